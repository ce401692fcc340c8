"""Small arrays, where a call is mostly overhead.

fastbn's functions and layer beside PyTorch's, one way and both ways.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastbn
from bench import pytorch
from bench.contestants import TOLERANCE, apart
from bench.measure import paired, rounds
from bench.problem import EPS, Problem

Run = Callable[[], Any]


class Pair(NamedTuple):
    """A call of fastbn's and the peer's that does the same."""

    own: str
    peer: str
    target: float | None  # the least ratio wanted


PAIRS = (
    Pair("batch_norm", "native_batch_norm.out", 1.5),
    Pair("batch_norm", "F.batch_norm", 4.0),
    Pair("BatchNorm", "nn.BatchNorm", 10.0),
    Pair("batch_norm + backward", "native + backward", None),
    Pair("BatchNorm + backward", "nn.BatchNorm + autograd", None),
)
LIMITS = {"batch_norm": 5e-6, "batch_norm + backward": 12e-6}  # seconds


def _own(p: Problem) -> dict[str, Run]:
    layer = fastbn.BatchNorm(p.gamma.size)
    layer.load_state_dict({**layer.state_dict(), "weight": p.gamma, "bias": p.beta})
    x, dy, gamma, beta, out, dx = p.x, p.dy, p.gamma, p.beta, p.out, np.empty_like(p.x)

    def both() -> Any:
        _, m = fastbn.batch_norm(x, gamma, beta, out=out)
        return fastbn.batch_norm_backward(dy, x, m, gamma, out=dx)

    def layer_both() -> Any:
        layer(x)
        return (layer.backward(dy),)

    return {
        "batch_norm": lambda: fastbn.batch_norm(x, gamma, beta, out=out),
        "BatchNorm": lambda: (layer(x),),
        "batch_norm + backward": both,
        "BatchNorm + backward": layer_both,
    }


def _torch(p: Problem) -> dict[str, Run]:
    torch = pytorch.library()
    aten, normalize = torch.ops.aten, torch.nn.functional.batch_norm
    x, dy, gamma, beta, out = (pytorch.tensor(a) for a in (p.x, p.dy, p.gamma, p.beta, np.empty_like(p.x)))
    mean, rstd = torch.empty_like(gamma), torch.empty_like(gamma)
    module = (torch.nn.BatchNorm1d if x.ndim == 2 else torch.nn.BatchNorm2d)(gamma.numel(), eps=EPS)
    with torch.no_grad():
        module.weight.copy_(gamma)
        module.bias.copy_(beta)
    leaf = x.detach().clone().requires_grad_()
    wanted = (leaf, module.weight, module.bias)

    def native() -> Any:
        return aten.native_batch_norm.out(
            x, gamma, beta, None, None, True, 0.1, EPS, out=out, save_mean=mean, save_invstd=rstd
        )

    def both() -> Any:
        native()
        return aten.native_batch_norm_backward(dy, x, gamma, None, None, mean, rstd, True, EPS, pytorch.MASK)

    return {
        "native_batch_norm.out": native,
        "F.batch_norm": lambda: (normalize(x, None, None, gamma, beta, True, 0.1, EPS),),
        "nn.BatchNorm": lambda: (module(x),),
        "native + backward": both,
        "nn.BatchNorm + autograd": lambda: torch.autograd.grad(module(leaf), wanted, dy),
    }


def _array(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else value.detach().numpy()


def record(name: str, seconds: float) -> dict[str, Any]:
    """Time all calls on one shape: median seconds, and the ratios of each pair; AssertionError where results differ."""
    p = Problem(name, "float32")
    calls, before = _own(p), {}
    if pytorch.there():
        peers = _torch(p)
        set_grad = pytorch.library().set_grad_enabled
        before = {call: partial(set_grad, call.startswith("nn.")) for call in peers}  # as their users have it
        calls |= peers
    with pytorch.no_autograd():
        for own, peer, _ in PAIRS if before else ():
            before[peer]()
            expected, found = _array(calls[own]()[0]).copy(), _array(calls[peer]()[0])
            if not apart(found, expected) <= TOLERANCE["float32"]:
                raise AssertionError(f"{name}: {own} and {peer} differ by {apart(found, expected):.1e}")
        times = rounds(calls, seconds, before=before)
    return {
        "shape": name,
        "seconds": {call: statistics.median(values) for call, values in times.items()},
        "ratios": {f"{own} / {peer}": paired(times[peer], times[own]) for own, peer, _ in PAIRS if peer in times},
    }
