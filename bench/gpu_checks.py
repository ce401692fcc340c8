"""What must hold on a real GPU before anything is timed.

Right values, the same bits on every run and by every way to a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import fastbn
from fastbn.cli.selftest import error

Found = Iterator[tuple[str, float, float]]  # (what, worst error, limit) of each comparison
SHAPES: tuple[tuple[int, ...], ...] = (
    (32, 64), (9, 5), (4099, 3), (70_001, 4), (300, 513), (4, 3, 7, 7), (8, 64, 14, 14), (3, 5, 33, 35), (2, 16, 120,
    121),
    (2, 3, 1, 70_000),
)  # fmt: skip
LAYOUTS = ("first", "last", "crop", "strided", "every other row")
OFFSETS = (0.0, 1e2, 1e4)
RUNS = 10
THIN = 4  # of --quick: every so many cases
# of max(1, |y|), half a unit in the last place included
LIMITS = {"float32": 2e-6, "float64": 1e-9, "float16": 2e-3, "bfloat16": 1.6e-2}


def arranged(torch: Any, values: Any, layout: str) -> Any:
    """The same values, otherwise in memory."""
    if layout == "last":
        order = [0, *range(2, values.ndim), 1]
        return values.permute(order).contiguous().permute([order.index(a) for a in range(values.ndim)])
    if layout == "crop":
        whole = torch.full([n + 3 for n in values.shape], float("nan"), dtype=values.dtype, device="cuda")
        inside = whole[tuple(slice(1, n + 1) for n in values.shape)]
        return inside.copy_(values)
    if layout == "strided":
        return torch.repeat_interleave(values, 2, -1)[..., ::2]
    if layout == "every other row":  # torch has no negative strides
        return torch.repeat_interleave(values, 2, 0)[::2]
    return values


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], Found]]]:
    """(what, its comparisons) of each case; running one may raise, and leaves the others as they are."""
    found = [
        (f"{dtype} {shape} {layout} mean {offset:g}", (dtype, shape, layout, offset))
        for dtype in LIMITS
        for shape in SHAPES
        for layout in LAYOUTS
        for offset in (OFFSETS if LIMITS[dtype] < 1e-5 else OFFSETS[:1])
    ]
    for k, (what, case) in enumerate(found[:: THIN if quick else 1]):
        yield what, partial(_compared, *case, ("float32", "float64")[k % 2])
    for what, run in (("arrays of numba", _of_numba), ("arrays of CuPy", _of_cupy), ("a captured graph", _captured)):
        yield what, run


def _drawn(torch: Any, dtype: str, shape: tuple[int, ...], layout: str, offset: float) -> tuple[Any, Any, Any]:
    """x, dy and gamma."""
    stored, parameter = getattr(torch, dtype), torch.float64 if dtype == "float64" else torch.float32
    generator = torch.Generator("cuda").manual_seed(1)
    values = (torch.randn(shape, device="cuda", generator=generator, dtype=torch.float64) + offset).to(stored)
    dy = torch.randn(shape, device="cuda", generator=generator, dtype=torch.float64).to(stored)
    return arranged(torch, values, layout), dy, torch.linspace(0.5, 2, shape[1], dtype=parameter, device="cuda")


def host(tensor: Any) -> Any:
    """Its values in float64."""
    return tensor.detach().double().cpu().numpy()


def _same(torch: Any, what: str, *pairs: tuple[Any, Any]) -> None:
    if not all(torch.equal(a, b) for a, b in pairs):
        raise AssertionError(f"{what} gives other bits")


def _compared(dtype: str, shape: tuple[int, ...], layout: str, offset: float, statistic: str) -> Found:
    import torch

    x, dy, gamma = _drawn(torch, dtype, shape, layout, offset)
    y, m = fastbn.batch_norm(x, gamma, gamma)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, m, gamma)
    for _ in range(RUNS - 1):
        again, back = fastbn.batch_norm(x, gamma, gamma), fastbn.batch_norm_backward(dy, x, m, gamma)
        _same(
            torch,
            "another run",
            (again[0], y),
            (again[1].mean, m.mean),
            (again[1].m2, m.m2),
            *zip(back, (dx, dgamma, dbeta), strict=True),
        )
    _ways(torch, x, gamma, y)
    want, statistics = fastbn.batch_norm(host(x), host(gamma), host(gamma), backend="reference")
    slopes = fastbn.batch_norm_backward(host(dy), host(x), statistics, host(gamma), backend="reference")
    yield from _within(
        dtype,
        host(dy),
        ("y", y, want),
        ("dx", dx, slopes[0]),
        ("dgamma", dgamma, slopes[1]),
        ("dbeta", dbeta, slopes[2]),
    )
    yield from _within(dtype, host(dy), ("mean", m.mean, statistics.mean), ("var", m.var(), statistics.var()))
    yield from _of_statistics(torch, dtype, x, dy, gamma, m, statistic)


def _of_statistics(torch: Any, dtype: str, x: Any, dy: Any, gamma: Any, m: Any, statistic: str) -> Found:
    """Calls that take statistics, of a dtype: inference and its backward, the backward in two halves."""
    mean, var = (values.to(getattr(torch, statistic)) for values in (m.mean, m.var()))
    given, parameters = (host(x), host(mean), host(var)), (host(gamma), host(gamma))
    y = fastbn.batch_norm_inference(x, mean, var, gamma, gamma)
    back = fastbn.batch_norm_inference_backward(dy, x, mean, var, gamma)
    sums = fastbn.batch_norm_backward_reduce(dy, x, mean, var)
    dx = fastbn.batch_norm_backward_input(dy, x, mean, var, *sums, m.count, gamma)
    want = fastbn.batch_norm_inference_backward(host(dy), *given, host(gamma), backend="reference")
    halves = fastbn.batch_norm_backward_reduce(host(dy), *given, backend="reference")
    whole = fastbn.batch_norm_backward_input(host(dy), *given, *halves, m.count, host(gamma), backend="reference")
    yield from _within(
        dtype, host(dy),
        (f"y, {statistic} statistics", y, fastbn.batch_norm_inference(*given, *parameters, backend="reference")),
        ("dx of constant statistics", back[0], want[0]), ("dgamma of constant statistics", back[1], want[1]),
        ("sum of dy", sums[0], halves[0]), ("sum of dy * xhat", sums[1], halves[1]), ("dx of two halves", dx, whole),
    )  # fmt: skip


def _within(dtype: str, dy: Any, *compared: tuple[str, Any, Any]) -> Found:
    size = np.abs(dy).sum() / dy.shape[1] + 1.0  # what sums of gradients are made of, about
    for name, got, want in compared:
        scale = np.maximum(1e-30, want) if name == "var" else np.maximum(1.0, np.abs(want))
        scale = size if name.startswith(("dgamma", "dbeta", "sum")) else scale
        yield (
            name,
            float(error(host(got), want, scale)),
            LIMITS[dtype] if name[0] == "y" or name.startswith("dx") else LIMITS["float32"],
        )


def _ways(torch: Any, x: Any, gamma: Any, y: Any) -> None:
    """`out=` apart and in place, and another stream, whose results are those of the plain call."""
    out = torch.empty_like(y)
    _same(torch, "out=", (fastbn.batch_norm(x, gamma, gamma, out=out)[0], y))
    place = x.clone()
    plain = fastbn.batch_norm(place, gamma, gamma)[0]
    _same(torch, "out=x", (fastbn.batch_norm(place, gamma, gamma, out=place)[0], plain))
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    results = [fastbn.batch_norm(x, gamma, gamma, stream=stream)[0] for stream in (side, side.cuda_stream, current)]
    current.wait_stream(side)
    _same(torch, "stream=", *((found, y) for found in results))


def _of_numba() -> Found:
    """Arrays without a library, on numba's own streams, the default one of each thread among them."""
    from numba import cuda

    x = np.random.default_rng(0).standard_normal((32, 64, 14, 14)).astype(np.float32)
    want = fastbn.batch_norm(x, backend="reference")[0]
    given = cuda.to_device(x)
    for name, stream in (
        ("no stream", None),
        ("cuda.stream()", cuda.stream()),
        ("default_stream()", cuda.default_stream()),
        ("per_thread_default_stream()", cuda.per_thread_default_stream()),
    ):
        cuda.synchronize()
        for _ in range(RUNS):
            y = fastbn.batch_norm(given, stream=stream)[0]
        cuda.synchronize()
        yield f"y, {name}", float(error(y.copy_to_host(), want, np.maximum(1.0, np.abs(want)))), LIMITS["float32"]


def _of_cupy() -> Found:
    """CuPy's, where it is installed."""
    try:
        import cupy
    except ImportError:
        return
    x = np.random.default_rng(0).standard_normal((32, 64, 14, 14)).astype(np.float32)
    want = fastbn.batch_norm(x, backend="reference")[0]
    given, side = cupy.asarray(x), cupy.cuda.Stream(non_blocking=True)
    for name, stream in (("no stream", None), ("another stream", side)):
        y = fastbn.batch_norm(given, stream=stream)[0]
        cupy.cuda.Device().synchronize()
        yield f"y, {name}", float(error(y.get(), want, np.maximum(1.0, np.abs(want)))), LIMITS["float32"]


def _captured() -> Found:
    """Replayed on other values: nothing is allocated, or waited for, that a capture does not take."""
    import torch

    x, _, gamma = _drawn(torch, "float32", (32, 64, 56, 56), "first", 0.0)
    fastbn.batch_norm(x, gamma, gamma)  # kernels are compiled
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, m = fastbn.batch_norm(x, gamma, gamma)
    x.mul_(2).add_(1)
    graph.replay()
    want = fastbn.batch_norm(x, gamma, gamma)
    _same(torch, "a replay", (y, want[0]), (m.mean, want[1].mean), (m.m2, want[1].m2))
    yield "y", 0.0, LIMITS["float32"]
