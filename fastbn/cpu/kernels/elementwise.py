"""The elementwise half of every pass: y from x, dx from dy and x, and each channel's coefficients.

The coefficients split the mean into its nearest value in the arithmetic of x and the remainder: `x - mean_hi` is exact
near the mean, where `x * scale + shift` would cancel, and the remainder goes into the shift, which costs nothing. They
are computed in float64, eight channels at a time, into the rows of a workspace k.
"""

from __future__ import annotations

from fastbn.cpu.kernels.beyond import centred, fits, keeps
from fastbn.cpu.kernels.jit import SHARED, kernel, leaf
from fastbn.cpu.kernels.simd import (
    address,
    at,
    bytes_of,
    choose,
    lanes,
    load,
    load_broadcast,
    load_far,
    load_some,
    load_wide,
    muladd,
    prefetch,
    quiet,
    root,
    rounded,
    splice,
    store,
    store_some,
    store_stream,
    store_wide,
    wide,
)

TINY = 5e-324  # the least number above 0


@leaf
def wide_rstd(m2, c, n, count, eps):
    """1 / sqrt(m2 / count + eps) of channels c .. c + n, the same bits as `Moments.rstd`."""
    return wide(1.0) / root(load_wide(m2, (c,), n) / wide(count) + wide(eps))


@leaf
def channel_rstd(m2_or_rstd, c, n, count, eps):
    """The same, or, where count is 0, rstd as it stands."""
    return wide_rstd(m2_or_rstd, c, n, count, eps) if count > 0.0 else load_wide(m2_or_rstd, (c,), n)


@leaf
def put_affine(x, mean, rstd, gamma, beta, c, n, k, i):
    """Columns i .. i + n of k = (mean_hi, scale, shift) of channels c .. c + n; whether they fit.

    y = (x - mean_hi) * scale + shift.
    """
    g = load_wide(gamma, (c,), n) if gamma.size else wide(1.0)
    b = load_wide(beta, (c,), n) if beta.size else wide(0.0)
    mean_hi, scale = rounded(x, mean), rounded(x, g * rstd)
    tail = mean - mean_hi
    shift = b - choose(tail, -TINY, TINY, tail, tail * scale)  # an infinite scale would make NaN of a remainder of 0
    store_wide(k, (0, i), n, mean_hi)
    store_wide(k, (1, i), n, scale)
    store_wide(k, (2, i), n, shift)
    scale = g * rstd
    return centred(x, mean, n) and fits(x, scale, n) and fits(x, shift, n) and keeps(x, scale, g, n)


@leaf
def fill_affine(x, mean, m2_or_rstd, count, eps, gamma, beta, c0, c1, k):
    """The coefficients of channels c0 .. c1 from column 0 of k; see `channel_rstd`.

    False where one leaves the range of float32: see `beyond`.
    """
    fit = True
    for c in range(c0, c1, 8):
        n = min(8, c1 - c)
        rstd = channel_rstd(m2_or_rstd, c, n, count, eps)
        fit = put_affine(x, load_wide(mean, (c,), n), rstd, gamma, beta, c, n, k, c - c0) and fit
    return fit


@leaf
def put_standardize(x, mean, rstd, c, n, k, i):
    """The same for xhat = (x - mean_hi) * scale + shift."""
    m, r = load_wide(mean, (c,), n), load_wide(rstd, (c,), n)
    mean_hi, scale = rounded(x, m), rounded(x, r)
    shift = wide(0.0) - (m - mean_hi) * scale
    store_wide(k, (0, i), n, mean_hi)
    store_wide(k, (1, i), n, scale)
    store_wide(k, (2, i), n, shift)
    return centred(x, m, n) and fits(x, r, n) and fits(x, shift, n) and keeps(x, r, wide(1.0), n)


@leaf
def fill_standardize(x, mean, rstd, c0, c1, k):
    """The same of channels c0 .. c1 from column 0 of k."""
    fit = True
    for c in range(c0, c1, 8):
        fit = put_standardize(x, mean, rstd, c, min(8, c1 - c), k, c - c0) and fit
    return fit


@leaf
def put_gradient(x, mean, rstd, gamma, sums, count, training, c, n, k, i):
    """Columns i .. i + n of k = (mean_hi, slope, offset, mean_dy_hi, scale) of channels c .. c + n; whether they fit.

    dx = ((dy - mean_dy_hi) + ((x - mean_hi) * slope + offset)) * scale; where the statistics are constants, those of
    `affine_row` on dy: (0, gamma * rstd, 0).
    """
    # The slope is rstd times the mean of dy * xhat; times gamma * rstd too, it would underflow for data near 1e30.
    m, r = load_wide(mean, (c,), n), load_wide(rstd, (c,), n)
    g = load_wide(gamma, (c,), n) if gamma.size else wide(1.0)
    scale = r * g
    fit = fits(x, scale, n) and keeps(x, scale, g, n)
    if training:
        mean_dy, mean_dy_xhat = load_wide(sums, (0, c), n) / wide(count), load_wide(sums, (1, c), n) / wide(count)
        mean_hi, mean_dy_hi, exact = rounded(x, m), rounded(x, mean_dy), (wide(0.0) - r) * mean_dy_xhat
        slope = rounded(x, exact)
        offset = (wide(0.0) - (m - mean_hi)) * slope - (mean_dy - mean_dy_hi)
        store_wide(k, (0, i), n, mean_hi)
        store_wide(k, (1, i), n, slope)
        store_wide(k, (2, i), n, offset)
        store_wide(k, (3, i), n, mean_dy_hi)
        store_wide(k, (4, i), n, scale)
        fit = centred(x, m, n) and centred(x, mean_dy, n) and fits(x, offset, n) and fit
        fit = fits(x, exact, n) and keeps(x, exact, mean_dy_xhat, n) and fit
    else:
        store_wide(k, (0, i), n, wide(0.0))
        store_wide(k, (1, i), n, scale)
        store_wide(k, (2, i), n, wide(0.0))
    return fit


@leaf
def fill_gradient(x, mean, rstd, gamma, sums, count, training, c0, c1, k):
    """The same of channels c0 .. c1 from column 0 of k; False where one leaves the range of float32."""
    fit = True
    for c in range(c0, c1, 8):
        fit = put_gradient(x, mean, rstd, gamma, sums, count, training, c, min(8, c1 - c), k, c - c0) and fit
    return fit


@leaf
def narrow(sums, c0, c1, grads):
    """grads = sums (2, C) of channels c0 .. c1 in the dtype of parameters."""
    for i in range(2):
        for c in range(c0, c1, 8):
            n = min(8, c1 - c)
            store_wide(grads, (i, c), n, load_wide(sums, (i, c), n))


@leaf
def head(y, index, size):
    """Elements of a row of `size` before the first boundary of a whole vector's bytes; all where none lies on one."""
    whole = lanes(y) * bytes_of(y)
    gap = -address(y, index) & (whole - 1)
    return min(size, gap // bytes_of(y)) if gap % bytes_of(y) == 0 else size


@leaf
def affine(v, h, a, b):
    """y of the vector v."""
    return quiet(muladd(v - h, a, b))


@leaf
def gradient(g, v, h, p, o, m, a):
    """dx of the vectors g of dy and v of x."""
    return quiet(((g - m) + muladd(v - h, p, o)) * a)


@leaf
def affine_row(x, n, c, s0, s1, k, i, prefetch_distance, stream, y):
    """y = (x - mean_hi) * scale + shift on columns s0 .. s1 of row n of channel c, coefficients k[:, i].

    Past the cache where `stream`. That leaves room there: the row of the channel `prefetch_distance` further, to be
    reduced next, is fetched meanwhile, unless that is 0.
    """
    W = lanes(x)
    h, a, b = load_broadcast(k, (0, i)), load_broadcast(k, (1, i)), load_broadcast(k, (2, i))
    s = s0
    if stream:
        first = head(y, (n, c, s), s1 - s)
        if 0 < first < W:
            store_some(y, (n, c, s), first, affine(load_some(x, (n, c, s), first, h), h, a, b))
            s += first
        while first < W and s + W <= s1:
            if prefetch_distance > 0:
                prefetch(x, (n, c + prefetch_distance, s))
            store_stream(y, (n, c, s), affine(load(x, (n, c, s)), h, a, b))
            s += W
    # One loop: with two vectors a turn and the end of the row behind it, rows of 64 bytes took 5 times as long, 1.6 MB
    # in rows of 196 3 times, 4 to 20 MB in rows of 1 KB and more 1.1 to 1.4 times.
    while s < s1:
        if s + W <= s1:
            store(y, (n, c, s), affine(load_far(x, (n, c, s)), h, a, b))
        else:
            store_some(y, (n, c, s), s1 - s, affine(load_some(x, (n, c, s), s1 - s, h), h, a, b))
        s += W


@leaf
def gradient_row(dy, x, n, c, s0, s1, k, i, prefetch_distance, stream, dx):
    """dx = ((dy - mean_dy_hi) + ((x - mean_hi) * slope + offset)) * scale, as `affine_row`."""
    W = lanes(x)
    h, p, o = load_broadcast(k, (0, i)), load_broadcast(k, (1, i)), load_broadcast(k, (2, i))
    m, a = load_broadcast(k, (3, i)), load_broadcast(k, (4, i))
    s = s0
    if stream:
        first = head(dx, (n, c, s), s1 - s)
        if 0 < first < W:
            g = load_some(dy, (n, c, s), first, m)
            store_some(dx, (n, c, s), first, gradient(g, load_some(x, (n, c, s), first, h), h, p, o, m, a))
            s += first
        while first < W and s + W <= s1:
            if prefetch_distance > 0:
                prefetch(x, (n, c + prefetch_distance, s))
                prefetch(dy, (n, c + prefetch_distance, s))
            store_stream(dx, (n, c, s), gradient(load(dy, (n, c, s)), load(x, (n, c, s)), h, p, o, m, a))
            s += W
    while s < s1:
        if s + W <= s1:
            store(dx, (n, c, s), gradient(load_far(dy, (n, c, s)), load_far(x, (n, c, s)), h, p, o, m, a))
        else:
            g = load_some(dy, (n, c, s), s1 - s, m)
            store_some(dx, (n, c, s), s1 - s, gradient(g, load_some(x, (n, c, s), s1 - s, h), h, p, o, m, a))
        s += W


@leaf
def joined(x):
    """Whether the end of a row of (N, C, S) is the beginning of the next."""
    N, C, S = x.shape
    return (C == 1 or x.strides[1] == S * bytes_of(x)) and (N == 1 or x.strides[0] == C * S * bytes_of(x))


@leaf
def one_stream(x, y):
    """Whether rows of (N, C, S) can be written past the cache as one: by `affine_stream`, `gradient_stream`."""
    W = lanes(x)
    return x.shape[2] >= W and joined(x) and joined(y) and head(y, (0, 0, 0), W) < W


@leaf
def as_row(x):
    """A joined array as one row."""
    return at(x, address(x, (0, 0, 0)), (x.size,))


@leaf
def affine_stream(x, first, last, k, i, prefetch_distance, y):
    """y of rows first .. last of N * C in the order of memory, past the cache; coefficients from column i of k on."""
    # A vector on the end of a row takes the coefficients of both. Written as two parts, as `affine_row` does, the line
    # of memory that they share has to be read first, which holds up all stores behind it: 96 x 192 x 17 x 17 took 1400
    # us and takes 610, 64 x 128 x 29 x 29 1360 and 1130.
    C, S, W = x.shape[1], x.shape[2], lanes(x)
    z, out = as_row(x), as_row(y)
    j, stop = first * S, last * S
    end = j + S
    h, a, b = load_broadcast(k, (0, i)), load_broadcast(k, (1, i)), load_broadcast(k, (2, i))
    some = head(out, (j,), S)
    if some > 0:
        store_some(out, (j,), some, affine(load_some(z, (j,), some, h), h, a, b))
        j += some
    while j < stop:
        while j + W <= end:
            if prefetch_distance > 0:
                prefetch(z, (j + prefetch_distance * S,))
            store_stream(out, (j,), affine(load(z, (j,)), h, a, b))
            j += W
        some = end - j
        if end < stop:
            i = i + 1 if i + 1 < C else 0
            h1, a1, b1 = load_broadcast(k, (0, i)), load_broadcast(k, (1, i)), load_broadcast(k, (2, i))
            if some > 0:
                store_stream(
                    out, (j,), affine(load(z, (j,)), splice(h, some, h1), splice(a, some, a1), splice(b, some, b1))
                )
                j += W
            h, a, b = h1, a1, b1
            end += S
        elif some > 0:
            store_some(out, (j,), some, affine(load_some(z, (j,), some, h), h, a, b))
            j = stop


@leaf
def gradient_stream(dy, x, first, last, k, i, prefetch_distance, dx):
    """dx of rows first .. last of N * C, in the same way."""
    C, S, W = x.shape[1], x.shape[2], lanes(x)
    dz, z, out = as_row(dy), as_row(x), as_row(dx)
    j, stop = first * S, last * S
    end = j + S
    h, p, o = load_broadcast(k, (0, i)), load_broadcast(k, (1, i)), load_broadcast(k, (2, i))
    m, a = load_broadcast(k, (3, i)), load_broadcast(k, (4, i))
    some = head(out, (j,), S)
    if some > 0:
        g = load_some(dz, (j,), some, m)
        store_some(out, (j,), some, gradient(g, load_some(z, (j,), some, h), h, p, o, m, a))
        j += some
    while j < stop:
        while j + W <= end:
            if prefetch_distance > 0:
                prefetch(z, (j + prefetch_distance * S,))
                prefetch(dz, (j + prefetch_distance * S,))
            store_stream(out, (j,), gradient(load(dz, (j,)), load(z, (j,)), h, p, o, m, a))
            j += W
        some = end - j
        if end < stop:
            i = i + 1 if i + 1 < C else 0
            h1, p1, o1 = load_broadcast(k, (0, i)), load_broadcast(k, (1, i)), load_broadcast(k, (2, i))
            m1, a1 = load_broadcast(k, (3, i)), load_broadcast(k, (4, i))
            if some > 0:
                h, p, o, m, a = (
                    splice(h, some, h1),
                    splice(p, some, p1),
                    splice(o, some, o1),
                    splice(m, some, m1),
                    splice(a, some, a1),
                )
                store_stream(out, (j,), gradient(load(dz, (j,)), load(z, (j,)), h, p, o, m, a))
                j += W
            h, p, o, m, a = h1, p1, o1, m1, a1
            end += S
        elif some > 0:
            g = load_some(dz, (j,), some, m)
            store_some(out, (j,), some, gradient(g, load_some(z, (j,), some, h), h, p, o, m, a))
            j = stop


@kernel(SHARED, parallel=False, m2="m1 (C,)", out="s1 (C,)")
def rstd(m2, count, eps, out):
    """out = 1 / sqrt(m2 / count + eps)."""
    for c in range(0, m2.size, 8):
        n = min(8, m2.size - c)
        store_wide(out, (c,), n, wide_rstd(m2, c, n, count, eps))


@kernel(
    SHARED,
    parallel=False,
    m2="m1 (C,)",
    freedom="f that m2 is divided by",
    weight="f of the new statistics",
    running_mean="w1 (C,), moved in place",
    running_var="w1 (C,), moved in place",
)
def track(mean, m2, freedom, weight, running_mean, running_var):
    """Running statistics move towards mean and m2 / freedom by `weight`."""
    kept, new = wide(1.0 - weight), wide(weight)
    for c in range(0, mean.size, 8):
        n = min(8, mean.size - c)
        var = load_wide(m2, (c,), n) / wide(freedom)
        store_wide(running_mean, (c,), n, kept * load_wide(running_mean, (c,), n) + new * load_wide(mean, (c,), n))
        store_wide(running_var, (c,), n, kept * load_wide(running_var, (c,), n) + new * var)
