"""The elementwise passes on the GPU, on any layout: runs of contiguous memory, cut into groups of 16 bytes.

An array is `runs` pieces of `length` elements: one where all is contiguous, N or R where images or rows are apart, N *
C where channels are. A thread takes four groups at the same place of four images, or of one channel: one position and
one set of coefficients serve all four, and nothing is stored before the last is loaded. Blocks go through an array from
its end, which the pass before has left in cache. Every kernel stands here twice, for positions that fit 32 bits and for
longer arrays: a division of 64 bits takes as long as the rest.
"""

from fastbn.cuda.kernels.gpu import gpu
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
def load_normalize_coefs(x, coefs, pad, run, e, C, S, per_run, mode):
    """The first three rows of a table of coefficients for the lanes of a group that begins at element e of a run."""
    c, s = channel_of(run, e, C, S, per_run)
    if mode == TABLE:
        return gpu.load_table(x, coefs, s), gpu.load_table(x, coefs, pad + s), gpu.load_table(x, coefs, 2 * pad + s)
    p, q, r = gpu.load(coefs, c), gpu.load(coefs, pad + c), gpu.load(coefs, 2 * pad + c)
    if mode == ONE:
        return gpu.broadcast(x, p), gpu.broadcast(x, q), gpu.broadcast(x, r)
    c, left = c + 1 if c + 1 < C else 0, S - s
    p, q = gpu.split(x, p, gpu.load(coefs, c), left), gpu.split(x, q, gpu.load(coefs, pad + c), left)
    return p, q, gpu.split(x, r, gpu.load(coefs, 2 * pad + c), left)


def _normalize(
    x, y, coefs, pad, C, S, runs, length, per_run, inner, sn, sc, yn, yc, groups, mode, aligned, apart, xd, yd
):
    """y = (x - mean_hi) * scale + shift, with `finish.normalize_coefs`' coefficients (3, pad).

    Run r begins at r // inner * sn + r % inner * sc in x, and in y alike. In mode TABLE a table of S columns is that of
    one channel.
    """
    lanes = gpu.lanes(x)
    u = first_of(apart)
    if aligned and xd and u + (EACH - 1) * apart < runs * gpu.quotient(length, lanes):
        r, e = run_of(u, groups, lanes)
        i, j = start_of(r, inner, sn, sc) + e, start_of(r, inner, yn, yc) + e
        a, b = gpu.load_group(x, i), gpu.load_group(x, i + xd)
        c, d = gpu.load_group(x, i + 2 * xd), gpu.load_group(x, i + 3 * xd)
        mean_hi, scale, shift = load_normalize_coefs(x, coefs, pad, r, e, C, S, per_run, mode)
        gpu.store_group(y, j, (a - mean_hi) * scale + shift)
        gpu.store_group(y, j + yd, (b - mean_hi) * scale + shift)
        gpu.store_group(y, j + 2 * yd, (c - mean_hi) * scale + shift)
        gpu.store_group(y, j + 3 * yd, (d - mean_hi) * scale + shift)
        return
    for _ in range(EACH):
        if u < runs * groups:
            r, e = run_of(u, groups, lanes)
            i, j, count = start_of(r, inner, sn, sc) + e, start_of(r, inner, yn, yc) + e, min(lanes, length - e)
            mean_hi, scale, shift = load_normalize_coefs(x, coefs, pad, r, e, C, S, per_run, mode)
            if aligned and count == lanes:
                gpu.store_group(y, j, (gpu.load_group(x, i) - mean_hi) * scale + shift)
            else:
                gpu.store_any(y, j, count, (gpu.load_any(x, i, count) - mean_hi) * scale + shift)
        u += apart


@gpu.device
def load_gradient_coefs(x, coefs, pad, run, e, C, S, per_run, mode):
    """All four rows likewise."""
    mean_hi, projection, mean_dy = load_normalize_coefs(x, coefs, pad, run, e, C, S, per_run, mode)
    c, s = channel_of(run, e, C, S, per_run)
    if mode == TABLE:
        return mean_hi, projection, mean_dy, gpu.load_table(x, coefs, 3 * pad + s)
    scale = gpu.load(coefs, 3 * pad + c)
    if mode == ONE:
        return mean_hi, projection, mean_dy, gpu.broadcast(x, scale)
    return (
        mean_hi,
        projection,
        mean_dy,
        gpu.split(x, scale, gpu.load(coefs, 3 * pad + (c + 1 if c + 1 < C else 0)), S - s),
    )


@gpu.device
def gradient_group(x, dy, mean_hi, projection, mean_dy, scale):
    """dx of a group."""
    return (dy - (x - mean_hi) * projection) * scale - mean_dy


def _gradient(
    x, dy, dx, coefs, pad, C, S, runs, length, per_run, inner, sn, sc, dn, dc, yn, yc, groups, mode, aligned, apart, xd,
    dd, yd,
):  # fmt: skip
    """dx = (dy - (x - mean_hi) * projection) * scale - mean_dy, with `finish.gradient_coefs`' coefficients (4, pad).

    As `_normalize`.
    """
    lanes = gpu.lanes(x)
    u = first_of(apart)
    if aligned and xd and u + (EACH - 1) * apart < runs * gpu.quotient(length, lanes):
        r, e = run_of(u, groups, lanes)
        i, k, j = start_of(r, inner, sn, sc) + e, start_of(r, inner, dn, dc) + e, start_of(r, inner, yn, yc) + e
        x0, x1 = gpu.load_group(x, i), gpu.load_group(x, i + xd)
        x2, x3 = gpu.load_group(x, i + 2 * xd), gpu.load_group(x, i + 3 * xd)
        dy0, dy1 = gpu.load_group(dy, k), gpu.load_group(dy, k + dd)
        dy2, dy3 = gpu.load_group(dy, k + 2 * dd), gpu.load_group(dy, k + 3 * dd)
        coefficients = load_gradient_coefs(x, coefs, pad, r, e, C, S, per_run, mode)
        gpu.store_group(dx, j, gradient_group(x0, dy0, *coefficients))
        gpu.store_group(dx, j + yd, gradient_group(x1, dy1, *coefficients))
        gpu.store_group(dx, j + 2 * yd, gradient_group(x2, dy2, *coefficients))
        gpu.store_group(dx, j + 3 * yd, gradient_group(x3, dy3, *coefficients))
        return
    for _ in range(EACH):
        if u < runs * groups:
            r, e = run_of(u, groups, lanes)
            i, k, j = start_of(r, inner, sn, sc) + e, start_of(r, inner, dn, dc) + e, start_of(r, inner, yn, yc) + e
            coefficients = load_gradient_coefs(x, coefs, pad, r, e, C, S, per_run, mode)
            count = min(lanes, length - e)
            if aligned and count == lanes:
                gpu.store_group(dx, j, gradient_group(gpu.load_group(x, i), gpu.load_group(dy, k), *coefficients))
            else:
                found = gradient_group(gpu.load_any(x, i, count), gpu.load_any(dy, k, count), *coefficients)
                gpu.store_any(dx, j, count, found)
        u += apart


# of arrays whose positions take 64 bits
LONG = dict.fromkeys(("C", "S", "inner", "groups", "apart"), "i8")

normalize = kernel("normalize", S="i4")(_normalize)
normalize_long = kernel("normalize_long", **LONG)(_normalize)
gradient = kernel("gradient", S="i4")(_gradient)
gradient_long = kernel("gradient_long", **LONG)(_gradient)
