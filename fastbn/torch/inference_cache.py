"""What the call before found.

Where a module and its tensors are the same, nothing is looked over again, and inference is but its kernel.
The 20 or 52 norms of a network are called behind convolutions that empty the caches, where each step of Python takes
ten times as long as otherwise: a call took 120 to 250 us without its kernel, all of PyTorch's 50 with it.
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

from fastbn.arguments import config, layout
from fastbn.backends import select
from fastbn.cpu import threads
from fastbn.cpu.backend import Host
from fastbn.torch import allocator, eager, eligibility
from fastbn.torch import tensors as kernels
from fastbn.torch.openmp import runtime


class Known(NamedTuple):
    """What an earlier eager call of a module, served by fastbn, found.

    No tensor, which would keep alive what reaches the module.
    """

    # asked of x and the tensors: type, layout, dtype, rank, shape and strides, but of x any
    unchanged: Callable[..., bool]
    addresses: tuple[int, ...]  # of running mean and variance, weight and bias; 0 where absent
    apart: bool  # whether running statistics lie where they can be moved
    channels: int  # where the kernel takes addresses: constants without gaps, on the CPU; else 0


class Way(NamedTuple):
    """How x of one shape, memory order and dtype is normalized."""

    run: Callable[..., None]
    channels: int
    threaded: bool
    large: bool


# of torch.compile: 0.2 us for five tensors, where asking each takes 1; its annotations leave them out
_Guards: Any = TensorGuards
_known: WeakKeyDictionary[torch.nn.Module, Known] = WeakKeyDictionary()
Tensors = tuple[Tensor, ...]  # running mean and variance, weight and bias
# in place of None: at the address 0. The guards let no two be the same
_ABSENT = tuple(torch.empty(0, device="cpu") for _ in range(4))


def known(module: Any, x: Tensor) -> tuple[Known | None, Tensors]:
    """What an earlier call found.

    Where all of it is as it was, and the tensors, to be held while their addresses are used.
    """
    found = _known.get(module)
    if found is None:
        return None, ()
    own, kept = module._parameters, module._buffers
    mean, var, weight, bias = kept.get("running_mean"), kept.get("running_var"), own.get("weight"), own.get("bias")
    if mean is None:
        mean = _ABSENT[0]
    if var is None:
        var = _ABSENT[1]
    if weight is None:
        weight = _ABSENT[2]
    if bias is None:
        bias = _ABSENT[3]
    if (
        not found.unchanged(x, mean, var, weight, bias)
        or (mean.data_ptr(), var.data_ptr(), weight.data_ptr(), bias.data_ptr()) != found.addresses
    ):
        return None, ()
    return found, (mean, var, weight, bias)


def keep(module: Any, x: Tensor, given: eligibility.Call) -> None:
    """Keep for the next call what this one was served with."""
    weight, bias, mean, var = given[:4]
    own = module._parameters
    if own.get("weight") is not weight or own.get("bias") is not bias:  # parametrized: others in each call
        return
    tensors = [
        absent if value is None else value for value, absent in zip((mean, var, weight, bias), _ABSENT, strict=True)
    ]
    sizes, strides = ([list(measure(value)) for value in tensors] for measure in (Tensor.size, Tensor.stride))
    any_length: list[Any] = [[None] * x.dim()]
    unchanged = _Guards(
        x, *tensors, dynamic_dims_sizes=any_length + sizes, dynamic_dims_strides=any_length + strides
    ).check
    addresses = tuple(value.data_ptr() for value in tensors)
    compact = mean is not None and mean.is_cpu and all(value.is_contiguous() for value in tensors)
    _known[module] = Known(unchanged, addresses, eligibility.apart(given), x.shape[1] if compact else 0)


@lru_cache(maxsize=1024)
def _way(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, backend: str | None) -> Way | None:
    """Where x is dense, in one of PyTorch's memory formats, and the backend takes addresses."""
    if len(shape) < 2 or dtype not in eligibility.PARAMETERS:
        return None
    form = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if not form.numel() or not kernels.dense(form):
        return None
    kind = kernels.array(torch.empty(0, dtype=dtype, device="cpu")).dtype
    plan = layout.planned(tuple(shape), tuple(n * kind.itemsize for n in stride), 1, kind.itemsize)
    host = select(backend)
    compact = host.passes.compact(tuple(shape), plan.dims, kind) if isinstance(host, Host) else None
    if compact is None:
        return None
    return Way(compact.inference, plan.channels, form.nbytes >= config.SERIAL_BYTES, form.nbytes >= kernels.LARGE)


def inference(module: Any, x: Tensor, before: Known, tensors: Tensors) -> Tensor | None:
    """y of an eager call that records nothing, on what was found before.

    None where it takes more than the kernel: errors among these.
    """
    (_, addresses, _, channels), (_, _, weight, bias) = before, tensors
    eps, momentum = module.eps, module.momentum
    if type(eps) is not float or not 0.0 <= eps < math.inf or (type(momentum) is not float and momentum is not None):
        return None
    if eligibility.watched() is not None:
        return None
    if torch.is_grad_enabled():
        if x.requires_grad or weight.requires_grad or bias.requires_grad:
            return None
    way, begins = _way(x.shape, x.stride(), x.dtype, config.BACKEND), x.data_ptr()
    if way is None or way.channels != channels or not begins:
        return None
    if way.threaded and torch.get_num_threads() < threads.most():
        return None
    y = allocator.like(x) if way.large else torch.empty_like(x)
    if profiler._is_profiler_enabled:
        eager.named(
            "batch_norm_inference", way.run, begins, y.data_ptr(), *addresses, eps, runtime() if way.threaded else None
        )
    else:
        way.run(begins, y.data_ptr(), *addresses, eps, runtime() if way.threaded else None)
    return y
