"""The elementwise passes on the GPU, on any layout: runs of contiguous memory, cut into groups of 16 bytes.

An array is `runs` pieces of `length` elements: one where all is contiguous, N or R where images or rows are apart, N * C where channels
are. A block takes four groups a thread, loaded before the first is stored. Every kernel stands here twice, for positions that fit 32 bits
and for longer arrays: a division of 64 bits takes as long as the rest of a group's work.
"""

from fastbn.kernels.cuda import _gpu as gpu
from fastbn.kernels.cuda._jit import kernel

EACH = 4  # groups of a thread


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
def coefficient(x, table, at, c, s, C, S, even):
    """A row of a table of coefficients for the lanes of a group that begins with channel c at position s."""
    if s + gpu.lanes(x) <= S:
        return gpu.spread(x, gpu.load(table, at + c))
    if even:  # channels side by side, in whole groups
        return gpu.load_table(x, table, at + c)
    return gpu.gather(x, table, at, c, s, S, C)


@gpu.device
def normalized(x, group, coefs, pad, run, e, C, S, per_run, even):
    """gamma * xhat + beta of a group."""
    c, s = channel_of(run, e, C, S, per_run)
    scaled = (group - coefficient(x, coefs, 0, c, s, C, S, even)) * coefficient(x, coefs, pad, c, s, C, S, even)
    return scaled + coefficient(x, coefs, 2 * pad, c, s, C, S, even)


def _normalize(x, y, coefs, pad, C, S, runs, length, per_run, inner, xn, xm, yn, ym, groups, even, aligned):
    """y = (x - near) * scale + shift, with `finish.keep_scale`'s coefficients (3, pad).

    Run r begins at r // inner * xn + r % inner * xm in x, and in y alike; it holds `per_run` channels of S elements, in `groups` groups.
    """
    lanes, threads = gpu.lanes(x), gpu.threads()
    u, end = gpu.block() * EACH * threads + gpu.thread(), runs * groups
    if aligned and u - gpu.thread() + EACH * threads <= runs * gpu.quotient(length, lanes):
        r, e = run_of(u, groups, lanes)
        r1, e1 = run_of(u + threads, groups, lanes)
        r2, e2 = run_of(u + 2 * threads, groups, lanes)
        r3, e3 = run_of(u + 3 * threads, groups, lanes)
        a = gpu.load_group(x, start_of(r, inner, xn, xm) + e)
        b = gpu.load_group(x, start_of(r1, inner, xn, xm) + e1)
        c = gpu.load_group(x, start_of(r2, inner, xn, xm) + e2)
        d = gpu.load_group(x, start_of(r3, inner, xn, xm) + e3)
        gpu.store_group(y, start_of(r, inner, yn, ym) + e, normalized(x, a, coefs, pad, r, e, C, S, per_run, even))
        gpu.store_group(y, start_of(r1, inner, yn, ym) + e1, normalized(x, b, coefs, pad, r1, e1, C, S, per_run, even))
        gpu.store_group(y, start_of(r2, inner, yn, ym) + e2, normalized(x, c, coefs, pad, r2, e2, C, S, per_run, even))
        gpu.store_group(y, start_of(r3, inner, yn, ym) + e3, normalized(x, d, coefs, pad, r3, e3, C, S, per_run, even))
        return
    for _ in range(EACH):
        if u < end:
            r, e = run_of(u, groups, lanes)
            count = min(lanes, length - e)
            group = gpu.load_any(x, start_of(r, inner, xn, xm) + e, count)
            found = normalized(x, group, coefs, pad, r, e, C, S, per_run, even)
            gpu.store_any(y, start_of(r, inner, yn, ym) + e, count, found)
        u += threads


@gpu.device
def sloped(x, dy, group, coefs, pad, run, e, C, S, per_run, even):
    """(dy - (x - near) * slope) * scale - level of a group."""
    c, s = channel_of(run, e, C, S, per_run)
    left = dy - (group - coefficient(x, coefs, 0, c, s, C, S, even)) * coefficient(x, coefs, pad, c, s, C, S, even)
    return left * coefficient(x, coefs, 3 * pad, c, s, C, S, even) - coefficient(x, coefs, 2 * pad, c, s, C, S, even)


def _gradient(x, dy, dx, coefs, pad, C, S, runs, length, per_run, inner, xn, xm, dn, dm, yn, ym, groups, even, aligned):
    """dx = (dy - (x - near) * slope) * scale - level, with `finish.finish_backward`'s coefficients (4, pad); as `_normalize`."""
    lanes, threads = gpu.lanes(x), gpu.threads()
    u, end = gpu.block() * EACH * threads + gpu.thread(), runs * groups
    if aligned and u - gpu.thread() + EACH * threads <= runs * gpu.quotient(length, lanes):
        r, e = run_of(u, groups, lanes)
        r1, e1 = run_of(u + threads, groups, lanes)
        r2, e2 = run_of(u + 2 * threads, groups, lanes)
        r3, e3 = run_of(u + 3 * threads, groups, lanes)
        a, da = gpu.load_group(x, start_of(r, inner, xn, xm) + e), gpu.load_group(dy, start_of(r, inner, dn, dm) + e)
        b, db = gpu.load_group(x, start_of(r1, inner, xn, xm) + e1), gpu.load_group(dy, start_of(r1, inner, dn, dm) + e1)
        c, dc = gpu.load_group(x, start_of(r2, inner, xn, xm) + e2), gpu.load_group(dy, start_of(r2, inner, dn, dm) + e2)
        d, dd = gpu.load_group(x, start_of(r3, inner, xn, xm) + e3), gpu.load_group(dy, start_of(r3, inner, dn, dm) + e3)
        gpu.store_group(dx, start_of(r, inner, yn, ym) + e, sloped(x, da, a, coefs, pad, r, e, C, S, per_run, even))
        gpu.store_group(dx, start_of(r1, inner, yn, ym) + e1, sloped(x, db, b, coefs, pad, r1, e1, C, S, per_run, even))
        gpu.store_group(dx, start_of(r2, inner, yn, ym) + e2, sloped(x, dc, c, coefs, pad, r2, e2, C, S, per_run, even))
        gpu.store_group(dx, start_of(r3, inner, yn, ym) + e3, sloped(x, dd, d, coefs, pad, r3, e3, C, S, per_run, even))
        return
    for _ in range(EACH):
        if u < end:
            r, e = run_of(u, groups, lanes)
            count = min(lanes, length - e)
            group = gpu.load_any(x, start_of(r, inner, xn, xm) + e, count)
            steep = gpu.load_any(dy, start_of(r, inner, dn, dm) + e, count)
            found = sloped(x, steep, group, coefs, pad, r, e, C, S, per_run, even)
            gpu.store_any(dx, start_of(r, inner, yn, ym) + e, count, found)
        u += threads


normalize = kernel("x x w i4 i4 i4 i8 i8 i8 i4 i8 i8 i8 i8 i4 i4 i4", "normalize")(_normalize)
normalize_long = kernel("x x w i4 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i4 i4", "normalize_long")(_normalize)
gradient = kernel("x x x w i4 i4 i4 i8 i8 i8 i4 i8 i8 i8 i8 i8 i8 i4 i4 i4", "gradient")(_gradient)
gradient_long = kernel("x x x w i4 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i8 i4 i4", "gradient_long")(_gradient)
