"""Kernels on (R, F) arrays, F contiguous: statistics. Channels last, and channels first with short rows.

Every column is summed by itself, over 4 rows at a time, into accumulators that stay in the first-level cache: long runs
of memory, all lanes busy, no chain of additions. Sums of a tile of rows are of deviations from the mean of the tiles
before, which makes one pass enough; tiles merge in float64.

S adjacent columns share a channel: 1 in a channels-last array; a channels-first array with rows too short to fill
vectors is one of C * S columns. Rows of few columns are folded: `fold` of them make one, whose parts of each channel
merge at the end, pairwise; the rows left over make one more, incomplete, row `rest`. Counted with their folds, channels
are `strips` here, P = fold * C of them.

A unit of work is one of `parts` runs of rows by a block of strips; `tasks` share the units, each with a workspace of
its own. Only parts and folds show in the result.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu.kernels.column_sums import along_sums, tile_sums
from fastbn.cpu.kernels.jit import SHARED, kernel, leaf, prange, routine
from fastbn.cpu.kernels.rows import HIGH, LOW, coarse, distance, finish_block, merge
from fastbn.cpu.kernels.simd import (
    address,
    broadcast,
    bytes_of,
    choose,
    element,
    lanes,
    load,
    load_some,
    load_wide,
    muladd,
    not_negative,
    rough_root,
    scalar,
    store,
    store_some,
    store_wide,
    total,
    wide,
    within,
)
from fastbn.cpu.kernels.welford import WORK

COLUMNS = SHARED | {
    "x": "x2 (R, F), F contiguous: rows folded",
    "rest_x": "x2 (1, F'): the rows left over by a fold",
    "dy": "x2 like x",
    "rest_dy": "x2 like rest_x",
    "y": "y2 like x",
    "rest_y": "y2 like rest_x",
    "dx": "y2 like x",
    "rest_dx": "y2 like rest_x",
    "C": "i channels",
    "S": "i columns of a channel",
    "fold": "i rows in one",
    "rest": "i rows in rest_x; 0: none, whatever rest_x is",
    "parts": "i runs of rows",
    "block": "i channels of a unit",
    "columns": "i of a task's workspace",
    "along": "b whether rows go one by one, along the memory",
    "work": "w1 (tasks * WORK * columns + 64,)",
    "partial": "s3 (parts + 1, 2, P): of each part, and of rest_x",
}
BELOW = -1e-300  # just less than 0
TILE, ALONG_TILE = 128, 64  # rows


@leaf
def workspace_of(work, task, columns):
    """A task's part of the workspace, (WORK, columns)."""
    # on a 64-byte boundary, or every vector would lie on two lines of the cache
    start = (-address(work, (0,)) & 63) // bytes_of(work) + task * WORK * columns
    return work[start : start + WORK * columns].reshape((WORK, columns))


@leaf
def unit_of(unit, R, parts, strips, block):
    """Part, rows r0 .. r1 and strips first .. last of a unit."""
    blocks = (strips + block - 1) // block
    p, first = unit // blocks, unit % blocks * block
    return p, R * p // parts, R * (p + 1) // parts, first, min(strips, first + block)


@leaf
def task_units(task, tasks, parts, strips, block):
    """The units of a task."""
    units = (strips + block - 1) // block * parts
    return range(units * task // tasks, units * (task + 1) // tasks)


@leaf
def run_total(t, i, S):
    """Sum of t[i : i + S] in float64."""
    found, a = wide(0.0), 0
    while a + 8 <= S:
        found = found + load_wide(t, (i + a,), 8)
        a += 8
    return total(found + load_wide(t, (i + a,), S - a)) if a < S else total(found)


@leaf
def fill(k, i, S, value):
    """k[i : i + S] = value."""
    v, a = broadcast(k, scalar(k, value)), 0
    while a + lanes(k) <= S:
        store(k, (i + a,), v)
        a += lanes(k)
    if a < S:
        store_some(k, (i + a,), S - a, v)


@leaf
def few_mean(x, r0, r1, few, j, S):
    """Mean of `few` of the rows r0 .. r1 over columns j .. j + S, in the arithmetic of x."""
    W = lanes(x)
    t, zero = broadcast(x, 0.0), broadcast(x, 0.0)
    for f in range(few):
        r, i = r0 + (r1 - r0) * f // few, j
        while i + W <= j + S:
            t = t + load(x, (r, i))
            i += W
        if i < j + S:
            t = t + load_some(x, (r, i), j + S - i, zero)
    return total(t) / scalar(x, few * S)


@leaf
def centre(x, r0, r1, j, strips, S, k):
    """k = about the mean of a few rows of each strip (see `coarse`), over the tile: no odd first rows decide."""
    W, few, zero = lanes(x), min(8 if S < 16 else 2, r1 - r0), broadcast(x, 0.0)
    if S > 1:
        middle = (r0 + r1) // 2
        for s in range(strips):
            i = j + s * S
            mean = np.float64(few_mean(x, r0, r1, few, i, S))
            ends = (
                distance(x, (r0, i), mean)
                + distance(x, (r0, i + S - 1), mean)
                + distance(x, (middle, i + S // 2), mean)
            )
            fill(k, s * S, S, coarse(x, mean, ends))
    else:
        step = broadcast(x, 2.0**14 if W == 16 else 2.0**43)
        for i in range(0, strips, W):
            left, t, q = min(W, strips - i), zero, zero
            for f in range(few):
                t = t + load_some(x, (r0 + (r1 - r0) * f // few, j + i), left, zero)
            t = t / broadcast(x, float(few))
            for f in range(few):
                d = load_some(x, (r0 + (r1 - r0) * f // few, j + i), left, t) - t
                q = muladd(d, d, q)
            step_i = rough_root(q) * step
            store(k, (i,), (t + step_i) - step_i)


@leaf
def merge_columns(k, t, q, width, before, size, first, mean, m2):
    """Merge a tile of `size` rows into mean, m2, from `first` on, of `before` rows.

    In the first tile k may lie more than a standard deviation off, which costs digits: there it becomes about the mean,
    to take the sums again. Whether it was well centred everywhere. A column's result does not depend on others'.
    """
    n, w, spacing = wide(size), wide(size / (before + size)), wide(before * (size / (before + size)))
    centred = True
    for i in range(0, width, 8):
        left = min(8, width - i)
        sums, shift = load_wide(t, (i,), left), load_wide(k, (i,), left)
        offset = sums / n
        tile_mean = shift + offset
        tile_m2 = not_negative(load_wide(q, (i,), left) - offset * sums)
        if before > 0.0:
            old = load_wide(mean, (first + i,), left)
            delta = tile_mean - old
            tile_mean = muladd(delta, w, old)
            tile_m2 = load_wide(m2, (first + i,), left) + tile_m2 + delta * delta * spacing
        else:
            excess = tile_m2 - offset * sums
            if not within(excess, left, BELOW, np.inf):
                centred = False
                store_wide(k, (i,), left, choose(excess, BELOW, np.inf, shift, coarse_wide(tile_mean, tile_m2 / n)))
        store_wide(mean, (first + i,), left, tile_mean)
        store_wide(m2, (first + i,), left, tile_m2)
    return centred


@leaf
def merge_strips(k, t, q, strips, S, before, size, first, mean, m2):
    """The same for strips of S columns."""
    centred, n = True, size * S
    for s in range(strips):
        i, c = s * S, first + s
        sums = run_total(t, i, S)
        tile_mean, tile_m2 = finish_block(n, element(k, (i,)), sums, run_total(q, i, S))
        if before > 0.0:
            _, tile_mean, tile_m2 = merge(before * S, mean[c], m2[c], n, tile_mean, tile_m2)
        elif not sums * sums / n <= tile_m2:
            centred = False
            fill(k, i, S, coarse(k, tile_mean, np.sqrt(tile_m2 / n)))
        mean[c], m2[c] = tile_mean, tile_m2
    return centred


@leaf
def coarse_wide(mean, var):
    """`coarse` of wide vectors, to be rounded to what x is computed in."""
    grid = rough_root(var) * wide(2.0**43)
    return (mean + grid) - grid


@leaf
def recentre(k, mean, m2, first, strips, S, rows):
    """k = about the means of so many rows."""
    if S == 1:
        per_row = wide(1.0 / rows)
        for i in range(0, strips, 8):
            left = min(8, strips - i)
            var = load_wide(m2, (first + i,), left) * per_row
            store_wide(k, (i,), left, coarse_wide(load_wide(mean, (first + i,), left), var))
    else:
        for s in range(strips):
            fill(k, s * S, S, coarse(k, mean[first + s], np.sqrt(m2[first + s] / (rows * S))))


@routine
def wide_columns(x, r0, r1, j, left, first, mean, m2):
    """Again in float64, those of `left` columns whose squares were too large or too small."""
    k = load_wide(x, (r0, j), left)
    t, q = wide(0.0), wide(0.0)
    for r in range(r0, r1):
        d = load_wide(x, (r, j), left) - k
        t, q = t + d, muladd(d, d, q)
    offset = t / wide(float(r1 - r0))
    kept = load_wide(m2, (first,), left)
    store_wide(mean, (first,), left, choose(kept, LOW, HIGH, load_wide(mean, (first,), left), k + offset))
    store_wide(m2, (first,), left, choose(kept, LOW, HIGH, kept, not_negative(q - offset * t)))


@routine
def wide_strip(x, r0, r1, j, S):
    """(mean, m2) of a strip in float64."""
    shift = element(x, (r0, j))
    k, t, q = wide(shift), wide(0.0), wide(0.0)
    spare_t, spare_q = 0.0, 0.0
    for r in range(r0, r1):
        i = j
        while i + 8 <= j + S:
            d = load_wide(x, (r, i), 8) - k
            t, q = t + d, muladd(d, d, q)
            i += 8
        while i < j + S:
            e = element(x, (r, i)) - shift
            spare_t += e
            spare_q += e * e
            i += 1
    return finish_block(float((r1 - r0) * S), shift, total(t) + spare_t, total(q) + spare_q)


@routine
def part_moments(x, r0, r1, first, last, S, along, work, mean, m2):
    """mean, m2 of strips first .. last over rows r0 .. r1, row by row if `along`; work (5, columns)."""
    k, t, q, u, v = work[0], work[1], work[2], work[3], work[4]
    j, strips = first * S, last - first
    tile = ALONG_TILE if along else TILE
    centre(x, r0, min(r1, r0 + tile), j, strips, S, k)
    for row in range(r0, r1, tile):
        stop = min(r1, row + tile)
        before, size, centred = float(row - r0), float(stop - row), False
        for _ in range(2):
            if centred:
                break
            if along:
                along_sums(x, row, stop, j, strips * S, k, t, q, u, v)
            else:
                tile_sums(x, row, stop, j, strips * S, k, t, q, u, v)
            if S == 1:
                centred = merge_columns(k, t, q, strips, before, size, first, mean, m2)
            else:
                centred = merge_strips(k, t, q, strips, S, before, size, first, mean, m2)
        if stop < r1:
            recentre(k, mean, m2, first, strips, S, float(stop - r0))
    if lanes(x) == 16:
        for c in range(first, last, 8):
            left = min(8, last - c)
            if not within(load_wide(m2, (c,), left), left, LOW, HIGH):
                if S == 1:
                    wide_columns(x, r0, r1, c, left, c, mean, m2)
                else:
                    for s in range(c, c + left):
                        if not (LOW < m2[s] < HIGH):
                            mean[s], m2[s] = wide_strip(x, r0, r1, s * S, S)


@leaf
def merge_into(mean, m2, i, before, other_mean, other_m2, j, more, left):
    """Strips i .. i + left, of `before` values each, take in strips j .. j + left of `more` values each."""
    weight = more / (before + more)
    old = load_wide(mean, (i,), left)
    delta = load_wide(other_mean, (j,), left) - old
    store_wide(mean, (i,), left, muladd(delta, wide(weight), old))
    sums = load_wide(m2, (i,), left) + load_wide(other_m2, (j,), left)
    store_wide(m2, (i,), left, sums + delta * delta * wide(before * weight))


@routine
def merge_parts(R, C, S, fold, rest, parts, partial, mean, m2):
    """mean, m2 (C,) from partial (parts + 1, 2, P): parts in order, then the folds pairwise, then the rest in order."""
    whole, squares = partial[0, 0], partial[0, 1]
    for p in range(1, parts):
        r0, r1 = R * p // parts, R * (p + 1) // parts
        before, more = float(r0 * S), float((r1 - r0) * S)
        for i in range(0, fold * C, 8):
            merge_into(whole, squares, i, before, partial[p, 0], partial[p, 1], i, more, min(8, fold * C - i))
    count, folds = float(R * S), fold
    while folds > 1:
        folds //= 2
        for i in range(0, folds * C, 8):
            merge_into(whole, squares, i, count, whole, squares, folds * C + i, count, min(8, folds * C - i))
        count *= 2.0
    more_mean, more_m2 = partial[parts, 0], partial[parts, 1]
    for f in range(rest):
        for c in range(0, C, 8):
            merge_into(whole, squares, c, count, more_mean, more_m2, f * C + c, float(S), min(8, C - c))
        count += S
    for c in range(C):
        mean[c], m2[c] = whole[c], squares[c]


@kernel(COLUMNS, block="i strips of a unit")
def moments(x, rest_x, C, S, fold, rest, parts, block, tasks, columns, along, work, partial, stats):
    """Mean and m2 of each channel."""
    R, P = x.shape[0], fold * C
    for task in prange(tasks):
        k = workspace_of(work, task, columns)
        for unit in task_units(task, tasks, parts, P, block):
            p, r0, r1, first, last = unit_of(unit, R, parts, P, block)
            part_moments(x, r0, r1, first, last, S, along, k, partial[p, 0], partial[p, 1])
    if rest > 0:
        part_moments(
            rest_x, 0, 1, 0, rest * C, S, False, workspace_of(work, 0, columns), partial[parts, 0], partial[parts, 1]
        )
    merge_parts(R, C, S, fold, rest, parts, partial, stats[0], stats[1])
