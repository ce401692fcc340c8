"""fastbn.torch's modules beside torch.nn's: pairs of them, data, and tensors in every memory order."""

from collections.abc import Callable
from typing import Any

import numpy as np
import published
import torch
from tolerances import check, scales

import fastbn.torch
from fastbn.torch import tensors

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
    return None if tensor is None else tensors.array(tensor.detach())


def served(module: Any, x: Any) -> bool:
    return fastbn.torch.explain(module, x).startswith("fastbn's kernels")


def step(ours: Any, theirs: Any, x: Any, dy: Any, run: Any = None) -> None:
    """One forward and backward of both, compared: y, gradients, statistics; `run` is what calls ours, where that is
    compiled.
    """
    assert served(ours, x)
    batch = ours.training or ours.running_mean is None
    if not batch:  # rounded to float32 at every training step, compared there: from here on the same numbers
        theirs.load_state_dict(ours.state_dict())
    mean, var = (
        (None, None) if batch else (array(ours.running_mean).astype(float), array(ours.running_var).astype(float))
    )
    ours.zero_grad()
    theirs.zero_grad()
    given, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y, want = (ours if run is None else run)(given), theirs(wide)
    y.backward(dy)
    want.backward(dy.double())
    a, dtype = array(x), array(x).dtype
    stats = published.statistics(a, 1)
    if mean is None:
        mean, var = stats.mean, stats.var
    gamma, beta = array(ours.weight), array(ours.bias)
    natural = scales(array(dy), a, mean, var, gamma, beta, 1, ours.eps, batch)
    check("y", dtype, array(y), array(want), natural.y)
    check("dx", dtype, array(given.grad), array(wide.grad), natural.dx)
    for name in ("weight", "bias"):
        if getattr(ours, name) is not None:
            quantity = {"weight": "dgamma", "bias": "dbeta"}[name]
            check(
                quantity,
                dtype,
                array(getattr(ours, name).grad),
                array(getattr(theirs, name).grad),
                getattr(natural, quantity),
            )
    if ours.running_mean is not None:
        check("mean", dtype, array(ours.running_mean), array(theirs.running_mean), np.maximum(1.0, np.abs(stats.mean)))
        check("var", dtype, array(ours.running_var), array(theirs.running_var), 1.0 + stats.var)
        assert ours.num_batches_tracked == theirs.num_batches_tracked
