"""Channels last on the GPU: partial moments and gradients' sums of columns (R, W), W contiguous.

A thread takes one group of columns and every so many rows, a block a few hundred columns and one part of the rows: its threads stand
`across` columns, the others below them. Short rows of channels first are columns too, S to a channel; rows of few channels are folded
together, and the last, shorter one is read apart.
"""

from fastbn.kernels.cuda import _gpu as gpu
from fastbn.kernels.cuda._jit import kernel
from fastbn.kernels.cuda.merging import add, deviate, join_two


@gpu.device
def fetch(x, i, count, aligned):
    """A group of columns: in one load, or as many of its lanes as there are."""
    if aligned:
        return gpu.load_group(x, i)
    return gpu.load_any(x, i, count)


@gpu.device
def column_moments(x, at, step, start, stop, every, wide, aligned, shift, unit):
    """(rows, mean, m2) of each lane for the columns at `at`: rows start, start + every, ... below stop."""
    one = gpu.scalar(x, 1.0)
    count, mean = one - one, gpu.spread(x, one - one)
    m2, lost = mean, mean
    r = start
    while r + 3 * every < stop:  # four loads on their way at once
        i, apart = at + r * step, every * step
        a, b = fetch(x, i, wide, aligned), fetch(x, i + apart, wide, aligned)
        c, d = fetch(x, i + 2 * apart, wide, aligned), fetch(x, i + 3 * apart, wide, aligned)
        mean, m2, lost = deviate((a - shift) * unit, gpu.spread(x, gpu.inverse(count + one)), mean, m2, lost)
        mean, m2, lost = deviate((b - shift) * unit, gpu.spread(x, gpu.inverse(count + one + one)), mean, m2, lost)
        mean, m2, lost = deviate((c - shift) * unit, gpu.spread(x, gpu.inverse(count + one + one + one)), mean, m2, lost)
        count += one + one + one + one
        mean, m2, lost = deviate((d - shift) * unit, gpu.spread(x, gpu.inverse(count)), mean, m2, lost)
        r += 4 * every
    while r < stop:
        count += one
        group = (fetch(x, at + r * step, wide, aligned) - shift) * unit
        mean, m2, lost = deviate(group, gpu.spread(x, gpu.inverse(count)), mean, m2, lost)
        r += every
    return count, mean, m2


@gpu.device
def join_columns(x, across, count, mean, m2):
    """(rows, mean, m2) of each lane of the threads one below the other, in the topmost; always in the same order."""
    thread = gpu.thread()
    half = gpu.threads() // 2
    while half >= across:
        gpu.put(x, thread, count)
        gpu.put_group(x, thread, mean)
        gpu.put_group(x, gpu.threads() + thread, m2)
        gpu.sync()
        if thread < half:
            other = gpu.take(x, thread + half)
            if other:
                here, there = gpu.spread(x, count), gpu.spread(x, other)
                others = gpu.take_group(x, thread + half), gpu.take_group(x, gpu.threads() + thread + half)
                _, mean, m2 = join_two(here, mean, m2, there, *others)
                count += other
        gpu.sync()
        half //= 2
    return count, mean, m2


@gpu.device
def column_sums(x, dy, at, step, at_dy, step_dy, start, stop, every, wide, aligned, means):
    """(sum of dy, sum of dy * (x - mean)) of each lane, as `column_moments`."""
    total = gpu.spread(x, gpu.scalar(x, 0.0))
    lost, product, missing = total, total, total
    r = start
    while r + every < stop:  # two loads of each array on their way at once
        i, j, apart, apart_dy = at + r * step, at_dy + r * step_dy, every * step, every * step_dy
        a, da = fetch(x, i, wide, aligned), fetch(dy, j, wide, aligned)
        b, db = fetch(x, i + apart, wide, aligned), fetch(dy, j + apart_dy, wide, aligned)
        total, lost = add(total, lost, da)
        product, missing = add(product, missing, da * (a - means))
        total, lost = add(total, lost, db)
        product, missing = add(product, missing, db * (b - means))
        r += 2 * every
    while r < stop:
        group = fetch(dy, at_dy + r * step_dy, wide, aligned)
        total, lost = add(total, lost, group)
        product, missing = add(product, missing, group * (fetch(x, at + r * step, wide, aligned) - means))
        r += every
    return total, product


@gpu.device
def sum_columns(x, across, a, b):
    """Both sums of each lane of the threads one below the other, in the topmost; always in the same order."""
    thread = gpu.thread()
    half = gpu.threads() // 2
    while half >= across:
        gpu.put_group(x, thread, a)
        gpu.put_group(x, gpu.threads() + thread, b)
        gpu.sync()
        if thread < half:
            a = a + gpu.take_group(x, thread + half)
            b = b + gpu.take_group(x, gpu.threads() + thread + half)
        gpu.sync()
        half //= 2
    return a, b


@gpu.device
def part_moments(x, R, W, step, across, parts, chunk, aligned, given, partial):
    """A block's part into `partial` (parts, 3, W), its shift and unit into `given` (2, W); this thread's part, columns, shift and unit."""
    block, thread, lanes = gpu.block(), gpu.thread(), gpu.lanes(x)
    part, column = block % parts, (block // parts * across + thread % across) * lanes
    wide = min(lanes, W - column)  # none at all beyond the last column
    start = part * chunk
    stop = min(start + chunk, R) if wide > 0 else start
    last = (R - 1) * step
    shift, unit = gpu.spread(x, gpu.scalar(x, 0.0)), gpu.spread(x, gpu.scalar(x, 1.0))
    if wide > 0:
        a, c = fetch(x, column, wide, aligned), fetch(x, column + last, wide, aligned)
        b = fetch(x, column + R // 2 * step, wide, aligned)
        shift, unit = gpu.median(a, b, c), gpu.unit(a, b, c)
    every = gpu.threads() // across
    count, mean, m2 = column_moments(x, column, step, start + thread // across, stop, every, wide, aligned, shift, unit)
    count, mean, m2 = join_columns(x, across, count, mean, m2)
    if thread < across and wide > 0:
        gpu.store_any(partial, (part * 3) * W + column, wide, gpu.spread(x, count))
        gpu.store_any(partial, (part * 3 + 1) * W + column, wide, mean)
        gpu.store_any(partial, (part * 3 + 2) * W + column, wide, m2)
        if part == 0:
            gpu.store_any(given, column, wide, shift)
            gpu.store_any(given, W + column, wide, unit)
    return part, column, wide, shift, unit


@gpu.device
def part_sums(x, dy, mean, R, W, C, S, step, step_dy, across, parts, chunk, aligned, partial):
    """A block's part into `partial` (parts, 2, W); this thread's part and columns, and their means."""
    block, thread, lanes = gpu.block(), gpu.thread(), gpu.lanes(x)
    part, column = block % parts, (block // parts * across + thread % across) * lanes
    wide = min(lanes, W - column)
    start = part * chunk
    stop = min(start + chunk, R) if wide > 0 else start
    means = gpu.spread(x, gpu.scalar(x, 0.0))
    if wide > 0:
        means = gpu.gather(x, mean, 0, column // S % C, column % S, S, C)
    every = gpu.threads() // across
    a, b = column_sums(x, dy, column, step, column, step_dy, start + thread // across, stop, every, wide, aligned, means)
    a, b = sum_columns(x, across, a, b)
    if thread < across and wide > 0:
        gpu.store_any(partial, (part * 2) * W + column, wide, a)
        gpu.store_any(partial, (part * 2 + 1) * W + column, wide, b)
    return part, column, wide, means


@kernel("x i8 i8 i8 i4 i4 i4 i8 i4 w w")
def moments_columns(x, R, W, step, rest, across, parts, chunk, aligned, given, partial):
    """(rows, mean, m2) of each part of each column into `partial` (parts, 3, W), as deviations; their shift and unit into `given` (2, W).

    A part is `chunk` rows. Where `rest` columns of one more row are left, they are a part of their own, the last of `partial`.
    """
    part, column, wide, shift, unit = part_moments(x, R, W, step, across, parts, chunk, aligned, given, partial)
    if part == 0 and rest > 0 and gpu.thread() < across and wide > 0:
        left = min(max(rest - column, 0), wide)
        nothing = gpu.spread(x, gpu.scalar(x, 0.0))
        value = (gpu.load_any(x, column + R * step, left) - shift) * unit
        gpu.store_any(partial, (parts * 3) * W + column, wide, nothing)
        gpu.store_any(partial, (parts * 3) * W + column, left, gpu.spread(x, gpu.scalar(x, 1.0)))
        gpu.store_any(partial, (parts * 3 + 1) * W + column, wide, value)
        gpu.store_any(partial, (parts * 3 + 2) * W + column, wide, nothing)


@kernel("x x t i8 i8 i4 i4 i8 i8 i4 i4 i4 i8 i4 w")
def sums_columns(x, dy, mean, R, W, C, S, step, step_dy, rest, across, parts, chunk, aligned, partial):
    """(sum of dy, sum of dy * (x - mean)) of each part of each column into `partial` (parts, 2, W), parts as in `moments_columns`.

    S columns of a row are one channel's; `mean` (C,) is rounded as x is computed in.
    """
    part, column, wide, means = part_sums(x, dy, mean, R, W, C, S, step, step_dy, across, parts, chunk, aligned, partial)
    if part == 0 and rest > 0 and gpu.thread() < across and wide > 0:
        left = min(max(rest - column, 0), wide)
        value = gpu.load_any(dy, column + R * step_dy, left)
        gpu.store_any(partial, (parts * 2) * W + column, wide, value)
        gpu.store_any(partial, (parts * 2 + 1) * W + column, wide, value * (gpu.load_any(x, column + R * step, left) - means))
