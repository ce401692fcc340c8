"""Channels first on the GPU: partial moments and gradients' sums of (N, C, S), S contiguous.

A block takes one part of one channel.
A row is cut into slots of 16 bytes that begin on 16-byte boundaries, as many as fit wherever the row begins; its
`rest`, before the first slot and behind the last, is read value by value in a second loop. Threads go from slot to slot
by counters: a division for each would cost as much as the arithmetic.
"""

from fastbn.cuda.kernels.gpu import gpu
from fastbn.cuda.kernels.jit import kernel
from fastbn.cuda.kernels.merging import (
    LEAF,
    add_four,
    add_group_leaf,
    add_kahan,
    add_leaf,
    join,
    join_group,
    join_slots,
    keep,
    keep_sums,
    kept,
    kept_sums,
    leaf_weights,
    store_moments,
    store_pair,
    sum_slots,
)


@gpu.device
def slot_at(at, base, lanes, v):
    """Where slot `v` of a row lies that begins at `at`.

    `base` elements lie between the array's begin and the boundary before it.
    """
    return at + (-(at + base) & (lanes - 1)) + v * lanes


@gpu.device
def next_slot(n, v, step_n, step_v, slots):
    """The (row, slot) one step further."""
    n, v = n + step_n, v + step_v
    return (n + 1, v - slots) if v >= slots else (n, v)


@gpu.device
def four_slots(n, v, at, sn, base, lanes, step_n, step_v, slots):
    """Where this slot and the next three of a thread lie, and the (row, slot) behind them."""
    i = slot_at(at + n * sn, base, lanes, v)
    n, v = next_slot(n, v, step_n, step_v, slots)
    j = slot_at(at + n * sn, base, lanes, v)
    n, v = next_slot(n, v, step_n, step_v, slots)
    k = slot_at(at + n * sn, base, lanes, v)
    n, v = next_slot(n, v, step_n, step_v, slots)
    m = slot_at(at + n * sn, base, lanes, v)
    n, v = next_slot(n, v, step_n, step_v, slots)
    return i, j, k, m, n, v


@gpu.device
def rest_at(e, at, sn, base, lanes, S, rest):
    """Where the e-th element lies that is in no slot."""
    row, k = at + e // rest * sn, e % rest
    return row + k if k < -(row + base) & (lanes - 1) else row + k + (S - rest)


@gpu.device
def read_moments(x, S, at, sn, base, slots, rest, step_n, step_v, start, stop, first, last):
    """(count, base, rest, m2) of what this thread reads of a channel that begins at `at`.

    Of slots start to stop, and elements outside.
    """
    lanes, threads, thread = gpu.lanes(x), gpu.threads(), gpu.thread()
    zero, one = gpu.scalar(x, 0.0), gpu.scalar(x, 1.0)
    nil = gpu.broadcast(x, zero)
    count, origin, beside, m2, lost = zero, nil, nil, nil, nil
    e = start + thread
    n, v = e // slots, e % slots
    if e < stop:
        origin = gpu.load_group(x, slot_at(at + n * sn, base, lanes, v))
    until = e + 4 * threads  # the first leaf is short: one value may be far from all others
    while e < stop:
        terms, total, squares = zero, nil, nil
        until = min(until, stop)
        while e + 3 * threads < until:  # four loads on their way at once
            i, j, k, m, n, v = four_slots(n, v, at, sn, base, lanes, step_n, step_v, slots)
            a, b, c, d = gpu.load_group(x, i), gpu.load_group(x, j), gpu.load_group(x, k), gpu.load_group(x, m)
            total, squares = add_four(a, b, c, d, origin, total, squares)
            terms += one + one + one + one
            e += 4 * threads
        while e < until:
            a = gpu.load_group(x, slot_at(at + n * sn, base, lanes, v)) - origin
            total, squares = total + a, squares + a * a
            n, v = next_slot(n, v, step_n, step_v, slots)
            terms += one
            e += threads
        origin, beside, m2, lost = add_group_leaf(x, count, terms, total, squares, origin, beside, m2, lost)
        count += terms
        until = e + LEAF * threads
    found = join_group(x, count, origin, beside, m2)
    n1, base1, rest1, m21, lost1 = zero, zero, zero, zero, zero
    e = first + thread
    if e < last:
        base1 = gpu.load(x, rest_at(e, at, sn, base, lanes, S, rest))
    until = e + 4 * threads
    while e < last:
        terms, total, squares = zero, zero, zero
        until = min(until, last)
        while e < until:
            a = gpu.load(x, rest_at(e, at, sn, base, lanes, S, rest)) - base1
            total, squares = total + a, squares + a * a
            terms += one
            e += threads
        inverse, weight, both = leaf_weights(n1, terms)
        base1, rest1, m21, lost1 = add_leaf(total, squares, inverse, weight, both, base1, rest1, m21, lost1)
        n1 += terms
        until = e + LEAF * threads
    return join(*found, n1, base1, rest1, m21)


@gpu.device
def read_sums(
    x, dy, S, at, sn, base, at_dy, sn_dy, base_dy, slots, rest, step_n, step_v, start, stop, first, last, mean
):
    """(sum of dy, sum of dy * (x - mean)) of what this thread reads, as `read_moments`.

    Rows of both begin alike to a boundary.
    """
    lanes, threads, thread = gpu.lanes(x), gpu.threads(), gpu.thread()
    means, zero = gpu.broadcast(x, mean), gpu.scalar(x, 0.0)
    nil = gpu.broadcast(x, zero)
    total, lost, product, missing = nil, nil, nil, nil
    e = start + thread
    n, v = e // slots, e % slots
    while e < stop:
        some, products = nil, nil
        until = min(e + LEAF * threads, stop)
        while e + threads < until:  # two loads of each array on their way at once
            i, j = slot_at(at + n * sn, base, lanes, v), slot_at(at_dy + n * sn_dy, base_dy, lanes, v)
            n, v = next_slot(n, v, step_n, step_v, slots)
            k, m = slot_at(at + n * sn, base, lanes, v), slot_at(at_dy + n * sn_dy, base_dy, lanes, v)
            n, v = next_slot(n, v, step_n, step_v, slots)
            a, da, b, db = gpu.load_group(x, i), gpu.load_group(dy, j), gpu.load_group(x, k), gpu.load_group(dy, m)
            some = some + (da + db)
            products = products + da * (a - means) + db * (b - means)
            e += 2 * threads
        while e < until:
            da = gpu.load_group(dy, slot_at(at_dy + n * sn_dy, base_dy, lanes, v))
            some = some + da
            products = products + da * (gpu.load_group(x, slot_at(at + n * sn, base, lanes, v)) - means)
            n, v = next_slot(n, v, step_n, step_v, slots)
            e += threads
        total, lost = add_kahan(total, lost, some)
        product, missing = add_kahan(product, missing, products)
    a, b, la, lb = gpu.total(total), gpu.total(product), zero, zero
    e = first + thread
    while e < last:
        value = gpu.load(dy, rest_at(e, at_dy, sn_dy, base_dy, lanes, S, rest))
        a, la = add_kahan(a, la, value)
        b, lb = add_kahan(b, lb, value * (gpu.load(x, rest_at(e, at, sn, base, lanes, S, rest)) - mean))
        e += threads
    return a, b


@gpu.device
def row_moments(x, S, at, sn, base, slots, rest, step_n, step_v, start, stop, first, last):
    """(count, base, rest, m2) of what a block reads so."""
    found = read_moments(x, S, at, sn, base, slots, rest, step_n, step_v, start, stop, first, last)
    keep(x, gpu.thread(), *found)
    join_slots(x, gpu.threads(), 1, 1, 0)
    return kept(x, 0)


@gpu.device
def row_sums(
    x, dy, S, at, sn, base, at_dy, sn_dy, base_dy, slots, rest, step_n, step_v, start, stop, first, last, mean
):
    """(sum of dy, sum of dy * (x - mean)) of what a block reads so."""
    a, b = read_sums(
        x, dy, S, at, sn, base, at_dy, sn_dy, base_dy, slots, rest, step_n, step_v, start, stop, first, last, mean
    )  # fmt: skip
    keep_sums(x, gpu.thread(), a, b)
    sum_slots(x, gpu.threads(), 1, 1, 0)
    return kept_sums(x, 0)


@kernel()
def moments_rows(x, N, C, S, sn, sc, base, slots, rest, step_n, step_v, chunk, chunk_rest, partial):
    """(count, mean, m2) of each part of each channel into `partial` (parts, 3, C).

    A part is `chunk` slots and `chunk_rest` elements outside them; a block's step is `step_n` rows and `step_v` slots.
    Blocks side by side take one part of all channels: what is read last lies together.
    """
    part = gpu.quotient(gpu.block(), C)
    channel = gpu.block() - part * C
    start, first = part * chunk, part * chunk_rest
    stop, last = min(start + chunk, N * slots), min(first + chunk_rest, N * rest)
    found = row_moments(x, S, channel * sc, sn, base, slots, rest, step_n, step_v, start, stop, first, last)
    if gpu.thread() == 0:
        store_moments(partial, part, channel, C, *found)


@kernel(mean="t (C,), rounded as x is computed in")
def sums_rows(
    x, dy, mean, N, C, S, sn, sc, dn, dc, base, base_dy, slots, rest, step_n, step_v, chunk, chunk_rest, partial
):
    """(sum of dy, sum of dy * (x - mean)) of each part of each channel into `partial` (parts, 2, C)."""
    part = gpu.quotient(gpu.block(), C)
    channel = gpu.block() - part * C
    start, first = part * chunk, part * chunk_rest
    stop, last = min(start + chunk, N * slots), min(first + chunk_rest, N * rest)
    middle = gpu.scalar(x, gpu.load(mean, channel))
    a, b = row_sums(
        x, dy, S, channel * sc, sn, base, channel * dc, dn, base_dy, slots, rest, step_n, step_v, start, stop, first,
        last, middle
    )  # fmt: skip
    if gpu.thread() == 0:
        store_pair(partial, part, channel, C, a, b)
