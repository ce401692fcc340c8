"""Kernels on (N, C, S) arrays, S contiguous: statistics, and the forward that reads x from memory once.

A channel's slab, N rows of S values, is walked in blocks that fit the first-level cache: a block is `rows` rows, or one of `splits`
pieces of a long row. Blocks are numbered 0 .. blocks, a part is a run of them, a task is one part of one channel.
"""

from __future__ import annotations

import numpy as np

from fastbn.kernels import welford
from fastbn.kernels._jit import kernel, leaf, prange
from fastbn.kernels._simd import fence, load, load_some, muladd, spread, total, wide_sums
from fastbn.kernels.elementwise import affine, affine_block, inverse_deviation

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
    lanes = 64 // x.itemsize
    n, piece = k // splits, k % splits
    vectors = (S + lanes - 1) // lanes
    return n, n + 1, vectors * piece // splits * lanes, min(S, vectors * (piece + 1) // splits * lanes)


@leaf
def block_sum(x, c, n0, n1, s0, s1):
    """Sum of a block, in the dtype of x."""
    lanes = 64 // x.itemsize
    zero = spread(x, 0.0)
    a, b, d, e = zero, zero, zero, zero
    for n in range(n0, n1):
        i = s0
        while i + 4 * lanes <= s1:
            a = a + load(x, (n, c, i))
            b = b + load(x, (n, c, i + lanes))
            d = d + load(x, (n, c, i + 2 * lanes))
            e = e + load(x, (n, c, i + 3 * lanes))
            i += 4 * lanes
        if i + 2 * lanes <= s1:
            a = a + load(x, (n, c, i))
            b = b + load(x, (n, c, i + lanes))
            i += 2 * lanes
        if i + lanes <= s1:
            d = d + load(x, (n, c, i))
            i += lanes
        if i < s1:
            e = e + load_some(x, (n, c, i), s1 - i, zero)
    return total((a + b) + (d + e))


@leaf
def group_rows(x, s0, s1):
    """Rows that share accumulators before these are added up: a lane takes at most 8 to 16 values in a row."""
    return max(1, min(8, SEGMENT * (64 // x.itemsize) // (s1 - s0)))


@leaf
def block_deviations(x, c, n0, n1, s0, s1, shift):
    """(sum, sum of squares) of x - shift over a block, in the dtype of x."""
    lanes = 64 // x.itemsize
    k = spread(x, shift)
    zero = spread(x, 0.0)
    t, q = zero, zero
    group = group_rows(x, s0, s1)
    for m in range(n0, n1, group):
        for s in range(s0, s1, SEGMENT * lanes):
            stop = min(s1, s + SEGMENT * lanes)
            t0, t1, t2, t3 = zero, zero, zero, zero
            q0, q1, q2, q3 = zero, zero, zero, zero
            for n in range(m, min(n1, m + group)):
                i = s
                while i + 4 * lanes <= stop:
                    d = load(x, (n, c, i)) - k
                    t0, q0 = t0 + d, muladd(d, d, q0)
                    d = load(x, (n, c, i + lanes)) - k
                    t1, q1 = t1 + d, muladd(d, d, q1)
                    d = load(x, (n, c, i + 2 * lanes)) - k
                    t2, q2 = t2 + d, muladd(d, d, q2)
                    d = load(x, (n, c, i + 3 * lanes)) - k
                    t3, q3 = t3 + d, muladd(d, d, q3)
                    i += 4 * lanes
                if i + 2 * lanes <= stop:
                    d = load(x, (n, c, i)) - k
                    t0, q0 = t0 + d, muladd(d, d, q0)
                    d = load(x, (n, c, i + lanes)) - k
                    t1, q1 = t1 + d, muladd(d, d, q1)
                    i += 2 * lanes
                if i + lanes <= stop:
                    d = load(x, (n, c, i)) - k
                    t2, q2 = t2 + d, muladd(d, d, q2)
                    i += lanes
                if i < stop:
                    d = load_some(x, (n, c, i), stop - i, k) - k
                    t3, q3 = t3 + d, muladd(d, d, q3)
            t, q = t + ((t0 + t1) + (t2 + t3)), q + ((q0 + q1) + (q2 + q3))
    return total(t), total(q)


@leaf
def wide_deviations(x, c, n0, n1, s0, s1, shift):
    """(sum, sum of squares) of x - shift over a block, in float64."""
    lanes = 64 // x.itemsize
    k = spread(x, shift)
    t, q = 0.0, 0.0
    for n in range(n0, n1):
        for i in range(s0, s1, lanes):
            d, e = wide_sums(load_some(x, (n, c, i), min(lanes, s1 - i), k), k)
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
    if x.itemsize == 4 and not (LOW < q < HIGH):
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


@kernel("x3 m1 m1 x1 x1 i i i i b y3")
def normalize(x, mean, rstd, gamma, beta, rows, splits, blocks, parts, stream, y):
    """y = gamma * (x - mean) * rstd + beta; gamma, beta may be empty."""
    for task in prange(x.shape[1] * parts):
        c, p = task // parts, task % parts
        high, scale, shift = affine(x, mean[c], rstd[c], gamma, beta, c)
        for k in range(blocks * p // parts, blocks * (p + 1) // parts):
            n0, n1, s0, s1 = bounds(x, k, rows, splits)
            affine_block(x, c, n0, n1, s0, s1, high, scale, shift, stream, y)
        if stream:
            fence()


@kernel("x3 x1 x1 f i i i b y3 s1 s1")
def forward(x, gamma, beta, eps, rows, splits, blocks, stream, y, mean, m2):
    """Moments and normalize, a channel at a time: its slab is still in the cache when it is normalized, last block first."""
    count = float(x.shape[0] * x.shape[2])
    for c in prange(x.shape[1]):
        _, mean_c, m2_c = part_moments(x, c, 0, blocks, rows, splits)
        mean[c], m2[c] = mean_c, m2_c
        high, scale, shift = affine(x, mean_c, inverse_deviation(m2_c, count, eps), gamma, beta, c)
        for k in range(blocks - 1, -1, -1):
            n0, n1, s0, s1 = bounds(x, k, rows, splits)
            affine_block(x, c, n0, n1, s0, s1, high, scale, shift, stream, y)
        if stream:
            fence()
