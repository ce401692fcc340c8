"""What the GPU's kernels share: one step of a statistic on a 16-byte group, and how lanes, warps and blocks merge theirs.

Moments are taken of (x - shift) * unit, shift a value of the channel's own and unit a power of two: both are exact, float32 keeps what a
large mean would drown, and squares neither overflow nor vanish. Sums are compensated (Kahan 1965), for a thread adds hundreds of terms.
"""

from fastbn.kernels import welford
from fastbn.kernels.cuda import _gpu as gpu

join_two = gpu.device(welford.merge)


@gpu.device
def sample(x, at, rows, step, columns):
    """(shift, unit) in every lane for a channel at `at`, from three of its values: their median, a power of two for the largest."""
    a = gpu.spread(x, gpu.load(x, at))
    b = gpu.spread(x, gpu.load(x, at + rows // 2 * step + columns // 2))
    c = gpu.spread(x, gpu.load(x, at + (rows - 1) * step + columns - 1))
    return gpu.median(a, b, c), gpu.unit(a, b, c)


@gpu.device
def add(total, lost, term):
    """`total` and its rounding error so far, after one more term."""
    term = term - lost
    added = total + term
    return added, (added - total) - term


@gpu.device
def deviate(value, weight, mean, m2, lost):
    """Welford's update (1962) by a value, or lane by lane by a group; `weight` is 1 / count, this value counted."""
    delta = value - mean
    mean = mean + delta * weight
    m2, lost = add(m2, lost, delta * (value - mean))
    return mean, m2, lost


@gpu.device
def level(x, count, mean, m2):
    """(count, mean, m2) of all lanes together, each of `count` values: Chan, Golub & LeVeque (1979) for groups of one size."""
    lanes = gpu.lanes(x)
    middle = gpu.total(mean) * gpu.scalar(x, 1.0 / lanes)
    apart = mean - gpu.spread(x, middle)
    return count * gpu.scalar(x, lanes), middle, gpu.total(m2) + count * gpu.total(apart * apart)


@gpu.device
def join(count, mean, m2, other_count, other_mean, other_m2):
    """Merge two groups of values; either may be empty."""
    if other_count:
        return join_two(count, mean, m2, other_count, other_mean, other_m2)
    return count, mean, m2


@gpu.device
def join_warp(count, mean, m2):
    """(count, mean, m2) of a warp, in its first lane; always in the same order."""
    apart = gpu.WARP // 2
    while apart > 0:
        others = gpu.from_lane(count, apart), gpu.from_lane(mean, apart), gpu.from_lane(m2, apart)
        count, mean, m2 = join(count, mean, m2, *others)
        apart //= 2
    return count, mean, m2


@gpu.device
def join_block(x, count, mean, m2):
    """(count, mean, m2) of a block, in every thread; takes the first 3 * warps elements of shared memory."""
    thread = gpu.thread()
    warp, warps = thread // gpu.WARP, gpu.threads() // gpu.WARP
    count, mean, m2 = join_warp(count, mean, m2)
    if thread % gpu.WARP == 0:
        gpu.put(x, 3 * warp, count)
        gpu.put(x, 3 * warp + 1, mean)
        gpu.put(x, 3 * warp + 2, m2)
    gpu.sync()
    count, mean, m2 = gpu.take(x, 0), gpu.take(x, 1), gpu.take(x, 2)
    for w in range(1, warps):
        count, mean, m2 = join(count, mean, m2, gpu.take(x, 3 * w), gpu.take(x, 3 * w + 1), gpu.take(x, 3 * w + 2))
    gpu.sync()
    return count, mean, m2


@gpu.device
def sum_warp(a, b):
    """Both sums of a warp, in its first lane; always in the same order."""
    apart = gpu.WARP // 2
    while apart > 0:
        a, b = a + gpu.from_lane(a, apart), b + gpu.from_lane(b, apart)
        apart //= 2
    return a, b


@gpu.device
def sum_block(x, a, b):
    """Both sums of a block, in every thread; takes the first 2 * warps elements of shared memory."""
    thread = gpu.thread()
    warp, warps = thread // gpu.WARP, gpu.threads() // gpu.WARP
    a, b = sum_warp(a, b)
    if thread % gpu.WARP == 0:
        gpu.put(x, 2 * warp, a)
        gpu.put(x, 2 * warp + 1, b)
    gpu.sync()
    a, b = gpu.take(x, 0), gpu.take(x, 1)
    for w in range(1, warps):
        a, b = a + gpu.take(x, 2 * w), b + gpu.take(x, 2 * w + 1)
    gpu.sync()
    return a, b
