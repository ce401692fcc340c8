"""Kernels on a few values per channel: what NumPy would take microseconds of overhead for."""

from __future__ import annotations

from fastbn.cpu.kernels.elementwise import deviation
from fastbn.cpu.kernels.jit import kernel
from fastbn.cpu.kernels.simd import load_wide, store_wide, wide


@kernel("m1 f f s1", parallel=False)
def rstd(m2, count, eps, found):
    """`found` = 1 / sqrt(m2 / count + eps), all (C,)."""
    for c in range(0, m2.size, 8):
        n = min(8, m2.size - c)
        store_wide(found, (c,), n, deviation(m2, c, n, count, eps))


@kernel("m1 m1 f f w1 w1", parallel=False)
def track(mean, m2, freedom, weight, running_mean, running_var):
    """Running statistics move towards mean and m2 / freedom by `weight`; all (C,)."""
    kept, new = wide(1.0 - weight), wide(weight)
    for c in range(0, mean.size, 8):
        n = min(8, mean.size - c)
        var = load_wide(m2, (c,), n) / wide(freedom)
        store_wide(running_mean, (c,), n, kept * load_wide(running_mean, (c,), n) + new * load_wide(mean, (c,), n))
        store_wide(running_var, (c,), n, kept * load_wide(running_var, (c,), n) + new * var)
