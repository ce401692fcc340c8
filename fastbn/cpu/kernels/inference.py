"""Inference on memory: x, y, parameters and running statistics by their addresses, all without gaps, in one call.

For PyTorch's tensors. To see six of them as arrays, convert the statistics and take rstd takes 60 to 100 us where a
convolution has emptied the caches, and as long again to look all arguments over; a kernel for 1 MB takes 50. The loops
are those of `rows.normalize` and `columns_apply.normalize`.
"""

from __future__ import annotations

from fastbn.cpu.kernels.columns import COLUMNS
from fastbn.cpu.kernels.columns_apply import affine_rest, affine_task_columns
from fastbn.cpu.kernels.elementwise import fill_affine, wide_rstd
from fastbn.cpu.kernels.jit import kernel, leaf, prange
from fastbn.cpu.kernels.rows import ROWS, affine_task
from fastbn.cpu.kernels.simd import at, load_wide, store_wide

ADDRESSES = {
    "like": "x1 whose elements x and y have",
    "x_at": "i address of x",
    "y_at": "i address of y",
    "mean_at": "i address of the running mean",
    "var_at": "i address of the running variance",
    "gamma_at": "i address of gamma, or 0",
    "beta_at": "i address of beta, or 0",
    "stats": "s2 (2, C): workspace, for mean and rstd",
}


@leaf
def constants(mean, var, eps, stats):
    """stats (2, C): mean and rstd in float64, the same bits as `elementwise.rstd`."""
    for c in range(0, mean.size, 8):
        n = min(8, mean.size - c)
        store_wide(stats, (0, c), n, load_wide(mean, (c,), n))
        store_wide(stats, (1, c), n, wide_rstd(var, c, n, 1.0, eps))


@leaf
def parameter(like, address, C):
    """gamma or beta: empty where it is absent, at address 0."""
    return at(like, address, (C if address != 0 else 0,))


@kernel(ROWS | ADDRESSES, N="i", C="i", S="i", work="w2 (3, C rounded up to 8)")
def rows(like, x_at, y_at, mean_at, var_at, gamma_at, beta_at, eps, N, C, S, pieces, tasks, stream, stats, work):
    """y of (N, C, S)."""
    x, y = at(like, x_at, (N, C, S)), at(like, y_at, (N, C, S))
    constants(at(work, mean_at, (C,)), at(work, var_at, (C,)), eps, stats)
    gamma, beta = parameter(work, gamma_at, C), parameter(work, beta_at, C)
    fit = fill_affine(x, stats[0], stats[1], 0.0, 0.0, gamma, beta, 0, C, work)
    for task in prange(tasks):
        affine_task(x, task, tasks, pieces, fit, stats[0], stats[1], gamma, beta, work, stream, y)


@kernel(COLUMNS | ADDRESSES, R="i rows, folded")
def columns(
    like, x_at, y_at, mean_at, var_at, gamma_at, beta_at, eps, R, C, S, fold, rest, parts, block, tasks, columns,
    stream, stats, work
):  # fmt: skip
    """y of (R * fold + rest, C * S)."""
    F, more = fold * C * S, rest * C * S
    x, y = at(like, x_at, (R, F)), at(like, y_at, (R, F))
    mean, rstd = stats[0], stats[1]
    gamma, beta = parameter(work, gamma_at, C), parameter(work, beta_at, C)
    constants(at(work, mean_at, (C,)), at(work, var_at, (C,)), eps, stats)
    for task in prange(tasks):
        affine_task_columns(x, mean, rstd, gamma, beta, S, fold, parts, block, task, tasks, columns, stream, work, y)
    if rest > 0:
        begins = R * F * like.itemsize
        rest_x, rest_y = at(like, x_at + begins, (1, more)), at(like, y_at + begins, (1, more))
        affine_rest(rest_x, mean, rstd, gamma, beta, S, fold, columns, work, rest_y)
