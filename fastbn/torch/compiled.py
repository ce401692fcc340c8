"""Batch normalization as torch.compile sees it.

Moments by fastbn's kernel, all else in ordinary operations, which the compiler joins to their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbn.torch import custom_ops, tensors
from fastbn.torch.eligibility import parameter_dtype


def _stored(values: Tensor) -> Tensor:
    """Values per channel as memory."""
    # else Inductor computes them anew, in float64, for each element, which takes twice the time
    return values.as_strided(values.shape, (1,))


def _channelwise(x: Tensor) -> list[int]:
    return [-1, *[1] * (x.dim() - 2)]


def _affine(
    mean: Tensor, rstd: Tensor, gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What makes y of x, (x - mean_hi) * scale + shift: the mean in two parts, as in the kernels."""
    mean_hi = mean.to(dtype)
    scale = rstd if gamma is None else rstd * gamma.double()
    shift = (mean_hi.double() - mean) * scale
    shift = shift if beta is None else shift + beta.double()
    return _stored(mean_hi), _stored(scale.to(dtype)), _stored(shift.to(dtype))


def _apply(x: Tensor, mean_hi: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    view = _channelwise(x)
    y = (x.to(mean_hi.dtype) - mean_hi.view(view)) * scale.view(view) + shift.view(view)
    return tensors.formatted(y.to(x.dtype))


def inference(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """Forward with constant statistics: y."""
    return _apply(x, *_affine(mean.double(), (var.double() + eps).rsqrt(), gamma, beta, parameter_dtype(x)))


# As operators of their own, forward and backward kept in the memory order of the eager program what the compiler lays
# channels last: a step of a compiled MobileNetV2 took twice as long as with PyTorch's norms. This takes 0.97 of it.
class Normalize(torch.autograd.Function):
    """(y, mean, m2) of a training step."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y and the statistics, which are float64 of shape (C,) and not differentiated."""
        mean, m2 = custom_ops.moments(x)
        rstd = (m2 / custom_ops.count(x) + eps).rsqrt()
        mean_hi, scale, shift = _affine(mean, rstd, gamma, beta, parameter_dtype(x))
        ctx.save_for_backward(x, mean, rstd, mean_hi, scale)
        ctx.mark_non_differentiable(mean, m2)
        return _apply(x, mean_hi, scale, shift), mean, m2

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gamma and beta."""
        x, mean, rstd, mean_hi, scale = ctx.saved_tensors
        dtype, view, others = mean_hi.dtype, _channelwise(x), [0, *range(2, x.dim())]
        count = custom_ops.count(x)
        # dx is what the line that fits dy over d best leaves of dy
        d, dy, mean_lo = x.to(dtype) - mean_hi.view(view), dy.to(dtype), mean - mean_hi.double()
        sum_dy, sum_dy_d = dy.sum(others).double(), (dy * d).sum(others).double()
        dgamma = (sum_dy_d - mean_lo * sum_dy) * rstd
        slope = dgamma * rstd / count
        mean_dy = _stored((sum_dy / count - mean_lo * slope).to(dtype))  # where d is 0
        dx = (dy - mean_dy.view(view) - d * _stored(slope.to(dtype)).view(view)) * scale.view(view)
        needs = ctx.needs_input_grad
        return dx.to(x.dtype), dgamma.to(dtype) if needs[1] else None, sum_dy.to(dtype) if needs[2] else None, None


training: Callable[..., tuple[Tensor, Tensor, Tensor]] = Normalize.apply
