"""One shape on a GPU for `bench.gpu`: sets of tensors that outgrow the cache, and every contestant's call on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import fastbn
from bench.suite.cases import CASES, Case, name_of
from fastbn.cuda import cost

EPS = 1e-5
CACHED_BYTES = 256 * 2**20  # of all sets of x: several times the cache of any GPU
SETS = 512  # at most: smaller arrays are bound by the host, wherever they lie
LARGE: tuple[tuple[int, ...], ...] = (
    (256, 64, 112, 112),
    (256, 256, 56, 56),
    (64, 64, 224, 224),
    (16, 32, 64, 128, 128),
)
SHAPES: dict[str, Case] = {
    **CASES,
    **{name_of(shape): Case(shape, "first") for shape in LARGE},
    **{f"{name_of(shape)} last": Case(shape, "last") for shape in LARGE},
}
Call = Callable[[int], Any]


def dims(case: Case) -> tuple[int, ...]:
    """(N, C, S) or (R, C) of a case, as the backend sees it."""
    N, C, *rest = case.shape
    S = math.prod(rest)
    return (N * S, C) if case.last or not rest else (N, C, S)


class Problem:
    """Tensors of a case and dtype, in as many sets as outgrow the cache, and the calls on a set."""

    def __init__(self, name: str, dtype: str, sets: int = SETS) -> None:
        import torch

        self.torch, self.case, self.dtype = torch, SHAPES[name], dtype
        shape, kind = self.case.shape, getattr(torch, dtype)
        self.bytes = math.prod(shape) * kind.itemsize
        self.sets = max(2, min(sets, -(-CACHED_BYTES // self.bytes)))
        self.parameter = torch.float64 if dtype == "float64" else torch.float32
        self.x, self.dy, self.y = (
            [self._drawn(shape, kind, seed + i) for i in range(self.sets)] for seed in (0, 1000, 2000)
        )
        C = shape[1]
        self.gamma = torch.linspace(0.5, 2, C, dtype=self.parameter, device="cuda")
        self.beta = torch.linspace(-1, 1, C, dtype=self.parameter, device="cuda")
        self.mean, self.var = torch.full_like(self.beta, 3.0), torch.full_like(self.beta, 4.0)

    def _drawn(self, shape: tuple[int, ...], kind: Any, seed: int) -> Any:
        """Normal values, mean 3 and standard deviation 2, in the case's memory order."""
        torch = self.torch
        memory = self.case.memory
        generator = torch.Generator("cuda").manual_seed(seed)
        made = torch.empty([shape[a] for a in memory], dtype=kind, device="cuda").normal_(3, 2, generator=generator)
        return made.permute([memory.index(a) for a in range(len(shape))])

    def moved(self, what: str) -> int:
        """Bytes that a pass must move by the schedule."""
        return cost.moved(what, dims(self.case), self.dtype)

    def copy(self, k: int) -> Any:
        """The device's own copy of x."""
        return self.y[k].copy_(self.x[k])

    def fastbn(self, what: str) -> Call:
        """fastbn's pass."""
        moments = [fastbn.moments(x) for x in self.x] if what == "backward" else []
        return {
            "forward": lambda k: fastbn.batch_norm(self.x[k], self.gamma, self.beta, out=self.y[k]),
            "backward": lambda k: fastbn.batch_norm_backward(
                self.dy[k], self.x[k], moments[k], self.gamma, out=self.y[k]
            ),
            "inference": lambda k: fastbn.batch_norm_inference(
                self.x[k], self.mean, self.var, self.gamma, self.beta, out=self.y[k]
            ),
            "moments": lambda k: fastbn.moments(self.x[k]),
        }[what]

    def pytorch(self, what: str, function: Callable[..., Any]) -> Call:
        """PyTorch's pass, by F.batch_norm or a compiled one."""
        torch = self.torch
        if what == "moments":
            axes = [a for a in range(len(self.case.shape)) if a != 1]
            return lambda k: torch.var_mean(self.x[k], axes)
        if what == "inference":
            return lambda k: function(self.x[k], self.mean, self.var, self.gamma, self.beta, False, 0.1, EPS)
        if what == "forward":
            return lambda k: function(self.x[k], None, None, self.gamma, self.beta, True, 0.1, EPS)
        leaves = [x.detach().requires_grad_() for x in self.x]
        gamma, beta = self.gamma.detach().requires_grad_(), self.beta.detach().requires_grad_()
        with torch.enable_grad():
            results = [function(x, None, None, gamma, beta, True, 0.1, EPS) for x in leaves]
        return lambda k: torch.autograd.grad(results[k], (leaves[k], gamma, beta), self.dy[k], retain_graph=True)
