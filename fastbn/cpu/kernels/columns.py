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

from fastbn.cpu.kernels.blocks import WORK
from fastbn.cpu.kernels.column_sums import along_sums, tile_sums
from fastbn.cpu.kernels.jit import kernel, leaf, prange, routine
from fastbn.cpu.kernels.memory import address
from fastbn.cpu.kernels.rows import HIGH, LOW, coarse, distance, finish_block, merge
from fastbn.cpu.kernels.simd import (
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
    spread,
    store,
    store_some,
    store_wide,
    total,
    wide,
    within,
)

BELOW = -1e-300  # just less than 0
TILE, ALONG_TILE = 128, 64  # rows


@leaf
def share(work, task, columns):
    """A task's part of the workspace, (WORK, columns).

    On a 64-byte boundary, or every vector would lie on two lines of the cache.
    """
    start = (-address(work, (0,)) & 63) // bytes_of(work) + task * WORK * columns
    return work[start : start + WORK * columns].reshape((WORK, columns))


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
    v, a = spread(k, scalar(k, value)), 0
    while a + lanes(k) <= S:
        store(k, (i + a,), v)
        a += lanes(k)
    if a < S:
        store_some(k, (i + a,), S - a, v)


@leaf
def few_mean(x, r0, r1, few, j, S):
    """Mean of `few` of the rows r0 .. r1 over columns j .. j + S, in the arithmetic of x."""
    W = lanes(x)
    t, zero = spread(x, 0.0), spread(x, 0.0)
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
    """k = about the mean of a few rows of each strip (see `coarse`), spread over the tile: no odd first rows decide."""
    W, few, zero = lanes(x), min(8 if S < 16 else 2, r1 - r0), spread(x, 0.0)
    if S > 1:
        middle = (r0 + r1) // 2
        for s in range(strips):
            i = j + s * S
            mean = np.float64(few_mean(x, r0, r1, few, i, S))
            near = (
                distance(x, (r0, i), mean)
                + distance(x, (r0, i + S - 1), mean)
                + distance(x, (middle, i + S // 2), mean)
            )
            fill(k, s * S, S, coarse(x, mean, near))
    else:
        step = spread(x, 2.0**14 if W == 16 else 2.0**43)
        for i in range(0, strips, W):
            lot, t, q = min(W, strips - i), zero, zero
            for f in range(few):
                t = t + load_some(x, (r0 + (r1 - r0) * f // few, j + i), lot, zero)
            t = t / spread(x, float(few))
            for f in range(few):
                d = load_some(x, (r0 + (r1 - r0) * f // few, j + i), lot, t) - t
                q = muladd(d, d, q)
            step_i = rough_root(q) * step
            store(k, (i,), (t + step_i) - step_i)


@leaf
def merge_columns(k, t, q, width, before, size, first, mean, m2):
    """Merge a tile of `size` rows into mean, m2, from `first` on, of `before` rows.

    In the first tile k may lie more than a standard deviation off, which costs digits: there it becomes about the mean,
    to take the sums again. Whether it did nowhere. A column's result does not depend on others'.
    """
    n, w, spacing = wide(size), wide(size / (before + size)), wide(before * (size / (before + size)))
    near = True
    for i in range(0, width, 8):
        lot = min(8, width - i)
        sums, shift = load_wide(t, (i,), lot), load_wide(k, (i,), lot)
        offset = sums / n
        tile_mean = shift + offset
        tile_m2 = not_negative(load_wide(q, (i,), lot) - offset * sums)
        if before > 0.0:
            old = load_wide(mean, (first + i,), lot)
            delta = tile_mean - old
            tile_mean = muladd(delta, w, old)
            tile_m2 = load_wide(m2, (first + i,), lot) + tile_m2 + delta * delta * spacing
        else:
            excess = tile_m2 - offset * sums
            if not within(excess, lot, BELOW, np.inf):
                near = False
                store_wide(k, (i,), lot, choose(excess, BELOW, np.inf, shift, coarse_wide(tile_mean, tile_m2 / n)))
        store_wide(mean, (first + i,), lot, tile_mean)
        store_wide(m2, (first + i,), lot, tile_m2)
    return near


@leaf
def merge_strips(k, t, q, strips, S, before, size, first, mean, m2):
    """The same for strips of S columns."""
    near, n = True, size * S
    for s in range(strips):
        i, c = s * S, first + s
        sums = run_total(t, i, S)
        tile_mean, tile_m2 = finish_block(n, element(k, (i,)), sums, run_total(q, i, S))
        if before > 0.0:
            _, tile_mean, tile_m2 = merge(before * S, mean[c], m2[c], n, tile_mean, tile_m2)
        elif not sums * sums / n <= tile_m2:
            near = False
            fill(k, i, S, coarse(k, tile_mean, np.sqrt(tile_m2 / n)))
        mean[c], m2[c] = tile_mean, tile_m2
    return near


@leaf
def coarse_wide(mean, var):
    """`coarse` of wide vectors, to be rounded to what x is computed in."""
    grid = rough_root(var) * wide(2.0**43)
    return (mean + grid) - grid


@leaf
def recentre(k, mean, m2, first, strips, S, rows):
    """k = about the means of so many rows."""
    if S == 1:
        share_of_one = wide(1.0 / rows)
        for i in range(0, strips, 8):
            lot = min(8, strips - i)
            store_wide(
                k,
                (i,),
                lot,
                coarse_wide(load_wide(mean, (first + i,), lot), load_wide(m2, (first + i,), lot) * share_of_one),
            )
    else:
        for s in range(strips):
            fill(k, s * S, S, coarse(k, mean[first + s], np.sqrt(m2[first + s] / (rows * S))))


@routine
def wide_columns(x, r0, r1, j, lot, first, mean, m2):
    """Again in float64, those of `lot` columns whose squares were too large or too small."""
    k = load_wide(x, (r0, j), lot)
    t, q = wide(0.0), wide(0.0)
    for r in range(r0, r1):
        d = load_wide(x, (r, j), lot) - k
        t, q = t + d, muladd(d, d, q)
    offset = t / wide(float(r1 - r0))
    kept = load_wide(m2, (first,), lot)
    store_wide(mean, (first,), lot, choose(kept, LOW, HIGH, load_wide(mean, (first,), lot), k + offset))
    store_wide(m2, (first,), lot, choose(kept, LOW, HIGH, kept, not_negative(q - offset * t)))


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
    """mean, m2 of strips first .. last over rows r0 .. r1, row by row if `along`.

    `work` (5, columns rounded up to whole vectors).
    """
    k, t, q, u, v = work[0], work[1], work[2], work[3], work[4]
    j, strips = first * S, last - first
    tile = ALONG_TILE if along else TILE
    centre(x, r0, min(r1, r0 + tile), j, strips, S, k)
    for row in range(r0, r1, tile):
        stop = min(r1, row + tile)
        before, size, near = float(row - r0), float(stop - row), False
        for _ in range(2):
            if near:
                break
            if along:
                along_sums(x, row, stop, j, strips * S, k, t, q, u, v)
            else:
                tile_sums(x, row, stop, j, strips * S, k, t, q, u, v)
            if S == 1:
                near = merge_columns(k, t, q, strips, before, size, first, mean, m2)
            else:
                near = merge_strips(k, t, q, strips, S, before, size, first, mean, m2)
        if stop < r1:
            recentre(k, mean, m2, first, strips, S, float(stop - r0))
    if lanes(x) == 16:
        for c in range(first, last, 8):
            lot = min(8, last - c)
            if not within(load_wide(m2, (c,), lot), lot, LOW, HIGH):
                if S == 1:
                    wide_columns(x, r0, r1, c, lot, c, mean, m2)
                else:
                    for s in range(c, c + lot):
                        if not (LOW < m2[s] < HIGH):
                            mean[s], m2[s] = wide_strip(x, r0, r1, s * S, S)


@leaf
def merge_into(mean, m2, i, before, other_mean, other_m2, j, more, lot):
    """Strips i .. i + lot, of `before` values each, take in strips j .. j + lot of `more` values each."""
    weight = more / (before + more)
    old = load_wide(mean, (i,), lot)
    delta = load_wide(other_mean, (j,), lot) - old
    store_wide(mean, (i,), lot, muladd(delta, wide(weight), old))
    sums = load_wide(m2, (i,), lot) + load_wide(other_m2, (j,), lot)
    store_wide(m2, (i,), lot, sums + delta * delta * wide(before * weight))


@routine
def merge_parts(R, C, S, fold, rest, parts, partial, mean, m2):
    """mean, m2 (C,) from partial (parts + 1, 2, P): parts in order, then the folds pairwise, then the rest in order."""
    whole, squares = partial[0, 0], partial[0, 1]
    for p in range(1, parts):
        before = R * p // parts
        for i in range(0, fold * C, 8):
            more = R * (p + 1) // parts - before
            merge_into(
                whole,
                squares,
                i,
                float(before * S),
                partial[p, 0],
                partial[p, 1],
                i,
                float(more * S),
                min(8, fold * C - i),
            )
    count, folds = float(R * S), fold
    while folds > 1:
        folds //= 2
        for i in range(0, folds * C, 8):
            merge_into(whole, squares, i, count, whole, squares, folds * C + i, count, min(8, folds * C - i))
        count *= 2.0
    for f in range(rest):
        for c in range(0, C, 8):
            merge_into(
                whole, squares, c, count, partial[parts, 0], partial[parts, 1], f * C + c, float(S), min(8, C - c)
            )
        count += S
    for c in range(C):
        mean[c], m2[c] = whole[c], squares[c]


@kernel("x2 x2 i i i i i i i i b w1 s3 s2")
def moments(x, rest_row, C, S, fold, rest, parts, block, tasks, columns, along, work, partial, stats):
    """stats (2, C): mean and m2; `block` strips in a unit, `rest` folds in rest_row; `along` as in `part_moments`.

    Workspaces: work (tasks * WORK * columns + 64), partial (parts + 1, 2, P).
    """
    R, P = x.shape[0], fold * C
    blocks = (P + block - 1) // block
    for task in prange(tasks):
        k = share(work, task, columns)
        for unit in range(parts * blocks * task // tasks, parts * blocks * (task + 1) // tasks):
            p, first = unit // blocks, unit % blocks * block
            last = min(P, first + block)
            part_moments(
                x, R * p // parts, R * (p + 1) // parts, first, last, S, along, k, partial[p, 0], partial[p, 1]
            )
    if rest > 0:
        part_moments(
            rest_row, 0, 1, 0, rest * C, S, False, share(work, 0, columns), partial[parts, 0], partial[parts, 1]
        )
    merge_parts(R, C, S, fold, rest, parts, partial, stats[0], stats[1])
