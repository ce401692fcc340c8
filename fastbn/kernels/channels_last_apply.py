"""The elementwise passes on (R, C) arrays, C contiguous: y from x, dx from dy and x; and the forward that reads x once.

Coefficients come as rows of a workspace, a value per column, and stay in registers while a panel walks the rows of a tile. Panels,
tiles, folds and tasks as in `channels_last`.
"""

from __future__ import annotations

from fastbn.kernels._jit import kernel, leaf, prange
from fastbn.kernels._simd import address, fence, lanes, load, load_some, muladd, store, store_some, store_stream
from fastbn.kernels.channels_last import columns, part_moments
from fastbn.kernels.elementwise import affine, inverse_deviation

ROWS = 64  # of a tile: as many values as a lane may add up in float32 (see `channels_last.TILE`)


@leaf
def on_boundary(y):
    """Whether every row of y begins on a 64-byte boundary, as streaming stores need."""
    return ((address(y, (0, 0)) | y.strides[0]) & 63) == 0


@leaf
def fill_affine(x, mean, rstd, gamma, beta, c0, c1, coefficients):
    """Rows high, scale, shift of y = (x - high) * scale + shift, for columns c0 .. c1 of channels repeated."""
    C = mean.size
    for j in range(c0, c1):
        c = j % C
        coefficients[0, j], coefficients[1, j], coefficients[2, j] = affine(x, mean[c], rstd[c], gamma, beta, c)


@leaf
def affine_panel(x, r0, r1, c, k, stream, y):
    """y = (x - high) * scale + shift on rows r0 .. r1 of the 4 vectors from column c."""
    W = lanes(x)
    c1, c2, c3 = c + W, c + 2 * W, c + 3 * W
    h0, h1, h2, h3 = load(k, (0, c)), load(k, (0, c1)), load(k, (0, c2)), load(k, (0, c3))
    a0, a1, a2, a3 = load(k, (1, c)), load(k, (1, c1)), load(k, (1, c2)), load(k, (1, c3))
    b0, b1, b2, b3 = load(k, (2, c)), load(k, (2, c1)), load(k, (2, c2)), load(k, (2, c3))
    if stream:
        for r in range(r1 - 1, r0 - 1, -1):
            store_stream(y, (r, c), muladd(load(x, (r, c)) - h0, a0, b0))
            store_stream(y, (r, c1), muladd(load(x, (r, c1)) - h1, a1, b1))
            store_stream(y, (r, c2), muladd(load(x, (r, c2)) - h2, a2, b2))
            store_stream(y, (r, c3), muladd(load(x, (r, c3)) - h3, a3, b3))
    else:
        for r in range(r1 - 1, r0 - 1, -1):
            store(y, (r, c), muladd(load(x, (r, c)) - h0, a0, b0))
            store(y, (r, c1), muladd(load(x, (r, c1)) - h1, a1, b1))
            store(y, (r, c2), muladd(load(x, (r, c2)) - h2, a2, b2))
            store(y, (r, c3), muladd(load(x, (r, c3)) - h3, a3, b3))


@leaf
def affine_rows(x, first, last, c0, c1, k, stream, y):
    """y on rows first .. last, columns c0 .. c1, last tile first."""
    W = lanes(x)
    stream = stream and on_boundary(y)
    r1 = last
    while r1 > first:
        r0 = max(first, r1 - ROWS)
        c = c0
        while c + 4 * W <= c1:
            affine_panel(x, r0, r1, c, k, stream, y)
            c += 4 * W
        while c < c1:
            count = min(W, c1 - c)
            h, a, b = load(k, (0, c)), load(k, (1, c)), load(k, (2, c))
            for r in range(r1 - 1, r0 - 1, -1):
                store_some(y, (r, c), count, muladd(load_some(x, (r, c), count, h) - h, a, b))
            c += W
        r1 = r0
    if stream:
        fence()


@kernel("x2 x2 m1 m1 x1 x1 i i i b w3 y2 y2")
def normalize(x, rest, mean, rstd, gamma, beta, rest_rows, parts, groups, stream, work, y, rest_y):
    """y = gamma * (x - mean) * rstd + beta; `work` (parts, 3, width)."""
    R = x.shape[0]
    for task in prange(parts * groups):
        p, g = task // groups, task % groups
        c0, c1 = columns(x, g, groups)
        fill_affine(x, mean, rstd, gamma, beta, c0, c1, work[p])
        affine_rows(x, R * p // parts, R * (p + 1) // parts, c0, c1, work[p], stream, y)
    if rest_rows > 0:
        affine_rows(rest, 0, rest_rows, 0, mean.size, work[0], False, rest_y)


@kernel("x2 x1 x1 f i b w2 y2 s1 s1")
def forward(x, gamma, beta, eps, groups, stream, work, y, mean, m2):
    """Moments and normalize, a group of columns at a time, still in the cache; mean, m2 and `work` (3, width) as wide as whole vectors."""
    R, count = x.shape[0], float(x.shape[0])
    for g in prange(groups):
        c0, c1 = columns(x, g, groups)
        part_moments(x, 0, R, c0, c1, work, mean, m2)
        for c in range(c0, c1):
            rstd = inverse_deviation(m2[c], count, eps)
            work[0, c], work[1, c], work[2, c] = affine(x, mean[c], rstd, gamma, beta, c)
        affine_rows(x, 0, R, c0, c1, work, stream, y)
