"""A batch norm folded into the linear or convolution layer before it.

One multiplication less for every value, at inference.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import checks, scalars
from fastbn.batchnorm import BatchNorm
from fastbn.statistics import affine_of

__all__ = ["fold"]

Array = NDArray[Any]


def fold(bn: Any, weight: Any, bias: Any = None, transposed: bool = False, groups: int = 1) -> tuple[Any, Any]:
    """Weight and bias that give what a batch norm in evaluation makes of a linear layer's, or a convolution's, output.

    bn(weight * x + bias) = folded_weight * x + folded_bias, with the running statistics of `bn`, whether it is in
    evaluation or not. In float64, then rounded to the dtype of weight (bfloat16 by way of float32).

    Parameters
    ----------
    bn : fastbn.BatchNorm, torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm
        The batch norm, of C channels.
    weight : array_like or torch.Tensor, shape (C, in) or (C, in / groups, *kernel)
        Of float16, bfloat16, float32 or float64. If transposed, of shape (in, C / groups, *kernel).
    bias : array_like or torch.Tensor, shape (C,), optional
        0 where absent.
    transposed : bool
        Whether weight is that of a transposed convolution, or a matrix (in, C), as Keras has it.
    groups : int
        Of the convolution.

    Returns
    -------
    weight : ndarray or torch.Tensor, shape and dtype of weight
        A tensor, on the device of weight and without a gradient, where weight is one; nothing given is changed.
    bias : ndarray or torch.Tensor, shape (C,), dtype of weight
        Always there.

    Raises
    ------
    TypeError
        `bn` is no batch norm; weight or bias not of a supported dtype; groups not an integer.
    ValueError
        A shape that does not go with the channels of `bn`, or with groups; a batch norm without running statistics.
    """
    norm = _norm(bn)
    wide = _float64(weight, "weight")
    shapes = _shapes(wide.shape, norm.mean.size, scalars.flag(transposed, "transposed"), groups)
    offset = None if bias is None else _float64(bias, "bias")
    if offset is not None and offset.shape != norm.mean.shape:
        raise ValueError(f"bias: given shape {offset.shape}, want {norm.mean.shape}, one value per channel of bn")
    scale, shift = affine_of(*norm, offset)
    with np.errstate(all="ignore"):  # NaN and Inf propagate without a warning
        folded = wide.reshape(shapes.weight) * scale.reshape(shapes.scale)
    return _like(folded.reshape(wide.shape), weight), _like(shift, weight)


class _Norm(NamedTuple):
    """What a batch norm does in evaluation: each (C,) and float64."""

    mean: Array
    var: Array
    gamma: Array | None
    beta: Array | None
    eps: float


def _norm(bn: Any) -> _Norm:
    """TypeError for what is no batch norm, ValueError for one without running statistics."""
    torch = sys.modules.get("torch")
    if isinstance(bn, BatchNorm):
        state, eps = bn.state_dict(), checks.check_eps(bn.eps, training=False)
    elif torch is not None and isinstance(bn, torch.nn.modules.batchnorm._BatchNorm):
        state, eps = bn.state_dict(), bn.eps
    else:
        raise TypeError(
            f"bn: given {type(bn).__name__}, want a fastbn.BatchNorm or a torch.nn.BatchNorm1d, "
            f"BatchNorm2d or BatchNorm3d"
        )
    arrays = (state.get(key) for key in ("running_mean", "running_var", "weight", "bias"))
    mean, var, gamma, beta = (None if array is None else _float64(array, "bn") for array in arrays)
    if mean is None or var is None:
        raise ValueError(
            "bn: given one without running statistics (track_running_stats=False), which has no fixed map to fold"
        )
    return _Norm(mean, var, gamma, beta, eps)


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _float64(value: Any, name: str) -> Array:
    """A float64 array on the host."""
    if not _is_tensor(value):
        return checks.as_input(value, name).astype(np.float64)
    import torch

    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name}: given dtype {value.dtype}, want torch.float16, bfloat16, float32 or float64: convert it first"
        )
    wide: Array = value.detach().to("cpu", torch.float64).numpy()
    return wide


def _like(values: Array, weight: Any) -> Any:
    """An array or tensor as weight is, of its dtype, and in its memory order where the shape is the same."""
    if not _is_tensor(weight):
        array = checks.as_input(weight)
        rounded = np.empty_like(array, shape=values.shape, subok=False)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded[...] = values
        return rounded
    import torch

    if weight.dtype == torch.float16:  # PyTorch would round twice, to float32 first
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(np.float16)
    plain = weight.detach()
    tensor = torch.empty_like(plain) if plain.shape == values.shape else plain.new_empty(values.shape)
    return tensor.copy_(torch.from_numpy(values))


class _Shapes(NamedTuple):
    """The shapes in which weight and scale meet."""

    weight: tuple[int, ...]
    scale: tuple[int, ...]


def _shapes(shape: tuple[int, ...], channels: int, transposed: bool, groups: Any) -> _Shapes:
    """ValueError for a weight that does not go with the channels and groups."""
    groups = scalars.whole(groups, "groups", "a positive integer")
    if groups < 1 or channels % groups:
        raise ValueError(
            f"groups: given {scalars.shown(groups)}, want a number that divides the {channels} channels of bn"
        )
    wanted = f"(in, {channels // groups}, *kernel)" if transposed else f"({channels}, in / groups, *kernel)"
    why = f"for the {channels} channels of bn" + (f" in {groups} groups" if groups > 1 else "")
    if len(shape) < 2 or shape[int(transposed)] != (channels // groups if transposed else channels):
        raise ValueError(
            f"weight: given shape {shape}, want {wanted} {why}" + (", as it is transposed" if transposed else "")
        )
    ones = (1,) * (len(shape) - 2)
    if not transposed:
        return _Shapes(shape, (channels, 1, *ones))
    if shape[0] % groups:
        raise ValueError(
            f"weight: given shape {shape}, with {shape[0]} inputs along axis 0, want a multiple of {groups}, the groups"
        )
    return _Shapes((groups, shape[0] // groups, *shape[1:]), (groups, 1, channels // groups, *ones))
