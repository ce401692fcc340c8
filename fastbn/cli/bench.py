"""The `bench` command: speed beside NumPy and PyTorch in a short table.

Accuracy, by `fastbn.cli.cases`. The full suite is in bench/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
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
from fastbn.cli import cases, info, timing
from fastbn.cli.npy_moments import check_output, replacing
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
# processors short, from which on PyTorch's spinning threads wait for each other 10 to 1000 times as long as they work
CROWD = 0.5
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
    """Backward as plain NumPy writes it; mean, var and gamma broadcast against x."""
    rstd = 1 / np.sqrt(var + np.float32(EPS))
    xhat = (x - mean) * rstd
    m = np.float32(x.size // mean.size)
    dbeta, dgamma = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
    return gamma * rstd * (dy - dbeta / m - xhat * (dgamma / m)), dgamma, dbeta


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
    mean, var = (
        x.mean(axes, np.float64, keepdims=True).astype(np.float32),
        x.var(axes, np.float64, keepdims=True).astype(np.float32),
    )
    m = fastbn.moments(x)
    outs = [np.empty_like(x) for _ in range(3)]
    forward: Contestants = {
        "fastbn": lambda: (fastbn.batch_norm(x, gamma, beta, eps=EPS, out=outs[0])[0],),
        "NumPy": lambda: numpy_forward(x, wide_gamma, wide_beta, outs[1], axes),
    }
    backward: Contestants = {
        "fastbn": lambda: fastbn.batch_norm_backward(dy, x, m, gamma, eps=EPS),
        "NumPy": lambda: numpy_backward(dy, x, mean, var, wide_gamma, axes),
    }
    torch = cases.torch()
    if torch is not None:
        aten = torch.ops.aten
        tx, tdy, tgamma, tbeta, ty = (torch.from_numpy(a) for a in (x, dy, gamma, beta, outs[2]))
        tmean, trstd = torch.empty(shape[1]), torch.empty(shape[1])
        stats = {"out": ty, "save_mean": tmean, "save_invstd": trstd}
        forward["PyTorch"] = lambda: aten.native_batch_norm.out(tx, tgamma, tbeta, None, None, True, 0.1, EPS, **stats)[
            :1
        ]
        backward["PyTorch"] = lambda: aten.native_batch_norm_backward(
            tdy, tx, tgamma, None, None, tmean, trstd, True, EPS, [True, True, True]
        )
        forward["PyTorch"]()  # fills tmean and trstd
    return {"forward": forward, "backward": backward}


def agree(calls: Contestants) -> None:
    """Run each once; SystemExit where a result is not fastbn's."""
    expected = [np.asarray(a) for a in calls["fastbn"]()]
    for name, call in calls.items():
        for i, (a, e) in enumerate(zip(call(), expected, strict=True)):
            apart = error(
                np.asarray(a),
                e.astype(np.float64),
                np.maximum(1.0, np.abs(e)) * (1.0 if i == 0 else np.sqrt(expected[0].size)),
            )
            if not apart <= AGREEMENT:
                raise SystemExit(
                    f"fastbn: result {i} of {name} and fastbn differ by {apart:.1e}, nothing is timed; "
                    f"run: fastbn check"
                )


def interleaved(calls: Contestants, repeats: int) -> dict[str, float]:
    """Median seconds per call; the contestants take turns, so that a slow spell of the machine meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timing.turn(call))
    return {name: statistics.median(values) for name, values in seconds.items()}


def others() -> float | None:
    """Processor seconds that all processes but this one have used since the start of the system.

    None where it does not tell.
    """
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    own = os.times()
    # all but idle and iowait
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def crowded(before: float | None, seconds: float, threads: int) -> str | None:
    """Say by how much the processors fell short since `before`.

    None where there were enough, or the system does not tell.
    """
    after = others()
    if before is None or after is None:
        return None
    used, there = (after - before) / seconds, os.cpu_count() or 1
    if used + threads <= there + CROWD:
        return None
    return (
        f"other processes used {used:.1f} of {there} processors meanwhile: these timings mean little, repeat them "
        f"on a quiet machine"
    )


def speed(repeats: int) -> list[dict[str, Any]]:
    """One record per shape and pass: shape, memory, pass, and the seconds of each contestant."""
    rows = []
    for shape, channels_last in SHAPES:
        for name, calls in contestants(shape, channels_last).items():
            agree(calls)
            row = {"shape": "x".join(map(str, shape)), "channels": "last" if channels_last else "first", "pass": name}
            rows.append({**row, "seconds": interleaved(calls, repeats)})
    return rows


def _speed_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    peers = [name for name in rows[0]["seconds"] if name != "fastbn"]
    lines = []
    for row in rows:
        own = row["seconds"]["fastbn"]
        ratios = [f"{row['seconds'][peer] / own:.1f}x" for peer in peers]
        lines.append([row["shape"], row["channels"], row["pass"], f"{own * 1e3:.3g} ms", *ratios])
    return ["shape", "channels", "pass", "fastbn", *(f"{peer} takes" for peer in peers)], lines


def machine() -> dict[str, str]:
    """Facts that the numbers depend on."""
    packages = {
        "fastbn": fastbn.__version__,
        "numpy": np.__version__,
        "numba": info.version("numba"),
        "torch": info.version("torch"),
    }
    return {
        "processor": info.cpu_name(),
        "threads": str(fastbn.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **packages,
        "date": datetime.date.today().isoformat(),
    }


def sentence(facts: Mapping[str, str]) -> str:
    """One line on the machine."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("fastbn", "python", "numpy", "numba", "torch"))
    return f"{facts['processor']}, {facts['threads']} threads, {facts['system']}; {versions}; {facts['date']}"


def replace_block(path: Path, name: str, text: str | None) -> None:
    """Put text between the lines ``<!-- name:begin -->`` and ``<!-- name:end -->`` of a file.

    None only looks whether they are there.

    Raises
    ------
    ValueError
        The file has no such lines, or several.
    """
    before = path.read_bytes().decode()
    block = re.compile(rf"(<!-- {name}:begin -->\r?\n).*?(<!-- {name}:end -->)", re.DOTALL)
    after, found = block.subn(lambda match: match[1] + (text or "") + match[2], before)
    if found != 1:
        raise ValueError(
            f"{path}: has {found} blocks from <!-- {name}:begin --> to <!-- {name}:end -->, want one, "
            f"markers on own lines"
        )
    if text is not None:
        with replacing(path) as file:
            file.write(after.encode())


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]], notes: str) -> str:
    """A table for a page, its first column to the left, and the notes below."""
    rule = ["---", *("---:" for _ in headers[1:])]
    return "\n".join([*("| " + " | ".join(row) + " |" for row in (headers, rule, *lines)), "", notes, ""])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `bench` command."""
    parser.add_argument(
        "--accuracy", action="store_true", help="compare accuracy on hard float32 data instead of speed"
    )
    parser.add_argument(
        "--repeats", type=int, default=9, metavar="N", help="turns of each contestant (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="replace the block between <!-- speed:begin --> and <!-- speed:end --> (or accuracy)",
    )


NOTES = {
    "speed": "fastbn's time, and the others' as multiples of it: medians of interleaved calls on float32 data. A "
    "forward writes into "
    "memory given to it, a backward allocates its result. Channels first or last in memory.",
    "accuracy": "Worst errors of var / of y, against float64 on the same float32 data: of var relative (absolute "
    "where it is 0), of y in "
    f"units of max(1, abs(xhat)). Shape {'x'.join(map(str, cases.SHAPE))}, channels first or last in memory.",
}


def run(args: argparse.Namespace) -> int:
    """Run the `bench` command; 1 where the machine was too busy for --readme."""
    if args.repeats < 1:
        raise ValueError(f"--repeats: given {args.repeats}, want 1 or more")
    name = "accuracy" if args.accuracy else "speed"
    if args.readme:
        replace_block(args.readme, name, None)
    if args.json:
        check_output(args.json, 2**20)
    facts = machine()
    print(textwrap.fill(sentence(facts), 79))
    if cases.torch() is None:
        print("PyTorch is not installed and is left out")
    before, start = others(), time.perf_counter()
    rows = cases.accuracy() if args.accuracy else speed(args.repeats)
    doubt = None if args.accuracy else crowded(before, time.perf_counter() - start, int(facts["threads"]))
    headers, lines = cases.table(rows) if args.accuracy else _speed_table(rows)
    progress.table(headers, lines)
    print(textwrap.fill(NOTES[name], 79))
    if args.json:
        with replacing(args.json) as file:
            file.write(json.dumps({"machine": facts, "doubt": doubt, name: rows}, indent=1).encode())
        print(f"wrote {args.json}")
    if doubt:
        print(f"fastbn: {doubt}", file=sys.stderr)
    if args.readme and doubt:
        print(f"fastbn: {args.readme} is left as it was", file=sys.stderr)
        return 1
    if args.readme:
        command = "python -m fastbn bench" + (" --accuracy" if args.accuracy else "")
        replace_block(
            args.readme, name, markdown(headers, lines, f"{NOTES[name]} {sentence(facts)}. Written by `{command}`.")
        )
        print(f"wrote the {name} table into {args.readme}")
    return 0
