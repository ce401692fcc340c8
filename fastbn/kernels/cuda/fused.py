"""Forward and backward in one launch, where one block takes all of a channel: what it reads for the statistics is still in cache after.

The statistics are those of `rows` and `columns` with one part to a channel, and finished in float64 as in `finish`, by a thread per
channel: the same arithmetic as in three launches.
"""

from math import sqrt

from numpy import float64

from fastbn.kernels.cuda import _gpu as gpu
from fastbn.kernels.cuda._jit import kernel
from fastbn.kernels.cuda.columns import fetch, part_moments, part_sums
from fastbn.kernels.cuda.finish import keep_scale, keep_slope, lifted, scaled, slope_of, sloped
from fastbn.kernels.cuda.merging import join_block, sample, sum_block
from fastbn.kernels.cuda.rows import four, onwards, outside, read_moments, read_sums, spot


@gpu.device
def kept(x, i):
    """A number of the block's, in every lane."""
    return gpu.spread(x, gpu.take(x, i))


@gpu.device
def slant(group, steep, near, rstd, slope, level, scale):
    """A gradient: scale * (dy - level - xhat * slope)."""
    return (steep - (group - near) * rstd * slope - level) * scale


@kernel("x x w w i4 f i4 i4 i4 i8 i8 i8 i8 i4 i4 i4 i4 i4 i4 i8 i8 s")
def forward_rows(x, y, gamma, beta, affine, eps, N, C, S, sn, sc, yn, yc, base, base_y, slots, rest, step_n, step_v, stop, last, stats):
    """Mean and m2 of each channel into `stats` (2, C), and y: `rows.moments_rows` with one part.

    It is `stop` slots and `last` elements outside them; where there are slots, rows of all arrays begin alike to a boundary.
    """
    channel, thread, threads, lanes = gpu.block(), gpu.thread(), gpu.threads(), gpu.lanes(x)
    at, to = channel * sc, channel * yc
    shifts, units = sample(x, at, N, sn, S)
    count, mean, m2 = read_moments(x, S, at, sn, base, slots, rest, step_n, step_v, 0, stop, 0, last, shifts, units)
    count, mean, m2 = join_block(x, count, mean, m2)
    if thread == 0:
        middle, spread = lifted(stats, gpu.first(shifts), gpu.first(units), mean, m2)
        gpu.store(stats, channel, middle)
        gpu.store(stats, C + channel, spread)
        rstd = 1.0 / sqrt(spread / gpu.scalar(stats, count) + eps)
        near, scale, shift = scaled(x, middle, rstd, gamma, beta, affine, channel)
        gpu.put(x, 0, near)
        gpu.put(x, 1, scale)
        gpu.put(x, 2, shift)
    gpu.sync()
    near, scale, shift = kept(x, 0), kept(x, 1), kept(x, 2)
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
        value = (gpu.load(x, outside(e, at, sn, base, lanes, S, rest)) - gpu.take(x, 0)) * gpu.take(x, 1) + gpu.take(x, 2)
        gpu.store(y, outside(e, to, yn, base_y, lanes, S, rest), value)
        e += threads


@kernel("x x x t t f f f w i4 i4 i4 i4 i8 i8 i8 i8 i8 i8 i4 i4 i4 i4 i4 i4 i4 i8 i8 w")
def backward_rows(
    x, dy, dx, mean, m2, count, eps, values, gamma, affine, N, C, S, sn, sc, dn, dc, yn, yc, base, base_dy, base_y, slots, rest, step_n,
    step_v, stop, last, grads,
):  # fmt: skip
    """Sums of dy and dy * xhat into `grads` (2, C), and dx, statistics as in `finish.finish_backward`: `rows.sums_rows` with one part."""
    channel, thread, threads, lanes = gpu.block(), gpu.thread(), gpu.threads(), gpu.lanes(x)
    at, of, to = channel * sc, channel * dc, channel * yc
    middle = gpu.scalar(x, gpu.load(mean, channel))
    a, b = read_sums(x, dy, S, at, sn, base, of, dn, base_dy, slots, rest, step_n, step_v, 0, stop, 0, last, middle)
    a, b = sum_block(x, a, b)
    if thread == 0:
        spread, total = gpu.load(m2, channel), float64(a)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        dgamma = slope_of(x, gpu.load(mean, channel), rstd, total, float64(b))
        gpu.store(grads, channel, a)
        gpu.store(grads, C + channel, gpu.scalar(grads, dgamma))
        near, inverse, slope, level, scale = sloped(x, gpu.load(mean, channel), rstd, gamma, affine, channel, total, dgamma, values)
        gpu.put(x, 0, near)
        gpu.put(x, 1, inverse)
        gpu.put(x, 2, slope)
        gpu.put(x, 3, level)
        gpu.put(x, 4, scale)
    gpu.sync()
    near, rstd, slope, level, scale = kept(x, 0), kept(x, 1), kept(x, 2), kept(x, 3), kept(x, 4)
    e = thread
    n, v = e // slots, e % slots
    while e + threads < stop:  # two loads of each array on their way at once
        n1, v1 = onwards(n, v, step_n, step_v, slots)
        p, dp = gpu.load_group(x, spot(at + n * sn, base, lanes, v)), gpu.load_group(dy, spot(of + n * dn, base_dy, lanes, v))
        q, dq = gpu.load_group(x, spot(at + n1 * sn, base, lanes, v1)), gpu.load_group(dy, spot(of + n1 * dn, base_dy, lanes, v1))
        gpu.store_group(dx, spot(to + n * yn, base_y, lanes, v), slant(p, dp, near, rstd, slope, level, scale))
        gpu.store_group(dx, spot(to + n1 * yn, base_y, lanes, v1), slant(q, dq, near, rstd, slope, level, scale))
        n, v = onwards(n1, v1, step_n, step_v, slots)
        e += 2 * threads
    while e < stop:
        p, dp = gpu.load_group(x, spot(at + n * sn, base, lanes, v)), gpu.load_group(dy, spot(of + n * dn, base_dy, lanes, v))
        gpu.store_group(dx, spot(to + n * yn, base_y, lanes, v), slant(p, dp, near, rstd, slope, level, scale))
        n, v = onwards(n, v, step_n, step_v, slots)
        e += threads
    e = thread
    while e < last:
        value, steep = gpu.load(x, outside(e, at, sn, base, lanes, S, rest)), gpu.load(dy, outside(e, of, dn, base_dy, lanes, S, rest))
        found = slant(value, steep, gpu.take(x, 0), gpu.take(x, 1), gpu.take(x, 2), gpu.take(x, 3), gpu.take(x, 4))
        gpu.store(dx, outside(e, to, yn, base_y, lanes, S, rest), found)
        e += threads


@gpu.device
def place(y, i, count, aligned, group):
    """A group of columns to where it belongs: in one store, or as many of its lanes as there are."""
    if aligned:
        gpu.store_group(y, i, group)
    else:
        gpu.store_any(y, i, count, group)


@kernel("x x w w i4 f i8 i4 i8 i8 i4 i4 i4 s w w w")
def forward_columns(x, y, gamma, beta, affine, eps, R, C, step, step_y, across, aligned, pad, stats, given, partial, coefs):
    """The same on (R, C): `columns.moments_columns` with one part; `given` (2, C), `partial` (3, C) and `coefs` (3, pad) are scratch."""
    thread, threads, lanes = gpu.thread(), gpu.threads(), gpu.lanes(x)
    _, column, wide, _, _ = part_moments(x, R, C, step, across, 1, R, aligned, given, partial)
    gpu.sync()  # what threads of a block have stored, all of them see now
    c = thread
    while c < across * lanes:
        channel = gpu.block() * across * lanes + c
        if channel < C:
            deviation = gpu.load(partial, C + channel), gpu.load(partial, 2 * C + channel)
            mean, m2 = lifted(stats, gpu.load(given, channel), gpu.load(given, C + channel), *deviation)
            gpu.store(stats, channel, mean)
            gpu.store(stats, C + channel, m2)
            keep_scale(mean, 1.0 / sqrt(m2 / float64(R) + eps), gamma, beta, affine, channel, pad, coefs)
        c += threads
    gpu.sync()
    if wide > 0:
        near, scale = gpu.load_table(x, coefs, column), gpu.load_table(x, coefs, pad + column)
        shift = gpu.load_table(x, coefs, 2 * pad + column)
        r, every = thread // across, threads // across
        while r + every < R:  # two loads on their way at once
            a, b = fetch(x, column + r * step, wide, aligned), fetch(x, column + (r + every) * step, wide, aligned)
            place(y, column + r * step_y, wide, aligned, (a - near) * scale + shift)
            place(y, column + (r + every) * step_y, wide, aligned, (b - near) * scale + shift)
            r += 2 * every
        if r < R:
            place(y, column + r * step_y, wide, aligned, (fetch(x, column + r * step, wide, aligned) - near) * scale + shift)


@kernel("x x x t t f f f w i4 i8 i4 i8 i8 i8 i4 i4 i4 w w w")
def backward_columns(
    x, dy, dx, mean, m2, count, eps, values, gamma, affine, R, C, step, step_dy, step_y, across, aligned, pad, grads, partial, coefs
):
    """The same on (R, C): `columns.sums_columns` with one part; `partial` (2, C) and `coefs` (5, pad) are scratch."""
    thread, threads, lanes = gpu.thread(), gpu.threads(), gpu.lanes(x)
    _, column, wide, _ = part_sums(x, dy, mean, R, C, C, 1, step, step_dy, across, 1, R, aligned, partial)
    gpu.sync()
    c = thread
    while c < across * lanes:
        channel = gpu.block() * across * lanes + c
        if channel < C:
            spread, middle, total = gpu.load(m2, channel), gpu.load(mean, channel), float64(gpu.load(partial, channel))
            rstd = 1.0 / sqrt(spread / count + eps) if count else spread
            dgamma = slope_of(coefs, middle, rstd, total, float64(gpu.load(partial, C + channel)))
            gpu.store(grads, channel, gpu.scalar(grads, total))
            gpu.store(grads, C + channel, gpu.scalar(grads, dgamma))
            keep_slope(middle, rstd, gamma, affine, channel, total, dgamma, values, pad, coefs)
        c += threads
    gpu.sync()
    if wide > 0:
        near, rstd = gpu.load_table(x, coefs, column), gpu.load_table(x, coefs, pad + column)
        slope, level = gpu.load_table(x, coefs, 2 * pad + column), gpu.load_table(x, coefs, 3 * pad + column)
        scale = gpu.load_table(x, coefs, 4 * pad + column)
        r = thread // across
        while r < R:
            a, da = fetch(x, column + r * step, wide, aligned), fetch(dy, column + r * step_dy, wide, aligned)
            place(dx, column + r * step_y, wide, aligned, slant(a, da, near, rstd, slope, level, scale))
            r += threads // across
