"""Forward in numba as the formulas are written: what fastbn's kernels are held against in `bench.ideas`.

Both take a channel at a time, one thread each, so that its values are read from the cache after the first time.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import prange


@numba.njit(parallel=True, nogil=True, error_model="numpy")
def welford(x, gamma, beta, eps, y):  # type: ignore[no-untyped-def]  # typed by numba
    """Mean and m2 of one value after the other (Welford 1962), then y; x and y (N, C, S)."""
    N, C, S = x.shape
    for c in prange(C):
        count, mean, m2 = 0, 0.0, 0.0
        for n in range(N):
            for s in range(S):
                count += 1
                d = x[n, c, s] - mean
                mean += d / count
                m2 += d * (x[n, c, s] - mean)
        scale = gamma[c] / math.sqrt(m2 / count + eps)
        for n in range(N):
            for s in range(S):
                y[n, c, s] = np.float32((x[n, c, s] - mean) * scale + beta[c])


@numba.njit(parallel=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
def loops(x, gamma, beta, eps, y):  # type: ignore[no-untyped-def]  # typed by numba
    """Sums, then squares of deviations, then y: three plain loops over float32 rows, for LLVM to vectorize; x and y (N, C, S)."""
    N, C, S = x.shape
    for c in prange(C):
        mean, m2 = 0.0, 0.0
        for n in range(N):
            row, t = x[n, c], np.float32(0)
            for s in range(row.size):
                t += row[s]
            mean += t
        mean /= N * S
        shift = np.float32(mean)
        for n in range(N):
            row, q = x[n, c], np.float32(0)
            for s in range(row.size):
                q += (row[s] - shift) * (row[s] - shift)
            m2 += q
        scale, offset = np.float32(gamma[c] / math.sqrt(m2 / (N * S) + eps)), beta[c]
        for n in range(N):
            row, result = x[n, c], y[n, c]
            for s in range(row.size):
                result[s] = (row[s] - shift) * scale + offset
