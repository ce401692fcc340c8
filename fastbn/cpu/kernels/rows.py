"""Kernels on (N, C, S) arrays, S contiguous: statistics, normalize, and the forward that reads x from memory once.

A channel's slab, N rows of S values, is walked in blocks: `rows` rows, or one of `splits` pieces of a long row. Blocks
are numbered 0 .. blocks, a part is a run of them. One pass over a block is enough: its values are shifted by the mean
of the blocks before; only the first block of a part, which fits the first-level cache, is read twice for that.
Statistics alone take a group of channels together, block by block: rows of one channel lie far apart, and memory gives
them at half its speed (102 MB in rows of 12 KB: 2.8 -> 1.5 ms). `tasks` is how many tasks share the work, each with a
row of the workspace; which task does what changes nothing in the result.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu.kernels import welford
from fastbn.cpu.kernels.beyond import affine_columns
from fastbn.cpu.kernels.elementwise import affine_row, affine_stream, channel_rstd, fill_affine, one_stream, put_affine
from fastbn.cpu.kernels.jit import SHARED, kernel, leaf, prange, routine
from fastbn.cpu.kernels.simd import (
    broadcast,
    element,
    fence,
    lanes,
    load,
    load_some,
    load_wide,
    muladd,
    scalar,
    total,
    wide,
)

ROWS = SHARED | {
    "x": "x3 (N, C, S), S contiguous",
    "dy": "x3 like x",
    "y": "y3 like x",
    "dx": "y3 like x",
    "rows": "i of a block, where a block is whole rows",
    "splits": "i blocks of a row, where a row is several",
    "blocks": "i of a channel",
    "parts": "i runs of blocks, of a channel",
    "pieces": "i of a row, each a unit of work",
    "group": "i channels taken together",
    "prefetch_distance": "i channels further, fetched meanwhile; 0: none",
}

merge = leaf(welford.merge)
finish_block = leaf(welford.block)

# Sums of squares outside these limits lose more than they keep in float32: 1e37 is near overflow, and where the sum is
# below 1e-24 single squares fall to subnormal numbers.
HIGH, LOW = 1e37, 1e-24
# Vectors that four accumulators take before they are added up. One chain of 64 squares lost 1.4e-6 of a variance to an
# outlier of 1e6: each small square rounded the same way against the large one.
SEGMENT = 32


@leaf
def ends(x, piece, pieces):
    """Columns of a piece of a row, which begins on a whole vector."""
    S, W = x.shape[2], lanes(x)
    if pieces == 1:
        return 0, S
    vectors = (S + W - 1) // W
    return vectors * piece // pieces * W, min(S, vectors * (piece + 1) // pieces * W)


@leaf
def bounds(x, k, rows, splits):
    """Block k of a channel: rows n0 .. n1, columns s0 .. s1."""
    if splits == 1:
        return k * rows, min(x.shape[0], (k + 1) * rows), 0, x.shape[2]
    s0, s1 = ends(x, k % splits, splits)
    return k // splits, k // splits + 1, s0, s1


@leaf
def block_sum(x, c, n0, n1, s0, s1):
    """Sum of a block, in the arithmetic of x."""
    W = lanes(x)
    zero = broadcast(x, 0.0)
    a, b, d, e = zero, zero, zero, zero
    for n in range(n0, n1):
        i = s0
        while i + 4 * W <= s1:
            a = a + load(x, (n, c, i))
            b = b + load(x, (n, c, i + W))
            d = d + load(x, (n, c, i + 2 * W))
            e = e + load(x, (n, c, i + 3 * W))
            i += 4 * W
        while i + W <= s1:
            d = d + load(x, (n, c, i))
            i += W
        if i < s1:
            e = e + load_some(x, (n, c, i), s1 - i, zero)
    return total((a + b) + (d + e))


@leaf
def group_rows(x, s0, s1):
    """Rows that share accumulators before these are added up: a lane takes at most 8 to 16 values in a row."""
    return max(1, min(8, SEGMENT * lanes(x) // (s1 - s0)))


@leaf
def block_deviations(x, c, n0, n1, s0, s1, shift):
    """(sum, sum of squares) of x - shift over a block, in the arithmetic of x."""
    W = lanes(x)
    k = broadcast(x, shift)
    zero = broadcast(x, 0.0)
    t, q = zero, zero
    group = group_rows(x, s0, s1)
    for m in range(n0, n1, group):
        for s in range(s0, s1, SEGMENT * W):
            stop = min(s1, s + SEGMENT * W)
            t0, t1, t2, t3 = zero, zero, zero, zero
            q0, q1, q2, q3 = zero, zero, zero, zero
            for n in range(m, min(n1, m + group)):
                i = s
                while i + 4 * W <= stop:
                    d = load(x, (n, c, i)) - k
                    t0, q0 = t0 + d, muladd(d, d, q0)
                    d = load(x, (n, c, i + W)) - k
                    t1, q1 = t1 + d, muladd(d, d, q1)
                    d = load(x, (n, c, i + 2 * W)) - k
                    t2, q2 = t2 + d, muladd(d, d, q2)
                    d = load(x, (n, c, i + 3 * W)) - k
                    t3, q3 = t3 + d, muladd(d, d, q3)
                    i += 4 * W
                if i + 2 * W <= stop:
                    d = load(x, (n, c, i)) - k
                    t0, q0 = t0 + d, muladd(d, d, q0)
                    d = load(x, (n, c, i + W)) - k
                    t1, q1 = t1 + d, muladd(d, d, q1)
                    i += 2 * W
                if i + W <= stop:
                    d = load(x, (n, c, i)) - k
                    t2, q2 = t2 + d, muladd(d, d, q2)
                    i += W
                if i < stop:
                    d = load_some(x, (n, c, i), stop - i, k) - k
                    t3, q3 = t3 + d, muladd(d, d, q3)
            t, q = t + ((t0 + t1) + (t2 + t3)), q + ((q0 + q1) + (q2 + q3))
    return total(t), total(q)


@routine
def wide_deviations(x, c, n0, n1, s0, s1, shift):
    """(sum, sum of squares) of x - shift over a block, in float64."""
    t, q = wide(0.0), wide(0.0)
    k = wide(shift)
    last_t, last_q = 0.0, 0.0
    for n in range(n0, n1):
        i = s0
        while i + 8 <= s1:
            d = load_wide(x, (n, c, i), 8) - k
            t, q = t + d, muladd(d, d, q)
            i += 8
        while i < s1:
            e = element(x, (n, c, i)) - shift
            last_t += e
            last_q += e * e
            i += 1
    return total(t) + last_t, total(q) + last_q


@leaf
def coarse(x, mean, std):
    """The mean in the arithmetic of x, on a grid of 1/32 to 1/64 of std: what values are shifted by."""
    # Of few digits more than std's: deviations of data that have few themselves, and their squares, then add up
    # exactly. About a shift of 24 digits each of these sums is rounded, equal ones all the same way: 5e-8 std of a
    # mean, 3e-6 of a variance.
    shift = scalar(x, mean)
    if std < 1e30:  # beyond, nothing is gained that is not lost by overflow
        step = scalar(x, std * (2.0**14 if lanes(x) == 16 else 2.0**43))
        shift = (shift + step) - step
    return shift


@leaf
def distance(x, index, mean):
    """|x[index] - mean|, in float64."""
    return abs(element(x, index) - mean)


@leaf
def block_shift(x, c, n0, n1, s0, s1, mean, m2, before):
    """What a block's values are shifted by: the mean of `before` values before it, or its own where it is the first."""
    if before > 0.0:
        return coarse(x, mean, np.sqrt(m2 / before))
    mean = block_sum(x, c, n0, n1, s0, s1) / float((n1 - n0) * (s1 - s0))
    ends = distance(x, (n0, c, s0), mean) + distance(x, (n1 - 1, c, s1 - 1), mean)
    return coarse(
        x, mean, ends + distance(x, (n0, c, s1 - 1), mean) + distance(x, ((n0 + n1) // 2, c, (s0 + s1) // 2), mean)
    )


@leaf
def block_moments(x, c, n0, n1, s0, s1, mean, m2, before):
    """(count, mean, m2) of a block, in deviations from `block_shift`."""
    count = float((n1 - n0) * (s1 - s0))
    shift = block_shift(x, c, n0, n1, s0, s1, mean, m2, before)
    deviations, squares = block_deviations(x, c, n0, n1, s0, s1, shift)
    k, t, q = np.float64(shift), np.float64(deviations), np.float64(squares)
    if lanes(x) == 16 and not (LOW < q < HIGH):
        k = wide_deviations(x, c, n0, n1, s0, s1, 0.0)[0] / count
        t, q = wide_deviations(x, c, n0, n1, s0, s1, k)
    block_mean, m2 = finish_block(count, k, t, q)
    return count, block_mean, m2


@routine
def part_moments(x, c0, c1, first, last, rows, splits, mean, m2):
    """mean, m2 of blocks first .. last of channels c0 .. c1, block by block in the order of memory; values of each."""
    count, more = 0.0, 0.0
    for k in range(first, last):
        n0, n1, s0, s1 = bounds(x, k, rows, splits)
        for c in range(c0, c1):
            more, block_mean, block_m2 = block_moments(x, c, n0, n1, s0, s1, mean[c], m2[c], count)
            if k > first:
                _, block_mean, block_m2 = merge(count, mean[c], m2[c], more, block_mean, block_m2)
            mean[c], m2[c] = block_mean, block_m2
        count += more
    return count


@kernel(ROWS, partial="s3 (parts, 3, C): mean, m2 and count of each part")
def moments(x, rows, splits, blocks, parts, group, tasks, partial, stats):
    """Mean and m2 of each channel."""
    C = x.shape[1]
    units = (C + group - 1) // group * parts
    for task in prange(tasks):
        for unit in range(units * task // tasks, units * (task + 1) // tasks):
            c0, p = unit // parts * group, unit % parts
            c1 = min(C, c0 + group)
            count = part_moments(
                x, c0, c1, blocks * p // parts, blocks * (p + 1) // parts, rows, splits, partial[p, 0], partial[p, 1]
            )
            partial[p, 2, c0:c1] = count
    for c in range(C):
        mean_c, m2_c, count = partial[0, 0, c], partial[0, 1, c], partial[0, 2, c]
        for p in range(1, parts):
            count, mean_c, m2_c = merge(count, mean_c, m2_c, partial[p, 2, c], partial[p, 0, c], partial[p, 1, c])
        stats[0, c], stats[1, c] = mean_c, m2_c


@leaf
def units_of(x, task, tasks, pieces):
    """One task's of N * C * pieces units in the order of memory: how many; the first one's row, channel and piece."""
    N, C = x.shape[0], x.shape[1]
    first, last = N * C * pieces * task // tasks, N * C * pieces * (task + 1) // tasks
    return last - first, first // pieces // C, first // pieces % C, first % pieces


@leaf
def onward(x, n, c, piece, pieces):
    """The next unit; without divisions, which take longer than a row of 64 bytes."""
    piece += 1
    if piece == pieces:
        piece, c = 0, c + 1
    if c == x.shape[1]:
        n, c = n + 1, 0
    return n, c, piece


@leaf
def affine_units(x, task, tasks, pieces, k, stream, y):
    """One task's part of y, in the order of memory; k the coefficients of all channels, which fit."""
    more, n, c, piece = units_of(x, task, tasks, pieces)
    if stream and pieces == 1 and one_stream(x, y):
        row = n * x.shape[1] + c
        affine_stream(x, row, row + more, k, c, 0, y)
        more = 0
    for _ in range(more):
        s0, s1 = ends(x, piece, pieces)
        affine_row(x, n, c, s0, s1, k, c, 0, stream, y)
        n, c, piece = onward(x, n, c, piece, pieces)


@routine
def affine_channel(x, c, mean, m2_or_rstd, count, eps, gamma, beta, k, i, y):
    """y of channel c by column i of k where another's coefficients do not fit, in float64 where its own do not."""
    rstd = channel_rstd(m2_or_rstd, c, 1, count, eps)
    if put_affine(x, load_wide(mean, (c,), 1), rstd, gamma, beta, c, 1, k, i):
        for n in range(x.shape[0] - 1, -1, -1):
            affine_row(x, n, c, 0, x.shape[2], k, i, 0, False, y)
    else:
        affine_columns(x[:, c], 0, x.shape[0], 0, x.shape[2], c, mean, m2_or_rstd, count, eps, gamma, beta, y[:, c])


@leaf
def affine_task(x, task, tasks, pieces, fit, mean, rstd, gamma, beta, k, stream, y):
    """One task's part of y: in the order of memory where the coefficients k of all channels fit, else by channels."""
    if fit:
        affine_units(x, task, tasks, pieces, k, stream, y)
        if stream:
            fence()
    else:
        for c in range(x.shape[1] * task // tasks, x.shape[1] * (task + 1) // tasks):
            affine_channel(x, c, mean, rstd, 0.0, 0.0, gamma, beta, k, c, y)


@kernel(ROWS, work="w2 (3, C rounded up to 8)")
def normalize(x, mean, rstd, gamma, beta, pieces, tasks, stream, work, y):
    """y = gamma * (x - mean) * rstd + beta, in the order of memory."""
    fit = fill_affine(x, mean, rstd, 0.0, 0.0, gamma, beta, 0, x.shape[1], work)
    for task in prange(tasks):
        affine_task(x, task, tasks, pieces, fit, mean, rstd, gamma, beta, work, stream, y)


@kernel(ROWS, work="w3 (tasks, 3, 8)")
def forward(x, gamma, beta, eps, rows, splits, blocks, group, tasks, prefetch_distance, stream, work, y, stats):
    """Moments and normalize, a group of up to 8 channels at a time, still in the cache."""
    # Coefficients are computed for 8 channels at once: forward of 1 x 256 x 24 x 26 takes 45 us instead of 63.
    N, C, S = x.shape
    mean, m2 = stats[0], stats[1]
    units, whole = (C + group - 1) // group, stream and one_stream(x, y)
    for task in prange(tasks):
        k = work[task]
        for unit in range(units * task // tasks, units * (task + 1) // tasks):
            c0 = unit * group
            c1 = min(C, c0 + group)
            count = part_moments(x, c0, c1, 0, blocks, rows, splits, mean, m2)
            if not fill_affine(x, mean, m2, count, eps, gamma, beta, c0, c1, k):
                for c in range(c0, c1):
                    affine_channel(x, c, mean, m2, count, eps, gamma, beta, k, c - c0, y)
                continue
            for n in range(N - 1, -1, -1):  # what was read last is the hottest
                if whole:
                    affine_stream(x, n * C + c0, n * C + c1, k, 0, prefetch_distance, y)
                else:
                    for c in range(c0, c1):
                        affine_row(x, n, c, 0, S, k, c - c0, prefetch_distance, stream, y)
        if stream:
            fence()
