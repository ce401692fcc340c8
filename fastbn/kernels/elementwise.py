"""The elementwise half of every pass: y from x, dx from dy and x, with each channel's coefficients.

The coefficients split the mean into its nearest value in the dtype of x and the remainder: `x - high` is exact near the mean, where
`x * scale + shift` would cancel, and the remainder goes into the shift, which costs nothing.
"""

from __future__ import annotations

import math

import numpy as np

from fastbn.kernels._jit import leaf
from fastbn.kernels._simd import address, broadcast, lanes, load, load_some, muladd, store, store_some, store_stream


@leaf
def inverse_deviation(m2, count, eps):
    """1 / sqrt(var + eps), the same bits as `Moments.rstd`."""
    return 1.0 / math.sqrt(m2 / count + eps)


@leaf
def affine(x, mean, rstd, gamma, beta, c):
    """(high, scale, shift) of channel c: y = (x - high) * scale + shift."""
    g = np.float64(gamma[c]) if gamma.size else 1.0
    b = np.float64(beta[c]) if beta.size else 0.0
    high = x.dtype.type(mean)
    scale = x.dtype.type(g * rstd)
    return high, scale, x.dtype.type(b - (mean - np.float64(high)) * np.float64(scale))


@leaf
def standardize(x, mean, rstd):
    """(high, scale, shift) of one channel: xhat = (x - high) * scale + shift."""
    high = x.dtype.type(mean)
    scale = x.dtype.type(rstd)
    return high, scale, x.dtype.type(-(mean - np.float64(high)) * np.float64(scale))


@leaf
def gradient(x, mean, rstd, gamma, c, sum_dy, sum_dy_xhat, count):
    """(high, slope, offset, mean_dy, scale) of channel c: dx = ((dy - mean_dy) + ((x - high) * slope + offset)) * scale.

    The slope is rstd times the mean of dy * xhat; times gamma * rstd too, it would underflow for data near 1e30.
    """
    high = x.dtype.type(mean)
    slope = x.dtype.type(-rstd * (sum_dy_xhat / count))
    mean_dy = x.dtype.type(sum_dy / count)
    offset = -(mean - np.float64(high)) * np.float64(slope) - (sum_dy / count - np.float64(mean_dy))
    return high, slope, x.dtype.type(offset), mean_dy, constant_scale(x, rstd, gamma, c)


@leaf
def constant_scale(x, rstd, gamma, c):
    """gamma * rstd of channel c: dx / dy where the statistics are constants."""
    return x.dtype.type(rstd * np.float64(gamma[c])) if gamma.size else x.dtype.type(rstd)


@leaf
def head(y, index, size):
    """Elements of a row of `size` before y's first 64-byte boundary, which an odd address never meets."""
    return min(size, (-address(y, index) & 63) // (64 // lanes(y)))


@leaf
def affine_row(x, n, c, s0, s1, k, stream, y):
    """y = (x - high) * scale + shift on columns s0 .. s1 of row n of channel c, coefficients k[:, c]; past the cache where `stream`."""
    W = lanes(x)
    h, a, b = broadcast(k, (0, c)), broadcast(k, (1, c)), broadcast(k, (2, c))
    i = s0
    if stream and address(y, (n, c, i)) % (64 // W) == 0:
        first = head(y, (n, c, i), s1 - i)
        if first > 0:
            store_some(y, (n, c, i), first, muladd(load_some(x, (n, c, i), first, h) - h, a, b))
            i += first
        while i + W <= s1:
            store_stream(y, (n, c, i), muladd(load(x, (n, c, i)) - h, a, b))
            i += W
    else:
        while i + 2 * W <= s1:
            v = muladd(load(x, (n, c, i)) - h, a, b)
            w = muladd(load(x, (n, c, i + W)) - h, a, b)
            store(y, (n, c, i), v)
            store(y, (n, c, i + W), w)
            i += 2 * W
        if i + W <= s1:
            store(y, (n, c, i), muladd(load(x, (n, c, i)) - h, a, b))
            i += W
    if i < s1:
        store_some(y, (n, c, i), s1 - i, muladd(load_some(x, (n, c, i), s1 - i, h) - h, a, b))


@leaf
def gradient_row(dy, x, n, c, s0, s1, k, stream, dx):
    """dx = ((dy - mean_dy) + ((x - high) * slope + offset)) * scale on columns s0 .. s1 of row n of channel c, coefficients k[:, c]."""
    W = lanes(x)
    h, p, o = broadcast(k, (0, c)), broadcast(k, (1, c)), broadcast(k, (2, c))
    m, a = broadcast(k, (3, c)), broadcast(k, (4, c))
    i = s0
    if stream and address(dx, (n, c, i)) % (64 // W) == 0:
        first = head(dx, (n, c, i), s1 - i)
        if first > 0:
            g = load_some(dy, (n, c, i), first, m) - m
            store_some(dx, (n, c, i), first, (g + muladd(load_some(x, (n, c, i), first, h) - h, p, o)) * a)
            i += first
        while i + W <= s1:
            g = load(dy, (n, c, i)) - m
            store_stream(dx, (n, c, i), (g + muladd(load(x, (n, c, i)) - h, p, o)) * a)
            i += W
    else:
        while i + W <= s1:
            g = load(dy, (n, c, i)) - m
            store(dx, (n, c, i), (g + muladd(load(x, (n, c, i)) - h, p, o)) * a)
            i += W
    if i < s1:
        g = load_some(dy, (n, c, i), s1 - i, m) - m
        store_some(dx, (n, c, i), s1 - i, (g + muladd(load_some(x, (n, c, i), s1 - i, h) - h, p, o)) * a)
