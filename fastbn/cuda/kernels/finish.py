"""What is left to do per channel, in float64.

Merge the partial statistics of a channel's parts, and compute the passes' coefficients.
A block takes `across` channels and divides its threads among them, each reads partial results in turn; the order, and
so every bit, comes from the shape. Channels that float32 has too little range for are read again.
"""

from math import sqrt

from fastbn.cuda.kernels import gpu
from fastbn.cuda.kernels.jit import kernel
from fastbn.cuda.kernels.merging import (
    doubtful,
    join,
    join_slots,
    keep,
    keep_sums,
    kept,
    kept_sums,
    reread,
    reread_sums,
    sum_slots,
)


@gpu.device
def share_of(across):
    """(channel, its place among those of a block, this thread's among the channel's, how many these are)."""
    below = gpu.quotient(gpu.thread(), across)
    beside = gpu.thread() - below * across
    return gpu.block() * across + beside, beside, below, gpu.threads() // across


@gpu.device
def moments_of(partial, entries, C, across, x, N, S, sn, sc, stats):
    """(channel, whether this thread is to finish it, count, mean, m2), from partial results (entries, 3, C)."""
    channel, beside, below, every = share_of(across)
    zero = gpu.scalar(stats, 0.0)
    nothing = zero, zero, zero, zero
    found = nothing
    e = below
    while channel < C and e < entries:
        at = e * 3 * C + channel
        found = join(*found, gpu.load(partial, at), gpu.load(partial, at + C), zero, gpu.load(partial, at + 2 * C))
        e += every
    keep(stats, gpu.thread(), *found)
    join_slots(stats, every, across, 1, 0)
    count, base, rest, m2 = kept(stats, beside)
    gpu.sync()
    if doubtful(x, count, base + rest, m2):
        found = reread(x, channel * sc, N, S, sn, below, every)
    else:
        found = (count, base, rest, m2) if below == 0 else nothing
    keep(stats, gpu.thread(), *found)
    join_slots(stats, every, across, 1, 0)
    count, base, rest, m2 = kept(stats, beside)
    return channel, channel < C and below == 0, count, base + rest, m2


@gpu.device
def scaled(x, mean, rstd, gamma, beta, affine, channel):
    """(near, scale, shift) of y = (x - near) * scale + shift.

    The nearest to a mean, the rest of which is in the shift.
    """
    near = gpu.scalar(x, mean)
    scale = rstd * gpu.load(gamma, channel) if affine & 1 else rstd
    shift = (near - mean) * scale
    if affine & 2:
        shift += gpu.load(beta, channel)
    return near, gpu.scalar(x, scale), gpu.scalar(x, shift)


@gpu.device
def sloped(x, mean, rstd, gamma, affine, channel, a, dgamma, values):
    """(near, slope, level, scale) of dx = (dy - (x - near) * slope) * scale - level, from sums of dy and dy * xhat."""
    near, slope = gpu.scalar(x, mean), dgamma / values * rstd
    level = a / values - (mean - near) * slope
    scale = rstd * gpu.load(gamma, channel) if affine & 1 else rstd
    return near, gpu.scalar(x, slope), gpu.scalar(x, level * scale), gpu.scalar(x, scale)


@gpu.device
def slope_of(x, mean, rstd, a, b):
    """Sum of dy * xhat, from those of dy and of dy * (x - near)."""
    return b * rstd - (mean - gpu.scalar(x, mean)) * rstd * a


@gpu.device
def keep_affine(near, scale, shift, channel, C, columns, copies, pad, coefs):
    """What `apply.normalize` needs of a channel: in each of its columns of each copy of C channels."""
    for i in range(copies):
        at = (i * C + channel) * columns
        for j in range(at, at + columns):
            gpu.store(coefs, j, near)
            gpu.store(coefs, pad + j, scale)
            gpu.store(coefs, 2 * pad + j, shift)


@gpu.device
def keep_scale(mean, rstd, gamma, beta, affine, channel, C, columns, copies, pad, coefs):
    """The same, from statistics."""
    near, scale, shift = scaled(coefs, mean, rstd, gamma, beta, affine, channel)
    keep_affine(near, scale, shift, channel, C, columns, copies, pad, coefs)


@gpu.device
def keep_slope(mean, rstd, gamma, affine, channel, a, dgamma, values, C, columns, copies, pad, coefs):
    """What `apply.gradient` needs of a channel, likewise."""
    near, slope, level, scale = sloped(coefs, mean, rstd, gamma, affine, channel, a, dgamma, values)
    keep_affine(near, slope, level, channel, C, columns, copies, pad, coefs)
    for i in range(copies):
        at = 3 * pad + (i * C + channel) * columns
        for j in range(at, at + columns):
            gpu.store(coefs, j, scale)


@kernel("s i4 i4 i4 x i8 i8 i8 i8 s")
def finish_moments(partial, entries, C, across, x, N, S, sn, sc, stats):
    """Mean and m2 of each channel into `stats` (2, C), from partial results (entries, 3, C) of x (N, C, S)."""
    channel, mine, _, mean, m2 = moments_of(partial, entries, C, across, x, N, S, sn, sc, stats)
    if mine:
        gpu.store(stats, channel, mean)
        gpu.store(stats, C + channel, m2)


@kernel("s i4 i4 i4 x i8 i8 i8 i8 f w w i4 i4 i4 i4 s w")
def finish_forward(
    partial, entries, C, across, x, N, S, sn, sc, eps, gamma, beta, affine, columns, copies, pad, stats, coefs
):
    """The same, and coefficients (3, pad) for `apply.normalize`; `affine` is 1 with gamma, 2 with beta, 3 with both."""
    channel, mine, count, mean, m2 = moments_of(partial, entries, C, across, x, N, S, sn, sc, stats)
    if mine:
        gpu.store(stats, channel, mean)
        gpu.store(stats, C + channel, m2)
        keep_scale(mean, 1.0 / sqrt(m2 / count + eps), gamma, beta, affine, channel, C, columns, copies, pad, coefs)


@kernel("t t f f w w i4 i4 i4 i4 i4 w")
def set_scale(mean, m2, count, eps, gamma, beta, affine, C, columns, copies, pad, coefs):
    """Coefficients (3, pad) for `apply.normalize` from given statistics (C,).

    m2 is 1 / sqrt(var + eps) where count is 0.
    """
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        spread = gpu.load(m2, channel)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        keep_scale(gpu.load(mean, channel), rstd, gamma, beta, affine, channel, C, columns, copies, pad, coefs)


@gpu.device
def sums_of(partial, entries, C, across, x, dy, mean, N, S, sn, sc, dn, dc, sums):
    """(channel, whether this thread is to finish it, sum of dy, sum of dy * (x - mean)), of partial (entries, 2, C)."""
    channel, beside, below, every = share_of(across)
    zero = gpu.scalar(sums, 0.0)
    a, b = zero, zero
    e = below
    while channel < C and e < entries:
        a += gpu.load(partial, e * 2 * C + channel)
        b += gpu.load(partial, (e * 2 + 1) * C + channel)
        e += every
    keep_sums(sums, gpu.thread(), a, b)
    sum_slots(sums, every, across, 1, 0)
    a, b = kept_sums(sums, beside)
    gpu.sync()
    if channel < C and gpu.lanes(x) > 2 and not (a - a == 0.0 and b - b == 0.0):
        near = gpu.scalar(sums, gpu.scalar(x, gpu.load(mean, channel)))
        a, b = reread_sums(x, dy, channel * sc, channel * dc, N, S, sn, dn, below, every, near)
    elif below > 0:
        a, b = zero, zero
    keep_sums(sums, gpu.thread(), a, b)
    sum_slots(sums, every, across, 1, 0)
    a, b = kept_sums(sums, beside)
    return channel, channel < C and below == 0, a, b


@kernel("s i4 i4 i4 x x i8 i8 i8 i8 i8 i8 t t f f f w i4 i4 i4 i4 i4 s w w")
def finish_backward(
    partial, entries, C, across, x, dy, N, S, sn, sc, dn, dc, mean, m2, count, eps, values, gamma, affine, training,
    columns, copies, pad, sums, grads, coefs,
):  # fmt: skip
    """Sums of dy and dy * xhat into `sums` and `grads` (2, C), and coefficients (4, pad) for the pass over elements.

    From partial sums (entries, 2, C) of x and dy (N, C, S); `values` per channel; m2 is 1 / sqrt(var + eps) where count
    is 0. If not `training`, statistics are constants, and dx is dy scaled: no coefficient of x's.
    """
    zero = gpu.scalar(sums, 0.0)
    channel, mine, a, b = sums_of(partial, entries, C, across, x, dy, mean, N, S, sn, sc, dn, dc, sums)
    if mine:
        spread, middle = gpu.load(m2, channel), gpu.load(mean, channel)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        dgamma = slope_of(coefs, middle, rstd, a, b)
        gpu.store(sums, channel, a)
        gpu.store(sums, C + channel, dgamma)
        gpu.store(grads, channel, gpu.scalar(grads, a))
        gpu.store(grads, C + channel, gpu.scalar(grads, dgamma))
        if training:
            keep_slope(middle, rstd, gamma, affine, channel, a, dgamma, values, C, columns, copies, pad, coefs)
        else:
            scale, none = (
                gpu.scalar(coefs, rstd * gpu.load(gamma, channel) if affine & 1 else rstd),
                gpu.scalar(coefs, zero),
            )
            keep_affine(none, scale, none, channel, C, columns, copies, pad, coefs)


@kernel("t t f f s s f w i4 i4 i4 i4 i4 w")
def set_slope(mean, m2, count, eps, sum_dy, sum_dy_xhat, values, gamma, affine, C, columns, copies, pad, coefs):
    """Coefficients (4, pad) for `apply.gradient` from given statistics and sums (C,) over `values` per channel.

    m2 as `set_scale`.
    """
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        spread = gpu.load(m2, channel)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        a, dgamma = gpu.load(sum_dy, channel), gpu.load(sum_dy_xhat, channel)
        middle = gpu.scalar(sum_dy, gpu.load(mean, channel))
        keep_slope(middle, rstd, gamma, affine, channel, a, dgamma, values, C, columns, copies, pad, coefs)


@kernel("s s f f i4 w w")
def track(mean, m2, freedom, weight, C, running_mean, running_var):
    """Running statistics (C,) move towards mean and m2 / freedom by `weight`."""
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        kept, var = 1.0 - weight, gpu.load(m2, channel) / freedom
        moved = kept * gpu.load(running_mean, channel) + weight * gpu.load(mean, channel)
        gpu.store(running_mean, channel, gpu.scalar(running_mean, moved))
        gpu.store(running_var, channel, gpu.scalar(running_var, kept * gpu.load(running_var, channel) + weight * var))


@kernel("t f f i4 s")
def rstd(m2, count, eps, C, found):
    """`found` = 1 / sqrt(m2 / count + eps), all (C,)."""
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        gpu.store(found, channel, 1.0 / sqrt(gpu.load(m2, channel) / count + eps))


@kernel("s f i4 i4 s")
def spread(m2, freedom, root, C, found):
    """`found` = m2 / freedom, or its square root, all (C,)."""
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        var = gpu.load(m2, channel) / freedom
        gpu.store(found, channel, sqrt(var) if root else var)


@kernel("f s s f s s i4 s s")
def join_moments(count, mean, m2, other_count, other_mean, other_m2, C, found, found_m2):
    """Moments of both groups of values, all (C,)."""
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        here = gpu.load(mean, channel), 0.0, gpu.load(m2, channel)
        _, middle, rest, q = join(
            count, *here, other_count, gpu.load(other_mean, channel), 0.0, gpu.load(other_m2, channel)
        )
        gpu.store(found, channel, middle + rest)
        gpu.store(found_m2, channel, q)


@kernel("t i4 s")
def widen(values, C, found):
    """`found` = values in float64, both (C,)."""
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        gpu.store(found, channel, gpu.scalar(found, gpu.load(values, channel)))


@kernel("w i4")
def clear(found, count):
    """Zeros."""
    i = gpu.block() * gpu.threads() + gpu.thread()
    if i < count:
        gpu.store(found, i, gpu.scalar(found, 0.0))
