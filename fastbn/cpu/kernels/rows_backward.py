"""Backward kernels on (N, C, S) arrays, S contiguous; blocks, parts and tasks as in `rows`."""

from __future__ import annotations

import numpy as np

from fastbn.cpu.kernels.beyond import finite, gradient_columns, row, wide_sums
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
from fastbn.cpu.kernels.rows import ROWS, SEGMENT, affine_units, bounds, ends, group_rows, onward, units_of
from fastbn.cpu.kernels.simd import broadcast, fence, lanes, load, load_broadcast, load_some, muladd, total


@leaf
def block_sums(dy, x, c, n0, n1, s0, s1, k, e):
    """(sum of dy, sum of dy * xhat) over a block, in the arithmetic of x; xhat by column e of k."""
    W = lanes(x)
    h, r, o = load_broadcast(k, (0, e)), load_broadcast(k, (1, e)), load_broadcast(k, (2, e))
    zero = broadcast(x, 0.0)
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
    """sums (2, C): sum of dy, sum of dy * xhat over blocks first .. last of channels c0 .. c1, added in float64."""
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
        N, S = x.shape[0], x.shape[2]
        gradient_columns(dy[:, c], x[:, c], 0, N, 0, S, c, mean, rstd, gamma, sums, count, training, dx[:, c])
        return
    for n in range(x.shape[0] - 1, -1, -1):
        if training:
            gradient_row(dy, x, n, c, 0, x.shape[2], k, i, 0, False, dx)
        else:
            affine_row(dy, n, c, 0, x.shape[2], k, i, 0, False, dx)


@kernel(ROWS, work="w3 (tasks, 3, group rounded up to 8)", partial="s3 (parts, 2, C): sums of each part")
def grad_reduce(dy, x, mean, rstd, rows, splits, blocks, parts, group, tasks, work, partial, sums):
    """Sums of dy and of dy * xhat of each channel."""
    C = x.shape[1]
    units = (C + group - 1) // group * parts
    for task in prange(tasks):
        for unit in range(units * task // tasks, units * (task + 1) // tasks):
            c0, p = unit // parts * group, unit % parts
            first, last = blocks * p // parts, blocks * (p + 1) // parts
            part_sums(dy, x, c0, min(C, c0 + group), first, last, rows, splits, mean, rstd, work[task], partial[p])
    for i in range(2):
        for c in range(C):
            t = 0.0
            for p in range(parts):
                t += partial[p, i, c]
            sums[i, c] = t


@leaf
def gradient_units(dy, x, task, tasks, pieces, k, stream, dx):
    """One task's part of dx, in the order of memory; k the coefficients of all channels."""
    more, n, c, piece = units_of(x, task, tasks, pieces)
    if stream and pieces == 1 and joined(dy) and one_stream(x, dx):
        row = n * x.shape[1] + c
        gradient_stream(dy, x, row, row + more, k, c, 0, dx)
        more = 0
    for _ in range(more):
        s0, s1 = ends(x, piece, pieces)
        gradient_row(dy, x, n, c, s0, s1, k, c, 0, stream, dx)
        n, c, piece = onward(x, n, c, piece, pieces)


@kernel(ROWS, sums="m2 (2, C): those of grad_reduce", work="w2 (5, C rounded up to 8)")
def grad_input(dy, x, mean, rstd, gamma, sums, count, training, pieces, tasks, stream, work, dx):
    """dx from the sums, in the order of memory."""
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


@kernel(ROWS, work="w3 (tasks, 5, 8)")
def backward(
    dy, x, mean, rstd, gamma, training, rows, splits, blocks, group, tasks, prefetch_distance, stream, work, dx, sums,
    grads
):  # fmt: skip
    """grad_reduce and grad_input, a group of up to 8 channels at a time, still in the cache."""
    N, C, S = x.shape
    count, units, whole = float(N * S), (C + group - 1) // group, stream and joined(dy) and one_stream(x, dx)
    for task in prange(tasks):
        k = work[task]
        for unit in range(units * task // tasks, units * (task + 1) // tasks):
            c0 = unit * group
            c1 = min(C, c0 + group)
            part_sums(dy, x, c0, c1, 0, blocks, rows, splits, mean, rstd, k, sums)
            narrow(sums, c0, c1, grads)
            if not fill_gradient(x, mean, rstd, gamma, sums, count, training, c0, c1, k):
                for c in range(c0, c1):
                    gradient_channel(dy, x, c, mean, rstd, gamma, sums, count, training, k, c - c0, dx)
                continue
            for n in range(N - 1, -1, -1):
                if whole and training:
                    gradient_stream(dy, x, n * C + c0, n * C + c1, k, 0, prefetch_distance, dx)
                elif whole:
                    affine_stream(dy, n * C + c0, n * C + c1, k, 0, prefetch_distance, dx)
                for c in range(c0, c0 if whole else c1):
                    if training:
                        gradient_row(dy, x, n, c, 0, S, k, c - c0, prefetch_distance, stream, dx)
                    else:
                        affine_row(dy, n, c, 0, S, k, c - c0, prefetch_distance, stream, dx)
        if stream:
            fence()
