"""A kernel that compiles in a fifth of a second, for tests of what is done with kernels."""

import numpy as np
from numba.core import event

from fastbn.cpu.kernels import jit


def double(x, out):
    for i in jit.prange(x.size):
        out[i] = 2 * x[i]


def kernel() -> jit.Kernel:
    """As a process has it that has not called it."""
    return jit.Kernel(double, {"x": "x1", "out": "s1"})


def compiled(dtype: str = "float32") -> list[str]:
    """What the first call of it compiles, in its serial form: nothing where that was kept. It must be right."""
    x, out = np.arange(32, dtype=dtype), np.empty(32)
    with event.install_recorder("numba:compile") as seen:
        kernel().form(x.dtype, False)(x, out)
    if out.tolist() != (2 * x).tolist():
        raise AssertionError(out)
    return sorted({e.data["dispatcher"].py_func.__name__ for _, e in seen.buffer})
