"""What the call before found: where a module and its tensors are the same, inference is but its kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastbn.arguments import config, layout
from fastbn.backends import select
from fastbn.cpu import threads
from fastbn.cpu.backend import Host
from fastbn.torch import allocator, eligibility, tensors
from fastbn.torch.openmp import runtime
from fastbn.torch.private import TensorGuards, profiled, shown_as, watched


class Entry(NamedTuple):
    """What an earlier call of a module found; it holds no tensor, which would keep alive what reaches the module."""

    # asked of x and the tensors: type, layout, dtype, rank, shape and strides, but of x any
    unchanged: Callable[..., bool]
    addresses: tuple[int, ...]  # of running mean and variance, weight and bias; 0 where absent
    apart: bool  # whether running statistics lie where they can be moved
    channels: int  # where the kernel takes addresses: constants without gaps, on the CPU; else 0


class CallPlan(NamedTuple):
    """How x of one shape, memory order and dtype is normalized."""

    run: Callable[..., None]
    channels: int
    threaded: bool
    large: bool


# The 20 or 52 norms of a network are called behind convolutions that empty the caches, where each step of Python takes
# ten times as long as otherwise: a call took 120 to 250 us without its kernel, all of PyTorch's 50 with it.
_entries: WeakKeyDictionary[torch.nn.Module, Entry] = WeakKeyDictionary()
State = tuple[Tensor, ...]  # running mean and variance, weight and bias
# in place of None: at the address 0. The guards let no two be the same
_ABSENT = tuple(torch.empty(0, device="cpu") for _ in range(4))


def lookup(module: Any, x: Tensor) -> tuple[Entry | None, State]:
    """What an earlier call found, if all of it is as it was, and the tensors: hold them while using their addresses."""
    entry = _entries.get(module)
    if entry is None:
        return None, ()
    parameters, buffers = module._parameters, module._buffers
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if mean is None:
        mean = _ABSENT[0]
    if var is None:
        var = _ABSENT[1]
    if weight is None:
        weight = _ABSENT[2]
    if bias is None:
        bias = _ABSENT[3]
    if (
        not entry.unchanged(x, mean, var, weight, bias)
        or (mean.data_ptr(), var.data_ptr(), weight.data_ptr(), bias.data_ptr()) != entry.addresses
    ):
        return None, ()
    return entry, (mean, var, weight, bias)


def store(module: Any, x: Tensor, operands: eligibility.Operands) -> None:
    """Keep for the next call what this one was served with."""
    weight, bias, mean, var = operands[:4]
    parameters = module._parameters
    if parameters.get("weight") is not weight or parameters.get("bias") is not bias:  # parametrized: new in each call
        return
    state = [
        absent if value is None else value for value, absent in zip((mean, var, weight, bias), _ABSENT, strict=True)
    ]
    sizes, strides = ([list(measure(value)) for value in state] for measure in (Tensor.size, Tensor.stride))
    of_x: list[Any] = [[None] * x.dim()]  # of any length
    unchanged = TensorGuards(x, *state, dynamic_dims_sizes=of_x + sizes, dynamic_dims_strides=of_x + strides).check
    addresses = tuple(value.data_ptr() for value in state)
    compact = mean is not None and mean.is_cpu and all(value.is_contiguous() for value in state)
    _entries[module] = Entry(unchanged, addresses, eligibility.apart(operands), x.shape[1] if compact else 0)


@lru_cache(maxsize=1024)
def _call_plan(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> CallPlan | None:
    """Where x is dense, in one of PyTorch's memory formats, and the backend takes addresses."""
    if len(shape) < 2 or dtype not in eligibility.PARAMETERS:
        return None
    form = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if not form.numel() or not tensors.dense(form):
        return None
    storage = tensors.array(torch.empty(0, dtype=dtype, device="cpu")).dtype
    plan = layout.planned(tuple(shape), tuple(n * storage.itemsize for n in stride), 1, storage.itemsize)
    host = select(backend)
    compact = host.passes.compact(tuple(shape), plan.dims, storage) if isinstance(host, Host) else None
    if compact is None:
        return None
    threaded, large = form.nbytes >= config.SERIAL_BYTES, form.nbytes >= tensors.LARGE
    return CallPlan(compact.inference, plan.channels, threaded, large)


def inference(module: Any, x: Tensor, entry: Entry, state: State) -> Tensor | None:
    """y of an eager call that records nothing; None where it takes more than the kernel: errors among these."""
    (_, addresses, _, channels), (_, _, weight, bias) = entry, state
    eps, momentum = module.eps, module.momentum
    if type(eps) is not float or not 0.0 <= eps < math.inf or (type(momentum) is not float and momentum is not None):
        return None
    if watched() is not None:
        return None
    if torch.is_grad_enabled():
        if x.requires_grad or weight.requires_grad or bias.requires_grad:
            return None
    call_plan, x_address = _call_plan(x.shape, x.stride(), x.dtype, config.BACKEND), x.data_ptr()
    if call_plan is None or call_plan.channels != channels or not x_address:
        return None
    if call_plan.threaded and torch.get_num_threads() < threads.most():
        return None
    y = allocator.like(x) if call_plan.large else torch.empty_like(x)
    team = runtime() if call_plan.threaded else None
    if profiled():
        shown_as("batch_norm_inference", call_plan.run, x_address, y.data_ptr(), *addresses, eps, team)
    else:
        call_plan.run(x_address, y.data_ptr(), *addresses, eps, team)
    return y
