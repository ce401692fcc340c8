"""Kernels on (N, C, S) arrays, S contiguous: statistics, and the forward that reads x from memory once.

A channel's slab, N rows of S values, is walked in blocks that fit the first-level cache: a block is `rows` rows, or one of `splits`
pieces of a long row. Blocks are numbered 0 .. blocks, a part is a run of them. A task is one part of one channel, or of a group of
channels side by side in memory.
"""

from __future__ import annotations

import numpy as np

from fastbn.kernels import welford
from fastbn.kernels._jit import kernel, leaf, prange
from fastbn.kernels._simd import fence, lanes, load, load_some, muladd, spread, total, wide_sums
from fastbn.kernels.elementwise import affine, affine_row, inverse_deviation

merge = leaf(welford.merge)
finish_block = leaf(welford.block)

# Sums of squares outside these limits lose more than they keep in float32: 1e37 is near overflow, and where the sum is below 1e-24
# single squares fall to subnormal numbers.
HIGH, LOW = 1e37, 1e-24
# Vectors that four accumulators take before they are added up. One chain of 64 squares lost 1.4e-6 of a variance to an outlier of 1e6:
# each small square rounded the same way against the large one.
SEGMENT = 32


@leaf
def bounds(x, k, rows, splits):
    """Block k of a channel: rows n0 .. n1, columns s0 .. s1. Pieces of a row begin on whole vectors."""
    N, S = x.shape[0], x.shape[2]
    if splits == 1:
        return k * rows, min(N, (k + 1) * rows), 0, S
    W = lanes(x)
    n, piece = k // splits, k % splits
    vectors = (S + W - 1) // W
    return n, n + 1, vectors * piece // splits * W, min(S, vectors * (piece + 1) // splits * W)


@leaf
def block_sum(x, c, n0, n1, s0, s1):
    """Sum of a block, in the dtype of x."""
    W = lanes(x)
    zero = spread(x, 0.0)
    a, b, d, e = zero, zero, zero, zero
    for n in range(n0, n1):
        i = s0
        while i + 4 * W <= s1:
            a = a + load(x, (n, c, i))
            b = b + load(x, (n, c, i + W))
            d = d + load(x, (n, c, i + 2 * W))
            e = e + load(x, (n, c, i + 3 * W))
            i += 4 * W
        if i + 2 * W <= s1:
            a = a + load(x, (n, c, i))
            b = b + load(x, (n, c, i + W))
            i += 2 * W
        if i + W <= s1:
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
    """(sum, sum of squares) of x - shift over a block, in the dtype of x."""
    W = lanes(x)
    k = spread(x, shift)
    zero = spread(x, 0.0)
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


@leaf
def wide_deviations(x, c, n0, n1, s0, s1, shift):
    """(sum, sum of squares) of x - shift over a block, in float64."""
    W = lanes(x)
    k = spread(x, shift)
    t, q = 0.0, 0.0
    for n in range(n0, n1):
        for i in range(s0, s1, W):
            d, e = wide_sums(load_some(x, (n, c, i), min(W, s1 - i), k), k)
            t += d
            q += e
    return t, q


@leaf
def block_moments(x, c, n0, n1, s0, s1):
    """(count, mean, m2) of a block: its mean, then the deviations from it, both from the first-level cache."""
    count = float((n1 - n0) * (s1 - s0))
    shift = x.dtype.type(block_sum(x, c, n0, n1, s0, s1) / count)
    t, q = block_deviations(x, c, n0, n1, s0, s1, shift)
    t, q = np.float64(t), np.float64(q)
    if lanes(x) == 16 and not (LOW < q < HIGH):
        shift = x.dtype.type(wide_deviations(x, c, n0, n1, s0, s1, x.dtype.type(0.0))[0] / count)
        t, q = wide_deviations(x, c, n0, n1, s0, s1, shift)
    mean, m2 = finish_block(count, np.float64(shift), t, q)
    return count, mean, m2


@leaf
def part_moments(x, c, first, last, rows, splits):
    """(count, mean, m2) of blocks first .. last of channel c."""
    count, mean, m2 = block_moments(x, c, *bounds(x, first, rows, splits))
    for k in range(first + 1, last):
        more, block_mean, block_m2 = block_moments(x, c, *bounds(x, k, rows, splits))
        count, mean, m2 = merge(count, mean, m2, more, block_mean, block_m2)
    return count, mean, m2


@kernel("x3 i i i i s3 s1 s1")
def moments(x, rows, splits, blocks, parts, partial, mean, m2):
    """mean, m2 (C,) of x; `partial` is a workspace (C, parts, 3)."""
    C = x.shape[1]
    for task in prange(C * parts):
        c, p = task // parts, task % parts
        found = part_moments(x, c, blocks * p // parts, blocks * (p + 1) // parts, rows, splits)
        partial[c, p, 0], partial[c, p, 1], partial[c, p, 2] = found
    for c in range(C):
        count, mean_c, m2_c = partial[c, 0, 0], partial[c, 0, 1], partial[c, 0, 2]
        for p in range(1, parts):
            count, mean_c, m2_c = merge(count, mean_c, m2_c, partial[c, p, 0], partial[c, p, 1], partial[c, p, 2])
        mean[c], m2[c] = mean_c, m2_c


@leaf
def affine_group(x, c0, c1, first, last, rows, splits, k, stream, y):
    """y on blocks first .. last of channels c0 .. c1, last row first; rows 0 .. 2 of k: high, scale, shift.

    Row by row over all channels of the group, so that short rows are written as one long run.
    """
    for block in range(last - 1, first - 1, -1):
        n0, n1, s0, s1 = bounds(x, block, rows, splits)
        for n in range(n1 - 1, n0 - 1, -1):
            for c in range(c0, c1):
                affine_row(x, n, c, s0, s1, k, stream, y)
    if stream:
        fence()


@kernel("x3 m1 m1 x1 x1 i i i i i b w3 y3")
def normalize(x, mean, rstd, gamma, beta, rows, splits, blocks, parts, groups, stream, work, y):
    """y = gamma * (x - mean) * rstd + beta; gamma, beta may be empty; `work` (parts, 3, C)."""
    C = x.shape[1]
    for task in prange(groups * parts):
        g, p = task // parts, task % parts
        c0, c1 = C * g // groups, C * (g + 1) // groups
        for c in range(c0, c1):
            work[p, 0, c], work[p, 1, c], work[p, 2, c] = affine(x, mean[c], rstd[c], gamma, beta, c)
        affine_group(x, c0, c1, blocks * p // parts, blocks * (p + 1) // parts, rows, splits, work[p], stream, y)


@kernel("x3 x1 x1 f i i i i b w2 y3 s1 s1")
def forward(x, gamma, beta, eps, rows, splits, blocks, groups, stream, work, y, mean, m2):
    """Moments and normalize, a group of channels at a time: its slab is still in the cache when it is normalized; `work` (3, C)."""
    C, count = x.shape[1], float(x.shape[0] * x.shape[2])
    for g in prange(groups):
        c0, c1 = C * g // groups, C * (g + 1) // groups
        for c in range(c0, c1):
            _, mean_c, m2_c = part_moments(x, c, 0, blocks, rows, splits)
            mean[c], m2[c] = mean_c, m2_c
            work[0, c], work[1, c], work[2, c] = affine(x, mean_c, inverse_deviation(m2_c, count, eps), gamma, beta, c)
        affine_group(x, c0, c1, 0, blocks, rows, splits, work, stream, y)
