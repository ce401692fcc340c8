"""The operator for eager PyTorch.

The same kernels and derivatives, without the dispatcher, which takes longer than a small layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame
from torch.autograd import profiler

from fastbn.statistics import Moments
from fastbn.torch import eligibility, tensors
from fastbn.torch.derivatives import first, leaf, second
from fastbn.torch.tensors import Statistics

followed = eval_frame.get_eval_frame_callback  # None but where Dynamo follows eager code: around its graph breaks

Running = tuple[float, Tensor, Tensor]  # weight of the new value, running mean and variance


def alone(run: Callable[..., Any], *arguments: Any) -> Any:
    """A call that Dynamo does not follow into: it would take NumPy's functions on memory for PyTorch's on tensors."""
    disable: Callable[..., Any] = torch.compiler.disable
    return disable(run)(*arguments)


def named(name: str, run: Callable[..., Any], *arguments: Any) -> Any:
    """A call that torch.profiler shows as fastbn::name. Ask `profiler._is_profiler_enabled` before.

    That takes 10 ns where none runs.
    """
    with profiler.record_function(f"fastbn::{name}"):
        return run(*arguments)


def normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    constants: tuple[Any, Any] | None,
    running: Running | None,
) -> tuple[Tensor, Statistics]:
    """Forward: (y, statistics), with constant statistics where given.

    Else those of the batch, which move the running ones.
    """
    if profiler._is_profiler_enabled:
        name = "batch_norm" if constants is None else "batch_norm_inference"
        shown: tuple[Tensor, Statistics] = named(name, _normalize, x, gamma, beta, eps, constants, running)
        return shown
    return _normalize(x, gamma, beta, eps, constants, running)


def _normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    constants: tuple[Any, Any] | None,
    running: Running | None,
) -> tuple[Tensor, Statistics]:
    if constants is not None:
        return tensors.inference(x, *constants, gamma, beta, eps), constants
    y, found = tensors.forward(x, gamma, beta, eps)
    if running is not None:
        tensors.track(found, *running)
    return y, found


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
        y, ctx.found = normalize(x, gamma, beta, eps, constants, running)
        ctx.eps, needs = eps, ctx.needs_input_grad
        ctx.frozen = constants is not None and not (needs[1] or needs[2])
        ctx.format = tensors.memory_format(y)
        ctx.save_for_backward(None if ctx.frozen else x, gamma)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gamma and beta."""
        if torch.compiler.is_compiling() or followed() is not None:
            found: tuple[Tensor | None, ...] = alone(_backward, ctx, dy)
            return found
        return _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of `Normalize`; recorded in turn under create_graph."""
    if profiler._is_profiler_enabled:
        name = "batch_norm_backward" if isinstance(ctx.found, Moments) else "batch_norm_inference_backward"
        shown: tuple[Tensor | None, ...] = named(name, _derived, ctx, dy)
        return shown
    return _derived(ctx, dy)


def _derived(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # the imaginary part of a conjugate is negated
    (x, gamma), dy, recorded = ctx.saved_tensors, dy.resolve_neg(), torch.is_grad_enabled()
    if ctx.frozen and recorded and not dy.requires_grad:
        dy = leaf(dy)
    if not (
        eligibility.plain(dy) and (x is None or eligibility.plain(x)) and (gamma is None or eligibility.plain(gamma))
    ):
        # dy of vmap, as is_grads_batched has it, or zeros without memory; x and gamma as a hook of saved tensors gives
        # them back
        dx, dgamma, dbeta = first(dy, dy if ctx.frozen else x, *_tensors(ctx.found), gamma, ctx.eps)
    elif ctx.frozen:  # dx = gamma * dy * rstd is a normalization of dy, and x is not needed
        dy, (mean, var) = dy.contiguous(memory_format=ctx.format), ctx.found
        dx = normalized(dy, gamma, None, ctx.eps, (tensors.zeros(mean), var), None)
        return dx, None, None, None, None, None
    else:
        run = gradients if recorded else tensors.backward
        dx, dgamma, dbeta = run(dy, x, ctx.found, gamma, ctx.eps)
    needs = ctx.needs_input_grad
    return dx if needs[0] else None, dgamma if needs[1] else None, dbeta if needs[2] else None, None, None, None


def _tensors(found: Statistics) -> tuple[Tensor, Tensor | None]:
    """Mean, and the variance where that is a constant."""
    mean, var = (found.mean, None) if isinstance(found, Moments) else found
    return tensors.tensor(mean), None if var is None else tensors.tensor(var)


class Gradients(torch.autograd.Function):
    """`kernels.backward`, recorded."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, found: Statistics, gamma: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, dgamma, dbeta)."""
        ctx.save_for_backward(dy, x, gamma)
        ctx.found, ctx.eps = found, eps
        return tensors.backward(dy, x, found, gamma, eps)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of dy, x and gamma."""
        dy, x, gamma = ctx.saved_tensors
        grad_dy, grad_x, grad_gamma = second(above, dy, x, *_tensors(ctx.found), gamma, ctx.eps)
        return grad_dy, grad_x, None, grad_gamma, None


normalized: Callable[..., Tensor] = Normalize.apply
gradients: Callable[..., tuple[Tensor, Tensor, Tensor]] = Gradients.apply
