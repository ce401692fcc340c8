"""fastbn.torch's modules beside torch.nn's: pairs of them, data, and tensors in every memory order."""

from collections.abc import Callable
from typing import Any

import torch

import fastbn.torch
from fastbn.torch import kernels

CHANNELS = 5


def channels_last(x: Any) -> Any:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _cropped(x: Any) -> Any:
    whole = torch.full([n + 2 for n in x.shape], float("nan"), dtype=x.dtype)
    window = whole[tuple(slice(1, n + 1) for n in x.shape)]
    return window.copy_(x)


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": channels_last,
    "crop": _cropped,
    "crop of channels_last": lambda x: _cropped(x.movedim(1, -1)).movedim(-1, 1),
    "channels outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: torch.repeat_interleave(x, 2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def pair(name: str, dtype: Any = torch.float32, **options: Any) -> tuple[Any, Any]:
    """fastbn's module, and PyTorch's in float64 with the same parameters: its arithmetic, without float32's error."""
    theirs = getattr(torch.nn, name)(CHANNELS, dtype=torch.float64, **options)
    ours = getattr(fastbn.torch, name)(CHANNELS, dtype=dtype, **options)
    with torch.no_grad():
        for k, parameter in enumerate(ours.parameters()):
            parameter.copy_(torch.linspace(0.5, -1.5, CHANNELS) + k)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def draw(shape: tuple[int, ...], offset: float, seed: int, dtype: Any = torch.float32) -> tuple[Any, Any]:
    """(x, dy); the channels have scales 1 to 3."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.linspace(1.0, 3.0, shape[1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return (offset + scale * x).to(dtype), dy.to(dtype)


def array(tensor: Any) -> Any:
    return None if tensor is None else kernels.array(tensor.detach())


def served(module: Any, x: Any) -> bool:
    return fastbn.torch.explain(module, x).startswith("fastbn's kernels")
