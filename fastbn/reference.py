"""The backend contract in plain float64 NumPy, formulas as published (Ioffe & Szegedy 2015): the oracle of every test.

Slow and simple on purpose: it holds float64 copies of its inputs. Select it with ``backend="reference"`` to check a
result. Canonical views in, see `fastbn.cpu.backend.Passes`; NaN and Inf propagate without a warning.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import dtypes
from fastbn.statistics import Moments, made

Array = NDArray[Any]
Wide = NDArray[np.float64]


def _axes(x: Array) -> tuple[int, ...]:
    """All axes but the channels': of (N, C, S) or (R, C)."""
    return (0, 2) if x.ndim == 3 else (0,)


def _shaped(values: Array | float, x: Array) -> Wide:
    """Per-channel values, shape (C,), to go beside x."""
    wide = np.asarray(values, np.float64)
    return wide.reshape(-1, 1) if x.ndim == 3 and wide.ndim else wide


def _xhat(x: Array, mean: Array, rstd: Array) -> Wide:
    return (x.astype(np.float64) - _shaped(mean, x)) * _shaped(rstd, x)


def _store(values: Wide, out: Array) -> Array:
    """Write a result; a half one is the float32 one, rounded to nearest even."""
    out[...] = values.astype(dtypes.of_parameters(out.dtype), copy=False)
    return out


@np.errstate(all="ignore")
def moments(x: Array) -> Moments:
    """Count, mean and m2 of each channel, two passes."""
    wide, axes = x.astype(np.float64), _axes(x)
    mean = wide.mean(axes)
    deviation = wide - _shaped(mean, x)
    correction = deviation.mean(axes)  # zero but for the rounding of the mean
    deviation -= _shaped(correction, x)
    return made(x.size // mean.size, mean + correction, np.square(deviation).sum(axes))


@np.errstate(all="ignore")
def rstd(m2: Wide, count: float, eps: float) -> Wide:
    """1 / sqrt(m2 / count + eps)."""
    return 1.0 / np.sqrt(m2 / count + eps)


@np.errstate(all="ignore")
def track(moments: Moments, freedom: float, weight: float, running_mean: Array, running_var: Array) -> None:
    """Running statistics move towards moments.mean and moments.m2 / freedom by `weight`, in place."""
    running_mean[...] = (1.0 - weight) * running_mean.astype(np.float64) + weight * moments.mean
    running_var[...] = (1.0 - weight) * running_var.astype(np.float64) + weight * (moments.m2 / freedom)


@np.errstate(all="ignore")
def normalize(x: Array, mean: Array, rstd: Array, gamma: Array | None, beta: Array | None, out: Array) -> Array:
    """y = gamma * (x - mean) * rstd + beta."""
    y = _xhat(x, mean, rstd)
    if gamma is not None:
        y *= _shaped(gamma, x)
    if beta is not None:
        y += _shaped(beta, x)
    return _store(y, out)


@np.errstate(all="ignore")
def grad_reduce(dy: Array, x: Array, mean: Array, rstd: Array) -> tuple[Wide, Wide]:
    """(sum of dy, sum of dy * xhat) of each channel: (dbeta, dgamma)."""
    wide, axes = dy.astype(np.float64), _axes(x)
    return wide.sum(axes), (wide * _xhat(x, mean, rstd)).sum(axes)


@np.errstate(all="ignore")
def grad_input(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    sums: tuple[Wide, Wide] | None,
    count: int,
    out: Array,
) -> Array:
    """dx in training; with sums=None the statistics are constants, as at inference."""
    scale = _shaped(rstd, x) * (1.0 if gamma is None else _shaped(gamma, x))
    dx = dy.astype(np.float64)
    if sums is not None:
        dx -= _shaped(sums[0] / count, x) + _xhat(x, mean, rstd) * _shaped(sums[1] / count, x)
    return _store(dx * scale, out)


@np.errstate(all="ignore")
def forward(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
    """Moments, then normalize."""
    m = moments(x)
    return normalize(x, m.mean, m.rstd(eps), gamma, beta, out), m


@np.errstate(all="ignore")
def backward(
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    out: Array,
    training: bool = True,
    grads: Array | None = None,
) -> tuple[Array, Wide, Wide]:
    """grad_reduce, then grad_input: (dx, dgamma, dbeta)."""
    sums = grad_reduce(dy, x, mean, rstd)
    grad_input(dy, x, mean, rstd, gamma, sums if training else None, x.size // mean.size, out)
    if grads is not None:
        grads[0], grads[1] = sums
    return out, sums[1], sums[0]


def compact(shape: tuple[int, ...], dims: tuple[int, ...], dtype: dtypes.Dtype) -> None:
    """Nothing that saves anything."""


def describe(dims: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """What runs for a canonical shape."""
    return f"NumPy in float64, one thread, several passes over {dims}"
