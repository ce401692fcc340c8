"""Channels first on the GPU: partial moments and gradients' sums of (N, C, S), S contiguous; a block takes one part of one channel.

A row is cut into slots of 16 bytes that begin on 16-byte boundaries, as many as fit wherever the row begins; its `rest`, before the first
slot and behind the last, is read value by value in a second loop. Threads go from slot to slot by counters: a division for each would
cost as much as the arithmetic.
"""

from fastbn.kernels.cuda import _gpu as gpu
from fastbn.kernels.cuda._jit import kernel
from fastbn.kernels.cuda.merging import add, deviate, join, join_block, level, sample, sum_block


@gpu.device
def spot(at, base, lanes, v):
    """Where slot `v` of a row lies that begins at `at`; `base` elements lie between the array's begin and the boundary before it."""
    return at + (-(at + base) & (lanes - 1)) + v * lanes


@gpu.device
def onwards(n, v, step_n, step_v, slots):
    """The (row, slot) one step further."""
    n, v = n + step_n, v + step_v
    return (n + 1, v - slots) if v >= slots else (n, v)


@gpu.device
def four(n, v, at, sn, base, lanes, step_n, step_v, slots):
    """Where this slot and the next three of a thread lie, and the (row, slot) behind them."""
    i = spot(at + n * sn, base, lanes, v)
    n, v = onwards(n, v, step_n, step_v, slots)
    j = spot(at + n * sn, base, lanes, v)
    n, v = onwards(n, v, step_n, step_v, slots)
    k = spot(at + n * sn, base, lanes, v)
    n, v = onwards(n, v, step_n, step_v, slots)
    m = spot(at + n * sn, base, lanes, v)
    n, v = onwards(n, v, step_n, step_v, slots)
    return i, j, k, m, n, v


@gpu.device
def outside(e, at, sn, base, lanes, S, rest):
    """Where the e-th element lies that is in no slot."""
    row, k = at + e // rest * sn, e % rest
    return row + k if k < -(row + base) & (lanes - 1) else row + k + (S - rest)


@gpu.device
def read_moments(x, S, at, sn, base, slots, rest, step_n, step_v, start, stop, first, last, shifts, units):
    """(count, mean, m2) of what this thread reads of a channel that begins at `at`: of slots start to stop, and of elements outside."""
    lanes, threads, thread = gpu.lanes(x), gpu.threads(), gpu.thread()
    shift, unit, one = gpu.first(shifts), gpu.first(units), gpu.scalar(x, 1.0)
    count, mean = gpu.scalar(x, 0.0), gpu.spread(x, gpu.scalar(x, 0.0))
    m2, lost = mean, mean
    e = start + thread
    n, v = e // slots, e % slots
    while e + 3 * threads < stop:  # four loads on their way at once
        i, j, k, m, n, v = four(n, v, at, sn, base, lanes, step_n, step_v, slots)
        a, b, c, d = gpu.load_group(x, i), gpu.load_group(x, j), gpu.load_group(x, k), gpu.load_group(x, m)
        mean, m2, lost = deviate((a - shifts) * units, gpu.spread(x, gpu.inverse(count + one)), mean, m2, lost)
        mean, m2, lost = deviate((b - shifts) * units, gpu.spread(x, gpu.inverse(count + one + one)), mean, m2, lost)
        mean, m2, lost = deviate((c - shifts) * units, gpu.spread(x, gpu.inverse(count + one + one + one)), mean, m2, lost)
        count += one + one + one + one
        mean, m2, lost = deviate((d - shifts) * units, gpu.spread(x, gpu.inverse(count)), mean, m2, lost)
        e += 4 * threads
    while e < stop:
        count += one
        group = gpu.load_group(x, spot(at + n * sn, base, lanes, v))
        mean, m2, lost = deviate((group - shifts) * units, gpu.spread(x, gpu.inverse(count)), mean, m2, lost)
        n, v = onwards(n, v, step_n, step_v, slots)
        e += threads
    count, middle, q = level(x, count, mean, m2)
    single, alone, spread, missing = one - one, one - one, one - one, one - one
    e = first + thread
    while e < last:
        single += one
        value = (gpu.load(x, outside(e, at, sn, base, lanes, S, rest)) - shift) * unit
        alone, spread, missing = deviate(value, gpu.inverse(single), alone, spread, missing)
        e += threads
    return join(count, middle, q, single, alone, spread)


@gpu.device
def read_sums(x, dy, S, at, sn, base, at_dy, sn_dy, base_dy, slots, rest, step_n, step_v, start, stop, first, last, mean):
    """(sum of dy, sum of dy * (x - mean)) of what this thread reads, as `read_moments`; rows of both begin alike to a boundary."""
    lanes, threads, thread = gpu.lanes(x), gpu.threads(), gpu.thread()
    means, zero = gpu.spread(x, mean), gpu.scalar(x, 0.0)
    total = gpu.spread(x, zero)
    lost, product, missing = total, total, total
    e = start + thread
    n, v = e // slots, e % slots
    while e + threads < stop:  # two loads of each array on their way at once
        i, j = spot(at + n * sn, base, lanes, v), spot(at_dy + n * sn_dy, base_dy, lanes, v)
        n, v = onwards(n, v, step_n, step_v, slots)
        k, m = spot(at + n * sn, base, lanes, v), spot(at_dy + n * sn_dy, base_dy, lanes, v)
        n, v = onwards(n, v, step_n, step_v, slots)
        a, da, b, db = gpu.load_group(x, i), gpu.load_group(dy, j), gpu.load_group(x, k), gpu.load_group(dy, m)
        total, lost = add(total, lost, da)
        product, missing = add(product, missing, da * (a - means))
        total, lost = add(total, lost, db)
        product, missing = add(product, missing, db * (b - means))
        e += 2 * threads
    while e < stop:
        group = gpu.load_group(dy, spot(at_dy + n * sn_dy, base_dy, lanes, v))
        total, lost = add(total, lost, group)
        product, missing = add(product, missing, group * (gpu.load_group(x, spot(at + n * sn, base, lanes, v)) - means))
        n, v = onwards(n, v, step_n, step_v, slots)
        e += threads
    a, b, la, lb = gpu.total(total), gpu.total(product), zero, zero
    e = first + thread
    while e < last:
        value = gpu.load(dy, outside(e, at_dy, sn_dy, base_dy, lanes, S, rest))
        a, la = add(a, la, value)
        b, lb = add(b, lb, value * (gpu.load(x, outside(e, at, sn, base, lanes, S, rest)) - mean))
        e += threads
    return a, b


@kernel("x i8 i4 i8 i8 i8 i4 i8 i8 i4 i4 i4 i8 i8 w w")
def moments_rows(x, N, C, S, sn, sc, base, slots, rest, step_n, step_v, parts, chunk, chunk_rest, given, partial):
    """(count, mean, m2) of each part of each channel into `partial` (parts, 3, C), as deviations; their shift and unit into `given` (2, C).

    A part is `chunk` slots and `chunk_rest` elements outside them; a block's step is `step_n` rows and `step_v` slots.
    """
    block = gpu.block()
    channel, part = block // parts, block % parts
    at = channel * sc
    shifts, units = sample(x, at, N, sn, S)
    start, first = part * chunk, part * chunk_rest
    stop, last = min(start + chunk, N * slots), min(first + chunk_rest, N * rest)
    count, mean, m2 = read_moments(x, S, at, sn, base, slots, rest, step_n, step_v, start, stop, first, last, shifts, units)
    count, mean, m2 = join_block(x, count, mean, m2)
    if gpu.thread() == 0:
        gpu.store(partial, (part * 3) * C + channel, count)
        gpu.store(partial, (part * 3 + 1) * C + channel, mean)
        gpu.store(partial, (part * 3 + 2) * C + channel, m2)
        if part == 0:
            gpu.store(given, channel, gpu.first(shifts))
            gpu.store(given, C + channel, gpu.first(units))


@kernel("x x t i8 i4 i8 i8 i8 i8 i8 i4 i4 i8 i8 i4 i4 i4 i8 i8 w")
def sums_rows(x, dy, mean, N, C, S, sn, sc, dn, dc, base, base_dy, slots, rest, step_n, step_v, parts, chunk, chunk_rest, partial):
    """(sum of dy, sum of dy * (x - mean)) of each part of each channel into `partial` (parts, 2, C), `mean` rounded as x is computed in."""
    block = gpu.block()
    channel, part = block // parts, block % parts
    start, first = part * chunk, part * chunk_rest
    stop, last = min(start + chunk, N * slots), min(first + chunk_rest, N * rest)
    middle = gpu.scalar(x, gpu.load(mean, channel))
    a, b = read_sums(
        x, dy, S, channel * sc, sn, base, channel * dc, dn, base_dy, slots, rest, step_n, step_v, start, stop, first, last, middle
    )  # fmt: skip
    a, b = sum_block(x, a, b)
    if gpu.thread() == 0:
        gpu.store(partial, (part * 2) * C + channel, a)
        gpu.store(partial, (part * 2 + 1) * C + channel, b)
