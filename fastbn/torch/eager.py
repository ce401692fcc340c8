"""The operator for eager PyTorch: the same kernels and derivatives, without the dispatcher.

That takes longer than a small layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbn.statistics import Moments
from fastbn.torch import eligibility, tensors
from fastbn.torch.derivatives import first_order, leaf, second_order
from fastbn.torch.private import dynamo_callback, profiled, shown_as
from fastbn.torch.tensors import Statistics

Running = tuple[float, Tensor, Tensor]  # weight of the new value, running mean and variance


def without_dynamo(run: Callable[..., Any], *arguments: Any) -> Any:
    """A call that Dynamo does not follow into: it would take NumPy's functions on memory for PyTorch's on tensors."""
    disable: Callable[..., Any] = torch.compiler.disable
    return disable(run)(*arguments)


def normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    constants: tuple[Any, Any] | None,
    running: Running | None,
    shown: bool = False,
) -> tuple[Tensor, Statistics]:
    """Forward: (y, statistics), of the constants where given, else of the batch, which move the running ones."""
    if profiled() and not shown:
        name = "batch_norm" if constants is None else "batch_norm_inference"
        result: tuple[Tensor, Statistics] = shown_as(name, normalize, x, gamma, beta, eps, constants, running, True)
        return result
    if constants is not None:
        return tensors.inference(x, *constants, gamma, beta, eps), constants
    y, m = tensors.forward(x, gamma, beta, eps)
    if running is not None:
        tensors.track(m, *running)
    return y, m


class Normalize(torch.autograd.Function):
    """`normalize`, recorded."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        eps: float,
        constants: tuple[Any, Any] | None,
        running: Running | None,
    ) -> Tensor:
        """y."""
        y, ctx.statistics = normalize(x, gamma, beta, eps, constants, running)
        ctx.eps, needs = eps, ctx.needs_input_grad
        ctx.frozen = constants is not None and not (needs[1] or needs[2])
        ctx.format = tensors.memory_format(y)
        ctx.save_for_backward(None if ctx.frozen else x, gamma)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gamma and beta."""
        if torch.compiler.is_compiling() or dynamo_callback() is not None:
            result: tuple[Tensor | None, ...] = without_dynamo(_backward, ctx, dy)
            return result
        return _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor, shown: bool = False) -> tuple[Tensor | None, ...]:
    """Of `Normalize`; recorded in turn under create_graph."""
    if profiled() and not shown:
        name = "batch_norm_backward" if isinstance(ctx.statistics, Moments) else "batch_norm_inference_backward"
        result: tuple[Tensor | None, ...] = shown_as(name, _backward, ctx, dy, True)
        return result
    # the imaginary part of a conjugate is negated
    (x, gamma), dy, recorded = ctx.saved_tensors, dy.resolve_neg(), torch.is_grad_enabled()
    if ctx.frozen and recorded and not dy.requires_grad:
        dy = leaf(dy)
    if not (
        eligibility.plain(dy) and (x is None or eligibility.plain(x)) and (gamma is None or eligibility.plain(gamma))
    ):
        # dy of vmap, as is_grads_batched has it, or zeros without memory; x and gamma as a hook of saved tensors gives
        # them back
        dx, dgamma, dbeta = first_order(dy, dy if ctx.frozen else x, *_mean_var(ctx.statistics), gamma, ctx.eps)
    elif ctx.frozen:  # dx = gamma * dy * rstd is a normalization of dy, and x is not needed
        dy, (mean, var) = dy.contiguous(memory_format=ctx.format), ctx.statistics
        dx = normalized(dy, gamma, None, ctx.eps, (tensors.zeros(mean), var), None)
        return dx, None, None, None, None, None
    else:
        run = gradients if recorded else tensors.backward
        dx, dgamma, dbeta = run(dy, x, ctx.statistics, gamma, ctx.eps)
    needs = ctx.needs_input_grad
    return dx if needs[0] else None, dgamma if needs[1] else None, dbeta if needs[2] else None, None, None, None


def _mean_var(statistics: Statistics) -> tuple[Tensor, Tensor | None]:
    """As tensors; no variance but where it is a constant."""
    mean, var = (statistics.mean, None) if isinstance(statistics, Moments) else statistics
    return tensors.tensor(mean), None if var is None else tensors.tensor(var)


class Gradients(torch.autograd.Function):
    """`tensors.backward`, recorded."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, statistics: Statistics, gamma: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dgamma, dbeta)."""
        ctx.save_for_backward(dy, x, gamma)
        ctx.statistics, ctx.eps = statistics, eps
        return tensors.backward(dy, x, statistics, gamma, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of dy, x and gamma."""
        dy, x, gamma = ctx.saved_tensors
        grad_dy, grad_x, grad_gamma = second_order(grads, dy, x, *_mean_var(ctx.statistics), gamma, ctx.eps)
        return grad_dy, grad_x, None, grad_gamma, None


normalized: Callable[..., Tensor] = Normalize.apply
gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = Gradients.apply
