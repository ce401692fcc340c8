"""Forward and backward in one launch, where one block takes all of a channel.

What it reads for the statistics is still in cache after.
The statistics are those of `rows` and `columns` with one part to a channel, and finished in float64 as in `finish`, by
a thread per channel: the same arithmetic as in three launches.
"""

from math import sqrt

from numpy import float64

from fastbn.cuda.kernels import gpu
from fastbn.cuda.kernels.apply import slant
from fastbn.cuda.kernels.columns import fetch, part_moments, part_sums
from fastbn.cuda.kernels.finish import scaled, slope_of, sloped
from fastbn.cuda.kernels.jit import kernel
from fastbn.cuda.kernels.merging import doubtful, kept_lane, kept_lane_sums, reread, reread_sums
from fastbn.cuda.kernels.rows import four, onwards, outside, row_moments, row_sums, spot


@gpu.device
def everywhere(x, i):
    """A number of the block's, in every lane."""
    return gpu.spread(x, gpu.take(x, i))


@gpu.device
def settled(x, at, N, S, sn, count, base, rest, m2):
    """(count, mean, m2) in float64 of the channel at `at`.

    Where float32 has too little range, read again, by one thread.
    """
    count, mean, m2 = float64(count), float64(base) + float64(rest), float64(m2)
    if doubtful(x, count, mean, m2):
        count, base, rest, m2 = reread(x, at, N, S, sn, 0, 1)
        mean = base + rest
    return count, mean, m2


@gpu.device
def settled_sums(x, dy, at, of, N, S, sn, dn, mean, a, b):
    """The sums of dy and dy * (x - mean) likewise."""
    a, b = float64(a), float64(b)
    if gpu.lanes(x) > 2 and not (a - a == 0.0 and b - b == 0.0):
        a, b = reread_sums(x, dy, at, of, N, S, sn, dn, 0, 1, float64(mean))
    return a, b


@kernel("x x w w i4 f i4 i4 i4 i8 i8 i8 i8 i4 i4 i4 i4 i4 i4 i8 i8 s")
def forward_rows(
    x,
    y,
    gamma,
    beta,
    affine,
    eps,
    N,
    C,
    S,
    sn,
    sc,
    yn,
    yc,
    base,
    base_y,
    slots,
    rest,
    step_n,
    step_v,
    stop,
    last,
    stats,
):
    """Mean and m2 of each channel into `stats` (2, C), and y: `rows.moments_rows` with one part.

    It is `stop` slots and `last` elements outside them; where there are slots, rows of all arrays begin alike to a
    boundary.
    """
    channel, thread, threads, lanes = gpu.block(), gpu.thread(), gpu.threads(), gpu.lanes(x)
    at, to = channel * sc, channel * yc
    found = row_moments(x, S, at, sn, base, slots, rest, step_n, step_v, 0, stop, 0, last)
    gpu.sync()
    if thread == 0:
        count, middle, spread = settled(x, at, N, S, sn, *found)
        gpu.store(stats, channel, middle)
        gpu.store(stats, C + channel, spread)
        rstd = 1.0 / sqrt(spread / count + eps)
        near, scale, shift = scaled(x, middle, rstd, gamma, beta, affine, channel)
        gpu.put(x, 0, near)
        gpu.put(x, 1, scale)
        gpu.put(x, 2, shift)
    gpu.sync()
    near, scale, shift = everywhere(x, 0), everywhere(x, 1), everywhere(x, 2)
    e = thread
    n, v = e // slots, e % slots
    while e + 3 * threads < stop:  # four loads on their way at once
        i, j, k, m, _, _ = four(n, v, at, sn, base, lanes, step_n, step_v, slots)
        a, b, c, d = gpu.load_group(x, i), gpu.load_group(x, j), gpu.load_group(x, k), gpu.load_group(x, m)
        i, j, k, m, n, v = four(n, v, to, yn, base_y, lanes, step_n, step_v, slots)
        gpu.store_group(y, i, (a - near) * scale + shift)
        gpu.store_group(y, j, (b - near) * scale + shift)
        gpu.store_group(y, k, (c - near) * scale + shift)
        gpu.store_group(y, m, (d - near) * scale + shift)
        e += 4 * threads
    while e < stop:
        a = gpu.load_group(x, spot(at + n * sn, base, lanes, v))
        gpu.store_group(y, spot(to + n * yn, base_y, lanes, v), (a - near) * scale + shift)
        n, v = onwards(n, v, step_n, step_v, slots)
        e += threads
    e = thread
    while e < last:
        value = (gpu.load(x, outside(e, at, sn, base, lanes, S, rest)) - gpu.take(x, 0)) * gpu.take(x, 1) + gpu.take(
            x, 2
        )
        gpu.store(y, outside(e, to, yn, base_y, lanes, S, rest), value)
        e += threads


@kernel("x x x t t f f f w i4 i4 i4 i4 i8 i8 i8 i8 i8 i8 i4 i4 i4 i4 i4 i4 i4 i8 i8 w")
def backward_rows(
    x, dy, dx, mean, m2, count, eps, values, gamma, affine, N, C, S, sn, sc, dn, dc, yn, yc, base, base_dy, base_y,
    slots, rest, step_n,
    step_v, stop, last, grads,
):  # fmt: skip
    """Sums of dy and dy * xhat into `grads` (2, C), and dx, statistics as in `finish.finish_backward`.

    `rows.sums_rows` with one part.
    """
    channel, thread, threads, lanes = gpu.block(), gpu.thread(), gpu.threads(), gpu.lanes(x)
    at, of, to = channel * sc, channel * dc, channel * yc
    middle = gpu.scalar(x, gpu.load(mean, channel))
    a, b = row_sums(x, dy, S, at, sn, base, of, dn, base_dy, slots, rest, step_n, step_v, 0, stop, 0, last, middle)
    gpu.sync()
    if thread == 0:
        spread = gpu.load(m2, channel)
        total, product = settled_sums(x, dy, at, of, N, S, sn, dn, middle, a, b)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        dgamma = slope_of(x, gpu.load(mean, channel), rstd, total, product)
        gpu.store(grads, channel, gpu.scalar(grads, total))
        gpu.store(grads, C + channel, gpu.scalar(grads, dgamma))
        near, slope, level, scale = sloped(
            x, gpu.load(mean, channel), rstd, gamma, affine, channel, total, dgamma, values
        )
        gpu.put(x, 0, near)
        gpu.put(x, 1, slope)
        gpu.put(x, 2, level)
        gpu.put(x, 3, scale)
    gpu.sync()
    near, slope, level, scale = everywhere(x, 0), everywhere(x, 1), everywhere(x, 2), everywhere(x, 3)
    e = thread
    n, v = e // slots, e % slots
    while e + threads < stop:  # two loads of each array on their way at once
        n1, v1 = onwards(n, v, step_n, step_v, slots)
        p, dp = (
            gpu.load_group(x, spot(at + n * sn, base, lanes, v)),
            gpu.load_group(dy, spot(of + n * dn, base_dy, lanes, v)),
        )
        q, dq = (
            gpu.load_group(x, spot(at + n1 * sn, base, lanes, v1)),
            gpu.load_group(dy, spot(of + n1 * dn, base_dy, lanes, v1)),
        )
        gpu.store_group(dx, spot(to + n * yn, base_y, lanes, v), slant(p, dp, near, slope, level, scale))
        gpu.store_group(dx, spot(to + n1 * yn, base_y, lanes, v1), slant(q, dq, near, slope, level, scale))
        n, v = onwards(n1, v1, step_n, step_v, slots)
        e += 2 * threads
    while e < stop:
        p, dp = (
            gpu.load_group(x, spot(at + n * sn, base, lanes, v)),
            gpu.load_group(dy, spot(of + n * dn, base_dy, lanes, v)),
        )
        gpu.store_group(dx, spot(to + n * yn, base_y, lanes, v), slant(p, dp, near, slope, level, scale))
        n, v = onwards(n, v, step_n, step_v, slots)
        e += threads
    e = thread
    while e < last:
        value, steep = (
            gpu.load(x, outside(e, at, sn, base, lanes, S, rest)),
            gpu.load(dy, outside(e, of, dn, base_dy, lanes, S, rest)),
        )
        found = slant(value, steep, gpu.take(x, 0), gpu.take(x, 1), gpu.take(x, 2), gpu.take(x, 3))
        gpu.store(dx, outside(e, to, yn, base_y, lanes, S, rest), found)
        e += threads


@gpu.device
def place(y, i, count, aligned, group):
    """A group of columns to where it belongs: in one store, or as many of its lanes as there are."""
    if aligned:
        gpu.store_group(y, i, group)
    else:
        gpu.store_any(y, i, count, group)


@gpu.device
def normalize_columns(x, y, column, step, step_y, r, R, every, wide, aligned, near, scale, shift):
    """y of the columns of a thread, rows r, r + every, ... below R."""
    i, j, apart, apart_y = column + r * step, column + r * step_y, every * step, every * step_y
    while r + 3 * every < R:  # four loads on their way at once
        a, b = fetch(x, i, wide, aligned), fetch(x, i + apart, wide, aligned)
        c, d = fetch(x, i + 2 * apart, wide, aligned), fetch(x, i + 3 * apart, wide, aligned)
        place(y, j, wide, aligned, (a - near) * scale + shift)
        place(y, j + apart_y, wide, aligned, (b - near) * scale + shift)
        place(y, j + 2 * apart_y, wide, aligned, (c - near) * scale + shift)
        place(y, j + 3 * apart_y, wide, aligned, (d - near) * scale + shift)
        r += 4 * every
        i += 4 * apart
        j += 4 * apart_y
    while r < R:
        place(y, j, wide, aligned, (fetch(x, i, wide, aligned) - near) * scale + shift)
        r += every
        i += apart
        j += apart_y


@gpu.device
def slant_columns(x, dy, dx, column, step, step_dy, step_y, r, R, every, wide, aligned, near, slope, level, scale):
    """dx of the columns of a thread likewise."""
    i, k, j = column + r * step, column + r * step_dy, column + r * step_y
    while r + every < R:  # two loads of each array on their way at once
        a, da = fetch(x, i, wide, aligned), fetch(dy, k, wide, aligned)
        b, db = fetch(x, i + every * step, wide, aligned), fetch(dy, k + every * step_dy, wide, aligned)
        place(dx, j, wide, aligned, slant(a, da, near, slope, level, scale))
        place(dx, j + every * step_y, wide, aligned, slant(b, db, near, slope, level, scale))
        r += 2 * every
        i += 2 * every * step
        k += 2 * every * step_dy
        j += 2 * every * step_y
    if r < R:
        found = slant(fetch(x, i, wide, aligned), fetch(dy, k, wide, aligned), near, slope, level, scale)
        place(dx, j, wide, aligned, found)


@kernel("x x w w i4 f i8 i4 i8 i8 i4 i4 s")
def forward_columns(x, y, gamma, beta, affine, eps, R, C, step, step_y, across, aligned, stats):
    """The same on (R, C): `columns.moments_columns` with one part."""
    thread, threads, lanes = gpu.thread(), gpu.threads(), gpu.lanes(x)
    channels, begin = part_moments(x, R, C, C, 1, step, 0, across, gpu.blocks(), gpu.block(), 0, R, aligned)
    gpu.sync()
    c = thread
    while c < channels:
        channel, found = begin + c, kept_lane(x, c)
        count, mean, m2 = settled(x, channel, R, 1, step, *found)
        gpu.store(stats, channel, mean)
        gpu.store(stats, C + channel, m2)
        near, scale, shift = scaled(x, mean, 1.0 / sqrt(m2 / count + eps), gamma, beta, affine, channel)
        gpu.put_lane(x, c, near)
        gpu.put_lane(x, gpu.many(x) + c, scale)
        gpu.put_lane(x, 2 * gpu.many(x) + c, shift)
        c += threads
    gpu.sync()
    every = threads // across
    r = gpu.quotient(thread, across)
    beside = (thread - r * across) * lanes
    column, wide = begin + beside, min(lanes, channels - beside)
    if wide > 0 and r < every:
        near, scale = gpu.take_group(x, beside), gpu.take_group(x, gpu.many(x) + beside)
        shift = gpu.take_group(x, 2 * gpu.many(x) + beside)
        if aligned:
            normalize_columns(x, y, column, step, step_y, r, R, every, wide, True, near, scale, shift)
        else:
            normalize_columns(x, y, column, step, step_y, r, R, every, wide, False, near, scale, shift)


@kernel("x x x t t f f f w i4 i8 i4 i8 i8 i8 i4 i4 w")
def backward_columns(
    x, dy, dx, mean, m2, count, eps, values, gamma, affine, R, C, step, step_dy, step_y, across, aligned, grads
):
    """The same on (R, C): `columns.sums_columns` with one part."""
    thread, threads, lanes = gpu.thread(), gpu.threads(), gpu.lanes(x)
    channels, begin = part_sums(
        x, dy, mean, R, C, C, 1, step, step_dy, 0, across, gpu.blocks(), gpu.block(), 0, R, aligned
    )
    gpu.sync()
    c = thread
    while c < channels:
        channel, found = begin + c, kept_lane_sums(x, c)
        spread, middle = gpu.load(m2, channel), gpu.load(mean, channel)
        total, product = settled_sums(x, dy, channel, channel, R, 1, step, step_dy, gpu.scalar(x, middle), *found)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        dgamma = slope_of(x, middle, rstd, total, product)
        gpu.store(grads, channel, gpu.scalar(grads, total))
        gpu.store(grads, C + channel, gpu.scalar(grads, dgamma))
        near, slope, level, scale = sloped(x, middle, rstd, gamma, affine, channel, total, dgamma, values)
        gpu.put_lane(x, c, near)
        gpu.put_lane(x, gpu.many(x) + c, slope)
        gpu.put_lane(x, 2 * gpu.many(x) + c, level)
        gpu.put_lane(x, 3 * gpu.many(x) + c, scale)
        c += threads
    gpu.sync()
    every = threads // across
    r = gpu.quotient(thread, across)
    beside = (thread - r * across) * lanes
    column, wide = begin + beside, min(lanes, channels - beside)
    if wide > 0 and r < every:
        near, slope = gpu.take_group(x, beside), gpu.take_group(x, gpu.many(x) + beside)
        level, scale = gpu.take_group(x, 2 * gpu.many(x) + beside), gpu.take_group(x, 3 * gpu.many(x) + beside)
        if aligned:
            slant_columns(x, dy, dx, column, step, step_dy, step_y, r, R, every, wide, True, near, slope, level, scale)
        else:
            slant_columns(x, dy, dx, column, step, step_dy, step_y, r, R, every, wide, False, near, slope, level, scale)
