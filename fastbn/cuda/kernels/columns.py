"""Channels last on the GPU: partial moments and gradients' sums of columns (R, W), W contiguous.

A thread takes one group of columns and every so many rows, a block `across` groups, which hold whole channels, and one
part of the rows. Short rows of channels first are columns too, S to a channel; rows of few channels are folded
together, and the last, shorter one is read apart. A block merges what it has of a channel: rows, folded rows and
columns.
"""

from fastbn.cuda.kernels.gpu import gpu
from fastbn.cuda.kernels.jit import kernel
from fastbn.cuda.kernels.merging import (
    LEAF,
    add_four,
    add_group_leaf,
    add_kahan,
    join,
    join_lanes,
    keep_lane,
    keep_lane_sums,
    kept_lane,
    kept_lane_sums,
    store_moments,
    store_pair,
    sum_lanes,
)


@gpu.device
def load_columns(x, i, count, aligned):
    """A group of columns: in one load, or as many of its lanes as there are."""
    if aligned:
        return gpu.load_group(x, i)
    return gpu.load_any(x, i, count)


@gpu.device
def column_moments(x, at, step, start, stop, every, wide, aligned):
    """(rows, base, rest, m2) of each lane for the columns at `at`: rows start, start + every, ... below stop.

    Rows are of all lanes.
    """
    zero, one = gpu.scalar(x, 0.0), gpu.scalar(x, 1.0)
    nil = gpu.broadcast(x, zero)
    count, origin, beside, m2, lost = zero, nil, nil, nil, nil
    i, apart = at + start * step, every * step
    if start < stop:
        origin = load_columns(x, i, wide, aligned)
    r, until = start, start + 4 * every  # the first leaf is short: one value may be far from all others
    while r < stop:
        terms, total, squares = zero, nil, nil
        until = min(until, stop)
        while r + 3 * every < until:  # four loads on their way at once
            a, b = load_columns(x, i, wide, aligned), load_columns(x, i + apart, wide, aligned)
            c, d = load_columns(x, i + 2 * apart, wide, aligned), load_columns(x, i + 3 * apart, wide, aligned)
            total, squares = add_four(a, b, c, d, origin, total, squares)
            terms += one + one + one + one
            r += 4 * every
            i += 4 * apart
        while r < until:
            a = load_columns(x, i, wide, aligned) - origin
            total, squares = total + a, squares + a * a
            terms += one
            r += every
            i += apart
        origin, beside, m2, lost = add_group_leaf(x, count, terms, total, squares, origin, beside, m2, lost)
        count += terms
        until = r + LEAF * every
    return count, origin, beside, m2


@gpu.device
def column_sums(x, dy, at, step, at_dy, step_dy, start, stop, every, wide, aligned, means):
    """(sum of dy, sum of dy * (x - mean)) of each lane, as `column_moments`."""
    nil = gpu.broadcast(x, gpu.scalar(x, 0.0))
    total, lost, product, missing = nil, nil, nil, nil
    i, j, apart, apart_dy = at + start * step, at_dy + start * step_dy, every * step, every * step_dy
    r = start
    while r < stop:
        some, products = nil, nil
        until = min(r + LEAF * every, stop)
        while r + every < until:  # two loads of each array on their way at once
            a, da = load_columns(x, i, wide, aligned), load_columns(dy, j, wide, aligned)
            b, db = load_columns(x, i + apart, wide, aligned), load_columns(dy, j + apart_dy, wide, aligned)
            some = some + (da + db)
            products = products + da * (a - means) + db * (b - means)
            r += 2 * every
            i += 2 * apart
            j += 2 * apart_dy
        while r < until:
            da = load_columns(dy, j, wide, aligned)
            some, products = some + da, products + da * (load_columns(x, i, wide, aligned) - means)
            r += every
            i += apart
            j += apart_dy
        total, lost = add_kahan(total, lost, some)
        product, missing = add_kahan(product, missing, products)
    return total, product


@gpu.device
def columns_of(x, R, W, across, unit, part, chunk):
    """(first column of the block's, this thread's, how many it has, rows from, to, every)."""
    thread, lanes = gpu.thread(), gpu.lanes(x)
    every = gpu.threads() // across
    below = gpu.quotient(thread, across)
    first = unit * across * lanes
    column = first + (thread - below * across) * lanes
    wide = min(lanes, W - column) if below < every else 0  # threads that no row is for, and columns beyond the last
    start = part * chunk + below
    return first, column, wide, start, min(part * chunk + chunk, R) if wide > 0 else start, every


@gpu.device
def kept_group(x, slot):
    """The four numbers of as many slots of shared memory as a group has lanes."""
    plane = gpu.many(x)
    first, second = gpu.take_group(x, slot), gpu.take_group(x, plane + slot)
    return first, second, gpu.take_group(x, 2 * plane + slot), gpu.take_group(x, 3 * plane + slot)


@gpu.device
def part_moments(x, R, W, C, S, step, rest, across, units, unit, part, chunk, aligned):
    """A block's part of each of its channels into slot 0, S, 2 * S, ... of shared memory.

    How many channels, and which is the first.
    Channels of folded rows are merged where a block has all of them; else channel C is channel 0 of the next row.
    """
    lanes, thread = gpu.lanes(x), gpu.thread()
    first, column, wide, start, stop, every = columns_of(x, R, W, across, unit, part, chunk)
    if aligned:  # a loop of its own: a choice at each load would hold back the next until this one is there
        count, base, beside, m2 = column_moments(x, column, step, start, stop, every, wide, True)
    else:
        count, base, beside, m2 = column_moments(x, column, step, start, stop, every, wide, False)
    plane = gpu.many(x)
    gpu.put_group(x, thread * lanes, gpu.broadcast(x, count))
    gpu.put_group(x, plane + thread * lanes, base)
    gpu.put_group(x, 2 * plane + thread * lanes, beside)
    gpu.put_group(x, 3 * plane + thread * lanes, m2)
    columns = min(across * lanes, W - first)
    if part == 0 and rest > first:
        gpu.sync()
        i, zero = thread, gpu.scalar(x, 0.0)
        while i < min(rest - first, columns):
            keep_lane(x, i, *join(*kept_lane(x, i), gpu.scalar(x, 1.0), gpu.load(x, first + i + R * step), zero, zero))
            i += gpu.threads()
    join_lanes(x, every, across * lanes, 1, 0)
    channels = gpu.quotient(columns, S)
    if units == 1:
        join_lanes(x, gpu.quotient(channels, C), C * S, 1, 0)
        channels = min(channels, C)
    join_lanes(x, S, 1, channels, S)
    return channels, gpu.quotient(first, S)


@gpu.device
def part_sums(x, dy, mean, R, W, C, S, step, step_dy, rest, across, units, unit, part, chunk, aligned):
    """The same for the sums of dy and dy * (x - mean)."""
    lanes, thread = gpu.lanes(x), gpu.thread()
    first, column, wide, start, stop, every = columns_of(x, R, W, across, unit, part, chunk)
    means = gpu.broadcast(x, gpu.scalar(x, 0.0))
    if wide > 0:
        means = gpu.gather(x, mean, 0, column // S % C, column % S, S, C)
    if aligned:
        a, b = column_sums(x, dy, column, step, column, step_dy, start, stop, every, wide, True, means)
    else:
        a, b = column_sums(x, dy, column, step, column, step_dy, start, stop, every, wide, False, means)
    gpu.put_group(x, thread * lanes, a)
    gpu.put_group(x, gpu.many(x) + thread * lanes, b)
    columns = min(across * lanes, W - first)
    if part == 0 and rest > first:
        gpu.sync()
        i = thread
        while i < min(rest - first, columns):
            value, middle = gpu.load(dy, first + i + R * step_dy), gpu.scalar(x, gpu.load(mean, (first + i) // S % C))
            one, other = kept_lane_sums(x, i)
            keep_lane_sums(x, i, one + value, other + value * (gpu.load(x, first + i + R * step) - middle))
            i += gpu.threads()
    sum_lanes(x, every, across * lanes, 1, 0)
    channels = gpu.quotient(columns, S)
    if units == 1:
        sum_lanes(x, gpu.quotient(channels, C), C * S, 1, 0)
        channels = min(channels, C)
    sum_lanes(x, S, 1, channels, S)
    return channels, gpu.quotient(first, S)


@kernel(S="i4 columns of a channel, side by side", rest="i4 columns left of one more row", chunk="i8 rows of a part")
def moments_columns(x, R, W, C, S, step, rest, across, units, chunk, copies, aligned, partial):
    """(count, mean, m2) of each part of each channel into `partial` (parts * copies, 3, C).

    A row is `copies` times C channels of S columns. Blocks side by side take one part of all columns: what is read last
    lies together.
    """
    part = gpu.quotient(gpu.block(), units)
    channels, first = part_moments(
        x, R, W, C, S, step, rest, across, units, gpu.block() - part * units, part, chunk, aligned
    )
    i = gpu.thread()
    while i < channels:
        copy = gpu.quotient(first + i, C)
        store_moments(partial, part * copies + copy, first + i - copy * C, C, *kept_lane(x, i * S))
        i += gpu.threads()


@kernel(
    mean="t (C,), rounded as x is computed in",
    S="i4 columns of a channel, side by side",
    rest="i4 columns left of one more row",
    chunk="i8 rows of a part",
)
def sums_columns(x, dy, mean, R, W, C, S, step, step_dy, rest, across, units, chunk, copies, aligned, partial):
    """(sum of dy, sum of dy * (x - mean)) of each part of each channel into `partial` (parts * copies, 2, C).

    As `moments_columns`.
    """
    part = gpu.quotient(gpu.block(), units)
    unit = gpu.block() - part * units
    channels, first = part_sums(x, dy, mean, R, W, C, S, step, step_dy, rest, across, units, unit, part, chunk, aligned)
    i = gpu.thread()
    while i < channels:
        copy = gpu.quotient(first + i, C)
        store_pair(partial, part * copies + copy, first + i - copy * C, C, *kept_lane_sums(x, i * S))
        i += gpu.threads()
