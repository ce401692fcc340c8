"""What must hold on a real GPU before anything is timed: right values, the same bits on every run, arrays of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import fastbn
from fastbn.check import error

SHAPES: tuple[tuple[int, ...], ...] = (
    (32, 64), (9, 5), (4099, 3), (70_001, 4), (300, 513), (4, 3, 7, 7), (8, 64, 14, 14), (3, 5, 33, 35), (2, 16, 120, 121),
    (2, 3, 1, 70_000),
)  # fmt: skip
LAYOUTS = ("first", "last", "crop", "strided", "reversed rows")
OFFSETS = (0.0, 1e2, 1e4)
RUNS = 10
LIMITS = {"float32": 2e-6, "float64": 1e-9, "float16": 2e-3, "bfloat16": 1.6e-2}  # of max(1, |y|), half a unit in the last place included


def _arranged(torch: Any, values: Any, layout: str) -> Any:
    if layout == "last":
        order = [0, *range(2, values.ndim), 1]
        return values.permute(order).contiguous().permute([order.index(a) for a in range(values.ndim)])
    if layout == "crop":
        whole = torch.full([n + 3 for n in values.shape], float("nan"), dtype=values.dtype, device="cuda")
        inside = whole[tuple(slice(1, n + 1) for n in values.shape)]
        return inside.copy_(values)
    if layout == "strided":
        return torch.repeat_interleave(values, 2, -1)[..., ::2]
    if layout == "reversed rows":  # torch has no negative strides; every other row instead
        return torch.repeat_interleave(values, 2, 0)[::2]
    return values


def checks() -> Iterator[tuple[str, float, float]]:
    """(what, worst error, limit) of each comparison; AssertionError where runs differ."""
    import torch

    for dtype in LIMITS:
        kind = getattr(torch, dtype)
        parameter = torch.float64 if dtype == "float64" else torch.float32
        for shape in SHAPES:
            for layout in LAYOUTS:
                for offset in OFFSETS if kind.itemsize >= 4 else OFFSETS[:1]:
                    generator = torch.Generator("cuda").manual_seed(1)
                    values = (torch.randn(shape, device="cuda", generator=generator, dtype=torch.float64) + offset).to(kind)
                    x = _arranged(torch, values, layout)
                    dy = torch.randn(shape, device="cuda", generator=generator, dtype=torch.float64).to(kind)
                    gamma = torch.linspace(0.5, 2, shape[1], dtype=parameter, device="cuda")
                    yield from _compared(torch, f"{dtype} {shape} {layout} mean {offset:g}", dtype, x, dy, gamma)


def _compared(torch: Any, what: str, dtype: str, x: Any, dy: Any, gamma: Any) -> Iterator[tuple[str, float, float]]:
    def host(tensor: Any) -> Any:
        return tensor.detach().to("cpu", torch.float64).numpy()

    y, m = fastbn.batch_norm(x, gamma, gamma)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, m, gamma)
    for _ in range(RUNS - 1):
        again = fastbn.batch_norm(x, gamma, gamma)
        back = fastbn.batch_norm_backward(dy, x, m, gamma)
        same = [(again[0], y), (again[1].mean, m.mean), (again[1].m2, m.m2), (back[0], dx), (back[1], dgamma), (back[2], dbeta)]
        assert all(torch.equal(a, b) for a, b in same), f"{what}: another run gives other bits"
    want, statistics = fastbn.batch_norm(host(x), host(gamma), host(gamma), backend="reference")
    slopes = fastbn.batch_norm_backward(host(dy), host(x), statistics, host(gamma), backend="reference")
    limit = LIMITS[dtype]
    size = np.abs(host(dy)).sum() / x.shape[1] + 1.0  # what sums of gradients are made of, about
    for name, found, expected, scale in (
        ("y", host(y), want, np.maximum(1.0, np.abs(want))),
        ("mean", host(m.mean), statistics.mean, np.maximum(1.0, np.abs(statistics.mean))),
        ("var", host(m.var()), statistics.var(), np.maximum(1e-30, statistics.var())),
        ("dx", host(dx), slopes[0], np.maximum(1.0, np.abs(slopes[0]))),
        ("dgamma", host(dgamma), slopes[1], size),
        ("dbeta", host(dbeta), slopes[2], size),
    ):
        yield f"{what}: {name}", float(error(found, expected, scale)), limit if name in ("y", "dx") else max(LIMITS["float32"], 0)
