"""Batch normalization as functions of arrays: validate, find the canonical view, let the backend run, put the result in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import checks, config, layout, threads
from fastbn.moments import Moments
from fastbn.ready import ready

Array = NDArray[Any]


def _target(plan: layout.Plan, dtype: np.dtype[Any], out: Array | None) -> tuple[Array, Array, bool]:
    """Where a result goes: what the caller gets, the canonical view that the kernel writes, and whether that must be copied over."""
    if out is None:
        return *plan.empty(dtype), False
    view = plan.view(out)
    if view is None:  # another memory order than x: compute beside it, then copy
        return out, plan.empty(dtype)[1], True
    return out, view, False


def _finish(plan: layout.Plan, result: Array, target: Array) -> Array:
    result[...] = plan.restore(target)
    return result


def _empty(x: Array, out: Array | None) -> Array:
    return np.empty(x.shape, x.dtype.newbyteorder("=")) if out is None else out


def moments(x: ArrayLike, axis: int = 1, *, backend: str | None = None, num_threads: int | None = None) -> Moments:
    """Mean and variance of each channel, in one pass over memory.

    Blocked Welford: the moments of cache-sized blocks, merged by Chan, Golub & LeVeque's formula in float64.

    Parameters
    ----------
    x : array_like, shape (..., C, ...), float16, bfloat16, float32 or float64
        At least two axes.
    axis : int
        The channel axis.
    backend : str, optional
        "cpu" or "reference"; default where the array lives.
    num_threads : int, optional
        Of the kernels in this call, from 1 to NUMBA_NUM_THREADS; changes speed, never a bit. Default as `set_num_threads` says.

    Returns
    -------
    Moments
        count, mean (C,) and m2 (C,) in float64; count 0 and zeros for an empty x.

    Raises
    ------
    TypeError
        x is not of float16, bfloat16, float32 or float64.
    ValueError
        Rank below 2, axis out of range, no channels.
    """
    if num_threads is not None:
        with threads.limited(num_threads):
            return moments(x, axis, backend=backend)
    x = checks.as_input(x)
    way = ready(x, axis, backend)
    if not way.values:
        return Moments(0, np.zeros(way.channels), np.zeros(way.channels))
    return way.served.moments(layout.view_of(way.plan, x)[1])


def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = config.EPS,
    out: Array | None = None,
    *,
    backend: str | None = None,
    num_threads: int | None = None,
) -> tuple[Array, Moments]:
    """Normalize each channel by its own mean and variance, then scale and shift: the training forward.

    y = gamma * (x - mean) / sqrt(var + eps) + beta, with the biased variance (Ioffe & Szegedy 2015).

    Parameters
    ----------
    x : array_like, shape (..., C, ...), float16, bfloat16, float32 or float64
        At least two axes.
    gamma, beta : array_like, shape (C,), float64 beside x of float64, else float32, optional
        Scale and shift; 1 and 0 where absent.
    axis : int
        The channel axis.
    eps : float
        Added to the variance, in units of x squared; positive.
    out : ndarray, shape and dtype of x, optional
        Takes y; may be x itself.
    backend : str, optional
        "cpu" or "reference"; default where the array lives.
    num_threads : int, optional
        Of the kernels in this call, from 1 to NUMBA_NUM_THREADS; changes speed, never a bit. Default as `set_num_threads` says.

    Returns
    -------
    y : ndarray, shape and dtype of x
        In the memory order of x, or `out`.
    moments : Moments
        The statistics of x, for `batch_norm_backward` and running averages.

    Raises
    ------
    TypeError
        x is not of float16, bfloat16, float32 or float64; a parameter or `out` of a dtype that does not go with x.
    ValueError
        A shape, axis or eps out of range; one value per channel; an `out` that overlaps x in part.
    """
    if num_threads is not None:
        with threads.limited(num_threads):
            return batch_norm(x, gamma, beta, axis, eps, out, backend=backend)
    x = checks.as_input(x)
    way = ready(x, axis, backend)
    channels, kind = way.channels, way.kind
    gamma = checks.as_parameter(gamma, channels, kind, "gamma")
    beta = checks.as_parameter(beta, channels, kind, "beta")
    eps = checks.check_eps(eps, training=True)
    checks.check_count(x, way.values)
    if out is not None:
        checks.check_out(out, x)
    if way.forward is not None and (out is None or out.flags.c_contiguous):
        y = way.plan.empty(x.dtype)[0] if out is None else out
        return y, way.forward(x, gamma, beta, eps, y)[1]
    if not way.values:
        return _empty(x, out), Moments(0, np.zeros(channels), np.zeros(channels))
    plan, view = layout.view_of(way.plan, x)
    result, target, late = _target(plan, view.dtype, out)
    m = way.served.forward(view, gamma, beta, eps, target)[1]
    return (_finish(plan, result, target) if late else result), m


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = config.EPS,
    out: Array | None = None,
    *,
    backend: str | None = None,
    num_threads: int | None = None,
) -> Array:
    """Normalize each channel by given statistics, then scale and shift.

    Parameters
    ----------
    x : array_like, shape (..., C, ...), float16, bfloat16, float32 or float64
        At least two axes.
    mean, var : array_like, shape (C,), float32 or float64
        The statistics, e.g. running averages.
    gamma, beta : array_like, shape (C,), float64 beside x of float64, else float32, optional
        Scale and shift; 1 and 0 where absent.
    axis, eps, out, backend, num_threads
        As in `batch_norm`; eps may be 0 here.

    Returns
    -------
    ndarray, shape and dtype of x
        y, in the memory order of x, or `out`.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`; also mean without var.
    """
    if num_threads is not None:
        with threads.limited(num_threads):
            return batch_norm_inference(x, mean, var, gamma, beta, axis, eps, out, backend=backend)
    x = checks.as_input(x)
    way = ready(x, axis, backend)
    checks.check_running(mean, var)
    channels, kind = way.channels, way.kind
    mean = checks.as_statistic(mean, channels, "mean")
    var = checks.as_statistic(var, channels, "var")
    gamma = checks.as_parameter(gamma, channels, kind, "gamma")
    beta = checks.as_parameter(beta, channels, kind, "beta")
    eps = checks.check_eps(eps, training=False)
    if out is not None:
        checks.check_out(out, x)
    if not way.values:
        return _empty(x, out)
    rstd = way.served.rstd(var, 1.0, eps)
    if way.normalize is not None and (out is None or out.flags.c_contiguous):
        y = way.plan.empty(x.dtype)[0] if out is None else out
        way.normalize(x, mean, rstd, gamma, beta, y)
        return y
    plan, view = layout.view_of(way.plan, x)
    result, target, late = _target(plan, view.dtype, out)
    way.served.normalize(view, mean, rstd, gamma, beta, target)
    return _finish(plan, result, target) if late else result


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
    axis, eps, backend, num_threads
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
    gamma, axis, eps, out, backend, num_threads
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
    channels, kind = way.channels, way.kind
    gamma = checks.as_parameter(gamma, channels, kind, "gamma")
    eps = checks.check_eps(eps, training=constant is None)
    if constant is None:
        checks.check_moments(m, channels, way.values)
        checks.check_count(x, way.values)
        mean, count = checks.as_statistic(m.mean, channels, "moments.mean"), m.count
        spread = checks.as_statistic(m.m2, channels, "moments.m2")
    else:
        mean, count = checks.as_statistic(constant[0], channels, "mean"), 1
        spread = checks.as_statistic(constant[1], channels, "var")
    if out is not None:
        checks.check_out(out, x, dy)
    if not way.values:
        zeros = np.zeros((2, channels), kind)
        return _empty(x, out), zeros[0], zeros[1]
    rstd, grads = way.served.rstd(spread, count, eps), np.empty((2, channels), kind)
    if way.backward is not None and dy.dtype is x.dtype and dy.flags.c_contiguous and (out is None or out.flags.c_contiguous):
        dx = way.plan.empty(x.dtype)[0] if out is None else out
        way.backward(dy, x, mean, rstd, gamma, dx, constant is None, grads)
        return dx, grads[1], grads[0]
    plan, view = layout.view_of(way.plan, x)
    result, target, late = _target(plan, view.dtype, out)
    way.served.backward(layout.view_as(plan, dy), view, mean, rstd, gamma, target, constant is None, grads)
    return _finish(plan, result, target) if late else result, grads[1], grads[0]
