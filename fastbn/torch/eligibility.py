"""Which calls of a module fastbn's kernels serve; all others are PyTorch's own, with its results and its errors."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad

from fastbn import backends
from fastbn.arguments.errors import BackendUnavailable
from fastbn.torch.openmp import of_pytorch

PARAMETERS = {  # of which dtype parameters and running statistics are, beside x
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
LARGEST = sys.float_info.max  # an int may be larger
PLAIN = (Tensor, torch.nn.Parameter)


class Call(NamedTuple):
    """A module as one call sees it."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    batch: bool  # whether the batch's own statistics normalize


def call(module: Any) -> Call:
    """What a call of a batch norm uses."""
    own, kept = module._parameters, module._buffers
    try:  # a quarter of the time that looking them up as attributes takes
        weight, bias, mean, var = own["weight"], own["bias"], kept["running_mean"], kept["running_var"]
    except KeyError:  # parametrized, pruned
        weight, bias, mean, var = module.weight, module.bias, module.running_mean, module.running_var
    return Call(weight, bias, mean, var, module.training or (mean is None and var is None))


def finite(value: Any) -> bool:
    """Whether fastbn calculates with a number as PyTorch does.

    Whatever else PyTorch takes for one, or refuses, is its own to tell.
    """
    return isinstance(value, (float, int)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def declines(given: Call, x: Tensor, ranks: Container[int], eps: Any, momentum: Any) -> str | None:
    """Why fastbn's kernels can't serve a call; None where they do.

    torch.compile traces this: what it reads of x guards the compiled code.
    """
    kind, rank = PARAMETERS.get(x.dtype), x.dim()
    if kind is None:
        return f"x is of {x.dtype}"
    if rank not in ranks:
        return f"x is of rank {rank}"
    C, device = x.shape[1], x.device
    if C == 0:
        return "x has no channels"
    for value in given[:4]:
        if value is not None and (value.dtype is not kind or value.shape != (C,) or value.device != device):
            return (
                f"parameters and running statistics are not all of {kind}, shape ({C},), on {device}, as x of "
                f"{x.dtype} wants them"
            )
    mean, var = given.running_mean, given.running_var
    if (mean is None) != (var is None):
        return "one running statistic is there without the other"
    if mean is not None and var is not None and (mean.requires_grad or var.requires_grad):
        return "a running statistic requires a gradient, and has none"
    if given.batch and x.numel() // C < 2:
        return "x has less than two values per channel"
    if not (finite(eps) and (momentum is None or finite(momentum))):
        return "eps or momentum is no finite number"
    if eps <= 0.0 and (given.batch or eps < 0.0):
        return f"eps is {eps}"
    if x.is_cuda:
        return gpu_declines()
    return None if x.is_cpu else f"x is on {device}"


def gpu_declines() -> str | None:
    """Why fastbn's CUDA backend serves no call on this machine."""
    try:
        backends.check_device()
    except BackendUnavailable as error:
        return str(error)
    return None


# torch.compiler.assume_constant_result, which imports Dynamo
gpu_declines._dynamo_marked_constant = True  # type: ignore[attr-defined]


def hidden(given: Call, x: Tensor) -> str | None:
    """Why an eager call is one that only PyTorch's own kernels may serve.

    What memory holds is not all there is to its tensors.
    Or the running statistics lie where the kernel that moves them can't write, or somebody looks at every operation.
    """
    if not plain(x):
        return f"x is a {type(x).__name__}, but no plain memory"
    for value in given[:4]:
        if value is not None and not plain(value):
            return f"a parameter or running statistic is a {type(value).__name__}, but no plain memory"
    if given.batch and not apart(given):
        return "the running statistics lie in memory with gaps, or share it with each other or with a parameter"
    return watched()


def plain(value: Tensor) -> bool:
    """Whether a tensor is what lies at its address.

    No subclass, sparse, negated, nor zeros or a functional tensor, whose address is 0.
    """
    try:
        memory = type(value) in PLAIN and value.layout is torch.strided and not value.is_neg()
        return memory and (value.data_ptr() != 0 or not value.numel())
    except RuntimeError:  # of vmap, or what is left of a tensor of torch.func behind its transform: it has no address
        return False


def apart(given: Call) -> bool:
    """Whether running statistics can be moved where they are.

    Without gaps, apart from each other and from the parameters.
    """
    weight, bias, mean, var, _ = given
    if mean is None or var is None:
        return True
    if not (mean.is_contiguous() and var.is_contiguous()):
        return False
    first, second, reach = mean.data_ptr(), var.data_ptr(), mean.nbytes
    if -reach < first - second < reach:
        return False
    for value in (weight, bias):
        if value is not None:
            begins, most = value.data_ptr(), reach if value.is_contiguous() else reach * max(1, value.stride(0))
            if -most < begins - first < reach or -most < begins - second < reach:
                return False
    return True


def watched() -> str | None:
    """Who looks at every operation of this thread now, as only PyTorch's own kernels let them.

    None where nobody does.
    """
    if torch._C._len_torch_dispatch_stack():
        return "a mode of torch.utils._python_dispatch looks at every operation"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "derivatives are taken forwards (torch.autograd.forward_ad)"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records PyTorch's own operators"
    return None


def remedy(module: Any) -> str:
    """What to do where something looks for PyTorch's own classes."""
    kind = type(module)
    given = f"given a model with {kind.__module__}.{kind.__qualname__}, which it can't look into"
    if not kind.__module__.startswith("fastbn.torch."):
        return (
            f"{given}, nor can fastbn.torch.revert swap it: remove its parametrizations, or derive it from "
            f"torch.nn's batch norm"
        )
    again = "convert_sync_batchnorm" if kind.__name__ == "SyncBatchNorm" else "convert"
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
    if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"module: given {type(module).__name__}, want a batch norm, e.g. model.bn1")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: given {type(x).__name__}, want a torch.Tensor: torch.from_numpy(x) of an array")
    ranks, given = getattr(module, "RANKS", None), call(module)
    if ranks is None:
        return f"PyTorch's own kernels: a {type(module).__qualname__} that is not converted, see fastbn.torch.convert"
    reason = declines(given, x, ranks, module.eps, module.momentum) or hidden(given, x)
    if reason is not None:
        return f"PyTorch's own kernels: {reason}"
    dtype = str(x.dtype).removeprefix("torch.")
    last = x.stride(1) == 1 and x.shape[1] > 1
    with of_pytorch():
        shown = backends.explain(tuple(x.shape), dtype, channels_last=last, backend="cuda" if x.is_cuda else None)
    how = (
        "with the statistics of the batch"
        if given.batch
        else ("with the running statistics; below, what runs in training")
    )
    return f"fastbn's kernels, {how}\n{shown}"
