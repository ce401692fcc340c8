"""Batch normalization for the caller's own @njit functions: one thread, no validation, the kernels' arithmetic.

x, dy, y and dx are of float32 or float64, gamma and beta (C,) of the same, mean, m2 and rstd (C,) of float64, in C
order. `channels_first` takes (N, C, S) arrays, S contiguous, `channels_last` (R, C), C contiguous. gamma or beta may be
an empty array: 1, 0. Results are those of `fastbn`'s functions to the bit where `fastbn.explain` says "fused", but for
short rows of channels first; elsewhere the last bits may differ. Safe in prange, in threads and after a fork.
"""

from __future__ import annotations

import numpy as np

from fastbn.cpu.kernels import beyond, columns, columns_apply, columns_backward, rows_backward, welford
from fastbn.cpu.kernels import rows as channels_first
from fastbn.cpu.kernels.elementwise import affine_row, fill_affine, fill_gradient, fill_standardize, gradient_row
from fastbn.cpu.kernels.jit import leaf, routine
from fastbn.cpu.kernels.simd import lanes

cut = leaf(welford.cut)
BLOCK = welford.BLOCK
COLUMNS = 1024  # of a channels-last array at a time; zeros behind the last coefficients, which whole vectors read too

__all__ = [
    "backward_channels_first",
    "backward_channels_last",
    "forward_channels_first",
    "forward_channels_last",
    "moments_channels_first",
    "moments_channels_last",
    "normalize_channels_first",
    "normalize_channels_last",
]


@routine
def moments_channels_first(x, mean, m2):
    """mean and m2, the sum of squared deviations, of each channel of x (N, C, S)."""
    rows, splits, count = cut(x.shape[0], x.shape[2], lanes(x), BLOCK)
    channels_first.part_moments(x, 0, x.shape[1], 0, count, rows, splits, mean, m2)


@routine
def moments_channels_last(x, mean, m2):
    """mean and m2, the sum of squared deviations, of each column of x (R, C)."""
    R, C = x.shape
    work = np.empty((5, min(C, COLUMNS) + 16), x.dtype)
    for first in range(0, C, COLUMNS):
        columns.part_moments(x, 0, R, first, min(C, first + COLUMNS), 1, False, work, mean, m2)


@routine
def normalize_channels_first(x, mean, rstd, gamma, beta, y):
    """y = gamma * (x - mean) * rstd + beta on (N, C, S) arrays."""
    N, C, S = x.shape
    k = np.empty((3, C + 8), x.dtype)
    fit = fill_affine(x, mean, rstd, 0.0, 0.0, gamma, beta, 0, C, k)
    if not fit:
        for c in range(C):
            channels_first.affine_channel(x, c, mean, rstd, 0.0, 0.0, gamma, beta, k, c, y)
    for n in range(N if fit else 0):
        for c in range(C):
            affine_row(x, n, c, 0, S, k, c, 0, False, y)


@routine
def normalize_channels_last(x, mean, rstd, gamma, beta, y):
    """y = gamma * (x - mean) * rstd + beta on (R, C) arrays."""
    R, C = x.shape
    k = np.zeros((3, min(C, COLUMNS) + 16), x.dtype)
    for first in range(0, C, COLUMNS):
        last = min(C, first + COLUMNS)
        if fill_affine(x, mean, rstd, 0.0, 0.0, gamma, beta, first, last, k):
            columns_apply.affine_block(x, 0, R, first, last - first, k, 0, 0, False, y)
        else:
            columns_apply.affine_channels(x, 0, R, first, last, 1, 1, mean, rstd, 0.0, 0.0, gamma, beta, k, y)


@routine
def forward_channels_first(x, gamma, beta, eps, y, mean, m2):
    """Moments and normalize on (N, C, S) arrays, a channel at a time; writes y, mean and m2."""
    N, C, S = x.shape
    k = np.empty((3, 8), x.dtype)
    rows, splits, count = cut(N, S, lanes(x), BLOCK)
    for c in range(C):
        values = channels_first.part_moments(x, c, c + 1, 0, count, rows, splits, mean, m2)
        fit = fill_affine(x, mean, m2, values, eps, gamma, beta, c, c + 1, k)
        if not fit:
            beyond.affine_columns(x[:, c], 0, N, 0, S, c, mean, m2, values, eps, gamma, beta, y[:, c])
        for n in range(N - 1 if fit else -1, -1, -1):
            affine_row(x, n, c, 0, S, k, 0, 0, False, y)


@routine
def forward_channels_last(x, gamma, beta, eps, y, mean, m2):
    """Moments and normalize on (R, C) arrays; writes y, mean and m2."""
    R, C = x.shape
    k = np.zeros((5, min(C, COLUMNS) + 16), x.dtype)
    for first in range(0, C, COLUMNS):
        last = min(C, first + COLUMNS)
        columns.part_moments(x, 0, R, first, last, 1, False, k, mean, m2)
        if fill_affine(x, mean, m2, float(R), eps, gamma, beta, first, last, k):
            columns_apply.affine_block(x, 0, R, first, last - first, k, 0, 0, False, y)
        else:
            columns_apply.affine_channels(x, 0, R, first, last, 1, 1, mean, m2, float(R), eps, gamma, beta, k, y)


@routine
def backward_channels_first(dy, x, mean, rstd, gamma, dx, sums):
    """Gradients of the forward on (N, C, S) arrays; writes dx and sums (2, C) in float64: dbeta, dgamma."""
    N, C, S = x.shape
    k = np.empty((5, 8), x.dtype)
    rows, splits, count = cut(N, S, lanes(x), BLOCK)
    for c in range(C):
        rows_backward.part_sums(dy, x, c, c + 1, 0, count, rows, splits, mean, rstd, k, sums)
        fit = fill_gradient(x, mean, rstd, gamma, sums, float(N * S), True, c, c + 1, k)
        if not fit:
            beyond.gradient_columns(
                dy[:, c], x[:, c], 0, N, 0, S, c, mean, rstd, gamma, sums, float(N * S), True, dx[:, c]
            )
        for n in range(N - 1 if fit else -1, -1, -1):
            gradient_row(dy, x, n, c, 0, S, k, 0, 0, False, dx)


@routine
def backward_channels_last(dy, x, mean, rstd, gamma, dx, sums):
    """Gradients of the forward on (R, C) arrays; writes dx and sums (2, C) in float64: dbeta, dgamma."""
    R, C = x.shape
    k = np.zeros((welford.WORK, min(C, COLUMNS) + 16), x.dtype)
    for first in range(0, C, COLUMNS):
        last = min(C, first + COLUMNS)
        fit = fill_standardize(x, mean, rstd, first, last, k)
        columns_backward.part_sums(dy, x, 0, R, first, last, 1, False, k, 0, sums)
        columns_backward.strip_sums(dy, x, 0, R, first, last, C, 1, fit, mean, rstd, k, sums)
        if fill_gradient(x, mean, rstd, gamma, sums, float(R), True, first, last, k):
            columns_backward.gradient_block(dy, x, 0, R, first, last - first, k, 0, 0, False, dx)
        else:
            columns_backward.gradient_channels(
                dy, x, 0, R, first, last, mean, rstd, gamma, sums, float(R), True, 1, 1, k, dx
            )
