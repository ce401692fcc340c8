"""The gradients of batch normalization as functions of arrays: the backward half of `functional`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import results
from fastbn.arguments import checks, config, layout
from fastbn.cpu import threads
from fastbn.cuda import buffers
from fastbn.ready import ready
from fastbn.statistics import Moments, check_moments

Array = NDArray[Any]


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    moments: Moments,
    gamma: ArrayLike | None = None,
    axis: int = 1,
    eps: float = config.EPS,
    out: Array | None = None,
    *,
    backend: str | None = None,
    num_threads: int | None = None,
    stream: Any = None,
) -> tuple[Array, Array, Array]:
    """Gradients of `batch_norm`, whose statistics depend on x.

    Parameters
    ----------
    dy : array_like, shape and dtype of x
        Gradient of the loss with respect to y.
    x : array_like, shape (..., C, ...), float16, bfloat16, float32 or float64
        The input of the forward.
    moments : Moments
        What the forward returned beside y.
    gamma : array_like, shape (C,), as in the forward, optional
        The forward's scale.
    axis, eps, backend, num_threads, stream
        As in the forward.
    out : ndarray, shape and dtype of x, optional
        Takes dx; may be dy or x itself.

    Returns
    -------
    dx : ndarray, shape and dtype of x
        In the memory order of x, or `out`.
    dgamma, dbeta : ndarray, shape (C,), float64 for x of float64, else float32
        Sums over the batch of dy * xhat and of dy.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`; also dy unlike x, or moments of another shape.
    """
    if type(x) is not np.ndarray and buffers.on_device(x):
        found: tuple[Array, Array, Array] = results.gradients_on_gpu(backend).backward(
            dy, x, moments, None, gamma, axis, eps, out, stream
        )
        return found
    if stream is not None:
        raise TypeError(results.HOST)
    if num_threads is not None:
        with threads.limited(num_threads):
            return batch_norm_backward(dy, x, moments, gamma, axis, eps, out, backend=backend)
    return _backward(dy, x, moments, None, gamma, axis, eps, out, backend)


def batch_norm_inference_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    axis: int = 1,
    eps: float = config.EPS,
    out: Array | None = None,
    *,
    backend: str | None = None,
    num_threads: int | None = None,
    stream: Any = None,
) -> tuple[Array, Array, Array]:
    """Gradients of `batch_norm_inference`, whose statistics are constants: dx = gamma * dy / sqrt(var + eps).

    Parameters
    ----------
    dy : array_like, shape and dtype of x
        Gradient of the loss with respect to y.
    x : array_like, shape (..., C, ...), float16, bfloat16, float32 or float64
        The input of the forward.
    mean, var : array_like, shape (C,), float32 or float64
        The forward's statistics.
    gamma, axis, eps, out, backend, num_threads, stream
        As in `batch_norm_backward`; eps may be 0 here.

    Returns
    -------
    dx : ndarray, shape and dtype of x
        In the memory order of x, or `out`.
    dgamma, dbeta : ndarray, shape (C,), float64 for x of float64, else float32
        Sums over the batch of dy * xhat and of dy.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm_inference`; also dy unlike x.
    """
    if type(x) is not np.ndarray and buffers.on_device(x):
        found: tuple[Array, Array, Array] = results.gradients_on_gpu(backend).backward(
            dy, x, None, (mean, var), gamma, axis, eps, out, stream
        )
        return found
    if stream is not None:
        raise TypeError(results.HOST)
    if num_threads is not None:
        with threads.limited(num_threads):
            return batch_norm_inference_backward(dy, x, mean, var, gamma, axis, eps, out, backend=backend)
    checks.check_running(mean, var)
    return _backward(dy, x, None, (mean, var), gamma, axis, eps, out, backend)


def _backward(
    dy: ArrayLike,
    x: ArrayLike,
    m: Any,
    constant: tuple[ArrayLike, ArrayLike] | None,
    gamma: ArrayLike | None,
    axis: int,
    eps: float,
    out: Array | None,
    backend: str | None,
) -> tuple[Array, Array, Array]:
    x = checks.as_input(x)
    dy = checks.check_like(dy, x, "dy")
    way = ready(x, axis, backend)
    channels, kind, given = way.channels, way.kind, gamma
    gamma = checks.as_parameter(gamma, channels, kind, "gamma")
    eps = checks.check_eps(eps, training=constant is None)
    if constant is None:
        check_moments(m, channels, way.values)
        checks.check_count(x, way.values)
        mean, count = checks.as_statistic(m.mean, channels, "moments.mean"), way.values
        spread = checks.as_statistic(m.m2, channels, "moments.m2")
    else:
        mean, count = checks.as_statistic(constant[0], channels, "mean"), 1
        spread = checks.as_statistic(constant[1], channels, "var")
    if out is not None:
        kept = (
            {"moments.mean": m.mean, "moments.m2": m.m2}
            if constant is None
            else dict(zip(("mean", "var"), constant, strict=True))
        )
        checks.check_out(out, x, dy, gamma=given, **kept)
    if not way.values:
        zeros = np.zeros((2, channels), kind)
        return results.empty(x, out), zeros[0], zeros[1]
    rstd, grads = way.served.rstd(spread, count, eps), np.empty((2, channels), kind)
    if (
        way.backward is not None
        and dy.dtype is x.dtype
        and dy.flags.c_contiguous
        and (out is None or out.flags.c_contiguous)
    ):
        dx = way.plan.empty(x.dtype)[0] if out is None else out
        way.backward(dy, x, mean, rstd, gamma, dx, constant is None, grads)
        return dx, grads[1], grads[0]
    plan, view = layout.view_of(way.plan, x)
    result, target, late = results.target(plan, view.dtype, out)
    way.served.backward(layout.view_as(plan, dy), view, mean, rstd, gamma, target, constant is None, grads)
    return results.finish(plan, result, target) if late else result, grads[1], grads[0]
