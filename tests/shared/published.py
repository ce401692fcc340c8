"""The formulas of Ioffe & Szegedy 2015, in float64 on whole arrays: what every backend, the reference too, is held
against.
"""

from typing import NamedTuple

import numpy as np


class Statistics(NamedTuple):
    count: int
    mean: np.ndarray
    var: np.ndarray  # biased


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64)


def along(values: np.ndarray | float, x: np.ndarray, axis: int) -> np.ndarray:
    """Per-channel values, shape (C,), to go beside x."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return np.broadcast_to(np.asarray(values, np.float64), (x.shape[axis],)).reshape(shape)


def others_of(x: np.ndarray, axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(x.ndim) if a != axis % x.ndim)


def statistics(x: np.ndarray, axis: int) -> Statistics:
    """Mean 1/m sum x and variance 1/m sum (x - mean)^2 of each channel."""
    x, others = _wide(x), others_of(x, axis)
    mean = x.mean(others)
    return Statistics(x.size // x.shape[axis], mean, np.square(x - along(mean, x, axis)).mean(others))


def xhat(x: np.ndarray, mean: np.ndarray, var: np.ndarray, axis: int, eps: float) -> np.ndarray:
    return (_wide(x) - along(mean, x, axis)) / np.sqrt(along(var, x, axis) + eps)


def normalized(
    x: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    axis: int,
    eps: float,
) -> np.ndarray:
    """Gamma * xhat + beta."""
    gamma, beta = 1.0 if gamma is None else gamma, 0.0 if beta is None else beta
    return along(gamma, x, axis) * xhat(x, mean, var, axis, eps) + along(beta, x, axis)


class Gradients(NamedTuple):
    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray


def gradients(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    gamma: np.ndarray | None,
    axis: int,
    eps: float,
    training: bool,
) -> Gradients:
    """Through the statistics in training; with constant ones otherwise."""
    dy, others, m = _wide(dy), others_of(x, axis), x.size // x.shape[axis]
    hat = xhat(x, mean, var, axis, eps)
    dgamma, dbeta = (dy * hat).sum(others), dy.sum(others)
    inner = dy - along(dbeta, x, axis) / m - hat * along(dgamma, x, axis) / m if training else dy
    gamma = 1.0 if gamma is None else gamma
    return Gradients(along(gamma, x, axis) / np.sqrt(along(var, x, axis) + eps) * inner, dgamma, dbeta)
