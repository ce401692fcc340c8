"""Derivatives of batch normalization and of its gradients, of ordinary PyTorch operations: all further ones follow.

With E the mean of a channel's values, h = xhat, r = rstd, and P(v) = v - E[v] - h E[v h], which is its own transpose,
in training

    dx     = gamma r P(dy),    dgamma = sum of dy h,    dbeta = sum of dy

and h moves by r P(dx) where x moves by dx. Hence, with A, B, D the gradients with respect to dx, dgamma, dbeta,

    ddy    = gamma r P(A) + B h + D
    dgamma = sum of A r P(dy)
    dx     = B r P(dy) - gamma r^2 (h E[A P(dy)] + E[dy h] P(A) + E[A h] P(dy))

and where the statistics are constants, P is the identity and h moves by r dx.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastbn.torch.eligibility import parameter_dtype

Map = Callable[[Tensor], Tensor]


def _others(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """Values per channel, as x multiplies with them."""
    return values.to(parameter_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))


def _average(values: Tensor) -> Tensor:
    return values.mean(_others(values), keepdim=True)


def _xhat_rstd_projection(x: Tensor, mean: Tensor, var: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Map]:
    """h, r and P."""
    # The mean in two parts keeps float32's digits. In training it is but a shift by a constant, to which all below is
    # blind.
    high = mean.detach().to(parameter_dtype(x))
    d = x.to(parameter_dtype(x)) - _beside(high, x) - _beside(mean.detach() - high, x)
    if var is not None:
        r = _beside((var.detach().double() + eps).rsqrt(), x)
        return d * r, r, lambda v: v
    d = d - _average(d)
    r = (_average(d.square()) + eps).rsqrt()
    h = d * r
    return h, r, lambda v: v - _average(v) - h * _average(v * h)


def leaf(dy: Tensor) -> Tensor:
    """dy, so that dx is recorded as PyTorch has it, also where nothing depends on it: a penalty on it is 0."""
    # not dy.detach().requires_grad_(): vmap has no detach()
    return dy + torch.zeros((), dtype=dy.dtype, device=dy.device, requires_grad=True)


def first_order(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor | None, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to (x, gamma, beta), of any tensor dy that PyTorch can calculate with.

    Arguments as `second_order`. dgamma and dbeta are of float32, or of float64 beside x of float64.
    """
    h, r, P = _xhat_rstd_projection(x, mean, var, eps)
    dy, g = dy.to(parameter_dtype(x)), 1.0 if gamma is None else _beside(gamma, x)
    return (g * r * P(dy)).to(x.dtype), (dy * h).sum(_others(x)), dy.sum(_others(x))


def second_order(
    grads: tuple[Tensor, ...], dy: Tensor, x: Tensor, mean: Tensor, var: Tensor | None, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients for (dy, x, gamma) of a scalar whose gradients with respect to (dx, dgamma, dbeta) are (A, B, D).

    Parameters
    ----------
    grads : tuple of Tensor
        A, of the shape of x, and B and D, of shape (C,).
    dy, x : Tensor, shape (N, C, ...)
    mean : Tensor, shape (C,), float32 or float64
        Of the batch, or the constant.
    var : Tensor, shape (C,), float32 or float64, or None
        The constant; None in training, where x decides it.
    gamma : Tensor, shape (C,), or None
    eps : float

    Returns
    -------
    tuple of Tensor
        In the dtypes of dy, x and gamma; None beside a gamma of None.
    """
    h, r, P = _xhat_rstd_projection(x, mean, var, eps)
    A, wide_dy = grads[0].to(parameter_dtype(x)), dy.to(parameter_dtype(x))
    g = 1.0 if gamma is None else _beside(gamma, x)
    B, D = _beside(grads[1], x), _beside(grads[2], x)
    P_A, P_dy = P(A), P(wide_dy)
    grad_x = B * r * P_dy
    if var is None:
        through_h = h * _average(A * P_dy) + _average(wide_dy * h) * P_A + _average(A * h) * P_dy
        grad_x = grad_x - g * r.square() * through_h
    grad_dy = g * r * P_A + B * h + D
    grad_gamma = None if gamma is None else (A * r * P_dy).sum(_others(x)).to(gamma.dtype)
    return grad_dy.to(dy.dtype), grad_x.to(x.dtype), grad_gamma
