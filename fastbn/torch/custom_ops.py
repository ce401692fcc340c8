"""The operators as torch.library knows them, for torch.compile, torch.export and all that looks at PyTorch programs.

    torch.ops.fastbn.moments(x) -> (mean, m2)
    torch.ops.fastbn.batch_norm(x, gamma, beta, eps) -> (y, mean, m2)
    torch.ops.fastbn.batch_norm_inference(x, mean, var, gamma, beta, eps) -> y
    torch.ops.fastbn.batch_norm_backward(dy, x, mean, m2, gamma, eps) -> (dx, dgamma, dbeta)
    torch.ops.fastbn.batch_norm_inference_backward(dy, x, mean, var, gamma, eps) -> (dx, dgamma, dbeta)

Shapes and dtypes are those of fastbn's functions with axis=1; mean and m2 are float64 of shape (C,). Statistics are not
differentiated: neither those that go in nor those that come out. Derivatives are taken backwards only: forwards,
PyTorch gives a custom operator none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbn.arguments import checks
from fastbn.statistics import Moments
from fastbn.torch import tensors
from fastbn.torch.derivatives import leaf, second_order
from fastbn.torch.eligibility import parameter_dtype

Three = tuple[Tensor, Tensor, Tensor]


def count(x: Tensor) -> int:
    """Values per channel."""
    return x.numel() // x.shape[1]


_Library: Any = torch.library.Library  # whose methods are untyped
_LIBRARY = _Library("fastbn", "FRAGMENT")
# Flexible: in the memory order that the compiler chose for x, where else it would restore that of the eager program.
_LIBRARY.define("moments(Tensor x) -> (Tensor, Tensor)", tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
_LIBRARY.impl("moments", tensors.moments, "CPU")
_LIBRARY.impl("moments", tensors.moments, "CUDA")
moments: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.ops.fastbn.moments.default


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1], dtype=torch.float64), x.new_empty(x.shape[1], dtype=torch.float64)


torch.library.register_fake("fastbn::moments", _statistics, lib=_LIBRARY)


@torch.library.custom_op("fastbn::batch_norm", mutates_args=())
def batch_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Three:
    """Training forward: (y, mean, m2)."""
    y, m = tensors.forward(x, gamma, beta, eps)
    return y, tensors.tensor(m.mean), tensors.tensor(m.m2)


@torch.library.custom_op("fastbn::batch_norm_inference", mutates_args=())
def batch_norm_inference(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Tensor:
    """Forward with constant statistics: y."""
    return tensors.inference(x, tensors.array(mean), tensors.array(var), gamma, beta, eps)


@torch.library.custom_op("fastbn::batch_norm_backward", mutates_args=())
def batch_norm_backward(dy: Tensor, x: Tensor, mean: Tensor, m2: Tensor, gamma: Tensor | None, eps: float) -> Three:
    """Gradients of `batch_norm`: (dx, dgamma, dbeta)."""
    checks.check_axis(tuple(x.shape), 1)
    return tensors.backward(dy, x, Moments(count(x), tensors.array(mean), tensors.array(m2)), gamma, eps)


@torch.library.custom_op("fastbn::batch_norm_inference_backward", mutates_args=())
def batch_norm_inference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, eps: float
) -> Three:
    """Gradients of `batch_norm_inference`: (dx, dgamma, dbeta)."""
    return tensors.backward(dy, x, (tensors.array(mean), tensors.array(var)), gamma, eps)


def _like(x: Tensor) -> Tensor:
    return tensors.formatted(torch.empty_like(x))


def _together(x: Tensor, **others: Tensor | None) -> None:
    """Refuse what lies elsewhere: with one tensor on meta the dispatcher would take what is empty for the result."""
    for name, value in others.items():
        if value is not None and value.device != x.device:
            raise RuntimeError(f"{name}: given a tensor on {value.device}, want all of them on {x.device}, where x is")


@batch_norm.register_fake
def _(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Three:
    _together(x, gamma=gamma, beta=beta)
    return _like(x), *_statistics(x)


@batch_norm_inference.register_fake
def _(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    _together(x, mean=mean, var=var, gamma=gamma, beta=beta)
    return _like(x)


def _fake_gradients(dy: Tensor, x: Tensor, mean: Tensor, gamma: Tensor | None, **var_or_m2: Tensor) -> Three:
    _together(x, dy=dy, mean=mean, gamma=gamma, **var_or_m2)
    dgamma, dbeta = (x.new_empty(x.shape[1], dtype=parameter_dtype(x)) for _ in range(2))
    return _like(x), dgamma, dbeta


@batch_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, mean: Tensor, m2: Tensor, gamma: Tensor | None, eps: float) -> Three:
    return _fake_gradients(dy, x, mean, gamma, m2=m2)


@batch_norm_inference_backward.register_fake
def _(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, eps: float) -> Three:
    return _fake_gradients(dy, x, mean, gamma, var=var)


def _needed(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those that somebody asks for."""
    return tuple(grad if need else None for grad, need in zip(gradients, ctx.needs_input_grad, strict=True))


def _save_nothing(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


torch.library.register_autograd(
    "fastbn::moments", lambda ctx, dmean, dm2: None, setup_context=_save_nothing, lib=_LIBRARY
)


def _save_training(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    x, gamma, _, ctx.eps = inputs
    _, mean, m2 = output
    ctx.save_for_backward(x, mean, m2, gamma)
    ctx.mark_non_differentiable(mean, m2)


def _training_gradients(ctx: Any, dy: Tensor, dmean: Tensor, dm2: Tensor) -> tuple[Tensor | None, ...]:
    dx, dgamma, dbeta = batch_norm_backward(dy, *ctx.saved_tensors, ctx.eps)
    return _needed(ctx, dx, dgamma, dbeta, None)


def _save_inference(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, gamma, _, ctx.eps = inputs
    ctx.sums = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
    ctx.format = tensors.memory_format(output)
    ctx.save_for_backward(x if ctx.sums else None, mean, var, gamma)


def _inference_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, var, gamma = ctx.saved_tensors
    if not ctx.sums:  # frozen parameters: dx = gamma * dy * rstd is a normalization of dy, and x is not needed
        dy = dy.contiguous(memory_format=ctx.format)
        if torch.is_grad_enabled() and not dy.requires_grad:
            dy = leaf(dy)
        return batch_norm_inference(dy, torch.zeros_like(mean), var, gamma, None, ctx.eps), None, None, None, None, None
    dx, dgamma, dbeta = batch_norm_inference_backward(dy, x, mean, var, gamma, ctx.eps)
    return _needed(ctx, dx, None, None, dgamma, dbeta, None)


batch_norm.register_autograd(_training_gradients, setup_context=_save_training)
batch_norm_inference.register_autograd(_inference_gradients, setup_context=_save_inference)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.eps = inputs[-1]


def _second_training(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, mean, _, gamma = ctx.saved_tensors
    grad_dy, grad_x, grad_gamma = second_order(grads, dy, x, mean, None, gamma, ctx.eps)
    return _needed(ctx, grad_dy, grad_x, None, None, grad_gamma, None)


def _second_inference(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dy, x, mean, var, gamma = ctx.saved_tensors
    grad_dy, grad_x, grad_gamma = second_order(grads, dy, x, mean, var, gamma, ctx.eps)
    return _needed(ctx, grad_dy, grad_x, None, None, grad_gamma, None)


batch_norm_backward.register_autograd(_second_training, setup_context=_save_gradients)
batch_norm_inference_backward.register_autograd(_second_inference, setup_context=_save_gradients)
