"""The backward of batch normalization in two halves, between which a collective adds up the sums of all parts.

The other halves are there already: `moments` and `Moments.merge`, then `batch_norm_inference`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import results
from fastbn.arguments import checks, config, layout
from fastbn.cpu import threads
from fastbn.cuda import buffers
from fastbn.ready import Ready, ready

Array = NDArray[Any]
Wide = NDArray[np.float64]


def batch_norm_backward_reduce(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    axis: int = 1,
    eps: float = config.EPS,
    *,
    backend: str | None = None,
    num_threads: int | None = None,
    stream: Any = None,
) -> tuple[Wide, Wide]:
    """Sums over one part of a batch that its gradients need: of dy and of dy * xhat.

    Added up over all parts, they are what `batch_norm_backward_input` takes, and dbeta and dgamma.

    Parameters
    ----------
    dy : array_like, shape and dtype of x
        Gradient of the loss with respect to y.
    x : array_like, shape (..., C, ...), float16, bfloat16, float32 or float64
        One part of the batch: any number of values per channel, none too.
    mean, var : array_like, shape (C,), float32 or float64
        Mean and biased variance of the whole batch.
    axis : int
        The channel axis.
    eps : float
        The forward's, added to the variance.
    backend, num_threads, stream
        As in `batch_norm`.

    Returns
    -------
    sum_dy, sum_dy_xhat : ndarray, shape (C,), float64
        Zeros for an empty x.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`; also dy unlike x.
    """
    if type(x) is not np.ndarray and buffers.on_device(x):
        found: tuple[Wide, Wide] = results.gradients_on_gpu(backend).batch_norm_backward_reduce(
            dy, x, mean, var, axis, eps, stream
        )
        return found
    if stream is not None:
        raise TypeError(results.HOST)
    if num_threads is not None:
        with threads.limited(num_threads):
            return batch_norm_backward_reduce(dy, x, mean, var, axis, eps, backend=backend)
    dy, x, mean, var, eps, way = _prepared(dy, x, mean, var, axis, eps, backend)
    if not way.values:
        return np.zeros(way.channels), np.zeros(way.channels)
    plan, view = layout.view_of(way.plan, x)
    return way.served.grad_reduce(layout.view_as(plan, dy), view, mean, way.served.rstd(var, 1.0, eps))


def batch_norm_backward_input(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    sum_dy: ArrayLike,
    sum_dy_xhat: ArrayLike,
    count: int,
    gamma: ArrayLike | None = None,
    axis: int = 1,
    eps: float = config.EPS,
    out: Array | None = None,
    *,
    backend: str | None = None,
    num_threads: int | None = None,
    stream: Any = None,
) -> Array:
    """Gradient with respect to one part of a batch, given the sums over the whole of it.

    dx = gamma / sqrt(var + eps) * (dy - sum_dy / count - xhat * sum_dy_xhat / count) (Ioffe & Szegedy 2015).

    Parameters
    ----------
    dy : array_like, shape and dtype of x
        Gradient of the loss with respect to y.
    x : array_like, shape (..., C, ...), float16, bfloat16, float32 or float64
        One part of the batch: any number of values per channel, none too.
    mean, var : array_like, shape (C,), float32 or float64
        Mean and biased variance of the whole batch.
    sum_dy, sum_dy_xhat : array_like, shape (C,), float32 or float64
        What `batch_norm_backward_reduce` gives for each part, added up over all parts.
    count : int
        Values per channel of the whole batch.
    gamma : array_like, shape (C,), as in the forward, optional
        The forward's scale.
    axis : int
        The channel axis.
    eps : float
        The forward's, added to the variance.
    out : ndarray, shape and dtype of x, optional
        Takes dx; may be dy or x itself.
    backend, num_threads, stream
        As in `batch_norm`.

    Returns
    -------
    ndarray, shape and dtype of x
        dx, in the memory order of x, or `out`.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`; also dy unlike x, or a count of fewer values than x has.
    """
    if type(x) is not np.ndarray and buffers.on_device(x):
        gpu = results.gradients_on_gpu(backend)
        found: Array = gpu.batch_norm_backward_input(
            dy, x, mean, var, sum_dy, sum_dy_xhat, count, gamma, axis, eps, out, stream
        )
        return found
    if stream is not None:
        raise TypeError(results.HOST)
    if num_threads is not None:
        with threads.limited(num_threads):
            return batch_norm_backward_input(
                dy, x, mean, var, sum_dy, sum_dy_xhat, count, gamma, axis, eps, out, backend=backend
            )
    kept = {"mean": mean, "var": var, "sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat, "gamma": gamma}
    dy, x, mean, var, eps, way = _prepared(dy, x, mean, var, axis, eps, backend)
    sums = (
        checks.as_statistic(sum_dy, way.channels, "sum_dy"),
        checks.as_statistic(sum_dy_xhat, way.channels, "sum_dy_xhat"),
    )
    count = checks.check_whole(count, way.values)
    checks.check_count(x, count)
    gamma = checks.as_parameter(gamma, way.channels, way.kind, "gamma")
    if out is not None:
        checks.check_out(out, x, dy, **kept)
    if not way.values:
        return results.empty(x, out)
    plan, view = layout.view_of(way.plan, x)
    result, target, late = results.target(plan, view.dtype, out)
    way.served.grad_input(
        layout.view_as(plan, dy), view, mean, way.served.rstd(var, 1.0, eps), gamma, sums, count, target
    )
    return results.finish(plan, result, target) if late else result


def _prepared(
    dy: ArrayLike, x: ArrayLike, mean: ArrayLike, var: ArrayLike, axis: int, eps: float, backend: str | None
) -> tuple[Array, Array, Wide, Wide, float, Ready]:
    """What both halves are given, checked."""
    x = checks.as_input(x)
    dy = checks.check_like(dy, x, "dy")
    way = ready(x, axis, backend)
    checks.check_running(mean, var)
    mean = checks.as_statistic(mean, way.channels, "mean")
    var = checks.as_statistic(var, way.channels, "var")
    return dy, x, mean, var, checks.check_eps(eps, training=True), way
