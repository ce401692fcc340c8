"""A user's own parallel function, cached for all processes of a test session."""

import numba
import numpy as np


@numba.njit(parallel=True, cache=True, nogil=True)
def _total(x):
    total = 0.0
    for i in numba.prange(x.size):
        total += x[i]
    return total


def total(n: int) -> float:
    """n, by numba's threads."""
    return float(_total(np.ones(n)))
