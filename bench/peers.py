"""fastbn beside its peers and the machine's limit: `python -m bench.peers`, see --help."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench import command, machine, measure, plot, pytorch, report, small
from bench.command import RESULTS, relative, replace_block, rounded, write_result
from bench.contestants import PEERS, TOLERANCE
from bench.problem import PASSES, case, named
from bench.suite import cases
from fastbn import progress
from fastbn.arguments import checks
from fastbn.cli.files import check_output

SECONDS, QUICK_SECONDS = 4.0, 0.3  # of rounds for each shape and pass
SMALL_SECONDS = 10.0
QUICK = ("32x64x56x56", "32x512x7x7", "32x64x56x56 last", "4096x256", "32x64")  # one of each kind
# Of a shape, in memory at most, in float32: beside six peers the process held 27 of 64x64x112x112, 19 in float16.
ARRAYS, PEER_ARRAYS = 5, 4
AUTO = Path()  # a file in bench/results, named after the machine


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=report.COMMAND,
        description="Time fastbn beside its peers and the machine's own limit, by turns, on the same arrays. A "
        "complete run writes bench/results/KIND-DATE-PROCESSOR-CORES.json and its plot.",
    )
    listed = ", ".join(cases.GROUPS)
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="any, like 32x64x56x56, or '32x64x56x56 last' for channels last in memory; or groups of the table: "
        f"{listed} (default: the whole table)",
    )
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS", help=", ".join(PASSES)
    )
    parser.add_argument(
        "--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="PEER", help=", ".join(PEERS)
    )
    parser.add_argument(
        "--dtype", choices=cases.DTYPES, default="float32", help="half precision is also held against fastbn's float32"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="for everyone (default: as many as fastbn takes)")
    parser.add_argument("--scaling", action="store_true", help="fastbn alone, at 1, 2, 4, 8 and 16 threads")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help=f"of rounds for each shape and pass (default: {SECONDS:g})"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"a smoke run: {', '.join(QUICK)}, {QUICK_SECONDS:g} s each"
    )
    command.add_outputs(parser, "peers", "write the result (default: into bench/results)", nargs="?", const=AUTO)
    draw = "draw it as PNG (default: beside the JSON)"
    parser.add_argument("--plot", type=Path, nargs="?", const=AUTO, metavar="FILE", help=draw)
    return parser


def chosen(shapes: Sequence[str] | None, quick: bool) -> list[str]:
    """The names of the shapes asked for, a group's in the table's order; ValueError for what is neither."""
    if shapes is None:
        return list(QUICK) if quick else list(cases.CASES)
    return list(dict.fromkeys(name for text in shapes for name in cases.names(text) or [named(text)]))


def check_memory(names: Sequence[str], dtype: str, peers: int) -> None:
    """ValueError where a shape's arrays will not fit, before any of them is made."""
    free = machine.available()
    for name in names:
        need = (ARRAYS + PEER_ARRAYS * peers) * math.prod(case(name).shape) * max(4, checks.check_dtype(dtype).itemsize)
        if free is not None and need > free:
            raise ValueError(
                f"--shapes: given {name!r}, its arrays and the peers' take about {need / 2**30:,.1f} GiB, and "
                f"{free / 2**30:,.1f} are free: want a smaller shape, or fewer --peers"
            )


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on stderr, lines where that is no terminal: (what) -> None at the start of each step."""
    from rich.console import Console
    from rich.progress import Progress

    console, start = Console(stderr=True, highlight=False), time.perf_counter()
    done = 0
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def step(what: str) -> None:
            nonlocal done
            bar.update(task, description=what, completed=done)
            done += 1
            if not console.is_terminal:
                console.print(f"{time.perf_counter() - start:6.0f} s  {done:3d} of {total}  {what}")

        yield step


def measured(
    args: argparse.Namespace, shapes: Sequence[str], kept: bool, save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run all that was asked for; `save` gets the result after each shape."""
    threads = machine.give_threads(args.threads)
    seconds = args.seconds or (QUICK_SECONDS if args.quick else SECONDS)
    crowd = measure.Crowd()
    records: list[dict[str, Any]] = []
    little: list[dict[str, Any]] = []
    tiny = [name for name in shapes if case(name).group == "small"]
    tiny = [] if args.scaling or args.dtype != "float32" else tiny
    result = {
        "kind": "scaling" if args.scaling else "peers",
        "dtype": args.dtype,
        "machine": machine.facts(threads, kept),
        "method": {"seconds": seconds, "tolerance": TOLERANCE[args.dtype], "alignment": cases.ALIGNMENT},
        "doubt": None,
        "records": records,
        "small": little,
    }
    with _progress(len(shapes) + len(tiny)) as step, pytorch.no_autograd():
        for name in shapes:
            step(name)
            if args.scaling:
                counts = measure.thread_counts(args.threads)
                records += measure.scaling(name, args.dtype, args.passes, seconds, counts, crowd)
            else:
                records += measure.beside_peers(name, args.dtype, args.passes, args.peers, seconds, threads, crowd)
            save(result)
        for name in tiny:
            step(f"calls on {name}")
            little.append(crowd.watch(partial(small.record, name, min(SMALL_SECONDS, 4 * seconds))))
    result["doubt"] = crowd.doubt(threads)
    save(result)
    return result


def _complete(args: argparse.Namespace) -> bool:
    """Whether all that there is gets measured."""
    everything = len(args.passes) == len(PASSES) and len(args.peers) == len(PEERS)
    return args.source is None and not args.quick and args.shapes is None and everything


def _paths(args: argparse.Namespace, asked: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """Where the JSON and the plot are written; None where not at all."""
    name = asked["kind"] + ("" if asked["dtype"] == "float32" else f"-{asked['dtype']}")
    data, picture = args.json, args.plot
    if data == AUTO or (data is None and _complete(args)):
        facts = machine.facts(args.threads or 1, False)
        data = RESULTS / f"{name}-{machine.slug(facts)}.json"
    if picture == AUTO or (picture is None and _complete(args) and not args.scaling):
        picture = (args.source or data or RESULTS / name).with_suffix(".png")
    for path in (data, picture):
        if path is not None:
            if path.parent == RESULTS:
                RESULTS.mkdir(exist_ok=True)
            check_output(path, 2**20)
    return data, picture


def _write_readme(readme: Path, result: dict[str, Any], data: Path | None, picture: Path | None) -> None:
    """Replace the result's block; the plot is linked where it is, beside the JSON unless it was just drawn."""
    if picture is None and data is not None and data.with_suffix(".png").exists():
        picture = data.with_suffix(".png")
    found = [None if path is None else relative(path, readme) for path in (data, picture)]
    replace_block(readme, report.block(result), *report.paragraphs(result, *found))


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where the machine was too busy for --readme."""
    progress.need("rich", "matplotlib", command=report.COMMAND, named="rich and matplotlib")
    for name, value in (("--threads", args.threads), ("--seconds", args.seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}: given {value}, want more than 0")
    kept = args.source is None and machine.keep_memory()  # before any library starts its threads
    result = None if args.source is None else load(args.source)
    asked = result or {"kind": "scaling" if args.scaling else "peers", "dtype": args.dtype}
    if asked["kind"] == "scaling" and args.plot:
        raise ValueError("--plot: a scaling result has none, leave it out")
    if args.source and args.json:
        raise ValueError("--json: nothing is measured with --from, leave one of them out")
    if args.readme:
        replace_block(args.readme, report.block(asked))
    shapes = chosen(args.shapes, args.quick)
    if result is None:
        check_memory(shapes, args.dtype, 0 if args.scaling else len(args.peers))
    data, picture = _paths(args, asked)
    if result is None:
        result = rounded(measured(args, shapes, kept, partial(write_result, data)))
    show(result)
    if picture:
        plot.draw(result, picture)
    for path in (data, picture):
        if path is not None:
            print(f"wrote {path}")
    if result["doubt"]:
        print(f"{report.COMMAND}: {result['doubt']}", file=sys.stderr)
    if args.readme and result["doubt"]:
        print(f"{report.COMMAND}: {args.readme} is left as it was", file=sys.stderr)
        return 1
    if args.readme:
        _write_readme(args.readme, result, data or args.source, picture)
    return 0


def load(path: Path) -> dict[str, Any]:
    """Read an earlier result; ValueError where the file is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if {"kind", "dtype", "machine", "doubt", "records", "small"} <= result.keys() and result["records"]:
            return dict(result)
    except (ValueError, AttributeError):
        pass
    raise ValueError(
        f"--from: {path} is no result of {report.COMMAND}, want a file that it wrote, like those in bench/results"
    )


def show(result: dict[str, Any]) -> None:
    """Print the tables and who was not timed."""
    for table in report.tables(result):
        progress.table(*table)
    for line in (report.note(result), *report.refusals(result)):
        print(textwrap.fill(line, 110))


main = partial(command.main, _parser, run)

if __name__ == "__main__":
    sys.exit(main())
