"""Which calls of a module fastbn's kernels serve; all others are PyTorch's own, with its results and its errors."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastbn import backends
from fastbn.arguments.errors import BackendUnavailable
from fastbn.torch import private
from fastbn.torch.openmp import of_pytorch

PARAMETERS = {  # dtype of x, and of parameters and running statistics beside it
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
LARGEST = sys.float_info.max  # an int may be larger
PLAIN = (Tensor, torch.nn.Parameter)


class Operands(NamedTuple):
    """What a call of a batch norm uses of it."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch: bool  # whether the batch's own statistics normalize


def parameter_dtype(x: Tensor) -> torch.dtype:
    """Of parameters and their gradients beside x, and of the arithmetic in ordinary operations."""
    return PARAMETERS.get(x.dtype, torch.float32)


def operands_of(module: Any) -> Operands:
    """What a call of a batch norm uses now."""
    parameters, buffers = module._parameters, module._buffers
    try:  # a quarter of the time that looking them up as attributes takes
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
    except KeyError:  # parametrized, pruned
        weight, bias, mean, var = module.weight, module.bias, module.running_mean, module.running_var
    return Operands(weight, bias, mean, var, module.training or (mean is None and var is None))


def finite(value: Any) -> bool:
    """Whether fastbn calculates with a number as PyTorch does; what else PyTorch takes for one is its own to tell."""
    return isinstance(value, (float, int)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def declines(operands: Operands, x: Tensor, ranks: Container[int], eps: Any, momentum: Any) -> str | None:
    """Why fastbn's kernels can't serve a call; None where they do.

    torch.compile traces this: what it reads of x guards the compiled code.
    """
    dtype, rank = PARAMETERS.get(x.dtype), x.dim()
    if dtype is None:
        return f"x is of {x.dtype}"
    if rank not in ranks:
        return f"x is of rank {rank}"
    C, device = x.shape[1], x.device
    if C == 0:
        return "x has no channels"
    for value in operands[:4]:
        if value is not None and (value.dtype is not dtype or value.shape != (C,) or value.device != device):
            return (
                f"parameters and running statistics are not all of {dtype}, shape ({C},), on {device}, as x of "
                f"{x.dtype} wants them"
            )
    mean, var = operands.running_mean, operands.running_var
    if (mean is None) != (var is None):
        return "one running statistic is there without the other"
    if mean is not None and var is not None and (mean.requires_grad or var.requires_grad):
        return "a running statistic requires a gradient, and has none"
    if operands.batch and x.numel() // C < 2:
        return "x has less than two values per channel"
    if not (finite(eps) and (momentum is None or finite(momentum))):
        return "eps or momentum is no finite number"
    if eps <= 0.0 and (operands.batch or eps < 0.0):
        return f"eps is {eps}"
    if x.is_cuda:
        return gpu_declines()
    return None if x.is_cpu else f"x is on {device}"


@private.constant_when_compiled
def gpu_declines() -> str | None:
    """Why fastbn's CUDA backend serves no call on this machine."""
    try:
        backends.check_device()
    except BackendUnavailable as error:
        return str(error)
    return None


def hidden(operands: Operands, x: Tensor) -> str | None:
    """Why an eager call is one that only PyTorch's own kernels may serve.

    A tensor is more than what its memory holds, running statistics lie where no kernel can write, or somebody watches.
    """
    if not plain(x):
        return f"x is a {type(x).__name__}, but no plain memory"
    for value in operands[:4]:
        if value is not None and not plain(value):
            return f"a parameter or running statistic is a {type(value).__name__}, but no plain memory"
    if operands.batch and not apart(operands):
        return "the running statistics lie in memory with gaps, or share it with each other or with a parameter"
    return private.watched()


def plain(value: Tensor) -> bool:
    """Whether a tensor is what lies at its address: no subclass, sparse, negated, nor without an address."""
    try:
        memory = type(value) in PLAIN and value.layout is torch.strided and not value.is_neg()
        # zeros without memory and functional tensors have the address 0
        return memory and (value.data_ptr() != 0 or not value.numel())
    except RuntimeError:  # of vmap, or what is left of a tensor of torch.func behind its transform: it has no address
        return False


def apart(operands: Operands) -> bool:
    """Whether running statistics can be moved where they are: no gaps, apart from each other and the parameters."""
    weight, bias, mean, var, _ = operands
    if mean is None or var is None:
        return True
    if not (mean.is_contiguous() and var.is_contiguous()):
        return False
    mean_at, var_at, nbytes = mean.data_ptr(), var.data_ptr(), mean.nbytes
    if -nbytes < mean_at - var_at < nbytes:
        return False
    for value in (weight, bias):
        if value is not None:
            at, reach = value.data_ptr(), nbytes if value.is_contiguous() else nbytes * max(1, value.stride(0))
            if -reach < at - mean_at < nbytes or -reach < at - var_at < nbytes:
                return False
    return True


def remedy(module: Any) -> str:
    """What to do where something looks for PyTorch's own classes."""
    cls = type(module)
    given = f"given a model with {cls.__module__}.{cls.__qualname__}, which it can't look into"
    if not cls.__module__.startswith("fastbn.torch."):
        return (
            f"{given}, nor can fastbn.torch.revert swap it: remove its parametrizations, or derive it from "
            f"torch.nn's batch norm"
        )
    again = "convert_sync_batchnorm" if cls.__name__ == "SyncBatchNorm" else "convert"
    return f"{given}: call fastbn.torch.revert(model) first, fastbn.torch.{again}(model) afterwards"


def refuse_proxy(module: Any, x: Any) -> None:
    """TraceError where torch.fx asks what a batch norm does."""
    if isinstance(x, fx.Proxy):
        raise fx.proxy.TraceError(f"torch.fx: {remedy(module)}")


def explain(module: torch.nn.Module, x: Tensor) -> str:
    """Whose kernels run when a batch norm is called on x, which ones, or why not fastbn's.

    Parameters
    ----------
    module : Module
        A batch norm, as it is now: in training or evaluation.
    x : Tensor, shape (N, C, ...)
        Only looked at.

    Returns
    -------
    str
        For a person to read.

    Raises
    ------
    TypeError
        `module` is no batch norm, or `x` no tensor.
    """
    if not isinstance(module, private.AnyBatchNorm):
        raise TypeError(f"module: given {type(module).__name__}, want a batch norm, e.g. model.bn1")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: given {type(x).__name__}, want a torch.Tensor: torch.from_numpy(x) of an array")
    ranks, used = getattr(module, "RANKS", None), operands_of(module)
    if ranks is None:
        return f"PyTorch's own kernels: a {type(module).__qualname__} that is not converted, see fastbn.torch.convert"
    reason = declines(used, x, ranks, module.eps, module.momentum) or hidden(used, x)
    if reason is not None:
        return f"PyTorch's own kernels: {reason}"
    dtype = str(x.dtype).removeprefix("torch.")
    last, backend = x.stride(1) == 1 and x.shape[1] > 1, "cuda" if x.is_cuda else None
    with of_pytorch():
        shown = backends.explain(tuple(x.shape), dtype, channels_last=last, backend=backend)
    batch, running = "the statistics of the batch", "the running statistics; below, what runs in training"
    return f"fastbn's kernels, with {batch if used.batch else running}\n{shown}"
