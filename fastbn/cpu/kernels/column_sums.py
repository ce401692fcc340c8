"""Sums over the columns of a tile of rows, in accumulators that stay in the first-level cache: see `columns`."""

from __future__ import annotations

from fastbn.cpu.kernels.jit import leaf, routine
from fastbn.cpu.kernels.simd import broadcast, lanes, load, load_far, load_some, muladd, store
from fastbn.cpu.kernels.welford import LINEAR

# Rows that accumulators take before they are added up: 4 at a time, or one by one. Where most values of a column are
# equal and one is far from them, each addition to a sum of squares rounds the same way: 32 in a row lost 1.8e-6 of a
# variance, 8 and then 3 more lose 6e-7.
CHAIN, ALONG_CHAIN = 32, 8


@leaf
def fetch(x, r, j, count, fill, whole):
    """The vector at x[r, j], or its first `count` lanes; `whole` is a constant wherever this is inlined."""
    return load(x, (r, j)) if whole else load_some(x, (r, j), count, fill)


@leaf
def four_rows(x, r, j, i, count, whole, k, t, q):
    """Rows r .. r + 4 of one vector."""
    h = load(k, (i,))
    a, b = fetch(x, r, j, count, h, whole) - h, fetch(x, r + 1, j, count, h, whole) - h
    c, d = fetch(x, r + 2, j, count, h, whole) - h, fetch(x, r + 3, j, count, h, whole) - h
    store(t, (i,), load(t, (i,)) + ((a + b) + (c + d)))
    store(q, (i,), load(q, (i,)) + (muladd(b, b, a * a) + muladd(d, d, c * c)))


@leaf
def four_by_four(x, r, j, i, k, t, q):
    """The same of four vectors, row after row: along the memory where rows are narrow."""
    # moments of 100352 x 64: 0.64 -> 0.51 ms
    W = lanes(x)
    i1, i2, i3 = i + W, i + 2 * W, i + 3 * W
    j1, j2, j3 = j + W, j + 2 * W, j + 3 * W
    h0, h1, h2, h3 = load(k, (i,)), load(k, (i1,)), load(k, (i2,)), load(k, (i3,))
    a0, a1 = load_far(x, (r, j)) - h0, load_far(x, (r, j1)) - h1
    a2, a3 = load_far(x, (r, j2)) - h2, load_far(x, (r, j3)) - h3
    b0, b1 = load_far(x, (r + 1, j)) - h0, load_far(x, (r + 1, j1)) - h1
    b2, b3 = load_far(x, (r + 1, j2)) - h2, load_far(x, (r + 1, j3)) - h3
    s0, s1, s2, s3 = a0 + b0, a1 + b1, a2 + b2, a3 + b3
    p0, p1 = muladd(b0, b0, a0 * a0), muladd(b1, b1, a1 * a1)
    p2, p3 = muladd(b2, b2, a2 * a2), muladd(b3, b3, a3 * a3)
    a0, a1 = load_far(x, (r + 2, j)) - h0, load_far(x, (r + 2, j1)) - h1
    a2, a3 = load_far(x, (r + 2, j2)) - h2, load_far(x, (r + 2, j3)) - h3
    b0, b1 = load_far(x, (r + 3, j)) - h0, load_far(x, (r + 3, j1)) - h1
    b2, b3 = load_far(x, (r + 3, j2)) - h2, load_far(x, (r + 3, j3)) - h3
    store(t, (i,), load(t, (i,)) + (s0 + (a0 + b0)))
    store(t, (i1,), load(t, (i1,)) + (s1 + (a1 + b1)))
    store(t, (i2,), load(t, (i2,)) + (s2 + (a2 + b2)))
    store(t, (i3,), load(t, (i3,)) + (s3 + (a3 + b3)))
    store(q, (i,), load(q, (i,)) + (p0 + muladd(b0, b0, a0 * a0)))
    store(q, (i1,), load(q, (i1,)) + (p1 + muladd(b1, b1, a1 * a1)))
    store(q, (i2,), load(q, (i2,)) + (p2 + muladd(b2, b2, a2 * a2)))
    store(q, (i3,), load(q, (i3,)) + (p3 + muladd(b3, b3, a3 * a3)))


@leaf
def one_row(x, r, j, i, count, whole, k, t, q):
    """Row r of one vector."""
    h = load(k, (i,))
    d = (load_far(x, (r, j)) if whole else load_some(x, (r, j), count, h)) - h
    store(t, (i,), load(t, (i,)) + d)
    store(q, (i,), muladd(d, d, load(q, (i,))))


@leaf
def along_row(x, r, j, width, k, t, q):
    """Row r added to t, q."""
    W, i = lanes(x), 0
    while i + W <= width:
        one_row(x, r, j + i, i, W, True, k, t, q)
        i += W
    if i < width:
        one_row(x, r, j + i, i, width - i, False, k, t, q)


@leaf
def clear(t, q, width):
    """Both 0."""
    zero = broadcast(t, 0.0)
    for i in range(0, width, lanes(t)):
        store(t, (i,), zero)
        store(q, (i,), zero)


@leaf
def add_up(t, q, u, v, width):
    """t, q += u, v."""
    for i in range(0, width, lanes(t)):
        store(t, (i,), load(t, (i,)) + load(u, (i,)))
        store(q, (i,), load(q, (i,)) + load(v, (i,)))


@routine
def tile_sums(x, r0, r1, j, width, k, t, q, u, v):
    """t, q = sums of x - k and of its square over rows r0 .. r1, for `width` columns from j; u, v are workspaces."""
    W = lanes(x)
    for m in range(r0, r1, CHAIN):
        a, b = (t, q) if m == r0 else (u, v)
        clear(a, b, width)
        r, stop = m, min(r1, m + CHAIN)
        while r + 4 <= stop:
            i = 0
            while width <= LINEAR and i + 4 * W <= width:
                four_by_four(x, r, j + i, i, k, a, b)
                i += 4 * W
            while i + W <= width:
                four_rows(x, r, j + i, i, W, True, k, a, b)
                i += W
            if i < width:
                four_rows(x, r, j + i, i, width - i, False, k, a, b)
            r += 4
        while r < stop:
            along_row(x, r, j, width, k, a, b)
            r += 1
        if m > r0:
            add_up(t, q, u, v, width)


@routine
def along_sums(x, r0, r1, j, width, k, t, q, u, v):
    """The same row by row, along the memory."""
    # Twice the stores, and so slower wherever a cache holds the array (0.6 to 0.9 times), but memory reads ahead for
    # one run of it better than for four: moments of 100352 x 256 take 2.9 ms instead of 4.9.
    clear(t, q, width)
    for m in range(r0, r1, ALONG_CHAIN):
        clear(u, v, width)
        for r in range(m, min(r1, m + ALONG_CHAIN)):
            along_row(x, r, j, width, k, u, v)
        add_up(t, q, u, v, width)
