"""The `bench` command: speed beside NumPy and PyTorch in a short table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn import progress
from fastbn.arguments import config
from fastbn.cli import files, info, timing
from fastbn.cli.selftest import error

Array = NDArray[Any]
Contestants = dict[str, Callable[[], tuple[Any, ...]]]

SHAPES: tuple[tuple[tuple[int, ...], bool], ...] = (  # float32; whether the channels are innermost
    ((32, 64, 56, 56), False),
    ((32, 64, 56, 56), True),
    ((32, 512, 7, 7), False),
    ((65536, 64), True),
    ((32, 64), True),
)
EPS = config.EPS
AGREEMENT = 1e-4  # absolute, on data of standard deviation 1: a wrong result is timed by nobody


def numpy_forward(x: Array, gamma: Array, beta: Array, y: Array, axes: tuple[int, ...]) -> tuple[Array]:
    """Forward as plain NumPy writes it; gamma and beta broadcast against x."""
    np.subtract(x, x.mean(axes, keepdims=True), out=y)
    y *= gamma / np.sqrt(x.var(axes, keepdims=True) + np.float32(EPS))
    y += beta
    return (y,)


def numpy_backward(
    dy: Array, x: Array, mean: Array, var: Array, gamma: Array, axes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """Backward as plain NumPy, and JAX, write it; mean, var and gamma broadcast against x."""
    rstd = (var + np.float32(EPS)) ** -0.5
    xhat = (x - mean) * rstd
    m = np.float32(x.size // mean.size)
    dbeta, dgamma = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
    return gamma * rstd * (dy - dbeta / m - xhat * (dgamma / m)), dgamma, dbeta


def _pytorch() -> Any:
    """PyTorch, on as many threads as fastbn uses; None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.set_num_threads(fastbn.get_num_threads())
    return torch


def contestants(shape: tuple[int, ...], channels_last: bool) -> dict[str, Contestants]:
    """Build the calls to time on one array: {"forward": {name: call}, "backward": ...}.

    Every forward writes into memory of its own, allocated here; every backward allocates its gradients, since PyTorch's
    has no `out`.
    """
    rng = np.random.default_rng(0)
    order = (0, *range(2, len(shape)), 1) if channels_last else tuple(range(len(shape)))
    back = tuple(int(a) for a in np.argsort(order))
    x, dy = (rng.standard_normal([shape[a] for a in order], np.float32).transpose(back) for _ in range(2))
    gamma, beta = rng.uniform(0.5, 2.0, shape[1]).astype(np.float32), rng.standard_normal(shape[1]).astype(np.float32)
    axes = (0, *range(2, len(shape)))
    shaped = (1, -1, *(1 for _ in shape[2:]))
    wide_gamma, wide_beta = gamma.reshape(shaped), beta.reshape(shaped)
    m = fastbn.moments(x)
    mean, var = (a.astype(np.float32).reshape(shaped) for a in (m.mean, m.var()))
    outs = [np.empty_like(x) for _ in range(3)]
    forward: Contestants = {
        "fastbn": lambda: (fastbn.batch_norm(x, gamma, beta, eps=EPS, out=outs[0])[0],),
        "NumPy": lambda: numpy_forward(x, wide_gamma, wide_beta, outs[1], axes),
    }
    backward: Contestants = {
        "fastbn": lambda: fastbn.batch_norm_backward(dy, x, m, gamma, eps=EPS),
        "NumPy": lambda: numpy_backward(dy, x, mean, var, wide_gamma, axes),
    }
    torch = _pytorch()
    if torch is not None:
        aten = torch.ops.aten
        tx, tdy, tgamma, tbeta, ty = (torch.from_numpy(a) for a in (x, dy, gamma, beta, outs[2]))
        tmean, trstd = torch.empty(shape[1]), torch.empty(shape[1])
        stats = {"out": ty, "save_mean": tmean, "save_invstd": trstd}
        given, mask = (tx, tgamma, tbeta, None, None, True, 0.1, EPS), [True, True, True]
        forward["PyTorch"] = lambda: aten.native_batch_norm.out(*given, **stats)[:1]
        backward["PyTorch"] = lambda: aten.native_batch_norm_backward(
            tdy, tx, tgamma, None, None, tmean, trstd, True, EPS, mask
        )
        forward["PyTorch"]()  # fills tmean and trstd
    return {"forward": forward, "backward": backward}


def agree(calls: Contestants) -> None:
    """Run each once; SystemExit where a result is not fastbn's."""
    expected = [np.asarray(a) for a in calls["fastbn"]()]
    for name, call in calls.items():
        for i, (a, e) in enumerate(zip(call(), expected, strict=True)):
            scale = np.maximum(1.0, np.abs(e)) * (1.0 if i == 0 else np.sqrt(expected[0].size))
            apart = error(np.asarray(a), e.astype(np.float64), scale)
            if not apart <= AGREEMENT:
                raise SystemExit(
                    f"fastbn: result {i} of {name} and fastbn differ by {apart:.1e}, nothing is timed; run: fastbn "
                    "check"
                )


def interleaved(calls: Contestants, repeats: int) -> dict[str, float]:
    """Median seconds per call; the contestants take turns, so that a slow spell of the machine meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timing.turn(call))
    return {name: statistics.median(values) for name, values in seconds.items()}


def speed(repeats: int) -> list[dict[str, Any]]:
    """One record per shape and pass: shape, memory, pass, and the seconds of each contestant."""
    rows = []
    for shape, channels_last in SHAPES:
        for name, calls in contestants(shape, channels_last).items():
            agree(calls)
            row = {"shape": "x".join(map(str, shape)), "channels": "last" if channels_last else "first", "pass": name}
            rows.append({**row, "seconds": interleaved(calls, repeats)})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines."""
    peers = [name for name in rows[0]["seconds"] if name != "fastbn"]
    lines = []
    for row in rows:
        own = row["seconds"]["fastbn"]
        ratios = [f"{row['seconds'][peer] / own:.1f}x" for peer in peers]
        lines.append([row["shape"], row["channels"], row["pass"], f"{own * 1e3:.3g} ms", *ratios])
    return ["shape", "channels", "pass", "fastbn", *(f"{peer} takes" for peer in peers)], lines


NOTE = (
    "fastbn's time, and the others' as multiples of it: medians of interleaved calls on float32 data. A forward "
    "writes into memory given to it, a backward allocates its result. Channels first or last in memory."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `bench` command."""
    parser.add_argument(
        "--repeats", type=int, default=9, metavar="N", help="turns of each contestant (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and show what was found: the machine, why the numbers mean little, if they do, and a record per pass."""
    if args.repeats < 1:
        raise ValueError(f"--repeats: given {args.repeats}, want 1 or more")
    if args.json:
        files.check_output(args.json, 2**20)
    facts = info.machine()
    print(textwrap.fill(info.sentence(facts), 79))
    if _pytorch() is None:
        print("PyTorch is not installed and is left out")
    before, start = timing.others(), time.perf_counter()
    rows = speed(args.repeats)
    doubt = timing.crowded(before, time.perf_counter() - start, int(facts["threads"]))
    progress.table(*table(rows))
    print(textwrap.fill(NOTE, 79))
    result = {"machine": facts, "doubt": doubt, "speed": rows}
    if args.json:
        with files.replacing(args.json) as file:
            file.write(json.dumps(result, indent=1).encode())
        print(f"wrote {args.json}")
    if doubt:
        print(f"fastbn: {doubt}", file=sys.stderr)
    return result


def run(args: argparse.Namespace) -> int:
    """Run the `bench` command."""
    measured(args)
    return 0
