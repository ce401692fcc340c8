"""What the GPU's kernels share.

A statistic of 16-byte groups read one after the other, and how threads and blocks merge theirs.
A thread sums deviations and their squares of a few groups, a leaf, from a value that is near its mean so far, and
merges leaf after leaf (Chan, Golub & LeVeque 1983): three instructions a value, and float32 keeps what a large mean
would drown, wherever a typical value stands. A mean is two numbers, `base` and the `rest` beside it. A block merges
what its threads found in slots of shared memory, by halves.
"""

from typing import Any

from numpy import float64, int32, int64

from fastbn.cuda.kernels.gpu import gpu

# Squares vanish in float32 below 1e-19, and numbers near a mean are 6e-8 of it apart: beyond 2e-12 they are equal or
# their squares stand.
VANISHING = 1e-11
# groups: float32 sums of so many squares are good to 5e-7 in the worst case, and to a tenth of that as a rule
LEAF = 16


@gpu.device
def grid_index():
    """Which of all threads this one is."""
    return gpu.block() * gpu.threads() + gpu.thread()


@gpu.device
def add_kahan(total, lost, term):
    """`total` and its rounding error so far, after one more term (Kahan 1965)."""
    term = term - lost
    added = total + term
    return added, (added - total) - term


@gpu.device
def add_four(a, b, c, d, base, total, squares):
    """Sums of deviations from `base` and of their squares after four more groups."""
    a, b, c, d = a - base, b - base, c - base, d - base
    return total + ((a + b) + (c + d)), squares + a * a + b * b + c * c + d * d


@gpu.device
def leaf_weights(count, terms):
    """1 / terms, terms / (count + terms), and count times that: of `count` values and `terms` more."""
    weight = terms * gpu.inverse(count + terms)
    return gpu.inverse(terms), weight, count * weight


@gpu.device
def add_group_leaf(x, count, terms, total, squares, base, rest, m2, lost):
    """`add_leaf` for the lanes of a group, of `count` values each and `terms` more."""
    inverse, weight, both = leaf_weights(count, terms)
    inverse, weight, both = gpu.broadcast(x, inverse), gpu.broadcast(x, weight), gpu.broadcast(x, both)
    return add_leaf(total, squares, inverse, weight, both, base, rest, m2, lost)


@gpu.device
def add_leaf(total, squares, inverse, weight, both, base, rest, m2, lost):
    """(base, rest, m2, lost) after a leaf, the sums of whose deviations from `base` and of their squares are given.

    With its `leaf_weights`.
    """
    offset = total * inverse
    apart = offset - rest
    m2, lost = add_kahan(m2, lost, squares - offset * total + apart * apart * both)
    rest = rest + apart * weight
    moved = base + rest
    return moved, rest - (moved - base), m2, lost


@gpu.device
def join_group(x, count, base, rest, m2):
    """(count, base, rest, m2) of all lanes together, each of `count` values."""
    origin = gpu.first(base)
    means = (base - gpu.broadcast(x, origin)) + rest
    middle = gpu.total(means) * gpu.scalar(x, 1.0 / gpu.lanes(x))
    apart = means - gpu.broadcast(x, middle)
    moved = origin + middle
    return (
        count * gpu.scalar(x, gpu.lanes(x)),
        moved,
        middle - (moved - origin),
        gpu.total(m2) + count * gpu.total(apart * apart),
    )


@gpu.device
def join(count, base, rest, m2, other_count, other_base, other_rest, other_m2):
    """Merge two groups of values (Chan, Golub & LeVeque 1979); either may be empty."""
    if not other_count:
        return count, base, rest, m2
    if not count:
        return other_count, other_base, other_rest, other_m2
    both = count + other_count
    weight = gpu.half(both)  # most parts are of one size; a division in float64 takes as long as all the rest
    if count != other_count:
        weight = other_count * gpu.inverse(both)
    apart = (other_base - base) + (other_rest - rest)
    m2 += other_m2 + apart * apart * (count * weight)
    rest += apart * weight
    moved = base + rest
    return both, moved, rest - (moved - base), m2


def _merging(merge_two: Any) -> Any:
    """What merges slots of shared memory, two by two."""

    @gpu.device
    def merge_slots(x, n, width, pieces, apart):
        """Merge n slots, each `width` from the last, into the first.

        For `width` slots of each of `pieces` that begin `apart` slots apart.
        The order, and so every bit, is the same in every run. All of the block come here, and see each other's slots
        behind it.
        """
        gpu.sync()
        while n > 1:
            half = (n + 1) // 2
            each = int32((n - half) * width)
            i = gpu.thread()
            while i < each * pieces:
                piece = gpu.quotient(i, each)
                slot = piece * apart + (i - piece * each)
                merge_two(x, slot, slot + half * width)
                i += gpu.threads()
            gpu.sync()
            n = half

    return merge_slots


def _slots(put: Any, take: Any, plane: Any) -> Any:
    """What keeps, reads and merges slots of one array of shared memory, the numbers of a slot `plane` apart."""

    @gpu.device
    def keep(x, slot, count, base, rest, m2):
        """Moments to a slot."""
        apart = plane(x)
        put(x, slot, count)
        put(x, apart + slot, base)
        put(x, 2 * apart + slot, rest)
        put(x, 3 * apart + slot, m2)

    @gpu.device
    def kept(x, slot):
        """(count, base, rest, m2) of a slot."""
        apart = plane(x)
        return take(x, slot), take(x, apart + slot), take(x, 2 * apart + slot), take(x, 3 * apart + slot)

    @gpu.device
    def keep_sums(x, slot, a, b):
        """Two sums to a slot."""
        put(x, slot, a)
        put(x, plane(x) + slot, b)

    @gpu.device
    def kept_sums(x, slot):
        """The two sums of a slot."""
        return take(x, slot), take(x, plane(x) + slot)

    @gpu.device
    def join_two(x, slot, other):
        keep(x, slot, *join(*kept(x, slot), *kept(x, other)))

    @gpu.device
    def add_two(x, slot, other):
        a, b = kept_sums(x, slot)
        more, most = kept_sums(x, other)
        keep_sums(x, slot, a + more, b + most)

    return keep, kept, _merging(join_two), keep_sums, kept_sums, _merging(add_two)


keep, kept, join_slots, keep_sums, kept_sums, sum_slots = _slots(gpu.put, gpu.take, gpu.few)  # a slot a thread
# a lane
keep_lane, kept_lane, join_lanes, keep_lane_sums, kept_lane_sums, sum_lanes = _slots(
    gpu.put_lane, gpu.take_lane, gpu.many
)


@gpu.device
def store_moments(partial, entry, channel, C, count, base, rest, m2):
    """A block's moments of a channel into `partial` (entries, 3, C), in float64."""
    at = entry * 3 * C + channel
    gpu.store(partial, at, gpu.scalar(partial, count))
    gpu.store(partial, at + C, gpu.scalar(partial, base) + gpu.scalar(partial, rest))
    gpu.store(partial, at + 2 * C, gpu.scalar(partial, m2))


@gpu.device
def store_pair(rows, entry, channel, C, a, b):
    """Two numbers of a channel into `rows` (entries, 2, C)."""
    gpu.store(rows, entry * 2 * C + channel, gpu.scalar(rows, a))
    gpu.store(rows, (entry * 2 + 1) * C + channel, gpu.scalar(rows, b))


@gpu.device
def out_of_range(x, count, mean, m2):
    """Whether float32 had too little range for a channel.

    Squares that overflow, or that are subnormal beside what they are summed to.
    """
    vanished = m2 < 1e-37 * count and mean != 0.0 and -VANISHING < mean < VANISHING
    return gpu.lanes(x) > 2 and count > 0.0 and (not m2 - m2 == 0.0 or vanished)


@gpu.device
def reread(x, at, N, S, sn, first, every):
    """(count, base, rest, m2) in float64 of every so many values of the channel at `at`: slow, and rare."""
    base = float64(gpu.load(x, at))
    count = total = squares = float64(0.0)
    e = int64(first)
    while e < N * S:
        value = float64(gpu.load(x, at + e // S * sn + e % S)) - base
        count, total, squares = count + 1.0, total + value, squares + value * value
        e += every
    offset = total / count if count else total
    m2 = squares - offset * total
    # of one infinite value the mean is NaN too, as wherever threads merge theirs
    return count, base, offset + (m2 - m2), m2


@gpu.device
def reread_sums(x, dy, at, at_dy, N, S, sn, dn, first, every, mean):
    """(sum of dy, sum of dy * (x - mean)) likewise."""
    total = product = float64(0.0)
    e = int64(first)
    while e < N * S:
        value = float64(gpu.load(dy, at_dy + e // S * dn + e % S))
        total, product = total + value, product + value * (float64(gpu.load(x, at + e // S * sn + e % S)) - mean)
        e += every
    return total, product
