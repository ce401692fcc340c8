"""Inference as the call before it found it: where a module and its tensors are the same, nothing is looked over again.

The 20 or 52 norms of a network are called behind convolutions that empty the caches, where each step of Python takes ten times as long as
otherwise: a call took 120 to 250 us without its kernel, all of PyTorch's 50 with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastbn import config, layout, threads
from fastbn.backends import select
from fastbn.torch import kernels, memory, serves
from fastbn.torch.team import runtime


class Known(NamedTuple):
    """What an earlier call of a module was served with."""

    given: tuple[Tensor | None, Tensor | None, Tensor, Tensor]  # weight, bias, running mean and variance
    eps: float
    addresses: tuple[int, ...]  # of running mean and variance, weight and bias
    held: tuple[Tensor, ...]  # the memory there, which nothing else can take as long as it is held
    channels: int
    kind: torch.dtype


class Way(NamedTuple):
    """How x of one shape, memory order and dtype is normalized."""

    run: Callable[..., None]
    channels: int
    kind: torch.dtype  # of parameters
    threaded: bool
    large: bool


_known: WeakKeyDictionary[torch.nn.Module, Known] = WeakKeyDictionary()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def prepare(module: Any, given: serves.Call) -> None:
    """Keep what a call with running statistics was served with, for the next one."""
    weight, bias, mean, var = given[:4]
    if mean is None or var is None or not mean.is_cpu or type(module.eps) is not float:
        return
    own = [value for value in given[:4] if value is not None]
    if all(value.is_contiguous() for value in own):
        addresses = tuple(map(_address, (mean, var, weight, bias)))
        held = tuple(value.data for value in own)
        _known[module] = Known((weight, bias, mean, var), module.eps, addresses, held, mean.shape[0], mean.dtype)


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
    return Way(run, plan.channels, serves.PARAMETERS[dtype], form.nbytes >= config.SERIAL_BYTES, form.nbytes >= kernels.LARGE)


def inference(module: Any, x: Tensor) -> Tensor | None:
    """y of an eager call that records nothing; None where it is unlike the last one, or takes more than the kernel: errors among these."""
    known = _known.get(module)
    if known is None or x.layout is not torch.strided or not x.is_cpu or x.is_neg() or serves.watched() is not None:
        return None
    (weight, bias, mean, var), eps, addresses, _, channels, kind = known
    own, kept = module._parameters, module._buffers
    if (
        own.get("weight") is not weight
        or own.get("bias") is not bias
        or kept.get("running_mean") is not mean
        or kept.get("running_var") is not var
        or module.eps != eps
        or (mean.data_ptr(), var.data_ptr(), 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr())
        != addresses
    ):
        return None
    if torch.is_grad_enabled():
        if x.requires_grad or (weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad):
            return None
    way, begins = _way(x.shape, x.stride(), x.dtype, config.BACKEND), x.data_ptr()
    if way is None or way.channels != channels or way.kind is not kind or x.dim() not in module.RANKS or not begins:
        return None
    if way.threaded and torch.get_num_threads() < threads.most():
        return None
    y = memory.like(x) if way.large else torch.empty_like(x)
    way.run(begins, y.data_ptr(), *addresses, eps, runtime() if way.threaded else None)
    return y
