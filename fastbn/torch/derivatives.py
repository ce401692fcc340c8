"""Derivatives of batch normalization's gradients, of ordinary PyTorch operations, so that all further ones follow from them.

With A, B, D the gradients with respect to dx, dgamma, dbeta, E the mean of a channel's values, h = xhat, r = rstd, and
P(v) = v - E[v] - h E[v h], which is its own transpose: dx = gamma r P(dy), and h moves by r P(dx) where x moves by dx. Hence, in training,

    ddy    = gamma r P(A) + B h + D
    dgamma = sum of A r P(dy)
    dx     = B r P(dy) - gamma r^2 (h E[A P(dy)] + E[dy h] P(A) + E[A h] P(dy))

and where the statistics are constants, P is the identity and h moves by r dx.
"""

from __future__ import annotations

import torch
from torch import Tensor


def second(
    above: tuple[Tensor, ...], dy: Tensor, x: Tensor, mean: Tensor, var: Tensor | None, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients with respect to (dy, x, gamma) of a scalar whose gradients with respect to (dx, dgamma, dbeta) are (A, B, D).

    Parameters
    ----------
    above : tuple of Tensor
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
    A, B, D = above
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    along, others = [1, -1, *[1] * (x.dim() - 2)], [0, *range(2, x.dim())]

    def beside(values: Tensor) -> Tensor:
        return values.to(kind).view(along)

    def average(values: Tensor) -> Tensor:
        return values.mean(others, keepdim=True)

    # The mean in two parts keeps float32's digits. In training it is but a shift by a constant, to which all below is blind.
    high = mean.detach().to(kind)
    d = x.to(kind) - beside(high) - beside(mean.detach() - high)
    A, steep, g = A.to(kind), dy.to(kind), 1.0 if gamma is None else beside(gamma)
    if var is not None:
        r = beside((var.detach().double() + eps).rsqrt())
        h, P_A, P_dy = d * r, A, steep
        grad_x = beside(B) * r * steep
    else:
        d = d - average(d)
        r = (average(d.square()) + eps).rsqrt()
        h = d * r

        def P(v: Tensor) -> Tensor:
            return v - average(v) - h * average(v * h)

        P_A, P_dy = P(A), P(steep)
        curved = h * average(A * P_dy) + average(steep * h) * P_A + average(A * h) * P_dy
        grad_x = beside(B) * r * P_dy - g * r.square() * curved
    grad_dy = g * r * P_A + beside(B) * h + beside(D)
    grad_gamma = None if gamma is None else (A * r * P_dy).sum(others).to(gamma.dtype)
    return grad_dy.to(dy.dtype), grad_x.to(x.dtype), grad_gamma
