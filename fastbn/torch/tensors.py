"""fastbn's functions on tensors: the same memory in, memory of PyTorch's out, nothing recorded for autograd.

Tensors on the CPU are seen as NumPy arrays, those on a GPU go in as they are, on PyTorch's current stream. `Statistics`
are a `Moments` in training; the constants (mean, var) at inference.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastbn import functional
from fastbn.arguments import config, dtypes
from fastbn.backends import backend_for
from fastbn.cpu import threads
from fastbn.statistics import Moments
from fastbn.torch import allocator
from fastbn.torch.openmp import of_pytorch

LARGE = 2**22  # bytes of a result, from which on its memory is kept for the next

Statistics: TypeAlias = "Moments | tuple[Any, Any]"


def array(tensor: Tensor) -> Any:
    """What fastbn's functions take for a tensor: its memory."""
    plain = tensor.data  # without autograd, which fastbn's functions don't record; in half the time of detach()
    if not tensor.is_cpu:
        return plain
    if tensor.dtype is torch.bfloat16:
        return plain.view(torch.int16).numpy().view(dtypes.bfloat16())
    return plain.numpy()


def _optional(tensor: Tensor | None) -> Any:
    return None if tensor is None else array(tensor)


def tensor(result: Any) -> Tensor:
    """A tensor of fastbn's result: its memory."""
    if isinstance(result, Tensor):  # on a GPU, where those of (C,) are views of one, which nobody need know
        return result.clone() if result.dim() == 1 else result
    if result.dtype.kind == "V":  # bfloat16, whose name takes 2 us to ask for
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(result)


def copied(values: Tensor) -> Any:
    """A copy of (C,) statistics in float64, as constants that outlive a change of the buffer."""
    return array(values).astype(np.float64) if values.is_cpu else values.to(torch.float64, copy=True)


def zeros(values: Any) -> Any:
    """Zeros like (C,) statistics."""
    return torch.zeros_like(values) if isinstance(values, Tensor) else np.zeros_like(values)


def memory_format(y: Tensor) -> torch.memory_format:
    """Of a dense tensor: channels last where it is that, else contiguous, as PyTorch's own kernels have it."""
    if y.is_contiguous():
        return torch.contiguous_format
    if y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if y.dim() == 5 and y.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def formatted(y: Tensor) -> Tensor:
    """A dense result in its memory format, copied where it has another order."""
    return y.contiguous(memory_format=memory_format(y))


def _options(x: Tensor) -> dict[str, Any]:
    """PyTorch's number of threads, where a call would take more: in a worker of a DataLoader it is 1."""
    if x.nbytes < config.SERIAL_BYTES or (wanted := torch.get_num_threads()) >= threads.most() or not x.is_cpu:
        return {}
    return {"num_threads": min(wanted, threads.get_num_threads())}


def dense(x: Tensor) -> bool:
    """Whether x is in one of PyTorch's memory formats, without gaps."""
    return x.is_contiguous() or memory_format(x) is not torch.contiguous_format


def _result(x: Tensor) -> tuple[Tensor | None, Any]:
    """Memory for a result in the memory order of x, and what fastbn's functions take for it: `out=`.

    None where x has gaps or another order than PyTorch's, and on a GPU: there fastbn allocates, `formatted` arranges.
    """
    if not x.is_cpu or not dense(x):
        return None, None
    # memory of our own from LARGE on: malloc's is fresh in each step
    y = torch.empty_like(x) if x.nbytes < LARGE else allocator.like(x)
    return y, array(y)


def _in_format(y: Tensor | None, result: Any) -> Tensor:
    return formatted(tensor(result)) if y is None else y


def forward(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Moments]:
    """(y, moments) of `fastbn.batch_norm`."""
    y, out = _result(x)
    with of_pytorch():
        found, m = functional.batch_norm(array(x), _optional(gamma), _optional(beta), 1, eps, out, **_options(x))
    return _in_format(y, found), m


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, m2) of `fastbn.moments`."""
    with of_pytorch():
        found = functional.moments(array(x), 1, **_options(x))
    return tensor(found.mean), tensor(found.m2)


def inference(x: Tensor, mean: Any, var: Any, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """y of `fastbn.batch_norm_inference`; mean and var are arrays."""
    y, out = _result(x)
    with of_pytorch():
        found = functional.batch_norm_inference(
            array(x), mean, var, _optional(gamma), _optional(beta), 1, eps, out, **_options(x)
        )
    return _in_format(y, found)


def backward(
    dy: Tensor, x: Tensor, statistics: Statistics, gamma: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta) of `fastbn.batch_norm_backward`, or of its inference twin for constant statistics."""
    if dy.dtype == x.dtype and dy.stride() != x.stride() and not (dy.is_contiguous() and x.is_contiguous()):
        dy = torch.empty_like(x).copy_(dy)  # PyTorch copies on all threads, NumPy on one
    arrays, weight, options = (array(dy), array(x)), _optional(gamma), _options(x)
    dx, out = _result(x)
    with of_pytorch():
        if isinstance(statistics, tuple):
            found, dgamma, dbeta = functional.batch_norm_inference_backward(
                *arrays, *statistics, weight, 1, eps, out, **options
            )
        else:
            found, dgamma, dbeta = functional.batch_norm_backward(*arrays, statistics, weight, 1, eps, out, **options)
    return _in_format(dx, found), tensor(dgamma), tensor(dbeta)


def track(m: Moments, weight: float, running_mean: Tensor, running_var: Tensor) -> None:
    """Move running statistics, in place, towards those of a batch, by `weight`; the variance unbiased."""
    mean, var = array(running_mean), array(running_var)
    backend_for(mean).track(m, m.count - 1, weight, mean, var)
