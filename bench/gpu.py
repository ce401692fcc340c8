"""fastbn on a GPU: checked, then timed beside PyTorch and the device's own copy: `python -m bench.gpu`, see --help."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import command, gpu_checks, gpu_timing, plot, report
from bench.command import RESULTS, relative, replace_block, rounded, write_result
from bench.gpu_timing import SHAPES, Problem
from bench.problem import PASSES
from fastbn import progress
from fastbn.arguments.errors import MissingExtra
from fastbn.cli import info
from fastbn.cuda import buffers

COMMAND = "python -m bench.gpu"
SECONDS = 420.0  # for all timings together; what is left out is listed
# each takes seconds
COMPILED = ("32x64x56x56", "32x256x56x56", "32x512x28x28", "256x64x112x112", "32x64x56x56 last", "65536x64")
QUICK = ("32x64x56x56", "32x64x56x56 last", "65536x64")
OF_COPY, RATIO, GEOMEAN = 0.85, 1.0, 1.3  # targets
OF_COPY_BYTES, RATIO_BYTES = 256 * 2**20, 4 * 2**20  # from which they hold
SMALL = "32x64"
# cases in a row that raise, after which the device is taken for gone; where memory is out, or bits are others, it still
# answers
FAULTS = 3


def plan(quick: bool) -> list[tuple[str, str]]:
    """(shape, dtype) in the order of their weight: float32 in both memory orders, half precision channels last."""
    names = list(QUICK) if quick else [name for name, case in SHAPES.items() if case.group != "small"]
    last = [name for name in names if SHAPES[name].group in ("last", "flat")]
    return [(name, "float32") for name in names] + [(name, dtype) for dtype in ("float16", "bfloat16") for name in last]


def facts() -> dict[str, Any]:
    """The device and the versions of everything."""
    import torch

    device = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "memory": device.total_memory,
        "cudnn": str(torch.backends.cudnn.version()),
        "cuda": str(torch.version.cuda),
        **{name: info.version(name) for name in ("fastbn", "numba", "numba-cuda", "numpy", "torch")},
    }


class Failures:
    """What went wrong, and whether the device still answers: after a fault of a kernel it refuses everything."""

    def __init__(self, failed: list[dict[str, Any]]) -> None:
        self.failed, self._row = failed, 0

    def caught(self, what: str, error: Exception) -> None:
        """Keep an error with what was done."""
        self.failed.append({"what": what, "raised": gpu_timing.said(error)})
        words = f"{type(error).__name__}: {error}"  # fastbn's own hold those of what was raised before
        full = "MemoryError" in words or "out of memory" in words.replace("_", " ").lower()
        self._row += not (full or isinstance(error, AssertionError))

    def passed(self) -> None:
        """Something went well."""
        self._row = 0

    @property
    def gone(self) -> bool:
        """Whether going on would only repeat the last error."""
        return self._row >= FAULTS


def check(failed: list[dict[str, Any]], quick: bool) -> None:
    """Add every comparison that is out of its limit, and every case that raises."""
    worst, failures, number = 0.0, Failures(failed), 0
    for what, run in gpu_checks.cases(quick):
        try:
            for name, off, limit in run():
                number += 1
                worst = max(worst, off / limit)
                if not off <= limit:
                    failed.append({"what": f"{what}: {name}", "error": off, "limit": limit})
            failures.passed()
        except Exception as error:
            # an AssertionError too: the others are still looked at, and what there is gets written
            failures.caught(what, error)
        if failures.gone:
            failed.append({"what": "the checks behind that", "raised": f"not run: {FAULTS} cases in a row raised"})
            break
    print(f"checks: of {number} comparisons the worst error is {worst:.2f} of its limit; {len(failed)} failed")


def timed(result: dict[str, Any], seconds: float, quick: bool) -> None:
    """Add the records, what failed, and what there was no time for."""
    import torch

    failures, start = Failures(result["failed"]), time.perf_counter()
    for name, dtype in plan(quick):
        if failures.gone or time.perf_counter() - start > seconds:
            result["left"].append(f"{name} {dtype}")
            continue
        compiled = name in COMPILED and dtype == "float32"
        last: dict[str, dict[str, Any]] = {}
        problem = None
        try:
            problem = Problem(name, dtype)
            for what in PASSES:
                last[what] = gpu_timing.record(name, what, problem, compiled)
                result["records"].append(last[what])
            failures.passed()
        except Exception as error:  # of memory, of a fault
            failures.caught(f"{name} {dtype}", error)
        problem = None
        gpu_timing.released(torch)
        print(
            f"{time.perf_counter() - start:6.0f} s  {name} {dtype}  "
            + "  ".join(f"{w} {cell(r)}" for w, r in last.items()),
            flush=True,
        )


def host() -> dict[str, float]:
    """Microseconds of the host for each call on a small array."""
    import torch

    problem = Problem(SMALL, "float32", sets=2)
    calls = {f"fastbn {what}": problem.fastbn(what) for what in PASSES}
    calls["F.batch_norm forward"] = problem.pytorch("forward", torch.nn.functional.batch_norm)
    return {what: gpu_timing.host_microseconds(call, torch) for what, call in calls.items()}


def cell(record: Mapping[str, Any]) -> str:
    """A pass of a shape: time, the fastest peer, the copy's bandwidth."""
    peer = "no peer" if record["fastest"] is None else f"{record['ratio']:.2f}x {record['fastest']}"
    return f"{record['seconds']['fastbn'] * 1e6:.4g} µs, {peer}, {record['of_copy'] * 100:.0f} %"


def summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The targets beside what was measured."""
    lines = []
    large = [r for r in records if r["bytes"] > OF_COPY_BYTES]
    if large:
        least = min(large, key=lambda r: r["of_copy"])
        met = sum(r["of_copy"] >= OF_COPY for r in large)
        where = f"{least['shape']} {least['dtype']} {least['pass']}"
        lines.append(f"of the copy's bandwidth, arrays over 256 MiB: least {least['of_copy'] * 100:.0f} % ({where}); "
                     f"{met} of {len(large)} at {OF_COPY * 100:.0f} %")  # fmt: skip
    beside = [r for r in records if r["bytes"] > RATIO_BYTES and r["ratio"] is not None]
    if beside:
        least = min(beside, key=lambda r: r["ratio"])
        met = sum(r["ratio"] >= RATIO for r in beside)
        mean = statistics.geometric_mean(r["ratio"] for r in beside)
        where = f"{least['shape']} {least['dtype']} {least['pass']}, {least['fastest']}"
        lines.append(f"PyTorch's best, arrays over 4 MiB: least {least['ratio']:.2f}x ({where}); {met} of "
                     f"{len(beside)} at {RATIO:g}x; "
                     f"geometric mean {mean:.2f}x (target {GEOMEAN:g}x)")  # fmt: skip
    return lines


def table(records: Sequence[Mapping[str, Any]]) -> report.Table:
    """One line per shape and dtype, one column per pass."""
    return report.by_shape([{**r, "shape": f"{r['shape']} {r['dtype']}"} for r in records], cell)


def note(result: Mapping[str, Any]) -> str:
    """What the cells mean, where and when they were measured."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("fastbn", "numba-cuda", "numba", "torch"))
    calls = ", ".join(f"{what} {value:.0f} µs" for what, value in result["host"].items())
    return (
        "A cell: fastbn's time; PyTorch's best as a multiple of it, and which that is; fastbn's bandwidth on the "
        "bytes that its schedule says must move, as a share of the device's own copy's. The host side of a call on "
        f"{SMALL}: {calls}. {machine['device']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}; {versions}; "
        f"{machine['date']}."
    )


def paragraphs(result: Mapping[str, Any], data: str) -> list[str]:
    """Of the page's block; the plot is linked where it is, beside the JSON."""
    listed = "\n".join(f"* {line}" for line in summary(result["records"]))
    title = "time against PyTorch's best and the copy's bandwidth, by shape and pass"
    picture = f"![{title}]({data.removesuffix('.json')}.png)"
    written = f"{note(result)} Written by `{COMMAND}` from [its results]({data})."
    return [listed, command.markdown(*table(result["records"])), picture, written]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Check fastbn on this machine's GPU, then time it beside PyTorch."
    )
    command.add_outputs(parser, "gpu", "write the result here (default: into bench/results)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help=f"for all timings together (default: {SECONDS:g})"
    )
    parser.add_argument(
        "--host", action="store_true", help="only what Python takes of calls whose launches are faked: no GPU is needed"
    )
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only")
    return parser


def measure(result: dict[str, Any], path: Path, args: argparse.Namespace) -> None:
    """Check and time; what there is gets written after each, and whatever ends the run."""
    try:
        check(result["failed"], args.quick)
        write_result(path, result)
        try:
            result["host"] = host()
        except Exception as error:
            Failures(result["failed"]).caught(f"host time of {SMALL}", error)
        timed(result, args.seconds, args.quick)
    finally:
        write_result(path, result)
        print(f"wrote {path}")


def plotted(result: Mapping[str, Any], path: Path) -> None:
    """Draw, where there is something to draw, and with what: `--from` draws it later."""
    try:
        progress.need("matplotlib", command="the plot", named="matplotlib")
    except MissingExtra as error:
        print(f"{error}; then {COMMAND} --from {path.with_suffix('.json')} draws it")
        return
    if result["records"]:
        plot.draw_gpu(result, path, RATIO, OF_COPY)
        print(f"wrote {path}")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where a check fails."""
    if args.host:
        print("What Python takes of a call, its launches faked: arguments packed for the driver, and no more.")
        print(*gpu_timing.host_report(), sep="\n")
        return 0
    if args.readme:
        replace_block(args.readme, "gpu")
    path = args.source or args.json
    if args.source:
        result = json.loads(args.source.read_text(encoding="utf-8"))
        if not args.source.with_suffix(".png").exists():
            plotted(result, args.source.with_suffix(".png"))
    else:
        if (reason := buffers.declines()) is not None:
            raise ValueError(reason)
        machine = facts()
        slug = "-".join(machine["device"].lower().split())
        path = args.json or RESULTS / f"gpu-{machine['date']}-{slug}.json"
        result = {"kind": "gpu", "machine": machine, "failed": [], "host": {}, "records": [], "left": []}
        measure(result, path, args)
        result = rounded(result)
        plotted(result, path.with_suffix(".png"))
    for line in (*summary(result["records"]), note(result), *(f"no time for {what}" for what in result["left"])):
        print(line)
    for failed in result["failed"]:
        how = failed.get("raised") or f"off by {failed['error']:.2g}, want at most {failed['limit']:.2g}"
        print(f"{COMMAND}: {failed['what']}: {how}", file=sys.stderr)
    if result["failed"]:
        return 1
    if args.readme:
        replace_block(args.readme, "gpu", *paragraphs(result, relative(path, args.readme)))
    return 0


main = partial(command.main, _parser, run)

if __name__ == "__main__":
    sys.exit(main())
