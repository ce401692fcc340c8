"""Backward kernels on (N, C, S) arrays, S contiguous; blocks, parts and tasks as in `channels_first`."""

from __future__ import annotations

import numpy as np

from fastbn.cpu.kernels.beyond import finite, gradient_rows, row, wide_sums
from fastbn.cpu.kernels.elementwise import (
    affine_row,
    affine_stream,
    fill_gradient,
    fill_standardize,
    gradient_row,
    gradient_stream,
    joined,
    narrow,
    one_stream,
    put_gradient,
    put_standardize,
)
from fastbn.cpu.kernels.jit import kernel, leaf, prange, routine
from fastbn.cpu.kernels.memory import fence
from fastbn.cpu.kernels.rows import SEGMENT, affine_units, bounds, ends, group_rows, onward, units_of
from fastbn.cpu.kernels.simd import broadcast, lanes, load, load_some, muladd, spread, total


@leaf
def block_sums(dy, x, c, n0, n1, s0, s1, k, e):
    """(sum of dy, sum of dy * xhat) over a block, in the arithmetic of x; column e of k: high, scale, shift of xhat."""
    W = lanes(x)
    h, r, o = broadcast(k, (0, e)), broadcast(k, (1, e)), broadcast(k, (2, e))
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


@routine
def channel_sums(dy, x, c, first, last, rows, splits, mean, rstd, fit, sums):
    """sums of channel c in float64, over the same blocks; those that are finite stay if `fit`."""
    t, q = 0.0, 0.0
    for block in range(first, last):
        n0, n1, s0, s1 = bounds(x, block, rows, splits)
        for n in range(n0, n1):
            more_t, more_q = wide_sums(row(dy, (n, c, s0), s1 - s0), row(x, (n, c, s0), s1 - s0), mean[c], rstd[c])
            t, q = t + more_t, q + more_q
    if not (fit and finite(x, sums[0, c])):
        sums[0, c] = t
    if not (fit and finite(x, sums[1, c])):
        sums[1, c] = q


@leaf
def part_sums(dy, x, c0, c1, first, last, rows, splits, mean, rstd, k, sums):
    """sums (2, C): sum of dy, sum of dy * xhat over blocks first .. last of channels c0 .

    c1, blocks added in float64.
    """
    fit = fill_standardize(x, mean, rstd, c0, c1, k)
    for c in range(c0, c1):
        sums[0, c], sums[1, c] = 0.0, 0.0
    for block in range(first, last):
        n0, n1, s0, s1 = bounds(x, block, rows, splits)
        for c in range(c0, c1):
            t, q = block_sums(dy, x, c, n0, n1, s0, s1, k, c - c0)
            sums[0, c] += np.float64(t)
            sums[1, c] += np.float64(q)
    for c in range(c0, c1):
        own = fit or put_standardize(x, mean, rstd, c, 1, k, c - c0)
        if not (own and finite(x, sums[0, c]) and finite(x, sums[1, c])):
            channel_sums(dy, x, c, first, last, rows, splits, mean, rstd, own, sums)


@routine
def gradient_channel(dy, x, c, mean, rstd, gamma, sums, count, training, k, i, dx):
    """dx of channel c, where another's coefficients do not fit, or its own: column i of k, or in float64."""
    if not put_gradient(x, mean, rstd, gamma, sums, count, training, c, 1, k, i):
        gradient_rows(dy, x, c, mean, rstd, gamma, sums, count, training, dx)
        return
    for n in range(x.shape[0] - 1, -1, -1):
        if training:
            gradient_row(dy, x, n, c, 0, x.shape[2], k, i, 0, False, dx)
        else:
            affine_row(dy, n, c, 0, x.shape[2], k, i, 0, False, dx)


@kernel("x3 x3 m1 m1 i i i i i i w3 s3 s2")
def grad_reduce(dy, x, mean, rstd, rows, splits, blocks, parts, lot, tasks, work, partial, sums):
    """sums (2, C): sum of dy, sum of dy * xhat, `lot` channels in a unit.

    Workspaces: work (tasks, 3, lot rounded up to 8), partial (parts, 2, C).
    """
    C = x.shape[1]
    units = (C + lot - 1) // lot * parts
    for task in prange(tasks):
        for unit in range(units * task // tasks, units * (task + 1) // tasks):
            c0, p = unit // parts * lot, unit % parts
            first, last = blocks * p // parts, blocks * (p + 1) // parts
            part_sums(dy, x, c0, min(C, c0 + lot), first, last, rows, splits, mean, rstd, work[task], partial[p])
    for i in range(2):
        for c in range(C):
            t = 0.0
            for p in range(parts):
                t += partial[p, i, c]
            sums[i, c] = t


@leaf
def gradient_units(dy, x, task, tasks, pieces, k, stream, dx):
    """A task's share of dx, in the order of memory; k the coefficients of all channels."""
    more, n, c, piece = units_of(x, task, tasks, pieces)
    if stream and pieces == 1 and joined(dy) and one_stream(x, dx):
        row = n * x.shape[1] + c
        gradient_stream(dy, x, row, row + more, k, c, 0, dx)
        more = 0
    for _ in range(more):
        s0, s1 = ends(x, piece, pieces)
        gradient_row(dy, x, n, c, s0, s1, k, c, 0, stream, dx)
        n, c, piece = onward(x, n, c, piece, pieces)


@kernel("x3 x3 m1 m1 p1 m2 f b i i b w2 y3")
def grad_input(dy, x, mean, rstd, gamma, sums, count, training, pieces, tasks, stream, work, dx):
    """dx from the sums, in the order of memory; `training` False for constant statistics.

    `work` (5, C rounded up to 8).
    """
    C = x.shape[1]
    fit = fill_gradient(x, mean, rstd, gamma, sums, count, training, 0, C, work)
    for task in prange(tasks):
        if not fit:
            for c in range(C * task // tasks, C * (task + 1) // tasks):
                gradient_channel(dy, x, c, mean, rstd, gamma, sums, count, training, work, c, dx)
        elif training:
            gradient_units(dy, x, task, tasks, pieces, work, stream, dx)
        else:
            affine_units(dy, task, tasks, pieces, work, stream, dx)
        if stream:
            fence()


@kernel("x3 x3 m1 m1 p1 b i i i i i i b w3 y3 s2 w2")
def backward(
    dy, x, mean, rstd, gamma, training, rows, splits, blocks, lot, tasks, ahead, stream, work, dx, sums, grads
):
    """grad_reduce and grad_input, `lot` channels (up to 8) at a time, still in the cache.

    `work` (tasks, 5, 8), sums, grads (2, C).
    """
    N, C, S = x.shape
    count, units, whole = float(N * S), (C + lot - 1) // lot, stream and joined(dy) and one_stream(x, dx)
    for task in prange(tasks):
        k = work[task]
        for unit in range(units * task // tasks, units * (task + 1) // tasks):
            c0 = unit * lot
            c1 = min(C, c0 + lot)
            part_sums(dy, x, c0, c1, 0, blocks, rows, splits, mean, rstd, k, sums)
            narrow(sums, c0, c1, grads)
            if not fill_gradient(x, mean, rstd, gamma, sums, count, training, c0, c1, k):
                for c in range(c0, c1):
                    gradient_channel(dy, x, c, mean, rstd, gamma, sums, count, training, k, c - c0, dx)
                continue
            for n in range(N - 1, -1, -1):
                if whole and training:
                    gradient_stream(dy, x, n * C + c0, n * C + c1, k, 0, ahead, dx)
                elif whole:
                    affine_stream(dy, n * C + c0, n * C + c1, k, 0, ahead, dx)
                for c in range(c0, c0 if whole else c1):
                    if training:
                        gradient_row(dy, x, n, c, 0, S, k, c - c0, ahead, stream, dx)
                    else:
                        affine_row(dy, n, c, 0, S, k, c - c0, ahead, stream, dx)
        if stream:
            fence()
