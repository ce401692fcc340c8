"""What is left to do per channel, in float64.

Merge the partial statistics of a channel's parts, and compute the passes' coefficients.
A block takes `across` channels and divides its threads among them, each reads partial results in turn; the order, and
so every bit, comes from the shape. Channels that float32 has too little range for are read again.
"""

from math import sqrt

from fastbn.cuda.kernels.gpu import gpu
from fastbn.cuda.kernels.jit import kernel
from fastbn.cuda.kernels.merging import (
    grid_index,
    join,
    join_slots,
    keep,
    keep_sums,
    kept,
    kept_sums,
    out_of_range,
    reread,
    reread_sums,
    store_pair,
    sum_slots,
)


@gpu.device
def channel_of(across):
    """(channel, its place among those of a block, this thread's among the channel's, how many these are)."""
    below = gpu.quotient(gpu.thread(), across)
    beside = gpu.thread() - below * across
    return gpu.block() * across + beside, beside, below, gpu.threads() // across


@gpu.device
def moments_of(partial, entries, C, across, x, N, S, sn, sc, stats):
    """(channel, whether this thread is to finish it, count, mean, m2), from partial results (entries, 3, C)."""
    channel, beside, below, every = channel_of(across)
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
    if out_of_range(x, count, base + rest, m2):
        found = reread(x, channel * sc, N, S, sn, below, every)
    else:
        found = (count, base, rest, m2) if below == 0 else nothing
    keep(stats, gpu.thread(), *found)
    join_slots(stats, every, across, 1, 0)
    count, base, rest, m2 = kept(stats, beside)
    return channel, channel < C and below == 0, count, base + rest, m2


@gpu.device
def rstd_of(m2, channel, count, eps):
    """1 / sqrt(variance + eps) of a channel, from statistics (C,)."""
    return 1.0 / sqrt(gpu.load(m2, channel) / count + eps)


@gpu.device
def normalize_coefs_of(x, mean, rstd, gamma, beta, affine, channel):
    """(mean_hi, scale, shift) of y = (x - mean_hi) * scale + shift, the mean's rest in the shift."""
    mean_hi = gpu.scalar(x, mean)
    scale = rstd * gpu.load(gamma, channel) if affine & 1 else rstd
    shift = (mean_hi - mean) * scale
    if affine & 2:
        shift += gpu.load(beta, channel)
    return mean_hi, gpu.scalar(x, scale), gpu.scalar(x, shift)


@gpu.device
def gradient_coefs_of(x, mean, rstd, gamma, affine, channel, a, dgamma, values):
    """(mean_hi, projection, mean_dy, scale) of dx = (dy - (x - mean_hi) * projection) * scale - mean_dy.

    From the sums of dy and dy * xhat; `mean_dy` is that of dy, scaled.
    """
    mean_hi, projection = gpu.scalar(x, mean), dgamma / values * rstd
    mean_dy = a / values - (mean - mean_hi) * projection
    scale = rstd * gpu.load(gamma, channel) if affine & 1 else rstd
    return mean_hi, gpu.scalar(x, projection), gpu.scalar(x, mean_dy * scale), gpu.scalar(x, scale)


@gpu.device
def dgamma_of(x, mean, rstd, a, b):
    """Sum of dy * xhat, from those of dy and of dy * (x - mean_hi)."""
    return b * rstd - (mean - gpu.scalar(x, mean)) * rstd * a


@gpu.device
def store_coefs(mean_hi, second, third, channel, C, columns, copies, pad, coefs):
    """What `apply.normalize` needs of a channel: in each of its columns of each copy of C channels."""
    for i in range(copies):
        at = (i * C + channel) * columns
        for j in range(at, at + columns):
            gpu.store(coefs, j, mean_hi)
            gpu.store(coefs, pad + j, second)
            gpu.store(coefs, 2 * pad + j, third)


@gpu.device
def store_normalize_coefs(mean, rstd, gamma, beta, affine, channel, C, columns, copies, pad, coefs):
    """The same, from statistics."""
    found = normalize_coefs_of(coefs, mean, rstd, gamma, beta, affine, channel)
    store_coefs(*found, channel, C, columns, copies, pad, coefs)


@gpu.device
def store_gradient_coefs(mean, rstd, gamma, affine, channel, a, dgamma, values, C, columns, copies, pad, coefs):
    """What `apply.gradient` needs of a channel, likewise."""
    mean_hi, projection, mean_dy, scale = gradient_coefs_of(
        coefs, mean, rstd, gamma, affine, channel, a, dgamma, values
    )
    store_coefs(mean_hi, projection, mean_dy, channel, C, columns, copies, pad, coefs)
    for i in range(copies):
        at = 3 * pad + (i * C + channel) * columns
        for j in range(at, at + columns):
            gpu.store(coefs, j, scale)


@kernel(across="i4 channels of a block")
def finish_moments(partial, entries, C, across, x, N, S, sn, sc, stats):
    """Mean and m2 of each channel into `stats` (2, C), from partial results (entries, 3, C) of x (N, C, S)."""
    channel, mine, _, mean, m2 = moments_of(partial, entries, C, across, x, N, S, sn, sc, stats)
    if mine:
        store_pair(stats, 0, channel, C, mean, m2)


@kernel(across="i4 channels of a block")
def finish_forward(
    partial, entries, C, across, x, N, S, sn, sc, eps, gamma, beta, affine, columns, copies, pad, stats, coefs
):
    """The same, and coefficients (3, pad) for `apply.normalize`."""
    channel, mine, count, mean, m2 = moments_of(partial, entries, C, across, x, N, S, sn, sc, stats)
    if mine:
        store_pair(stats, 0, channel, C, mean, m2)
        store_normalize_coefs(
            mean, 1.0 / sqrt(m2 / count + eps), gamma, beta, affine, channel, C, columns, copies, pad, coefs
        )


@kernel()
def normalize_coefs(mean, var, eps, gamma, beta, affine, C, columns, copies, pad, coefs):
    """Coefficients (3, pad) for `apply.normalize` from given statistics (C,)."""
    channel = grid_index()
    if channel < C:
        rstd = rstd_of(var, channel, 1.0, eps)
        store_normalize_coefs(
            gpu.load(mean, channel), rstd, gamma, beta, affine, channel, C, columns, copies, pad, coefs
        )


@gpu.device
def sums_of(partial, entries, C, across, x, dy, mean, N, S, sn, sc, dn, dc, sums):
    """(channel, whether this thread is to finish it, sum of dy, sum of dy * (x - mean)), of partial (entries, 2, C)."""
    channel, beside, below, every = channel_of(across)
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
        mean_hi = gpu.scalar(sums, gpu.scalar(x, gpu.load(mean, channel)))
        a, b = reread_sums(x, dy, channel * sc, channel * dc, N, S, sn, dn, below, every, mean_hi)
    elif below > 0:
        a, b = zero, zero
    keep_sums(sums, gpu.thread(), a, b)
    sum_slots(sums, every, across, 1, 0)
    a, b = kept_sums(sums, beside)
    return channel, channel < C and below == 0, a, b


@kernel(across="i4 channels of a block", training="i4 whether the statistics are those of x; else constants")
def finish_backward(
    partial, entries, C, across, x, dy, N, S, sn, sc, dn, dc, mean, m2, count, eps, values, gamma, affine, training,
    columns, copies, pad, sums, grads, coefs,
):  # fmt: skip
    """Sums of dy and dy * xhat into `sums` and `grads` (2, C), and coefficients (4, pad) for the pass over elements.

    From partial sums (entries, 2, C) of x and dy (N, C, S). If not `training`, dx is dy scaled: no coefficient of x's.
    """
    zero = gpu.scalar(sums, 0.0)
    channel, mine, a, b = sums_of(partial, entries, C, across, x, dy, mean, N, S, sn, sc, dn, dc, sums)
    if mine:
        rstd, middle = rstd_of(m2, channel, count, eps), gpu.load(mean, channel)
        dgamma = dgamma_of(coefs, middle, rstd, a, b)
        store_pair(sums, 0, channel, C, a, dgamma)
        store_pair(grads, 0, channel, C, a, dgamma)
        if training:
            store_gradient_coefs(
                middle, rstd, gamma, affine, channel, a, dgamma, values, C, columns, copies, pad, coefs
            )
        else:
            scale = gpu.scalar(coefs, rstd * gpu.load(gamma, channel) if affine & 1 else rstd)
            nil = gpu.scalar(coefs, zero)
            store_coefs(nil, scale, nil, channel, C, columns, copies, pad, coefs)


@kernel(sum_dy="s (C,), sum of dy", sum_dy_xhat="s (C,), sum of dy * xhat")
def gradient_coefs(mean, var, eps, sum_dy, sum_dy_xhat, values, gamma, affine, C, columns, copies, pad, coefs):
    """Coefficients (4, pad) for `apply.gradient` from given statistics and sums (C,)."""
    channel = grid_index()
    if channel < C:
        rstd = rstd_of(var, channel, 1.0, eps)
        a, dgamma = gpu.load(sum_dy, channel), gpu.load(sum_dy_xhat, channel)
        middle = gpu.scalar(sum_dy, gpu.load(mean, channel))
        store_gradient_coefs(middle, rstd, gamma, affine, channel, a, dgamma, values, C, columns, copies, pad, coefs)


@kernel(
    mean="s (C,), of the batch",
    m2="s (C,), of the batch",
    freedom="f what m2 is divided by",
    weight="f of the batch; the rest is that of what was",
    running_mean="w (C,), moved in place",
    running_var="w (C,), moved in place",
)
def track(mean, m2, freedom, weight, C, running_mean, running_var):
    """Running statistics (C,) move towards mean and m2 / freedom by `weight`."""
    channel = grid_index()
    if channel < C:
        kept, var = 1.0 - weight, gpu.load(m2, channel) / freedom
        moved = kept * gpu.load(running_mean, channel) + weight * gpu.load(mean, channel)
        gpu.store(running_mean, channel, gpu.scalar(running_mean, moved))
        gpu.store(running_var, channel, gpu.scalar(running_var, kept * gpu.load(running_var, channel) + weight * var))


@kernel()
def rstd(m2, count, eps, C, result):
    """`result` = 1 / sqrt(m2 / count + eps), all (C,)."""
    channel = grid_index()
    if channel < C:
        gpu.store(result, channel, rstd_of(m2, channel, count, eps))


@kernel(m2="s (C,)", freedom="f what m2 is divided by", root="i4 whether to take the square root")
def var_or_std(m2, freedom, root, C, result):
    """`result` = m2 / freedom, or its square root, all (C,)."""
    channel = grid_index()
    if channel < C:
        var = gpu.load(m2, channel) / freedom
        gpu.store(result, channel, sqrt(var) if root else var)


@kernel(
    count="f values of a channel",
    mean="s (C,)",
    m2="s (C,)",
    other_count="f of the other group",
    other_mean="s (C,)",
    other_m2="s (C,)",
    result_m2="s (C,), takes m2 of both",
)
def join_moments(count, mean, m2, other_count, other_mean, other_m2, C, result, result_m2):
    """Moments of both groups of values, all (C,)."""
    channel = grid_index()
    if channel < C:
        here = gpu.load(mean, channel), 0.0, gpu.load(m2, channel)
        _, middle, rest, q = join(
            count, *here, other_count, gpu.load(other_mean, channel), 0.0, gpu.load(other_m2, channel)
        )
        gpu.store(result, channel, middle + rest)
        gpu.store(result_m2, channel, q)


@kernel(values="t (C,)")
def widen(values, C, result):
    """`result` = values in float64, both (C,)."""
    channel = grid_index()
    if channel < C:
        gpu.store(result, channel, gpu.scalar(result, gpu.load(values, channel)))


@kernel(result="w (size,)", size="i4 elements")
def clear(result, size):
    """Zeros."""
    i = grid_index()
    if i < size:
        gpu.store(result, i, gpu.scalar(result, 0.0))
