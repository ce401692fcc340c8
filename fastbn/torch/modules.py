"""BatchNorm1d, BatchNorm2d and BatchNorm3d: PyTorch's modules, whose calls fastbn's kernels serve."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from fastbn.torch import compiled, custom_ops, eager, eligibility, inference_cache, tensors
from fastbn.torch.private import dynamo_callback, watched

# An exported program is differentiated as it stands, the moments apart: there training must be one operator, and always
# is before PyTorch 2.7, which can't tell.
exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: True)


def check_module(module: object, name: str) -> None:
    """TypeError for what is none."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: given {type(module).__name__}, want a torch.nn.Module")


class Served:
    """What makes one of PyTorch's batch norms call fastbn; without state of its own: a module's class alone tells."""

    RANKS: Container[int]

    def _get_name(self) -> str:
        return f"fastbn.{type(self).__name__}"

    def forward(self: Any, input: Tensor) -> Tensor:
        """Normalize, scale and shift; in training also update the running statistics.

        Parameters
        ----------
        input : Tensor, shape (N, C, ...)

        Returns
        -------
        Tensor, shape and dtype of input
            In its memory format.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As PyTorch's module raises them.
        """
        # a third of the frames that is_compiling takes
        plain = type(input) in eligibility.PLAIN and not torch.compiler.is_dynamo_compiling()
        compiling = not plain and torch.compiler.is_compiling()
        if not compiling and dynamo_callback() is not None:
            y: Tensor = eager.without_dynamo(Served.forward, self, input)
            return y
        entry, state = inference_cache.lookup(self, input) if plain else (None, ())
        if entry is not None and entry.channels and not self.training:
            inferred = inference_cache.inference(self, input, entry, state)
            if inferred is not None:
                return inferred
        operands, reason = eligibility.operands_of(self), None
        if entry is not None and (entry.apart or not operands.batch):
            reason = watched()
        elif not compiling:
            reason = eligibility.hidden(operands, input)
        if reason is not None or eligibility.declines(operands, input, self.RANKS, self.eps, self.momentum) is not None:
            eligibility.refuse_proxy(self, input)
            of_pytorch: Tensor = super().forward(input)  # type: ignore[misc]  # of the class beside this one
            return of_pytorch
        running = None
        if self.training and self.track_running_stats:
            weight = self._count(compiling)
            if operands.running_mean is not None:
                running = (weight, operands.running_mean, operands.running_var)
        if compiling:
            return _compiled(input, operands, self.eps, running)
        if entry is None:
            inference_cache.store(self, input, operands)
        return _eager(input, operands, self.eps, running)

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script asks for first: this can't be compiled by it."""
        raise RuntimeError(f"torch.jit.script: {eligibility.remedy(self)}")

    def _count(self: Any, compiling: bool) -> Any:
        """Count a batch; the weight of its statistics in the running ones."""
        batches = self.num_batches_tracked
        if batches is not None:
            batches.add_(1)
        if self.momentum is not None:
            return self.momentum
        if batches is None:
            return 0.0
        return 1.0 / (batches.double() if compiling else batches.item())


def _eager(x: Tensor, operands: eligibility.Operands, eps: float, running: Any) -> Tensor:
    gamma, beta, mean, var = operands[:4]
    recorded = torch.is_grad_enabled() and (
        x.requires_grad or (gamma is not None and gamma.requires_grad) or (beta is not None and beta.requires_grad)
    )
    constants = None
    if not operands.batch and mean is not None and var is not None:
        # what backward will need must outlive a change of the buffers
        array = tensors.copied if recorded else tensors.array
        constants = array(mean), array(var)
    if recorded:
        return eager.normalized(x, gamma, beta, eps, constants, running)
    return eager.normalize(x, gamma, beta, eps, constants, running)[0]


def _compiled(x: Tensor, operands: eligibility.Operands, eps: float, running: Any) -> Tensor:
    gamma, beta, mean, var = operands[:4]
    if not operands.batch and mean is not None and var is not None:
        return compiled.inference(x, mean, var, gamma, beta, eps)
    # a program keeps derivatives of both orders, a compiled call takes one
    train = custom_ops.batch_norm if exporting() else compiled.training
    y, batch_mean, m2 = train(x, gamma, beta, eps)
    if running is not None:
        with torch.no_grad():
            weight, *buffers = running
            for old, new in zip(buffers, (batch_mean, m2 / (custom_ops.count(x) - 1)), strict=True):
                old.copy_((1.0 - weight) * old.double() + weight * new)
    return y


class BatchNorm1d(Served, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, served by fastbn's kernels: the same constructor, parameters, buffers and state_dict.

    Takes x of shape (N, C) or (N, C, L), of float16, bfloat16 or float32 beside parameters of float32, or of float64
    beside float64. Any other call is PyTorch's own, as are its errors: `explain` tells.
    """

    RANKS = (2, 3)


class BatchNorm2d(Served, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, served by fastbn's kernels: see `BatchNorm1d`. Takes x of shape (N, C, H, W)."""

    RANKS = (4,)


class BatchNorm3d(Served, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, served by fastbn's kernels: see `BatchNorm1d`. Takes x of shape (N, C, D, H, W)."""

    RANKS = (5,)
