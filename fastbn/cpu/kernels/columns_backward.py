"""Backward kernels on (R, F) arrays, F contiguous; strips, folds, units and tasks as in `columns`."""

from __future__ import annotations

from fastbn.cpu.kernels.beyond import finite, gradient_columns, sum_columns
from fastbn.cpu.kernels.columns import COLUMNS, run_total, task_units, unit_of, workspace_of
from fastbn.cpu.kernels.columns_apply import affine_block, around, as_row, expand_columns, whole_rows
from fastbn.cpu.kernels.elementwise import (
    fill_gradient,
    fill_standardize,
    gradient,
    head,
    narrow,
    put_gradient,
    put_standardize,
)
from fastbn.cpu.kernels.jit import kernel, leaf, prange, routine
from fastbn.cpu.kernels.simd import (
    broadcast,
    fence,
    lanes,
    load,
    load_far,
    load_some,
    load_wide,
    muladd,
    prefetch,
    store,
    store_some,
    store_stream,
    store_wide,
)
from fastbn.cpu.kernels.welford import PANELS

ROWS = 64  # of a tile: as many values as a lane's float32 sum may take within 1e-6
T, Q = 10, 11  # rows of a workspace that sum dy and dy * xhat


@leaf
def panel(dy, x, r0, r1, j, i, k, e):
    """Rows T, Q of k for 4 vectors from column j, over rows r0 .. r1."""
    W = lanes(x)
    i1, i2, i3 = i + W, i + 2 * W, i + 3 * W
    h0, h1, h2, h3 = load(k, (e, i)), load(k, (e, i1)), load(k, (e, i2)), load(k, (e, i3))
    s0, s1, s2, s3 = load(k, (e + 1, i)), load(k, (e + 1, i1)), load(k, (e + 1, i2)), load(k, (e + 1, i3))
    o0, o1, o2, o3 = load(k, (e + 2, i)), load(k, (e + 2, i1)), load(k, (e + 2, i2)), load(k, (e + 2, i3))
    zero = broadcast(x, 0.0)
    t0, t1, t2, t3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    for r in range(r0, r1):
        g = load_far(dy, (r, j))
        t0, q0 = t0 + g, muladd(g, muladd(load_far(x, (r, j)) - h0, s0, o0), q0)
        g = load_far(dy, (r, j + W))
        t1, q1 = t1 + g, muladd(g, muladd(load_far(x, (r, j + W)) - h1, s1, o1), q1)
        g = load_far(dy, (r, j + 2 * W))
        t2, q2 = t2 + g, muladd(g, muladd(load_far(x, (r, j + 2 * W)) - h2, s2, o2), q2)
        g = load_far(dy, (r, j + 3 * W))
        t3, q3 = t3 + g, muladd(g, muladd(load_far(x, (r, j + 3 * W)) - h3, s3, o3), q3)
    store(k, (T, i), t0)
    store(k, (T, i1), t1)
    store(k, (T, i2), t2)
    store(k, (T, i3), t3)
    store(k, (Q, i), q0)
    store(k, (Q, i1), q1)
    store(k, (Q, i2), q2)
    store(k, (Q, i3), q3)


@leaf
def single(dy, x, r0, r1, j, i, count, k, e):
    """The same for one vector, of which `count` lanes are columns."""
    h, s, o = load(k, (e, i)), load(k, (e + 1, i)), load(k, (e + 2, i))
    zero = broadcast(x, 0.0)
    t0, t1, q0, q1 = zero, zero, zero, zero
    for r in range(r0, r1 - 1, 2):
        g = load_some(dy, (r, j), count, zero)
        t0, q0 = t0 + g, muladd(g, muladd(load_some(x, (r, j), count, h) - h, s, o), q0)
        g = load_some(dy, (r + 1, j), count, zero)
        t1, q1 = t1 + g, muladd(g, muladd(load_some(x, (r + 1, j), count, h) - h, s, o), q1)
    if (r1 - r0) % 2:
        g = load_some(dy, (r1 - 1, j), count, zero)
        t0, q0 = t0 + g, muladd(g, muladd(load_some(x, (r1 - 1, j), count, h) - h, s, o), q0)
    store(k, (T, i), t0 + t1)
    store(k, (Q, i), q0 + q1)


@leaf
def two_rows(dy, x, r, j, i, k, e):
    """Rows r and r + 1 of one vector, added to rows T, Q of k."""
    h, s, o = load(k, (e, i)), load(k, (e + 1, i)), load(k, (e + 2, i))
    a, b = load(dy, (r, j)), load(dy, (r + 1, j))
    q = muladd(b, muladd(load(x, (r + 1, j)) - h, s, o), a * muladd(load(x, (r, j)) - h, s, o))
    store(k, (T, i), load(k, (T, i)) + (a + b))
    store(k, (Q, i), load(k, (Q, i)) + q)


@routine
def tile_sums(dy, x, r0, r1, j, width, along, k, e):
    """Rows T, Q of k = sums of dy and of dy * xhat over rows r0 .. r1, for `width` columns from j.

    Narrow rows go panel by panel, sums in registers; wide ones two rows at a time; all of them row by row if `along`,
    as in `column_sums`.
    """
    W = lanes(x)
    i, zero = 0, broadcast(x, 0.0)
    if width <= PANELS and not along:
        while i + 4 * W <= width:
            panel(dy, x, r0, r1, j + i, i, k, e)
            i += 4 * W
    else:
        i = width // W * W
        for a in range(0, i, W):
            store(k, (T, a), zero)
            store(k, (Q, a), zero)
        r = r0
        while not along and r + 2 <= r1:
            for a in range(0, i, W):
                two_rows(dy, x, r, j + a, a, k, e)
            r += 2
        while r < r1:
            for a in range(0, i, W):
                g, h = load_far(dy, (r, j + a)), load(k, (e, a))
                xhat = muladd(load_far(x, (r, j + a)) - h, load(k, (e + 1, a)), load(k, (e + 2, a)))
                store(k, (T, a), load(k, (T, a)) + g)
                store(k, (Q, a), muladd(g, xhat, load(k, (Q, a))))
            r += 1
    while i < width:
        single(dy, x, r0, r1, j + i, i, min(W, width - i), k, e)
        i += W


@routine
def part_sums(dy, x, r0, r1, first, last, S, along, k, e, sums):
    """sums (2, P) of strips first .. last over rows r0 .. r1; coefficients of xhat in rows e .. e + 3 of k.

    Tiles added in float64.
    """
    strips = last - first
    for row in range(r0, r1, ROWS):
        tile_sums(dy, x, row, min(r1, row + ROWS), first * S, strips * S, along, k, e)
        for i in range(2):
            if S == 1:
                for c in range(0, strips, 8):
                    left = min(8, strips - c)
                    found = load_wide(k, (T + i, c), left)
                    store_wide(
                        sums, (i, first + c), left, found + load_wide(sums, (i, first + c), left) if row > r0 else found
                    )
            else:
                for c in range(strips):
                    found_c = run_total(k[T + i], c * S, S)
                    sums[i, first + c] = sums[i, first + c] + found_c if row > r0 else found_c


@leaf
def standardized_sums(dy, x, r0, r1, first, last, strips, C, S, fold, along, mean, rstd, k, sums):
    """The same of strips first .. strips from channels first .. last, in float64 where that is needed."""
    fit = fill_standardize(x, mean, rstd, first, last, k)
    e = expand_columns(k, 3, last - first, fold, S)
    part_sums(dy, x, r0, r1, first, strips, S, along, k, e, sums)
    strip_sums(dy, x, r0, r1, first, strips, C, S, fit, mean, rstd, k, sums)


@leaf
def gradient_at(dy, x, r, j, k, e, i, far):
    """One vector of dx; `far` is a constant wherever this is inlined."""
    g, d = (load_far(dy, (r, j)), load_far(x, (r, j))) if far else (load(dy, (r, j)), load(x, (r, j)))
    return gradient(
        g, d, load(k, (e, i)), load(k, (e + 1, i)), load(k, (e + 2, i)), load(k, (e + 3, i)), load(k, (e + 4, i))
    )


@leaf
def gradient_some(dy, x, r, j, k, e, i, count, dx):
    """The first `count` lanes of one vector."""
    h, m = load(k, (e, i)), load(k, (e + 3, i))
    g, d = load_some(dy, (r, j), count, m), load_some(x, (r, j), count, h)
    store_some(dx, (r, j), count, gradient(g, d, h, load(k, (e + 1, i)), load(k, (e + 2, i)), m, load(k, (e + 4, i))))


@routine
def gradient_block(dy, x, r0, r1, j, width, k, e, prefetch_distance, stream, dx):
    """dx = ((dy - mean_dy_hi) + ((x - mean_hi) * slope + offset)) * scale on rows r0 .. r1 of `width` columns from j.

    Coefficients in rows e .. e + 5 of k; `prefetch_distance` as in `affine_block`.
    """
    W = lanes(x)
    r = r0
    if (
        stream
        and whole_rows(dy, width)
        and whole_rows(x, width)
        and whole_rows(dx, width)
        and head(dx, (r0, 0), width) < W
    ):
        size = (r1 - r0) * width
        dz, z, out = as_row(dy, r0, size), as_row(x, r0, size), as_row(dx, r0, size)
        around(k, e, 5, width)
        n = head(out, (0, 0), width)
        i = n
        if n > 0:
            gradient_some(dz, z, 0, 0, k, e, 0, n, out)
        while n + W <= size:
            if prefetch_distance > 0:
                prefetch(z, (0, n + prefetch_distance))
                prefetch(dz, (0, n + prefetch_distance))
            store_stream(out, (0, n), gradient_at(dz, z, 0, n, k, e, i, False))
            n += W
            i = i + W if i + W < width else i + W - width
        if n < size:
            gradient_some(dz, z, 0, n, k, e, i, size - n, out)
        fence()
        r = r1
    elif stream:
        while r < r1:
            i = 0
            first = head(dx, (r, j), width)
            if 0 < first < W:
                gradient_some(dy, x, r, j, k, e, 0, first, dx)
                i = first
            if first < W:
                while i + W <= width:
                    if prefetch_distance > 0:
                        prefetch(x, (r, j + i + prefetch_distance))
                        prefetch(dy, (r, j + i + prefetch_distance))
                    store_stream(dx, (r, j + i), gradient_at(dy, x, r, j + i, k, e, i, False))
                    i += W
            while i < width:
                gradient_some(dy, x, r, j + i, k, e, i, min(W, width - i), dx)
                i += W
            r += 1
        fence()
    while r < r1:
        i = 0
        while i < width:
            if i + W <= width:
                store(dx, (r, j + i), gradient_at(dy, x, r, j + i, k, e, i, True))
            else:
                gradient_some(dy, x, r, j + i, k, e, i, width - i, dx)
            i += W
        r += 1


@routine
def gradient_channels(dy, x, r0, r1, first, last, mean, rstd, gamma, sums, count, training, S, fold, k, dx):
    """dx of channels first .. last on rows r0 .. r1, `fold` times over, one by one: some coefficients do not fit."""
    for c in range(first, last):
        fit = put_gradient(x, mean, rstd, gamma, sums, count, training, c, 1, k, 0)
        e = expand_columns(k, 5 if training else 3, 1, 1, S)
        for j in range(c * S, min(x.shape[1], (first + (last - first) * fold) * S), (last - first) * S):
            if not fit:
                gradient_columns(dy, x, r0, r1, j, S, c, mean, rstd, gamma, sums, count, training, dx)
            elif training:
                gradient_block(dy, x, r0, r1, j, S, k, e, 0, False, dx)
            else:
                affine_block(dy, r0, r1, j, S, k, e, 0, False, dx)


@leaf
def strip_sums(dy, x, r0, r1, first, last, C, S, fit, mean, rstd, k, sums):
    """sums (2, P) of strips first .. last again in float64, where coefficients do not fit or a sum is not finite."""
    for s in range(first, last):
        own = fit or put_standardize(x, mean, rstd, s % C, 1, k, 0)
        if not (own and finite(x, sums[0, s]) and finite(x, sums[1, s])):
            sum_columns(dy, x, r0, r1, s, S, s % C, mean, rstd, own, sums)


@routine
def block_gradient(
    dy, x, r0, r1, first, last, mean, rstd, gamma, sums, count, training, S, fold, prefetch_distance, stream, k, dx
):
    """dx on rows r0 .. r1 of channels first .. last: coefficients, then `gradient_block`, or `affine_block` on dy."""
    if not fill_gradient(x, mean, rstd, gamma, sums, count, training, first, last, k):
        gradient_channels(dy, x, r0, r1, first, last, mean, rstd, gamma, sums, count, training, S, fold, k, dx)
        return
    e = expand_columns(k, 5 if training else 3, last - first, fold, S)
    width = min(x.shape[1] - first * S, (last - first) * fold * S)  # less in a row that is left over
    if training:
        gradient_block(dy, x, r0, r1, first * S, width, k, e, prefetch_distance, stream, dx)
    else:
        affine_block(dy, r0, r1, first * S, width, k, e, prefetch_distance, stream, dx)


@kernel(COLUMNS)
def grad_reduce(
    dy, rest_dy, x, rest_x, mean, rstd, S, fold, rest, parts, block, tasks, columns, along, work, partial, sums
):
    """Sums of dy and of dy * xhat of each channel."""
    R, C = x.shape[0], mean.size
    for task in prange(tasks):
        k = workspace_of(work, task, columns)
        for unit in task_units(task, tasks, parts, C, block):
            p, r0, r1, first, last = unit_of(unit, R, parts, C, block)
            strips = fold * C if fold > 1 else last
            standardized_sums(dy, x, r0, r1, first, last, strips, C, S, fold, along, mean, rstd, k, partial[p])
    if rest > 0:
        k = workspace_of(work, 0, columns)
        standardized_sums(rest_dy, rest_x, 0, 1, 0, C, rest * C, C, S, fold, False, mean, rstd, k, partial[parts])
    for i in range(2):
        for p in range(1, parts):
            for s in range(0, fold * C, 8):
                left = min(8, fold * C - s)
                store_wide(
                    partial, (0, i, s), left, load_wide(partial, (0, i, s), left) + load_wide(partial, (p, i, s), left)
                )
        for c in range(C):
            t = 0.0
            for s in range(c, fold * C, C):
                t += partial[0, i, s]
            for s in range(c, rest * C, C):
                t += partial[parts, i, s]
            sums[i, c] = t


@kernel(COLUMNS, sums="m2 (2, C): those of grad_reduce")
def grad_input(
    dy, rest_dy, x, rest_x, mean, rstd, gamma, sums, count, training, S, fold, rest, parts, block, tasks, columns,
    stream, work, dx, rest_dx
):  # fmt: skip
    """dx from the sums."""
    R, C = x.shape[0], mean.size
    for task in prange(tasks):
        k = workspace_of(work, task, columns)
        for unit in task_units(task, tasks, parts, C, block):
            _, r0, r1, first, last = unit_of(unit, R, parts, C, block)
            block_gradient(
                dy, x, r0, r1, first, last, mean, rstd, gamma, sums, count, training, S, fold, 0, stream, k, dx
            )
    if rest > 0:
        k = workspace_of(work, 0, columns)
        block_gradient(
            rest_dy, rest_x, 0, 1, 0, C, mean, rstd, gamma, sums, count, training, S, fold, 0, False, k, rest_dx
        )


@kernel(COLUMNS)
def backward(dy, x, mean, rstd, gamma, training, S, block, tasks, columns, stream, work, dx, sums, grads):
    """grad_reduce and grad_input, a block of channels at a time, still in the cache."""
    R, C, count = x.shape[0], mean.size, float(x.shape[0] * S)
    for task in prange(tasks):
        k = workspace_of(work, task, columns)
        for unit in task_units(task, tasks, 1, C, block):
            _, _, _, first, last = unit_of(unit, R, 1, C, block)
            standardized_sums(dy, x, 0, R, first, last, last, C, S, 1, False, mean, rstd, k, sums)
            narrow(sums, first, last, grads)
            block_gradient(
                dy, x, 0, R, first, last, mean, rstd, gamma, sums, count, training, S, 1, block * S, stream, k, dx
            )
