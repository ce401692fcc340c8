"""Where a coefficient leaves the range of float32: the same elementwise passes and sums in float64, channel by channel.

1 / sqrt(var + eps) does where eps is below 1e-76, or 0 beside a subnormal variance; times gamma, where gamma is huge;
the slope of dx, where deviations are near 1e38 or 1e-38. Infinite in float32 it would make NaN of a deviation of 0, and
subnormal it loses digits. Right, and slow: it is no case of practice. The other channels keep their bits.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu.kernels.jit import leaf, routine
from fastbn.cpu.kernels.simd import (
    address,
    at,
    choose,
    element,
    lanes,
    load_wide,
    muladd,
    quiet,
    store_wide,
    total,
    wide,
    within,
)

MOST, LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
INF = float("inf")


@leaf
def fits(x, a, n):
    """Whether the first n lanes of a wide vector are in the range of what x is computed in, or not finite anyway."""
    return lanes(x) == 8 or within(choose(a, -INF, INF, a, wide(0.0)), n, -MOST, MOST)


@leaf
def centred(x, mean, n):
    """Whether no value of the range is further than that from the first n lanes."""
    return fits(x, mean * wide(2.0**26), n)


@leaf
def keeps(x, a, b, n):
    """Whether none of the first n lanes of a is subnormal there where b is not."""
    return lanes(x) == 8 or within(choose(a, -LEAST, LEAST, b, wide(0.0)), n, -LEAST, LEAST)


@leaf
def finite(x, a):
    """Whether a sum is, or x is not of float32: a sum there may be too large where that in float64 is not."""
    return lanes(x) == 8 or -INF < a < INF


@leaf
def row(x, index, size):
    """`size` elements from x[index] on, of one row."""
    return at(x, address(x, index), (size,))


@leaf
def rstd_of(m2_or_rstd, count, eps, c):
    """1 / sqrt(var + eps) of channel c: from m2, or, where count is 0, as it stands."""
    return m2_or_rstd[c] if count == 0.0 else 1.0 / np.sqrt(m2_or_rstd[c] / count + eps)


@leaf
def times(gamma, rstd, c):
    """gamma * rstd of channel c."""
    return gamma[c] * rstd if gamma.size else rstd


@routine
def wide_affine(x, mean, scale, shift, y):
    """y = (x - mean) * scale + shift on one row."""
    m, a, b = wide(mean), wide(scale), wide(shift)
    for s in range(0, x.size, 8):
        n = min(8, x.size - s)
        store_wide(y, (s,), n, quiet((load_wide(x, (s,), n) - m) * a + b))


@routine
def wide_gradient(dy, x, mean, rstd, scale, mean_dy, mean_dy_xhat, dx):
    """dx = (dy - mean_dy - xhat * mean_dy_xhat) * scale on one row."""
    m, r, a, d, g = wide(mean), wide(rstd), wide(scale), wide(mean_dy), wide(mean_dy_xhat)
    for s in range(0, x.size, 8):
        n = min(8, x.size - s)
        xhat = (load_wide(x, (s,), n) - m) * r
        store_wide(dx, (s,), n, quiet((load_wide(dy, (s,), n) - d - xhat * g) * a))


@routine
def wide_sums(dy, x, mean, rstd):
    """(sum of dy, sum of dy * xhat) of one row."""
    m, r, t, q = wide(mean), wide(rstd), wide(0.0), wide(0.0)
    last_t, last_q, s = 0.0, 0.0, 0
    while s + 8 <= x.size:
        g = load_wide(dy, (s,), 8)
        t, q = t + g, muladd(g, (load_wide(x, (s,), 8) - m) * r, q)
        s += 8
    while s < x.size:
        g_s = element(dy, (s,))
        last_t += g_s
        last_q += g_s * ((element(x, (s,)) - mean) * rstd)
        s += 1
    return total(t) + last_t, total(q) + last_q


@routine
def affine_columns(x, r0, r1, j, S, c, mean, m2_or_rstd, count, eps, gamma, beta, y):
    """y of channel c, S columns from j, on rows r0 .. r1 of (R, F); x[:, c] is one of (N, C, S)."""
    scale, shift = times(gamma, rstd_of(m2_or_rstd, count, eps, c), c), np.float64(beta[c]) if beta.size else 0.0
    for r in range(r0, r1):
        wide_affine(row(x, (r, j), S), mean[c], scale, shift, row(y, (r, j), S))


@routine
def gradient_columns(dy, x, r0, r1, j, S, c, mean, rstd, gamma, sums, count, training, dx):
    """dx of the same."""
    scale = times(gamma, rstd[c], c)
    for r in range(r0, r1):
        dz, out = row(dy, (r, j), S), row(dx, (r, j), S)
        if training:
            wide_gradient(dz, row(x, (r, j), S), mean[c], rstd[c], scale, sums[0, c] / count, sums[1, c] / count, out)
        else:
            wide_affine(dz, 0.0, scale, 0.0, out)


@routine
def sum_columns(dy, x, r0, r1, s, S, c, mean, rstd, fit, sums):
    """sums (2, P) of strip s, S columns of channel c, over rows r0 .. r1; those that are finite stay if `fit`."""
    t, q = 0.0, 0.0
    for r in range(r0, r1):
        more_t, more_q = wide_sums(row(dy, (r, s * S), S), row(x, (r, s * S), S), mean[c], rstd[c])
        t, q = t + more_t, q + more_q
    if not (fit and finite(x, sums[0, s])):
        sums[0, s] = t
    if not (fit and finite(x, sums[1, s])):
        sums[1, s] = q
