"""Batch normalization with constant statistics as one affine map of each channel."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import checks
from fastbn.cuda import placement
from fastbn.statistics import inverse_deviation

Array = NDArray[Any]


@np.errstate(all="ignore")  # NaN and Inf propagate without a warning
def affine_of(
    mean: Array, var: Array, gamma: Array | None, beta: Array | None, eps: float, bias: Array | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(scale, shift), each (C,) float64.

    With gamma * (x + bias - mean) / sqrt(var + eps) + beta = scale * x + shift.
    """
    mean, var = (np.asarray(values, np.float64) for values in (mean, var))
    scale = inverse_deviation(var, eps)
    if gamma is not None:
        scale = scale * gamma
    shift = ((0.0 if bias is None else bias) - mean) * scale  # the difference first: a bias may be near the mean
    return scale, shift if beta is None else shift + beta


def folded(layer: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(scale, shift) of a BatchNorm in evaluation.

    float64 in any layer: where the mean is large the two terms nearly cancel.
    """
    kept = layer._kept()
    if layer.running_mean is None:
        raise ValueError("folded_affine: this layer keeps no running statistics, and so has no fixed map")
    host = {name: placement.to_host(array) for name, array in kept.items()}
    eps = checks.check_eps(layer.eps, training=False)
    return affine_of(host["running_mean"], host["running_var"], host.get("gamma"), host.get("beta"), eps)
