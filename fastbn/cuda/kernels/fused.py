"""Forward and backward in one launch, where one block takes all of a channel.

What it reads for the statistics is still in cache after.
The statistics are those of `rows` and `columns` with one part to a channel, and finished in float64 as in `finish`, by
a thread per channel: the same arithmetic as in three launches.
"""

from math import sqrt

from numpy import float64

from fastbn.cuda.kernels.apply import gradient_group
from fastbn.cuda.kernels.columns import columns_of, kept_group, load_columns, part_moments, part_sums
from fastbn.cuda.kernels.finish import dgamma_of, gradient_coefs_of, normalize_coefs_of, rstd_of
from fastbn.cuda.kernels.gpu import gpu
from fastbn.cuda.kernels.jit import kernel
from fastbn.cuda.kernels.merging import (
    keep,
    keep_lane,
    kept,
    kept_lane,
    kept_lane_sums,
    out_of_range,
    reread,
    reread_sums,
    store_pair,
)
from fastbn.cuda.kernels.rows import four_slots, next_slot, rest_at, row_moments, row_sums, slot_at


@gpu.device
def final_moments(x, at, N, S, sn, count, base, rest, m2):
    """(count, mean, m2) in float64 of the channel at `at`.

    Where float32 has too little range, read again, by one thread.
    """
    count, mean, m2 = float64(count), float64(base) + float64(rest), float64(m2)
    if out_of_range(x, count, mean, m2):
        count, base, rest, m2 = reread(x, at, N, S, sn, 0, 1)
        mean = base + rest
    return count, mean, m2


@gpu.device
def final_sums(x, dy, at, of, N, S, sn, dn, mean, a, b):
    """The sums of dy and dy * (x - mean) likewise."""
    a, b = float64(a), float64(b)
    if gpu.lanes(x) > 2 and not (a - a == 0.0 and b - b == 0.0):
        a, b = reread_sums(x, dy, at, of, N, S, sn, dn, 0, 1, float64(mean))
    return a, b


@gpu.device
def finish_gradients(x, mean, m2, count, eps, values, gamma, affine, channel, C, total, product, grads):
    """The sums of a channel into `grads`, and its coefficients of `apply.gradient_group`."""
    middle, rstd = gpu.load(mean, channel), rstd_of(m2, channel, count, eps)
    dgamma = dgamma_of(x, middle, rstd, total, product)
    store_pair(grads, 0, channel, C, total, dgamma)
    return gradient_coefs_of(x, middle, rstd, gamma, affine, channel, total, dgamma, values)


SHORT = dict.fromkeys(("N", "S", "slots", "rest"), "i4")  # where a block takes all of a channel


@kernel(**SHORT)
def forward_rows(
    x, y, gamma, beta, affine, eps, N, C, S, sn, sc, yn, yc, base, base_y, slots, rest, step_n, step_v, chunk,
    chunk_rest, stats,
):  # fmt: skip
    """Mean and m2 of each channel into `stats` (2, C), and y: `rows.moments_rows` with one part.

    Where there are slots, rows of all arrays begin alike to a boundary.
    """
    channel, thread, threads, lanes = gpu.block(), gpu.thread(), gpu.threads(), gpu.lanes(x)
    at, to = channel * sc, channel * yc
    found = row_moments(x, S, at, sn, base, slots, rest, step_n, step_v, 0, chunk, 0, chunk_rest)
    gpu.sync()
    if thread == 0:
        count, mean, m2 = final_moments(x, at, N, S, sn, *found)
        store_pair(stats, 0, channel, C, mean, m2)
        coefs = normalize_coefs_of(x, mean, 1.0 / sqrt(m2 / count + eps), gamma, beta, affine, channel)
        keep(x, 0, *coefs, gpu.scalar(x, 0.0))
    gpu.sync()
    one_mean_hi, one_scale, one_shift, _ = kept(x, 0)
    mean_hi, scale, shift = gpu.broadcast(x, one_mean_hi), gpu.broadcast(x, one_scale), gpu.broadcast(x, one_shift)
    e = thread
    n, v = e // slots, e % slots
    while e + 3 * threads < chunk:  # four loads on their way at once
        i, j, k, m, _, _ = four_slots(n, v, at, sn, base, lanes, step_n, step_v, slots)
        a, b, c, d = gpu.load_group(x, i), gpu.load_group(x, j), gpu.load_group(x, k), gpu.load_group(x, m)
        i, j, k, m, n, v = four_slots(n, v, to, yn, base_y, lanes, step_n, step_v, slots)
        gpu.store_group(y, i, (a - mean_hi) * scale + shift)
        gpu.store_group(y, j, (b - mean_hi) * scale + shift)
        gpu.store_group(y, k, (c - mean_hi) * scale + shift)
        gpu.store_group(y, m, (d - mean_hi) * scale + shift)
        e += 4 * threads
    while e < chunk:
        a = gpu.load_group(x, slot_at(at + n * sn, base, lanes, v))
        gpu.store_group(y, slot_at(to + n * yn, base_y, lanes, v), (a - mean_hi) * scale + shift)
        n, v = next_slot(n, v, step_n, step_v, slots)
        e += threads
    e = thread
    while e < chunk_rest:
        value = gpu.load(x, rest_at(e, at, sn, base, lanes, S, rest))
        value = (value - one_mean_hi) * one_scale + one_shift
        gpu.store(y, rest_at(e, to, yn, base_y, lanes, S, rest), value)
        e += threads


@kernel(**SHORT)
def backward_rows(
    x, dy, dx, mean, m2, count, eps, values, gamma, affine, N, C, S, sn, sc, dn, dc, yn, yc, base, base_dy, base_y,
    slots, rest, step_n, step_v, chunk, chunk_rest, grads,
):  # fmt: skip
    """Sums of dy and dy * xhat into `grads` (2, C), and dx, statistics as in `finish.finish_backward`.

    `rows.sums_rows` with one part.
    """
    channel, thread, threads, lanes = gpu.block(), gpu.thread(), gpu.threads(), gpu.lanes(x)
    at, of, to = channel * sc, channel * dc, channel * yc
    middle = gpu.scalar(x, gpu.load(mean, channel))
    a, b = row_sums(
        x, dy, S, at, sn, base, of, dn, base_dy, slots, rest, step_n, step_v, 0, chunk, 0, chunk_rest, middle
    )
    gpu.sync()
    if thread == 0:
        total, product = final_sums(x, dy, at, of, N, S, sn, dn, middle, a, b)
        keep(x, 0, *finish_gradients(x, mean, m2, count, eps, values, gamma, affine, channel, C, total, product, grads))
    gpu.sync()
    one = kept(x, 0)
    coefs = gpu.broadcast(x, one[0]), gpu.broadcast(x, one[1]), gpu.broadcast(x, one[2]), gpu.broadcast(x, one[3])
    e = thread
    n, v = e // slots, e % slots
    while e + threads < chunk:  # two loads of each array on their way at once
        n1, v1 = next_slot(n, v, step_n, step_v, slots)
        p = gpu.load_group(x, slot_at(at + n * sn, base, lanes, v))
        dp = gpu.load_group(dy, slot_at(of + n * dn, base_dy, lanes, v))
        q = gpu.load_group(x, slot_at(at + n1 * sn, base, lanes, v1))
        dq = gpu.load_group(dy, slot_at(of + n1 * dn, base_dy, lanes, v1))
        gpu.store_group(dx, slot_at(to + n * yn, base_y, lanes, v), gradient_group(p, dp, *coefs))
        gpu.store_group(dx, slot_at(to + n1 * yn, base_y, lanes, v1), gradient_group(q, dq, *coefs))
        n, v = next_slot(n1, v1, step_n, step_v, slots)
        e += 2 * threads
    while e < chunk:
        p = gpu.load_group(x, slot_at(at + n * sn, base, lanes, v))
        dp = gpu.load_group(dy, slot_at(of + n * dn, base_dy, lanes, v))
        gpu.store_group(dx, slot_at(to + n * yn, base_y, lanes, v), gradient_group(p, dp, *coefs))
        n, v = next_slot(n, v, step_n, step_v, slots)
        e += threads
    e = thread
    while e < chunk_rest:
        p = gpu.load(x, rest_at(e, at, sn, base, lanes, S, rest))
        dp = gpu.load(dy, rest_at(e, of, dn, base_dy, lanes, S, rest))
        value = gradient_group(p, dp, *one)
        gpu.store(dx, rest_at(e, to, yn, base_y, lanes, S, rest), value)
        e += threads


@gpu.device
def store_columns(y, i, count, aligned, group):
    """A group of columns to where it belongs: in one store, or as many of its lanes as there are."""
    if aligned:
        gpu.store_group(y, i, group)
    else:
        gpu.store_any(y, i, count, group)


@gpu.device
def normalize_columns(x, y, column, step, step_y, r, R, every, wide, aligned, mean_hi, scale, shift):
    """y of the columns of a thread, rows r, r + every, ... below R."""
    i, j, apart, apart_y = column + r * step, column + r * step_y, every * step, every * step_y
    while r + 3 * every < R:  # four loads on their way at once
        a, b = load_columns(x, i, wide, aligned), load_columns(x, i + apart, wide, aligned)
        c, d = load_columns(x, i + 2 * apart, wide, aligned), load_columns(x, i + 3 * apart, wide, aligned)
        store_columns(y, j, wide, aligned, (a - mean_hi) * scale + shift)
        store_columns(y, j + apart_y, wide, aligned, (b - mean_hi) * scale + shift)
        store_columns(y, j + 2 * apart_y, wide, aligned, (c - mean_hi) * scale + shift)
        store_columns(y, j + 3 * apart_y, wide, aligned, (d - mean_hi) * scale + shift)
        r += 4 * every
        i += 4 * apart
        j += 4 * apart_y
    while r < R:
        store_columns(y, j, wide, aligned, (load_columns(x, i, wide, aligned) - mean_hi) * scale + shift)
        r += every
        i += apart
        j += apart_y


@gpu.device
def gradient_columns(x, dy, dx, column, step, step_dy, step_y, r, R, every, wide, aligned, coefs):
    """dx of the columns of a thread likewise."""
    i, k, j = column + r * step, column + r * step_dy, column + r * step_y
    while r + every < R:  # two loads of each array on their way at once
        a, da = load_columns(x, i, wide, aligned), load_columns(dy, k, wide, aligned)
        b, db = load_columns(x, i + every * step, wide, aligned), load_columns(dy, k + every * step_dy, wide, aligned)
        store_columns(dx, j, wide, aligned, gradient_group(a, da, *coefs))
        store_columns(dx, j + every * step_y, wide, aligned, gradient_group(b, db, *coefs))
        r += 2 * every
        i += 2 * every * step
        k += 2 * every * step_dy
        j += 2 * every * step_y
    if r < R:
        found = gradient_group(load_columns(x, i, wide, aligned), load_columns(dy, k, wide, aligned), *coefs)
        store_columns(dx, j, wide, aligned, found)


@kernel()
def forward_columns(x, y, gamma, beta, affine, eps, R, C, step, step_y, across, aligned, stats):
    """The same on (R, C): `columns.moments_columns` with one part."""
    threads = gpu.threads()
    channels, begin = part_moments(x, R, C, C, 1, step, 0, across, gpu.blocks(), gpu.block(), 0, R, aligned)
    gpu.sync()
    c = gpu.thread()
    while c < channels:
        channel, found = begin + c, kept_lane(x, c)
        count, mean, m2 = final_moments(x, channel, R, 1, step, *found)
        store_pair(stats, 0, channel, C, mean, m2)
        coefs = normalize_coefs_of(x, mean, 1.0 / sqrt(m2 / count + eps), gamma, beta, affine, channel)
        keep_lane(x, c, *coefs, gpu.scalar(x, 0.0))
        c += threads
    gpu.sync()
    _, column, wide, r, stop, every = columns_of(x, R, C, across, gpu.block(), 0, R)
    if wide > 0:
        mean_hi, scale, shift, _ = kept_group(x, column - begin)
        if aligned:
            normalize_columns(x, y, column, step, step_y, r, stop, every, wide, True, mean_hi, scale, shift)
        else:
            normalize_columns(x, y, column, step, step_y, r, stop, every, wide, False, mean_hi, scale, shift)


@kernel()
def backward_columns(
    x, dy, dx, mean, m2, count, eps, values, gamma, affine, R, C, step, step_dy, step_y, across, aligned, grads
):
    """The same on (R, C): `columns.sums_columns` with one part."""
    threads = gpu.threads()
    channels, begin = part_sums(
        x, dy, mean, R, C, C, 1, step, step_dy, 0, across, gpu.blocks(), gpu.block(), 0, R, aligned
    )
    gpu.sync()
    c = gpu.thread()
    while c < channels:
        channel, found = begin + c, kept_lane_sums(x, c)
        middle = gpu.scalar(x, gpu.load(mean, channel))
        sums = final_sums(x, dy, channel, channel, R, 1, step, step_dy, middle, *found)
        coefs = finish_gradients(x, mean, m2, count, eps, values, gamma, affine, channel, C, *sums, grads)
        keep_lane(x, c, *coefs)
        c += threads
    gpu.sync()
    _, column, wide, r, stop, every = columns_of(x, R, C, across, gpu.block(), 0, R)
    if wide > 0:
        coefs = kept_group(x, column - begin)
        if aligned:
            gradient_columns(x, dy, dx, column, step, step_dy, step_y, r, stop, every, wide, True, coefs)
        else:
            gradient_columns(x, dy, dx, column, step, step_dy, step_y, r, stop, every, wide, False, coefs)
