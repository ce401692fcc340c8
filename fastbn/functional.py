"""Batch normalization as functions of arrays.

Validate, find the canonical view, let the backend run, put the result in place.
Arrays on a GPU are those with `__cuda_array_interface__`: CuPy's, PyTorch's CUDA tensors, numba's. Where x is one, so
must be every array beside it, and so is every result, of the same kind; nothing waits for the GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import results
from fastbn.arguments import checks, config, layout
from fastbn.backends import Backend
from fastbn.cpu import threads
from fastbn.cuda import buffers
from fastbn.ready import ready
from fastbn.statistics import Moments, made

Array = NDArray[Any]

PIECE = 2**18  # integers widened at a time, to 2 MB of float64: in cache when their moments are taken
# of an (R, C) array, at least, in a piece of one that has so many: merging a piece costs as much as some rows
ROWS = 64


def moments(
    x: ArrayLike, axis: int = 1, *, backend: str | None = None, num_threads: int | None = None, stream: Any = None
) -> Moments:
    """Mean and variance of each channel, in one pass over memory.

    Blocked Welford: the moments of cache-sized blocks, merged by Chan, Golub & LeVeque's formula in float64. Of float32
    data the variance is within 1e-6 of its value wherever an outlier stands, and the mean that of float64 where sums of
    the data have few digits.

    Parameters
    ----------
    x : array_like, shape (..., C, ...), float16, bfloat16, float32 or float64; on the host also int8, uint8, int16 or
    uint16
        At least two axes. Integers are taken in float64, a bounded piece at a time: no float copy of the whole is made.
    axis : int
        The channel axis.
    backend : str, optional
        "cpu", "cuda" or "reference"; default where the array lives.
    num_threads : int, optional
        Of the CPU kernels in this call, from 1 to NUMBA_NUM_THREADS; changes speed, never a bit. Default as
        `set_num_threads` says.
    stream : int or stream, optional
        Where the kernels of an array on a GPU are queued: a handle, or a stream of PyTorch, CuPy or numba. Default that
        of its library.

    Returns
    -------
    Moments
        count, mean (C,) and m2 (C,) in float64; count 0 and zeros for an empty x.

    Raises
    ------
    TypeError
        x is of another dtype, or no array.
    ValueError
        Rank below 2, axis out of range, no channels.
    """
    if type(x) is not np.ndarray and buffers.on_device(x):
        found: Moments = results.on_gpu(backend).moments(x, axis, stream)
        return found
    if stream is not None:
        raise TypeError(results.HOST)
    if num_threads is not None:
        with threads.limited(num_threads):
            return moments(x, axis, backend=backend)
    x = checks.as_input(x, integers=True)
    way = ready(x, axis, backend)
    if not way.values:
        return made(0, np.zeros(way.channels), np.zeros(way.channels))
    if way.integers:
        view = way.plan.view(x)  # in either byte order
        return _of_integers(way.served, layout.view_of(way.plan, x)[1] if view is None else view)
    return way.served.moments(layout.view_of(way.plan, x)[1])


def _of_integers(served: Backend, view: Array) -> Moments:
    """Moments of a canonical view of integers of 8 or 16 bits, which float64 holds exactly.

    A bounded piece at a time, merged in order.
    """
    N, C, S = (*view.shape, 1)[:3]
    inner = min(S, PIECE)
    channels = max(1, min(C, PIECE // (inner * min(N, ROWS))))
    outer = min(N, PIECE // (inner * channels))
    wide, parts = np.empty(outer * channels * inner), []
    for c in range(0, C, channels):
        own = view[:, c : c + channels]
        whole = (own[n : n + outer] for n in range(0, N, outer))
        pieces = (rows[..., s : s + inner] for rows in whole for s in range(0, S, inner)) if view.ndim == 3 else whole
        parts.append(functools.reduce(Moments.merge, (served.moments(_copied(piece, wide)) for piece in pieces)))
    return made(parts[0].count, np.concatenate([m.mean for m in parts]), np.concatenate([m.m2 for m in parts]))


def _copied(piece: Array, to: Array) -> Array:
    """The values of a piece, at the beginning of a buffer."""
    copy = to[: piece.size].reshape(piece.shape)
    copy[...] = piece
    return copy


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
    stream: Any = None,
) -> tuple[Array, Moments]:
    """Normalize each channel by its own mean and variance, then scale and shift: the training forward.

    y = gamma * (x - mean) / sqrt(var + eps) + beta, with the biased variance (Ioffe & Szegedy 2015). Of float32 data y
    is within 1e-6 * max(1, abs(gamma)) * max(1, abs(xhat)) of these formulas in float64, for any mean up to 1e6
    standard deviations.

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
        "cpu", "cuda" or "reference"; default where the array lives.
    num_threads : int, optional
        Of the CPU kernels in this call, from 1 to NUMBA_NUM_THREADS; changes speed, never a bit. Default as
        `set_num_threads` says.
    stream : int or stream, optional
        Where the kernels of an array on a GPU are queued: a handle, or a stream of PyTorch, CuPy or numba. Default that
        of its library.

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
        A shape, axis or eps out of range; one value per channel; an `out` that overlaps x in part, or a parameter.
    """
    if type(x) is not np.ndarray and buffers.on_device(x):
        found: tuple[Array, Moments] = results.on_gpu(backend).batch_norm(x, gamma, beta, axis, eps, out, stream)
        return found
    if stream is not None:
        raise TypeError(results.HOST)
    if num_threads is not None:
        with threads.limited(num_threads):
            return batch_norm(x, gamma, beta, axis, eps, out, backend=backend)
    x = checks.as_input(x)
    way = ready(x, axis, backend)
    channels, kind, given = way.channels, way.kind, (gamma, beta)
    gamma = checks.as_parameter(gamma, channels, kind, "gamma")
    beta = checks.as_parameter(beta, channels, kind, "beta")
    eps = checks.check_eps(eps, training=True)
    checks.check_count(x, way.values)
    if out is not None:
        checks.check_out(out, x, gamma=given[0], beta=given[1])
    if way.forward is not None and (out is None or out.flags.c_contiguous):
        y = way.plan.empty(x.dtype)[0] if out is None else out
        return y, way.forward(x, gamma, beta, eps, y)[1]
    if not way.values:
        return results.empty(x, out), made(0, np.zeros(channels), np.zeros(channels))
    plan, view = layout.view_of(way.plan, x)
    result, target, late = results.target(plan, view.dtype, out)
    m = way.served.forward(view, gamma, beta, eps, target)[1]
    return (results.finish(plan, result, target) if late else result), m


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
    stream: Any = None,
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
    axis, eps, out, backend, num_threads, stream
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
    if type(x) is not np.ndarray and buffers.on_device(x):
        found: Array = results.on_gpu(backend).batch_norm_inference(x, mean, var, gamma, beta, axis, eps, out, stream)
        return found
    if stream is not None:
        raise TypeError(results.HOST)
    if num_threads is not None:
        with threads.limited(num_threads):
            return batch_norm_inference(x, mean, var, gamma, beta, axis, eps, out, backend=backend)
    x = checks.as_input(x)
    way = ready(x, axis, backend)
    checks.check_running(mean, var)
    channels, kind, given = way.channels, way.kind, (mean, var, gamma, beta)
    mean = checks.as_statistic(mean, channels, "mean")
    var = checks.as_statistic(var, channels, "var")
    gamma = checks.as_parameter(gamma, channels, kind, "gamma")
    beta = checks.as_parameter(beta, channels, kind, "beta")
    eps = checks.check_eps(eps, training=False)
    if out is not None:
        checks.check_out(out, x, mean=given[0], var=given[1], gamma=given[2], beta=given[3])
    if not way.values:
        return results.empty(x, out)
    rstd = way.served.rstd(var, 1.0, eps)
    if way.normalize is not None and (out is None or out.flags.c_contiguous):
        y = way.plan.empty(x.dtype)[0] if out is None else out
        way.normalize(x, mean, rstd, gamma, beta, y)
        return y
    plan, view = layout.view_of(way.plan, x)
    result, target, late = results.target(plan, view.dtype, out)
    way.served.normalize(view, mean, rstd, gamma, beta, target)
    return results.finish(plan, result, target) if late else result
