"""Kernels on (R, C) arrays, C contiguous: statistics, normalize, and the forward for a few rows.

A panel of 4 vectors of columns walks the rows of a tile with its accumulators in registers, where a loop over rows would load and
store them for each row. Values are shifted by the mean so far, which makes one pass enough; tiles merge in float64. Two rows at a time
have accumulators of their own: half the rounding, and no waiting for the last addition.

Folding: k rows of few channels make one row of k * C columns, whose k parts of each channel are merged at the end. The rows that are
left over (`rest`) go through the same code unfolded. Workspaces are as wide as the columns rounded up to whole vectors (`width`).
A task is one of `parts` runs of rows by one of `groups` runs of columns.
"""

from __future__ import annotations

import numpy as np

from fastbn.kernels import welford
from fastbn.kernels._jit import kernel, leaf, prange
from fastbn.kernels._simd import lanes, load, load_some, load_wide, muladd, spread, store, store_narrow
from fastbn.kernels.channels_first import HIGH, LOW

merge = leaf(welford.merge)
finish_block = leaf(welford.block)

TILE = 128  # rows: a lane adds up 64 values in float32, which keeps a variance within 1e-6 (4 sigma over 2048 channels: 7e-7)


@leaf
def columns(x, g, groups):
    """Columns c0 .. c1 of group g: whole panels."""
    panel = 4 * lanes(x)
    panels = (x.shape[1] + panel - 1) // panel
    return panels * g // groups * panel, min(x.shape[1], panels * (g + 1) // groups * panel)


@leaf
def panel_sums(x, r0, r1, c, shift, t, q):
    """t, q = sums of x - shift and of its square over rows r0 .. r1, for the 4 vectors from column c."""
    W = lanes(x)
    c1, c2, c3 = c + W, c + 2 * W, c + 3 * W
    k0, k1, k2, k3 = load(shift, (c,)), load(shift, (c1,)), load(shift, (c2,)), load(shift, (c3,))
    zero = spread(x, 0.0)
    t0, t1, t2, t3, t4, t5, t6, t7 = zero, zero, zero, zero, zero, zero, zero, zero
    q0, q1, q2, q3, q4, q5, q6, q7 = zero, zero, zero, zero, zero, zero, zero, zero
    for r in range(r0, r1 - 1, 2):
        d = load(x, (r, c)) - k0
        t0, q0 = t0 + d, muladd(d, d, q0)
        d = load(x, (r, c1)) - k1
        t1, q1 = t1 + d, muladd(d, d, q1)
        d = load(x, (r, c2)) - k2
        t2, q2 = t2 + d, muladd(d, d, q2)
        d = load(x, (r, c3)) - k3
        t3, q3 = t3 + d, muladd(d, d, q3)
        d = load(x, (r + 1, c)) - k0
        t4, q4 = t4 + d, muladd(d, d, q4)
        d = load(x, (r + 1, c1)) - k1
        t5, q5 = t5 + d, muladd(d, d, q5)
        d = load(x, (r + 1, c2)) - k2
        t6, q6 = t6 + d, muladd(d, d, q6)
        d = load(x, (r + 1, c3)) - k3
        t7, q7 = t7 + d, muladd(d, d, q7)
    if (r1 - r0) % 2:
        d = load(x, (r1 - 1, c)) - k0
        t0, q0 = t0 + d, muladd(d, d, q0)
        d = load(x, (r1 - 1, c1)) - k1
        t1, q1 = t1 + d, muladd(d, d, q1)
        d = load(x, (r1 - 1, c2)) - k2
        t2, q2 = t2 + d, muladd(d, d, q2)
        d = load(x, (r1 - 1, c3)) - k3
        t3, q3 = t3 + d, muladd(d, d, q3)
    store(t, (c,), t0 + t4)
    store(t, (c1,), t1 + t5)
    store(t, (c2,), t2 + t6)
    store(t, (c3,), t3 + t7)
    store(q, (c,), q0 + q4)
    store(q, (c1,), q1 + q5)
    store(q, (c2,), q2 + q6)
    store(q, (c3,), q3 + q7)


@leaf
def vector_sums(x, r0, r1, c, count, shift, t, q):
    """The same for one vector, of which `count` lanes are columns."""
    k = load(shift, (c,))
    zero = spread(x, 0.0)
    t0, t1, q0, q1 = zero, zero, zero, zero
    for r in range(r0, r1 - 1, 2):
        d = load_some(x, (r, c), count, k) - k
        t0, q0 = t0 + d, muladd(d, d, q0)
        d = load_some(x, (r + 1, c), count, k) - k
        t1, q1 = t1 + d, muladd(d, d, q1)
    if (r1 - r0) % 2:
        d = load_some(x, (r1 - 1, c), count, k) - k
        t0, q0 = t0 + d, muladd(d, d, q0)
    store(t, (c,), t0 + t1)
    store(q, (c,), q0 + q1)


@leaf
def tile_sums(x, r0, r1, c0, c1, shift, t, q):
    """t, q of columns c0 .. c1."""
    W = lanes(x)
    c = c0
    while c + 4 * W <= c1:
        panel_sums(x, r0, r1, c, shift, t, q)
        c += 4 * W
    while c < c1:
        vector_sums(x, r0, r1, c, min(W, c1 - c), shift, t, q)
        c += W


@leaf
def wide_column(x, r0, r1, c):
    """(mean, m2) of column c over rows r0 .. r1, in float64."""
    shift = np.float64(x[r0, c])
    t, q = 0.0, 0.0
    for r in range(r0, r1):
        d = np.float64(x[r, c]) - shift
        t += d
        q += d * d
    return finish_block(float(r1 - r0), shift, t, q)


@leaf
def part_moments(x, r0, r1, c0, c1, work, mean, m2):
    """mean, m2 (width,) of columns c0 .. c1 over rows r0 .. r1; `work` (3, width)."""
    shift, t, q = work[0], work[1], work[2]
    W = lanes(x)
    end = (c1 + W - 1) // W * W
    none = spread(mean, 0.0)
    for c in range(c0, end, W):
        store(shift, (c,), load_some(x, (r0, c), min(W, c1 - c), spread(x, 0.0)))
    # The mean of the first rows is a better shift than the first row, which may be an outlier.
    few = min(8, r1 - r0)
    tile_sums(x, r0, r0 + few, c0, c1, shift, t, q)
    for c in range(c0, end, 8):
        store(mean, (c,), none)
        store(m2, (c,), none)
        store_narrow(shift, (c,), load_wide(shift, (c,)) + load_wide(t, (c,)) / spread(mean, float(few)))
    for row in range(r0, r1, TILE):
        stop = min(r1, row + TILE)
        tile_sums(x, row, stop, c0, c1, shift, t, q)
        before, size = float(row - r0), float(stop - row)
        weight = size / (before + size)
        n, w, k = spread(mean, size), spread(mean, weight), spread(mean, before * weight)
        for c in range(c0, end, 8):
            offset = load_wide(t, (c,)) / n
            old = load(mean, (c,))
            block_mean = load_wide(shift, (c,)) + offset
            delta = block_mean - old
            new = muladd(delta, w, old) if before > 0.0 else block_mean
            block_m2 = load_wide(q, (c,)) - offset * load_wide(t, (c,))
            store(mean, (c,), new)
            store(m2, (c,), load(m2, (c,)) + block_m2 + delta * delta * k if before > 0.0 else block_m2)
            store_narrow(shift, (c,), new)
    for c in range(c0, c1):
        if lanes(x) == 16 and not (LOW < m2[c] < HIGH):
            mean[c], m2[c] = wide_column(x, r0, r1, c)
        m2[c] = 0.0 if m2[c] < 0.0 else m2[c]  # rounding; NaN stays


@leaf
def merge_parts(R, C, fold, rest_rows, parts, partial, mean, m2):
    """mean, m2 (C,) from partial (parts + 1, 2, width): parts in order, then the folds, then the rest."""
    for p in range(1, parts):
        first, last = R * p // parts, R * (p + 1) // parts
        before, size = float(first), float(last - first)
        weight = size / (before + size)
        w, k = spread(mean, weight), spread(mean, before * weight)
        for c in range(0, partial.shape[2], 8):
            old = load(partial, (0, 0, c))
            delta = load(partial, (p, 0, c)) - old
            store(partial, (0, 0, c), muladd(delta, w, old))
            store(partial, (0, 1, c), load(partial, (0, 1, c)) + load(partial, (p, 1, c)) + delta * delta * k)
    for c in range(C):
        count, mean_c, m2_c = float(R), partial[0, 0, c], partial[0, 1, c]
        for j in range(1, fold):
            count, mean_c, m2_c = merge(count, mean_c, m2_c, float(R), partial[0, 0, j * C + c], partial[0, 1, j * C + c])
        if rest_rows > 0:
            count, mean_c, m2_c = merge(count, mean_c, m2_c, float(rest_rows), partial[parts, 0, c], partial[parts, 1, c])
        mean[c], m2[c] = mean_c, m2_c


@kernel("x2 x2 i i i i w3 s3 s1 s1")
def moments(x, rest, fold, rest_rows, parts, groups, work, partial, mean, m2):
    """mean, m2 (C,) of x (R, fold * C) and rest; workspaces work (parts, 3, width) and partial (parts + 1, 2, width)."""
    R, C = x.shape[0], x.shape[1] // fold
    for task in prange(parts * groups):
        p, g = task // groups, task % groups
        c0, c1 = columns(x, g, groups)
        part_moments(x, R * p // parts, R * (p + 1) // parts, c0, c1, work[p], partial[p, 0], partial[p, 1])
    if rest_rows > 0:
        part_moments(rest, 0, rest_rows, 0, C, work[0], partial[parts, 0], partial[parts, 1])
    merge_parts(R, C, fold, rest_rows, parts, partial, mean, m2)
