"""The elementwise passes on the GPU, on any layout: runs of contiguous memory, cut into groups of 16 bytes.

An array is `runs` pieces of `length` elements: one where all is contiguous, N or R where images or rows are apart, N *
C where channels are. A thread takes four groups at the same place of four images, or of one channel: one position and
one set of coefficients serve all four, and nothing is stored before the last is loaded. Blocks go through an array from
its end, which the pass before has left in cache. Every kernel stands here twice, for positions that fit 32 bits and for
longer arrays: a division of 64 bits takes as long as the rest.
"""

from fastbn.cuda.kernels import gpu
from fastbn.cuda.kernels.jit import kernel

EACH = 4  # groups of a thread
# channels of a group: one, two at most, or any of a table that is written out column by column
ONE, TWO, TABLE = 0, 1, 2


@gpu.device
def first_of(apart):
    """A thread's first group; the others follow so many groups apart."""
    i = (gpu.blocks() - 1 - gpu.block()) * gpu.threads() + gpu.thread()
    return i + gpu.quotient(i, apart) * (EACH - 1) * apart


@gpu.device
def run_of(u, groups, lanes):
    """(run, element in it) of the u-th group."""
    run = gpu.quotient(u, groups)
    return run, (u - run * groups) * lanes


@gpu.device
def start_of(run, inner, outer_step, inner_step):
    """Where a run begins."""
    n = gpu.quotient(run, inner)
    return n * outer_step + (run - n * inner) * inner_step


@gpu.device
def channel_of(run, e, C, S, per_run):
    """(channel, position in its S values) of an element of a run."""
    q = gpu.quotient(e, S)
    c = run * per_run + q
    return c - gpu.quotient(c, C) * C, e - q * S


@gpu.device
def affine_of(x, coefs, pad, run, e, C, S, per_run, mode):
    """The first three rows of a table of coefficients for the lanes of a group that begins at element e of a run."""
    c, s = channel_of(run, e, C, S, per_run)
    if mode == TABLE:
        return gpu.load_table(x, coefs, s), gpu.load_table(x, coefs, pad + s), gpu.load_table(x, coefs, 2 * pad + s)
    p, q, r = gpu.load(coefs, c), gpu.load(coefs, pad + c), gpu.load(coefs, 2 * pad + c)
    if mode == ONE:
        return gpu.spread(x, p), gpu.spread(x, q), gpu.spread(x, r)
    c, left = c + 1 if c + 1 < C else 0, S - s
    p, q = gpu.split(x, p, gpu.load(coefs, c), left), gpu.split(x, q, gpu.load(coefs, pad + c), left)
    return p, q, gpu.split(x, r, gpu.load(coefs, 2 * pad + c), left)


def _normalize(
    x, y, coefs, pad, C, S, runs, length, per_run, inner, xn, xm, yn, ym, groups, mode, aligned, apart, xd, yd
):
    """y = (x - near) * scale + shift, with `finish.keep_scale`'s coefficients (3, pad).

    Run r begins at r // inner * xn + r % inner * xm in x, and in y alike; it holds `per_run` channels of S elements, in
    `groups` groups. A thread's four lie `apart` groups and xd elements apart, if those are not 0. In mode TABLE a table
    of S columns is that of one channel.
    """
    lanes = gpu.lanes(x)
    u = first_of(apart)
    if aligned and xd and u + (EACH - 1) * apart < runs * gpu.quotient(length, lanes):
        r, e = run_of(u, groups, lanes)
        i, j = start_of(r, inner, xn, xm) + e, start_of(r, inner, yn, ym) + e
        a, b = gpu.load_group(x, i), gpu.load_group(x, i + xd)
        c, d = gpu.load_group(x, i + 2 * xd), gpu.load_group(x, i + 3 * xd)
        near, scale, shift = affine_of(x, coefs, pad, r, e, C, S, per_run, mode)
        gpu.store_group(y, j, (a - near) * scale + shift)
        gpu.store_group(y, j + yd, (b - near) * scale + shift)
        gpu.store_group(y, j + 2 * yd, (c - near) * scale + shift)
        gpu.store_group(y, j + 3 * yd, (d - near) * scale + shift)
        return
    for _ in range(EACH):
        if u < runs * groups:
            r, e = run_of(u, groups, lanes)
            i, j, count = start_of(r, inner, xn, xm) + e, start_of(r, inner, yn, ym) + e, min(lanes, length - e)
            near, scale, shift = affine_of(x, coefs, pad, r, e, C, S, per_run, mode)
            if aligned and count == lanes:
                gpu.store_group(y, j, (gpu.load_group(x, i) - near) * scale + shift)
            else:
                gpu.store_any(y, j, count, (gpu.load_any(x, i, count) - near) * scale + shift)
        u += apart


@gpu.device
def slope_of(x, coefs, pad, run, e, C, S, per_run, mode):
    """All four rows likewise."""
    near, slope, level = affine_of(x, coefs, pad, run, e, C, S, per_run, mode)
    c, s = channel_of(run, e, C, S, per_run)
    if mode == TABLE:
        return near, slope, level, gpu.load_table(x, coefs, 3 * pad + s)
    scale = gpu.load(coefs, 3 * pad + c)
    if mode == ONE:
        return near, slope, level, gpu.spread(x, scale)
    return near, slope, level, gpu.split(x, scale, gpu.load(coefs, 3 * pad + (c + 1 if c + 1 < C else 0)), S - s)


@gpu.device
def slant(group, steep, near, slope, level, scale):
    """A gradient."""
    return (steep - (group - near) * slope) * scale - level


def _gradient(
    x,
    dy,
    dx,
    coefs,
    pad,
    C,
    S,
    runs,
    length,
    per_run,
    inner,
    xn,
    xm,
    dn,
    dm,
    yn,
    ym,
    groups,
    mode,
    aligned,
    apart,
    xd,
    dd,
    yd,
):
    """dx = (dy - (x - near) * slope) * scale - level, with `finish.keep_slope`'s coefficients (4, pad).

    As `_normalize`.
    """
    lanes = gpu.lanes(x)
    u = first_of(apart)
    if aligned and xd and u + (EACH - 1) * apart < runs * gpu.quotient(length, lanes):
        r, e = run_of(u, groups, lanes)
        i, k, j = start_of(r, inner, xn, xm) + e, start_of(r, inner, dn, dm) + e, start_of(r, inner, yn, ym) + e
        a, b = gpu.load_group(x, i), gpu.load_group(x, i + xd)
        c, d = gpu.load_group(x, i + 2 * xd), gpu.load_group(x, i + 3 * xd)
        da, db = gpu.load_group(dy, k), gpu.load_group(dy, k + dd)
        dc, ddy = gpu.load_group(dy, k + 2 * dd), gpu.load_group(dy, k + 3 * dd)
        near, slope, level, scale = slope_of(x, coefs, pad, r, e, C, S, per_run, mode)
        gpu.store_group(dx, j, slant(a, da, near, slope, level, scale))
        gpu.store_group(dx, j + yd, slant(b, db, near, slope, level, scale))
        gpu.store_group(dx, j + 2 * yd, slant(c, dc, near, slope, level, scale))
        gpu.store_group(dx, j + 3 * yd, slant(d, ddy, near, slope, level, scale))
        return
    for _ in range(EACH):
        if u < runs * groups:
            r, e = run_of(u, groups, lanes)
            i, k, j = start_of(r, inner, xn, xm) + e, start_of(r, inner, dn, dm) + e, start_of(r, inner, yn, ym) + e
            near, slope, level, scale = slope_of(x, coefs, pad, r, e, C, S, per_run, mode)
            count = min(lanes, length - e)
            if aligned and count == lanes:
                gpu.store_group(dx, j, slant(gpu.load_group(x, i), gpu.load_group(dy, k), near, slope, level, scale))
            else:
                found = slant(gpu.load_any(x, i, count), gpu.load_any(dy, k, count), near, slope, level, scale)
                gpu.store_any(dx, j, count, found)
        u += apart


normalize = kernel("x x w i4 i4 i4 i8 i8 i8 i4 i8 i8 i8 i8 i4 i4 i4 i4 i8 i8", "normalize")(_normalize)
normalize_long = kernel("x x w i4 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i4 i4 i8 i8 i8", "normalize_long")(_normalize)
gradient = kernel("x x x w i4 i4 i4 i8 i8 i8 i4 i8 i8 i8 i8 i8 i8 i4 i4 i4 i4 i8 i8 i8", "gradient")(_gradient)
gradient_long = kernel("x x x w i4 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i4 i4 i8 i8 i8 i8", "gradient_long")(
    _gradient
)
