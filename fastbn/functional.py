"""Batch normalization as functions of arrays: signatures, docstrings and one line each, for a backend does it.

Arrays on a GPU are those with `__cuda_array_interface__`: CuPy's, PyTorch's CUDA tensors, numba's. Where x is one, so
must be every array beside it, and so is every result, of the same kind; nothing waits for the GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn.arguments import config
from fastbn.backends import backend_for
from fastbn.statistics import Moments

Array = NDArray[Any]
Wide = NDArray[np.float64]


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
    return backend_for(x, backend, num_threads, stream).moments(x, axis)


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
    return backend_for(x, backend, num_threads, stream).forward(x, gamma, beta, axis, eps, out)


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
    served = backend_for(x, backend, num_threads, stream)
    y: Array = served.inference(x, mean, var, gamma, beta, axis, eps, out)
    return y


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
    return backend_for(x, backend, num_threads, stream).backward(dy, x, moments, gamma, axis, eps, out)


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
    served = backend_for(x, backend, num_threads, stream)
    return served.inference_backward(dy, x, mean, var, gamma, axis, eps, out)


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
    return backend_for(x, backend, num_threads, stream).grad_reduce(dy, x, mean, var, axis, eps)


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
    served = backend_for(x, backend, num_threads, stream)
    dx: Array = served.grad_input(dy, x, mean, var, sum_dy, sum_dy_xhat, count, gamma, axis, eps, out)
    return dx
