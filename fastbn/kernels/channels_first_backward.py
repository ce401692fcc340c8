"""Backward kernels on (N, C, S) arrays, S contiguous; blocks, parts and tasks as in `channels_first`."""

from __future__ import annotations

import numpy as np

from fastbn.kernels._jit import kernel, leaf, prange
from fastbn.kernels._simd import fence, lanes, load, load_some, muladd, spread, total
from fastbn.kernels.channels_first import SEGMENT, affine_group, bounds, group_rows
from fastbn.kernels.elementwise import constant_scale, gradient, gradient_row, standardize


@leaf
def block_sums(dy, x, c, n0, n1, s0, s1, high, rstd, offset):
    """(sum of dy, sum of dy * xhat) over a block, in the dtype of x."""
    W = lanes(x)
    h, r, o = spread(x, high), spread(x, rstd), spread(x, offset)
    zero = spread(x, 0.0)
    t, q = zero, zero
    group = group_rows(x, s0, s1)
    for m in range(n0, n1, group):
        for s in range(s0, s1, SEGMENT * W):
            stop = min(s1, s + SEGMENT * W)
            t0, t1, q0, q1 = zero, zero, zero, zero
            for n in range(m, min(n1, m + group)):
                i = s
                while i + 2 * W <= stop:
                    g = load(dy, (n, c, i))
                    t0, q0 = t0 + g, muladd(g, muladd(load(x, (n, c, i)) - h, r, o), q0)
                    g = load(dy, (n, c, i + W))
                    t1, q1 = t1 + g, muladd(g, muladd(load(x, (n, c, i + W)) - h, r, o), q1)
                    i += 2 * W
                if i + W <= stop:
                    g = load(dy, (n, c, i))
                    t0, q0 = t0 + g, muladd(g, muladd(load(x, (n, c, i)) - h, r, o), q0)
                    i += W
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
def fill_coefficients(x, c, mean, rstd, gamma, sum_dy, sum_dy_xhat, count, training, k):
    """Column c of k: the coefficients of `gradient_row`, or of `affine_row` on dy where the statistics are constants."""
    if training:
        k[0, c], k[1, c], k[2, c], k[3, c], k[4, c] = gradient(x, mean, rstd, gamma, c, sum_dy, sum_dy_xhat, count)
    else:
        k[0, c], k[1, c], k[2, c] = x.dtype.type(0.0), constant_scale(x, rstd, gamma, c), x.dtype.type(0.0)


@leaf
def gradient_group(dy, x, c0, c1, first, last, rows, splits, k, training, stream, dx):
    """dx on blocks first .. last of channels c0 .. c1, last row first, row by row over all channels of the group."""
    if training:
        for block in range(last - 1, first - 1, -1):
            n0, n1, s0, s1 = bounds(x, block, rows, splits)
            for n in range(n1 - 1, n0 - 1, -1):
                for c in range(c0, c1):
                    gradient_row(dy, x, n, c, s0, s1, k, stream, dx)
        if stream:
            fence()
    else:
        affine_group(dy, c0, c1, first, last, rows, splits, k, stream, dx)


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


@kernel("x3 x3 m1 m1 x1 m2 f b i i i i i b w3 y3")
def grad_input(dy, x, mean, rstd, gamma, sums, count, training, rows, splits, blocks, parts, groups, stream, work, dx):
    """dx from the sums; `training` False for constant statistics; `work` (parts, 5, C)."""
    C = x.shape[1]
    for task in prange(groups * parts):
        g, p = task // parts, task % parts
        c0, c1 = C * g // groups, C * (g + 1) // groups
        for c in range(c0, c1):
            fill_coefficients(x, c, mean[c], rstd[c], gamma, sums[0, c], sums[1, c], count, training, work[p])
        first, last = blocks * p // parts, blocks * (p + 1) // parts
        gradient_group(dy, x, c0, c1, first, last, rows, splits, work[p], training, stream, dx)


@kernel("x3 x3 m1 m1 x1 b i i i i b w2 y3 s2")
def backward(dy, x, mean, rstd, gamma, training, rows, splits, blocks, groups, stream, work, dx, sums):
    """grad_reduce and grad_input, a group of channels at a time: its slabs are still in the cache for the second pass; `work` (5, C)."""
    C, count = x.shape[1], float(x.shape[0] * x.shape[2])
    for g in prange(groups):
        c0, c1 = C * g // groups, C * (g + 1) // groups
        for c in range(c0, c1):
            t, q = part_sums(dy, x, c, 0, blocks, rows, splits, mean[c], rstd[c])
            sums[0, c], sums[1, c] = t, q
            fill_coefficients(x, c, mean[c], rstd[c], gamma, t, q, count, training, work)
        gradient_group(dy, x, c0, c1, 0, blocks, rows, splits, work, training, stream, dx)
