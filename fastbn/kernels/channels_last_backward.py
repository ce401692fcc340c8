"""Backward kernels on (R, C) arrays, C contiguous; panels, tiles, folds and tasks as in `channels_last`."""

from __future__ import annotations

from fastbn.kernels._jit import kernel, leaf, prange
from fastbn.kernels._simd import fence, lanes, load, load_some, load_wide, muladd, spread, store, store_some, store_stream
from fastbn.kernels.channels_last import columns
from fastbn.kernels.channels_last_apply import ROWS, affine_rows, on_boundary
from fastbn.kernels.elementwise import constant_scale, gradient, standardize


@leaf
def fill_standardize(x, mean, rstd, c0, c1, k):
    """Rows 0 .. 2: high, scale, shift of xhat = (x - high) * scale + shift, for columns c0 .. c1 of channels repeated."""
    C = mean.size
    for j in range(c0, c1):
        c = j % C
        k[0, j], k[1, j], k[2, j] = standardize(x, mean[c], rstd[c])


@leaf
def panel_sums(dy, x, r0, r1, c, k, t, q):
    """t, q = sums of dy and of dy * xhat over rows r0 .. r1, for the 4 vectors from column c."""
    W = lanes(x)
    c1, c2, c3 = c + W, c + 2 * W, c + 3 * W
    h0, h1, h2, h3 = load(k, (0, c)), load(k, (0, c1)), load(k, (0, c2)), load(k, (0, c3))
    s0, s1, s2, s3 = load(k, (1, c)), load(k, (1, c1)), load(k, (1, c2)), load(k, (1, c3))
    o0, o1, o2, o3 = load(k, (2, c)), load(k, (2, c1)), load(k, (2, c2)), load(k, (2, c3))
    zero = spread(x, 0.0)
    t0, t1, t2, t3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    for r in range(r0, r1):
        g = load(dy, (r, c))
        t0, q0 = t0 + g, muladd(g, muladd(load(x, (r, c)) - h0, s0, o0), q0)
        g = load(dy, (r, c1))
        t1, q1 = t1 + g, muladd(g, muladd(load(x, (r, c1)) - h1, s1, o1), q1)
        g = load(dy, (r, c2))
        t2, q2 = t2 + g, muladd(g, muladd(load(x, (r, c2)) - h2, s2, o2), q2)
        g = load(dy, (r, c3))
        t3, q3 = t3 + g, muladd(g, muladd(load(x, (r, c3)) - h3, s3, o3), q3)
    store(t, (c,), t0)
    store(t, (c1,), t1)
    store(t, (c2,), t2)
    store(t, (c3,), t3)
    store(q, (c,), q0)
    store(q, (c1,), q1)
    store(q, (c2,), q2)
    store(q, (c3,), q3)


@leaf
def vector_sums(dy, x, r0, r1, c, count, k, t, q):
    """The same for one vector, of which `count` lanes are columns."""
    h, s, o = load(k, (0, c)), load(k, (1, c)), load(k, (2, c))
    zero = spread(x, 0.0)
    t0, q0 = zero, zero
    for r in range(r0, r1):
        g = load_some(dy, (r, c), count, zero)
        t0, q0 = t0 + g, muladd(g, muladd(load_some(x, (r, c), count, h) - h, s, o), q0)
    store(t, (c,), t0)
    store(q, (c,), q0)


@leaf
def part_sums(dy, x, r0, r1, c0, c1, work, sums):
    """sums (2, width) of columns c0 .. c1 over rows r0 .. r1, tiles added in float64; rows 3 and 4 of `work` are scratch."""
    W = lanes(x)
    t, q = work[3], work[4]
    end = (c1 + W - 1) // W * W
    zero = spread(sums, 0.0)
    for c in range(c0, end, 8):
        store(sums, (0, c), zero)
        store(sums, (1, c), zero)
    for row in range(r0, r1, ROWS):
        stop = min(r1, row + ROWS)
        c = c0
        while c + 4 * W <= c1:
            panel_sums(dy, x, row, stop, c, work, t, q)
            c += 4 * W
        while c < c1:
            vector_sums(dy, x, row, stop, c, min(W, c1 - c), work, t, q)
            c += W
        for c in range(c0, end, 8):
            store(sums, (0, c), load(sums, (0, c)) + load_wide(t, (c,)))
            store(sums, (1, c), load(sums, (1, c)) + load_wide(q, (c,)))


@leaf
def fill_gradient(x, mean, rstd, gamma, sums, count, c0, c1, k):
    """Rows 0 .. 4 of the coefficients of dx = ((dy - mean_dy) + ((x - high) * slope + offset)) * scale."""
    C = mean.size
    for j in range(c0, c1):
        c = j % C
        k[0, j], k[1, j], k[2, j], k[3, j], k[4, j] = gradient(x, mean[c], rstd[c], gamma, c, sums[0, c], sums[1, c], count)


@leaf
def gradient_panel(dy, x, r0, r1, c, k, stream, dx):
    """dx on rows r0 .. r1 of the 4 vectors from column c."""
    W = lanes(x)
    c1, c2, c3 = c + W, c + 2 * W, c + 3 * W
    h0, h1, h2, h3 = load(k, (0, c)), load(k, (0, c1)), load(k, (0, c2)), load(k, (0, c3))
    p0, p1, p2, p3 = load(k, (1, c)), load(k, (1, c1)), load(k, (1, c2)), load(k, (1, c3))
    o0, o1, o2, o3 = load(k, (2, c)), load(k, (2, c1)), load(k, (2, c2)), load(k, (2, c3))
    m0, m1, m2, m3 = load(k, (3, c)), load(k, (3, c1)), load(k, (3, c2)), load(k, (3, c3))
    a0, a1, a2, a3 = load(k, (4, c)), load(k, (4, c1)), load(k, (4, c2)), load(k, (4, c3))
    for r in range(r1 - 1, r0 - 1, -1):
        v0 = ((load(dy, (r, c)) - m0) + muladd(load(x, (r, c)) - h0, p0, o0)) * a0
        v1 = ((load(dy, (r, c1)) - m1) + muladd(load(x, (r, c1)) - h1, p1, o1)) * a1
        v2 = ((load(dy, (r, c2)) - m2) + muladd(load(x, (r, c2)) - h2, p2, o2)) * a2
        v3 = ((load(dy, (r, c3)) - m3) + muladd(load(x, (r, c3)) - h3, p3, o3)) * a3
        if stream:
            store_stream(dx, (r, c), v0)
            store_stream(dx, (r, c1), v1)
            store_stream(dx, (r, c2), v2)
            store_stream(dx, (r, c3), v3)
        else:
            store(dx, (r, c), v0)
            store(dx, (r, c1), v1)
            store(dx, (r, c2), v2)
            store(dx, (r, c3), v3)


@leaf
def gradient_vector(dy, x, r0, r1, c, count, k, dx):
    """The same for one vector, of which `count` lanes are columns."""
    h, p, o, m, a = load(k, (0, c)), load(k, (1, c)), load(k, (2, c)), load(k, (3, c)), load(k, (4, c))
    for r in range(r1 - 1, r0 - 1, -1):
        g = load_some(dy, (r, c), count, m) - m
        store_some(dx, (r, c), count, (g + muladd(load_some(x, (r, c), count, h) - h, p, o)) * a)


@leaf
def gradient_rows(dy, x, first, last, c0, c1, k, stream, dx):
    """dx on rows first .. last, columns c0 .. c1, last tile first."""
    W = lanes(x)
    stream = stream and on_boundary(dx)
    r1 = last
    while r1 > first:
        r0 = max(first, r1 - ROWS)
        c = c0
        while c + 4 * W <= c1:
            gradient_panel(dy, x, r0, r1, c, k, stream, dx)
            c += 4 * W
        while c < c1:
            gradient_vector(dy, x, r0, r1, c, min(W, c1 - c), k, dx)
            c += W
        r1 = r0
    if stream:
        fence()


@leaf
def fill_constant(x, mean, rstd, gamma, c0, c1, k):
    """Rows 0 .. 2: dx = (dy - 0) * scale + 0 where the statistics are constants."""
    C = mean.size
    for j in range(c0, c1):
        k[0, j], k[1, j], k[2, j] = x.dtype.type(0.0), constant_scale(x, rstd[j % C], gamma, j % C), x.dtype.type(0.0)


@leaf
def part_gradient(dy, x, r0, r1, c0, c1, mean, rstd, gamma, sums, count, training, stream, work, dx):
    """dx on rows r0 .. r1, columns c0 .. c1."""
    if training:
        fill_gradient(x, mean, rstd, gamma, sums, count, c0, c1, work)
        gradient_rows(dy, x, r0, r1, c0, c1, work, stream, dx)
    else:
        fill_constant(x, mean, rstd, gamma, c0, c1, work)
        affine_rows(dy, r0, r1, c0, c1, work, stream, dx)


@kernel("x2 x2 x2 x2 m1 m1 i i i w3 s3 s2")
def grad_reduce(dy, rest_dy, x, rest, mean, rstd, rest_rows, parts, groups, work, partial, sums):
    """sums (2, C): sum of dy, sum of dy * xhat; workspaces work (parts, 5, width) and partial (parts + 1, 2, width)."""
    R, C = x.shape[0], mean.size
    for task in prange(parts * groups):
        p, g = task // groups, task % groups
        c0, c1 = columns(x, g, groups)
        fill_standardize(x, mean, rstd, c0, c1, work[p])
        part_sums(dy, x, R * p // parts, R * (p + 1) // parts, c0, c1, work[p], partial[p])
    if rest_rows > 0:
        part_sums(rest_dy, rest, 0, rest_rows, 0, C, work[0], partial[parts])
    for i in range(2):
        for c in range(C):
            t = partial[parts, i, c] if rest_rows > 0 else 0.0
            for p in range(parts):
                for j in range(c, x.shape[1], C):
                    t += partial[p, i, j]
            sums[i, c] = t


@kernel("x2 x2 x2 x2 m1 m1 x1 m2 f b i i i b w3 y2 y2")
def grad_input(dy, rest_dy, x, rest, mean, rstd, gamma, sums, count, training, rest_rows, parts, groups, stream, work, dx, rest_dx):
    """dx from the sums; `training` False for constant statistics; `work` (parts, 5, width)."""
    R = x.shape[0]
    for task in prange(parts * groups):
        p, g = task // groups, task % groups
        c0, c1 = columns(x, g, groups)
        r0, r1 = R * p // parts, R * (p + 1) // parts
        part_gradient(dy, x, r0, r1, c0, c1, mean, rstd, gamma, sums, count, training, stream, work[p], dx)
    if rest_rows > 0:
        part_gradient(rest_dy, rest, 0, rest_rows, 0, mean.size, mean, rstd, gamma, sums, count, training, False, work[0], rest_dx)


@kernel("x2 x2 m1 m1 x1 b i b w2 y2 s2")
def backward(dy, x, mean, rstd, gamma, training, groups, stream, work, dx, sums):
    """grad_reduce and grad_input, a group of columns at a time; sums (2, width) and `work` (5, width) as wide as whole vectors."""
    R = x.shape[0]
    for g in prange(groups):
        c0, c1 = columns(x, g, groups)
        fill_standardize(x, mean, rstd, c0, c1, work)
        part_sums(dy, x, 0, R, c0, c1, work, sums)
        part_gradient(dy, x, 0, R, c0, c1, mean, rstd, gamma, sums, float(R), training, stream, work, dx)
