"""What the call before found: where a module and its tensors are the same, nothing is looked over again, and inference is but its kernel.

The 20 or 52 norms of a network are called behind convolutions that empty the caches, where each step of Python takes ten times as long as
otherwise: a call took 120 to 250 us without its kernel, all of PyTorch's 50 with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import profiler

from fastbn import config, layout, threads
from fastbn.backends import select
from fastbn.torch import functions, kernels, memory, serves
from fastbn.torch.team import runtime


class Known(NamedTuple):
    """What an earlier eager call of a module, served by fastbn, found."""

    given: tuple[Tensor | None, ...]  # weight, bias, running mean and variance
    there: tuple[Tensor, ...]  # those that are not None
    unchanged: Callable[..., bool]  # asked of x and of what is there: type, layout, dtype, rank, shape and strides, but of x any
    addresses: tuple[int, ...]  # of running mean and variance, weight and bias; 0 where absent
    apart: bool  # whether running statistics lie where they can be moved
    channels: int  # where the kernel takes addresses: constants without gaps, on the CPU; else 0


class Way(NamedTuple):
    """How x of one shape, memory order and dtype is normalized."""

    run: Callable[..., None]
    channels: int
    threaded: bool
    large: bool


_Guards: Any = TensorGuards  # of torch.compile: 0.2 us for five tensors, where asking each takes 1; its annotations leave them out
_known: WeakKeyDictionary[torch.nn.Module, Known] = WeakKeyDictionary()


def known(module: Any, x: Tensor) -> Known | None:
    """What an earlier call found, where all of it is as it was: the tensors, what is said of them, and where they lie."""
    found = _known.get(module)
    if found is None:
        return None
    (weight, bias, mean, var), there, unchanged, addresses, _, _ = found
    own, kept = module._parameters, module._buffers
    if (
        own.get("weight") is not weight
        or own.get("bias") is not bias
        or kept.get("running_mean") is not mean
        or kept.get("running_var") is not var
        or not unchanged(x, *there)
        or (
            0 if mean is None else mean.data_ptr(),
            0 if var is None else var.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
        != addresses
    ):
        return None
    return found


def keep(module: Any, x: Tensor, given: serves.Call) -> None:
    """Keep for the next call what this one was served with."""
    weight, bias, mean, var = given[:4]
    own = module._parameters
    if own.get("weight") is not weight or own.get("bias") is not bias:  # parametrized: others in each call
        return
    there = tuple(value for value in given[:4] if value is not None)
    sizes, strides = ([list(measure(value)) for value in there] for measure in (Tensor.size, Tensor.stride))
    any_length: list[Any] = [[None] * x.dim()]
    unchanged = _Guards(x, *there, dynamic_dims_sizes=any_length + sizes, dynamic_dims_strides=any_length + strides).check
    addresses = tuple(0 if value is None else value.data_ptr() for value in (mean, var, weight, bias))
    compact = mean is not None and mean.is_cpu and all(value.is_contiguous() for value in there)
    channels = x.shape[1] if compact else 0
    _known[module] = Known((weight, bias, mean, var), there, unchanged, addresses, serves.apart(given), channels)


@lru_cache(maxsize=1024)
def _way(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> Way | None:
    """Where x is dense, in one of PyTorch's memory formats, and the backend takes addresses."""
    if len(shape) < 2 or dtype not in serves.PARAMETERS:
        return None
    form = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if not form.numel() or not kernels.dense(form):
        return None
    kind = kernels.array(torch.empty(0, dtype=dtype, device="cpu")).dtype
    plan = layout.planned(tuple(shape), tuple(n * kind.itemsize for n in stride), 1, kind.itemsize)
    run = select(backend).compact("inference", tuple(shape), plan.dims, kind)
    if run is None:
        return None
    return Way(run, plan.channels, form.nbytes >= config.SERIAL_BYTES, form.nbytes >= kernels.LARGE)


def inference(module: Any, x: Tensor, before: Known) -> Tensor | None:
    """y of an eager call that records nothing, on what was found before; None where it takes more than the kernel: errors among these."""
    (weight, bias, _, _), _, _, addresses, _, channels = before
    eps = module.eps
    if type(eps) is not float or not 0.0 <= eps < math.inf or serves.watched() is not None:
        return None
    if torch.is_grad_enabled():
        if x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad):
            return None
    way, begins = _way(x.shape, x.stride(), x.dtype, config.BACKEND), x.data_ptr()
    if way is None or way.channels != channels or not begins:
        return None
    if way.threaded and torch.get_num_threads() < threads.most():
        return None
    y = memory.like(x) if way.large else torch.empty_like(x)
    if profiler._is_profiler_enabled:
        functions.named("batch_norm_inference", way.run, begins, y.data_ptr(), *addresses, eps, runtime() if way.threaded else None)
    else:
        way.run(begins, y.data_ptr(), *addresses, eps, runtime() if way.threaded else None)
    return y
