"""Where a coefficient leaves the range of float32: the same elementwise passes and sums in float64, channel by channel.

1 / sqrt(var + eps) does where eps is below 1e-76, or 0 beside a subnormal variance; times gamma, where gamma is huge; the slope of
dx, where deviations are near 1e38 or 1e-38. Infinite in float32 it would make NaN of a deviation of 0, and subnormal it loses
digits. Right, and slow: it is no case of practice.
"""

from __future__ import annotations

import numpy as np

from fastbn.kernels._jit import leaf, routine
from fastbn.kernels._memory import address, at
from fastbn.kernels._simd import choose, element, lanes, load_wide, quiet, store_wide, wide, within

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
def row(x, index, size):
    """`size` elements from x[index] on, of one row."""
    return at(x, address(x, index), (size,))


@leaf
def rstd_of(spread, count, eps, c):
    """1 / sqrt(var + eps) of channel c: from m2, or, where count is 0, as it stands."""
    return spread[c] if count == 0.0 else 1.0 / np.sqrt(spread[c] / count + eps)


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
    t, q = 0.0, 0.0
    for s in range(x.size):
        g = element(dy, (s,))
        t += g
        q += g * ((element(x, (s,)) - mean) * rstd)
    return t, q


@routine
def affine_rows(x, c, mean, spread, count, eps, gamma, beta, y):
    """y of all rows of channel c of (N, C, S)."""
    N, S = x.shape[0], x.shape[2]
    scale, shift = times(gamma, rstd_of(spread, count, eps, c), c), np.float64(beta[c]) if beta.size else 0.0
    for n in range(N - 1, -1, -1):
        wide_affine(row(x, (n, c, 0), S), mean[c], scale, shift, row(y, (n, c, 0), S))


@routine
def gradient_rows(dy, x, c, mean, rstd, gamma, sums, count, training, dx):
    """dx of all rows of channel c of (N, C, S)."""
    N, S = x.shape[0], x.shape[2]
    scale = times(gamma, rstd[c], c)
    for n in range(N - 1, -1, -1):
        dz, out = row(dy, (n, c, 0), S), row(dx, (n, c, 0), S)
        if training:
            wide_gradient(dz, row(x, (n, c, 0), S), mean[c], rstd[c], scale, sums[0, c] / count, sums[1, c] / count, out)
        else:
            wide_affine(dz, 0.0, scale, 0.0, out)


@leaf
def strips_of(x, first, last, S, fold):
    """How many strips of S columns, from column first * S on: of channels first .. last, `fold` times, as far as the row goes."""
    return min((last - first) * fold, x.shape[1] // S - first)


@routine
def affine_columns(x, r0, r1, first, last, S, fold, mean, spread, count, eps, gamma, beta, y):
    """y of channels first .. last of rows r0 .. r1 of (R, F), each S columns, `fold` times over."""
    for i in range(strips_of(x, first, last, S, fold)):
        c, j = first + i % (last - first), (first + i) * S
        scale, shift = times(gamma, rstd_of(spread, count, eps, c), c), np.float64(beta[c]) if beta.size else 0.0
        for r in range(r0, r1):
            wide_affine(row(x, (r, j), S), mean[c], scale, shift, row(y, (r, j), S))


@routine
def gradient_columns(dy, x, r0, r1, first, last, S, fold, mean, rstd, gamma, sums, count, training, dx):
    """dx of the same."""
    for i in range(strips_of(x, first, last, S, fold)):
        c, j = first + i % (last - first), (first + i) * S
        scale = times(gamma, rstd[c], c)
        for r in range(r0, r1):
            dz, out = row(dy, (r, j), S), row(dx, (r, j), S)
            if training:
                wide_gradient(dz, row(x, (r, j), S), mean[c], rstd[c], scale, sums[0, c] / count, sums[1, c] / count, out)
            else:
                wide_affine(dz, 0.0, scale, 0.0, out)


@routine
def sum_columns(dy, x, r0, r1, first, strips, C, S, mean, rstd, sums):
    """sums (2, P) of so many strips of S columns from `first` on, over rows r0 .. r1; strip s is of channel s modulo C."""
    for s in range(first, first + strips):
        t, q = 0.0, 0.0
        for r in range(r0, r1):
            more_t, more_q = wide_sums(row(dy, (r, s * S), S), row(x, (r, s * S), S), mean[s % C], rstd[s % C])
            t, q = t + more_t, q + more_q
        sums[0, s], sums[1, s] = t, q
