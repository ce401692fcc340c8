"""The elementwise passes on (R, F) arrays, F contiguous: y from x, dx from dy and x; and the forward that reads x once.

Strips, folds, units and tasks as in `columns`. Coefficients are repeated over the columns of a unit, in a workspace
that stays in the first-level cache, and applied to rows in the order of memory.
"""

from __future__ import annotations

from fastbn.cpu.kernels.beyond import affine_columns
from fastbn.cpu.kernels.columns import COLUMNS, part_moments, task_units, unit_of, workspace_of
from fastbn.cpu.kernels.elementwise import affine, channel_rstd, fill_affine, head, put_affine
from fastbn.cpu.kernels.jit import kernel, leaf, prange, routine
from fastbn.cpu.kernels.simd import (
    address,
    at,
    bytes_of,
    fence,
    lanes,
    load,
    load_broadcast,
    load_far,
    load_some,
    load_wide,
    prefetch,
    store,
    store_some,
    store_stream,
)
from fastbn.cpu.kernels.welford import FAR, LINEAR

EXPANDED = 5  # row of a workspace where the coefficients of columns begin; those of channels begin at 0


@leaf
def copy(k, row, i, j, size):
    """k[row + EXPANDED, j : j + size] = k[row, i : i + size]."""
    W = lanes(k)
    for a in range(0, size, W):
        v = load(k, (row, i + a))
        store_some(k, (row + EXPANDED, j + a), min(W, size - a), v)


@routine
def expand_columns(k, rows, channels, fold, S):
    """Coefficients of channels -> of columns, `fold` times over, S columns each; the row where they begin."""
    if fold == 1 and S == 1:
        return 0
    for row in range(rows):
        for f in range(fold):
            if S == 1:
                copy(k, row, 0, f * channels, channels)
            else:
                for c in range(channels):
                    v = load_broadcast(k, (row, c))
                    for a in range(0, S, lanes(k)):
                        store_some(k, (row + EXPANDED, (f * channels + c) * S + a), min(lanes(k), S - a), v)
    return EXPANDED


@leaf
def affine_at(x, r, j, k, e, i, y):
    """One vector."""
    store(y, (r, j), affine(load_far(x, (r, j)), load(k, (e, i)), load(k, (e + 1, i)), load(k, (e + 2, i))))


@leaf
def affine_some(x, r, j, k, e, i, count, y):
    """The first `count` lanes of one vector."""
    h = load(k, (e, i))
    store_some(y, (r, j), count, affine(load_some(x, (r, j), count, h), h, load(k, (e + 1, i)), load(k, (e + 2, i))))


@leaf
def gapless(x):
    """Whether the end of a row is the beginning of the next."""
    return x.strides[0] == x.shape[1] * bytes_of(x)


@leaf
def whole_rows(x, width):
    """Whether so many columns are all of rows without gaps, a vector at least."""
    return width == x.shape[1] and width >= lanes(x) and gapless(x)


@leaf
def as_row(x, r, size):
    """`size` elements from row r, without gaps, as one row."""
    return at(x, address(x, (r, 0)), (1, size))


@leaf
def around(k, e, rows, width):
    """The first columns again behind the last, for vectors on the end of a row and the beginning of the next."""
    for row in range(e, e + rows):
        store(k, (row, width), load(k, (row, 0)))


@routine
def affine_block(x, r0, r1, j, width, k, e, prefetch_distance, stream, y):
    """y = (x - mean_hi) * scale + shift on rows r0 .. r1 of `width` columns from j, with rows e .. e + 3 of k.

    What lies `prefetch_distance` columns further is fetched meanwhile, where y goes past the cache.
    """
    # A result that goes past the cache leaves room there for what is reduced next: forward of 32 x 512 x 28 x 28 takes
    # 1.8 ms instead of 2.2.
    W = lanes(x)
    r = r0
    if stream and whole_rows(x, width) and whole_rows(y, width) and head(y, (r0, 0), width) < W:
        size = (r1 - r0) * width
        z, out = as_row(x, r0, size), as_row(y, r0, size)
        around(k, e, 3, width)
        n = head(out, (0, 0), width)
        i = n
        if n > 0:
            affine_some(z, 0, 0, k, e, 0, n, out)
        while n + W <= size:
            if prefetch_distance > 0:
                prefetch(z, (0, n + prefetch_distance))
            h, a, b = load(k, (e, i)), load(k, (e + 1, i)), load(k, (e + 2, i))
            store_stream(out, (0, n), affine(load(z, (0, n)), h, a, b))
            n += W
            i = i + W if i + W < width else i + W - width
        if n < size:
            affine_some(z, 0, n, k, e, i, size - n, out)
        fence()
        r = r1
    elif stream:
        while r < r1:
            i = 0
            first = head(y, (r, j), width)
            if 0 < first < W:
                affine_some(x, r, j, k, e, 0, first, y)
                i = first
            if first < W:
                while i + W <= width:
                    h, a, b = load(k, (e, i)), load(k, (e + 1, i)), load(k, (e + 2, i))
                    if prefetch_distance > 0:
                        prefetch(x, (r, j + i + prefetch_distance))
                    store_stream(y, (r, j + i), affine(load(x, (r, j + i)), h, a, b))
                    i += W
            while i < width:
                affine_some(x, r, j + i, k, e, i, min(W, width - i), y)
                i += W
            r += 1
        fence()
    far = x.size * bytes_of(x) >= FAR
    if (far or width <= LINEAR) and width == x.shape[1] and width % W == 0 and gapless(x) and gapless(y):
        # One loop over all rows: where each row is a loop of its own, fewer lines are on their way at once (9 MB of 144
        # columns: 478 us, row by row 545, 4 rows at a time 735; a copy 389).
        i = n = 0
        while n < (r1 - r) * width:
            affine_at(x, r, n, k, e, i, y)
            n += W
            i += W
            if i == width:
                i = 0
        r = r1
    while r < r1:
        i = 0
        while i < width:
            if i + W <= width:
                affine_at(x, r, j + i, k, e, i, y)
            else:
                affine_some(x, r, j + i, k, e, i, width - i, y)
            i += W
        r += 1


@routine
def affine_channels(x, r0, r1, first, last, S, fold, mean, m2_or_rstd, count, eps, gamma, beta, k, y):
    """y of channels first .. last on rows r0 .. r1, `fold` times over, one by one: some coefficients do not fit."""
    for c in range(first, last):
        rstd = channel_rstd(m2_or_rstd, c, 1, count, eps)
        fit = put_affine(x, load_wide(mean, (c,), 1), rstd, gamma, beta, c, 1, k, 0)
        e = expand_columns(k, 3, 1, 1, S)
        for j in range(c * S, min(x.shape[1], (first + (last - first) * fold) * S), (last - first) * S):
            if fit:
                affine_block(x, r0, r1, j, S, k, e, 0, False, y)
            else:
                affine_columns(x, r0, r1, j, S, c, mean, m2_or_rstd, count, eps, gamma, beta, y)


@leaf
def affine_task_columns(x, mean, rstd, gamma, beta, S, fold, parts, block, task, tasks, columns, stream, work, y):
    """One task's rows and channels."""
    R, C = x.shape[0], mean.size
    k = workspace_of(work, task, columns)
    for unit in task_units(task, tasks, parts, C, block):
        _, r0, r1, first, last = unit_of(unit, R, parts, C, block)
        if not fill_affine(x, mean, rstd, 0.0, 0.0, gamma, beta, first, last, k):
            affine_channels(x, r0, r1, first, last, S, fold, mean, rstd, 0.0, 0.0, gamma, beta, k, y)
            continue
        e = expand_columns(k, 3, last - first, fold, S)
        affine_block(x, r0, r1, first * S, (last - first) * fold * S, k, e, 0, stream, y)


@leaf
def affine_rest(rest_x, mean, rstd, gamma, beta, S, fold, columns, work, rest_y):
    """The rows left over by a fold, as one."""
    C, k = mean.size, workspace_of(work, 0, columns)
    if fill_affine(rest_x, mean, rstd, 0.0, 0.0, gamma, beta, 0, C, k):
        e = expand_columns(k, 3, C, fold, S)
        affine_block(rest_x, 0, 1, 0, rest_x.shape[1], k, e, 0, False, rest_y)
    else:
        affine_channels(rest_x, 0, 1, 0, C, S, fold, mean, rstd, 0.0, 0.0, gamma, beta, k, rest_y)


@kernel(COLUMNS)
def normalize(x, rest_x, mean, rstd, gamma, beta, S, fold, rest, parts, block, tasks, columns, stream, work, y, rest_y):
    """y = gamma * (x - mean) * rstd + beta."""
    for task in prange(tasks):
        affine_task_columns(x, mean, rstd, gamma, beta, S, fold, parts, block, task, tasks, columns, stream, work, y)
    if rest > 0:
        affine_rest(rest_x, mean, rstd, gamma, beta, S, fold, columns, work, rest_y)


@kernel(COLUMNS)
def forward(x, gamma, beta, eps, S, block, tasks, columns, stream, work, y, stats):
    """Moments and normalize, a block of channels at a time, still in the cache."""
    R, C = x.shape[0], stats.shape[1]
    mean, m2, count = stats[0], stats[1], float(R * S)
    for task in prange(tasks):
        k = workspace_of(work, task, columns)
        for unit in task_units(task, tasks, 1, C, block):
            _, _, _, first, last = unit_of(unit, R, 1, C, block)
            part_moments(x, 0, R, first, last, S, False, k, mean, m2)
            if not fill_affine(x, mean, m2, count, eps, gamma, beta, first, last, k):
                affine_channels(x, 0, R, first, last, S, 1, mean, m2, count, eps, gamma, beta, k, y)
                continue
            e = expand_columns(k, 3, last - first, 1, S)
            affine_block(x, 0, R, first * S, (last - first) * S, k, e, block * S, stream, y)
