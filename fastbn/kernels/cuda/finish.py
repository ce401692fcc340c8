"""What is left to do per channel, in float64: merge the partial statistics of a channel's parts, and compute the passes' coefficients.

A warp takes a channel, its lanes the partial results in turn; the order, and so every bit, comes from the shape.
"""

from math import sqrt

from fastbn.kernels.cuda import _gpu as gpu
from fastbn.kernels.cuda._jit import kernel
from fastbn.kernels.cuda.merging import join, join_warp, sum_warp


@gpu.device
def entry(e, C, S, fold, channel):
    """(part, column) of a channel's e-th partial result; `fold` rows of C * S columns are one."""
    q = e % (fold * S)
    return e // (fold * S), q // S * (C * S) + channel * S + q % S


@gpu.device
def moments_of(partial, given, parts, fold, C, S, W, channel, stats):
    """(count, mean, m2) of a channel, in the first lane of its warp."""
    zero = gpu.scalar(stats, 0.0)
    count, mean, m2 = zero, zero, zero
    e = gpu.thread() % gpu.WARP
    while channel < C and e < parts * fold * S:
        part, column = entry(e, C, S, fold, channel)
        at, unit = part * 3 * W + column, gpu.scalar(stats, gpu.load(given, W + column))
        other = gpu.scalar(stats, gpu.load(partial, at))
        middle = gpu.scalar(stats, gpu.load(given, column)) + gpu.scalar(stats, gpu.load(partial, at + W)) / unit
        spread = gpu.scalar(stats, gpu.load(partial, at + 2 * W)) / unit / unit
        count, mean, m2 = join(count, mean, m2, other, middle, spread)
        e += gpu.WARP
    return join_warp(count, mean, m2)


@gpu.device
def keep_scale(mean, rstd, gamma, beta, affine, channel, pad, coefs):
    """What `apply.normalize` needs of a channel: the nearest to its mean, scale, and shift with what that leaves of the mean."""
    near = gpu.scalar(coefs, mean)
    scale = rstd * gpu.load(gamma, channel) if affine & 1 else rstd
    shift = (near - mean) * scale
    if affine & 2:
        shift += gpu.load(beta, channel)
    gpu.store(coefs, channel, near)
    gpu.store(coefs, pad + channel, gpu.scalar(coefs, scale))
    gpu.store(coefs, 2 * pad + channel, gpu.scalar(coefs, shift))


@kernel("w w i4 i4 i4 i4 i8 s")
def finish_moments(partial, given, parts, fold, C, S, W, stats):
    """Mean and m2 of each channel into `stats` (2, C), from partial results (parts, 3, W) and what they deviate from (2, W)."""
    channel = gpu.block() * (gpu.threads() // gpu.WARP) + gpu.thread() // gpu.WARP
    _, mean, m2 = moments_of(partial, given, parts, fold, C, S, W, channel, stats)
    if channel < C and gpu.thread() % gpu.WARP == 0:
        gpu.store(stats, channel, mean)
        gpu.store(stats, C + channel, m2)


@kernel("w w i4 i4 i4 i4 i8 f w w i4 i4 s w")
def finish_forward(partial, given, parts, fold, C, S, W, eps, gamma, beta, affine, pad, stats, coefs):
    """The same, and coefficients (3, pad) for `apply.normalize`; `affine` is 1 with gamma, 2 with beta, 3 with both."""
    channel = gpu.block() * (gpu.threads() // gpu.WARP) + gpu.thread() // gpu.WARP
    count, mean, m2 = moments_of(partial, given, parts, fold, C, S, W, channel, stats)
    if channel < C and gpu.thread() % gpu.WARP == 0:
        gpu.store(stats, channel, mean)
        gpu.store(stats, C + channel, m2)
        keep_scale(mean, 1.0 / sqrt(m2 / count + eps), gamma, beta, affine, channel, pad, coefs)


@kernel("t t f f w w i4 i4 i4 w")
def set_scale(mean, m2, count, eps, gamma, beta, affine, C, pad, coefs):
    """Coefficients (3, pad) for `apply.normalize` from given statistics (C,); m2 is 1 / sqrt(var + eps) where count is 0."""
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        spread = gpu.load(m2, channel)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        keep_scale(gpu.load(mean, channel), rstd, gamma, beta, affine, channel, pad, coefs)


@kernel("w i4 i4 i4 i4 i8 t t f f f w i4 i4 i4 s w w")
def finish_backward(partial, parts, fold, C, S, W, mean, m2, count, eps, values, gamma, affine, training, pad, sums, grads, coefs):
    """Sums of dy and dy * xhat into `sums` and `grads` (2, C), and coefficients (5, pad) for `apply.gradient`, or for `apply.normalize`.

    From partial sums (parts, 2, W); `values` per channel; m2 is 1 / sqrt(var + eps) where count is 0. If not `training`,
    statistics are constants, and dx is dy scaled: no coefficient of x's.
    """
    zero = gpu.scalar(sums, 0.0)
    channel = gpu.block() * (gpu.threads() // gpu.WARP) + gpu.thread() // gpu.WARP
    a, b = zero, zero
    e = gpu.thread() % gpu.WARP
    while channel < C and e < parts * fold * S:
        part, column = entry(e, C, S, fold, channel)
        a += gpu.load(partial, part * 2 * W + column)
        b += gpu.load(partial, (part * 2 + 1) * W + column)
        e += gpu.WARP
    a, b = sum_warp(a, b)
    if channel < C and gpu.thread() % gpu.WARP == 0:
        spread, middle = gpu.load(m2, channel), gpu.load(mean, channel)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        near = gpu.scalar(coefs, middle)
        low = (middle - near) * rstd
        dgamma = b * rstd - low * a
        gpu.store(sums, channel, a)
        gpu.store(sums, C + channel, dgamma)
        gpu.store(grads, channel, gpu.scalar(grads, a))
        gpu.store(grads, C + channel, gpu.scalar(grads, dgamma))
        scale = gpu.scalar(coefs, rstd * gpu.load(gamma, channel) if affine & 1 else rstd)
        if training:
            slope = dgamma / values
            gpu.store(coefs, channel, near)
            gpu.store(coefs, pad + channel, gpu.scalar(coefs, rstd))
            gpu.store(coefs, 2 * pad + channel, gpu.scalar(coefs, slope))
            gpu.store(coefs, 3 * pad + channel, gpu.scalar(coefs, a / values - low * slope))
            gpu.store(coefs, 4 * pad + channel, scale)
        else:
            gpu.store(coefs, channel, gpu.scalar(coefs, zero))
            gpu.store(coefs, pad + channel, scale)
            gpu.store(coefs, 2 * pad + channel, gpu.scalar(coefs, zero))


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
        here = gpu.load(mean, channel), gpu.load(m2, channel)
        _, middle, q = join(count, *here, other_count, gpu.load(other_mean, channel), gpu.load(other_m2, channel))
        gpu.store(found, channel, middle)
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
