"""Backward kernels on (N, C, S) arrays, S contiguous; blocks, parts and tasks as in `channels_first`."""

from __future__ import annotations

import numpy as np

from fastbn.kernels._jit import kernel, leaf, prange
from fastbn.kernels._simd import fence, load, load_some, muladd, spread, total
from fastbn.kernels.channels_first import SEGMENT, bounds, group_rows
from fastbn.kernels.elementwise import affine_block, gradient, gradient_block, standardize


@leaf
def block_sums(dy, x, c, n0, n1, s0, s1, high, rstd, offset):
    """(sum of dy, sum of dy * xhat) over a block, in the dtype of x."""
    lanes = 64 // x.itemsize
    h, r, o = spread(x, high), spread(x, rstd), spread(x, offset)
    zero = spread(x, 0.0)
    t, q = zero, zero
    group = group_rows(x, s0, s1)
    for m in range(n0, n1, group):
        for s in range(s0, s1, SEGMENT * lanes):
            stop = min(s1, s + SEGMENT * lanes)
            t0, t1, q0, q1 = zero, zero, zero, zero
            for n in range(m, min(n1, m + group)):
                i = s
                while i + 2 * lanes <= stop:
                    g = load(dy, (n, c, i))
                    t0, q0 = t0 + g, muladd(g, muladd(load(x, (n, c, i)) - h, r, o), q0)
                    g = load(dy, (n, c, i + lanes))
                    t1, q1 = t1 + g, muladd(g, muladd(load(x, (n, c, i + lanes)) - h, r, o), q1)
                    i += 2 * lanes
                if i + lanes <= stop:
                    g = load(dy, (n, c, i))
                    t0, q0 = t0 + g, muladd(g, muladd(load(x, (n, c, i)) - h, r, o), q0)
                    i += lanes
                if i < stop:
                    g = load_some(dy, (n, c, i), stop - i, zero)
                    t1, q1 = t1 + g, muladd(g, muladd(load_some(x, (n, c, i), stop - i, h) - h, r, o), q1)
            t, q = t + (t0 + t1), q + (q0 + q1)
    return total(t), total(q)


@leaf
def part_sums(dy, x, c, first, last, rows, splits, mean, rstd):
    """(sum of dy, sum of dy * xhat) over blocks first .. last of channel c, blocks added in float64."""
    high, scale, offset = standardize(x, mean, rstd)
    t, q = 0.0, 0.0
    for k in range(first, last):
        n0, n1, s0, s1 = bounds(x, k, rows, splits)
        block_t, block_q = block_sums(dy, x, c, n0, n1, s0, s1, high, scale, offset)
        t += np.float64(block_t)
        q += np.float64(block_q)
    return t, q


@leaf
def part_gradient(dy, x, c, first, last, rows, splits, mean, rstd, gamma, sum_dy, sum_dy_xhat, count, training, stream, dx):
    """dx on blocks first .. last of channel c, last block first."""
    if training:
        high, scale, offset = standardize(x, mean, rstd)
        mean_dy, slope, a, b = gradient(x, rstd, gamma, c, sum_dy, sum_dy_xhat, count)
        for k in range(last - 1, first - 1, -1):
            n0, n1, s0, s1 = bounds(x, k, rows, splits)
            gradient_block(dy, x, c, n0, n1, s0, s1, high, scale, offset, mean_dy, slope, a, b, stream, dx)
    else:
        zero, _, a, b = gradient(x, rstd, gamma, c, 0.0, 0.0, 1.0)
        for k in range(last - 1, first - 1, -1):
            n0, n1, s0, s1 = bounds(x, k, rows, splits)
            affine_block(dy, c, n0, n1, s0, s1, zero, a, b, stream, dx)
    if stream:
        fence()


@kernel("x3 x3 m1 m1 i i i i s3 s2")
def grad_reduce(dy, x, mean, rstd, rows, splits, blocks, parts, partial, sums):
    """sums (2, C): sum of dy, sum of dy * xhat; `partial` is a workspace (C, parts, 2)."""
    C = x.shape[1]
    for task in prange(C * parts):
        c, p = task // parts, task % parts
        first, last = blocks * p // parts, blocks * (p + 1) // parts
        partial[c, p, 0], partial[c, p, 1] = part_sums(dy, x, c, first, last, rows, splits, mean[c], rstd[c])
    for c in range(C):
        t, q = 0.0, 0.0
        for p in range(parts):
            t += partial[c, p, 0]
            q += partial[c, p, 1]
        sums[0, c], sums[1, c] = t, q


@kernel("x3 x3 m1 m1 x1 m2 f b i i i i b y3")
def grad_input(dy, x, mean, rstd, gamma, sums, count, training, rows, splits, blocks, parts, stream, dx):
    """dx from the sums; `training` False for constant statistics."""
    for task in prange(x.shape[1] * parts):
        c, p = task // parts, task % parts
        first, last = blocks * p // parts, blocks * (p + 1) // parts
        part_gradient(dy, x, c, first, last, rows, splits, mean[c], rstd[c], gamma, sums[0, c], sums[1, c], count, training, stream, dx)


@kernel("x3 x3 m1 m1 x1 b i i i b y3 s2")
def backward(dy, x, mean, rstd, gamma, training, rows, splits, blocks, stream, dx, sums):
    """grad_reduce and grad_input, a channel at a time: its slabs of dy and x are still in the cache for the second pass."""
    count = float(x.shape[0] * x.shape[2])
    for c in prange(x.shape[1]):
        t, q = part_sums(dy, x, c, 0, blocks, rows, splits, mean[c], rstd[c])
        sums[0, c], sums[1, c] = t, q
        part_gradient(dy, x, c, 0, blocks, rows, splits, mean[c], rstd[c], gamma, t, q, count, training, stream, dx)
