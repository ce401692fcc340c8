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
        at = part * 3 * W + column
        deviation = gpu.load(given, column), gpu.load(given, W + column), gpu.load(partial, at + W), gpu.load(partial, at + 2 * W)
        count, mean, m2 = join(count, mean, m2, gpu.scalar(stats, gpu.load(partial, at)), *lifted(stats, *deviation))
        e += gpu.WARP
    return join_warp(count, mean, m2)


@gpu.device
def lifted(stats, shift, unit, mean, m2):
    """Mean and m2 in float64 of what deviates from `shift` in units of 1 / `unit`."""
    unit = gpu.scalar(stats, unit)
    return gpu.scalar(stats, shift) + gpu.scalar(stats, mean) / unit, gpu.scalar(stats, m2) / unit / unit


@gpu.device
def scaled(x, mean, rstd, gamma, beta, affine, channel):
    """(near, scale, shift) of y = (x - near) * scale + shift: the nearest to a mean, the rest of which is in the shift."""
    near = gpu.scalar(x, mean)
    scale = rstd * gpu.load(gamma, channel) if affine & 1 else rstd
    shift = (near - mean) * scale
    if affine & 2:
        shift += gpu.load(beta, channel)
    return near, gpu.scalar(x, scale), gpu.scalar(x, shift)


@gpu.device
def sloped(x, mean, rstd, gamma, affine, channel, a, dgamma, values):
    """(near, rstd, slope, level, scale) of dx = scale * (dy - level - (x - near) * rstd * slope), from the sums of dy and dy * xhat."""
    near, slope = gpu.scalar(x, mean), dgamma / values
    level = a / values - (mean - near) * rstd * slope
    scale = rstd * gpu.load(gamma, channel) if affine & 1 else rstd
    return near, gpu.scalar(x, rstd), gpu.scalar(x, slope), gpu.scalar(x, level), gpu.scalar(x, scale)


@gpu.device
def slope_of(x, mean, rstd, a, b):
    """Sum of dy * xhat, from those of dy and of dy * (x - near)."""
    return b * rstd - (mean - gpu.scalar(x, mean)) * rstd * a


@gpu.device
def keep_scale(mean, rstd, gamma, beta, affine, channel, pad, coefs):
    """What `apply.normalize` needs of a channel."""
    near, scale, shift = scaled(coefs, mean, rstd, gamma, beta, affine, channel)
    gpu.store(coefs, channel, near)
    gpu.store(coefs, pad + channel, scale)
    gpu.store(coefs, 2 * pad + channel, shift)


@gpu.device
def keep_slope(mean, rstd, gamma, affine, channel, a, dgamma, values, pad, coefs):
    """What `apply.gradient` needs of a channel."""
    near, inverse, slope, level, scale = sloped(coefs, mean, rstd, gamma, affine, channel, a, dgamma, values)
    gpu.store(coefs, channel, near)
    gpu.store(coefs, pad + channel, inverse)
    gpu.store(coefs, 2 * pad + channel, slope)
    gpu.store(coefs, 3 * pad + channel, level)
    gpu.store(coefs, 4 * pad + channel, scale)


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
        dgamma = slope_of(coefs, middle, rstd, a, b)
        gpu.store(sums, channel, a)
        gpu.store(sums, C + channel, dgamma)
        gpu.store(grads, channel, gpu.scalar(grads, a))
        gpu.store(grads, C + channel, gpu.scalar(grads, dgamma))
        if training:
            keep_slope(middle, rstd, gamma, affine, channel, a, dgamma, values, pad, coefs)
        else:
            gpu.store(coefs, channel, gpu.scalar(coefs, zero))
            gpu.store(coefs, pad + channel, gpu.scalar(coefs, rstd * gpu.load(gamma, channel) if affine & 1 else rstd))
            gpu.store(coefs, 2 * pad + channel, gpu.scalar(coefs, zero))


@kernel("t t f f s s f w i4 i4 i4 w")
def set_slope(mean, m2, count, eps, sum_dy, sum_dy_xhat, values, gamma, affine, C, pad, coefs):
    """Coefficients (5, pad) for `apply.gradient` from given statistics and sums (C,) over `values` per channel; m2 as `set_scale`."""
    channel = gpu.block() * gpu.threads() + gpu.thread()
    if channel < C:
        spread = gpu.load(m2, channel)
        rstd = 1.0 / sqrt(spread / count + eps) if count else spread
        a, dgamma = gpu.load(sum_dy, channel), gpu.load(sum_dy_xhat, channel)
        keep_slope(gpu.scalar(sum_dy, gpu.load(mean, channel)), rstd, gamma, affine, channel, a, dgamma, values, pad, coefs)


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
