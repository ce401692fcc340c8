"""What each idea of the kernels is worth: fastbn's own call without it and with it, by turns: `python -m bench.ideas`, see --help."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import command, machine, report, textbook
from bench.contestants import disagreement
from bench.measure import Crowd
from bench.problem import EPS, Call, Problem, first, own
from bench.rounds import paired, rounds
from fastbn import config, layout, quickbench, ready, screen
from fastbn.backends import cpu, routes, schedule
from fastbn.stream import check_output, replacing

COMMAND = "python -m bench.ideas"
SECONDS = 2.0  # of rounds for each shape and pass
NEVER = 2**62  # bytes: more than any array has

PLANNED = (cpu, routes, schedule, layout, ready)  # modules that remember what they decided for a shape


class Patch(NamedTuple):
    """A constant or function, and what stands in for it."""

    owner: Any
    name: str
    value: Any


Patches = tuple[Patch, ...]


def _remembering() -> Iterator[tuple[Any, str, Any]]:
    """Every function that remembers its results: (module, name, function)."""
    for module in PLANNED:
        for name, value in vars(module).items():
            if hasattr(value, "cache_clear") and getattr(value, "__module__", None) == module.__name__:
                yield module, name, value


def _forget() -> None:
    for _, _, function in _remembering():
        function.cache_clear()


@contextmanager
def patched(patches: Patches) -> Iterator[None]:
    """Replace within the block; what was decided before is decided anew, and again after it."""
    before = [Patch(p.owner, p.name, getattr(p.owner, p.name)) for p in patches]
    try:
        for p in patches:
            setattr(p.owner, p.name, p.value)
        _forget()
        yield
    finally:
        for p in before:
            setattr(p.owner, p.name, p.value)
        _forget()


def _images(kernel: Callable[..., None]) -> Callable[[Problem], Call]:
    """The maker of a textbook forward, on (N, C, S) views."""

    def make(p: Problem) -> Call:
        x, out = (a.reshape(*a.shape[:2], -1) for a in (p.x, p.out))

        def run() -> tuple[Any]:
            kernel(x, p.gamma, p.beta, EPS, out)
            return (p.out,)

        return Call(run, first)

    return make


class Idea(NamedTuple):
    """What is switched off and on, and on which shapes and passes."""

    name: str
    shapes: tuple[str, ...]
    passes: tuple[str, ...]
    off: Patches = ()
    on: Patches = ()  # where fastbn itself does not take the idea on every machine
    instead: Callable[[Problem], Call] | None = None  # another kernel, timed as the call without the idea
    exact: bool = True  # whether it must not change a bit
    taken: Callable[[Problem, str], bool] = lambda p, what: True  # whether fastbn takes it here by itself


def _streams(p: Problem, what: str) -> bool:
    return routes.streams(p.out.nbytes, 3 if what == "backward" else 2)


LARGE = ("32x64x56x56", "32x256x56x56")
ROWS = ("32x256x56x56", "32x512x28x28")
SHORT = ("32x1024x14x14", "32x2048x7x7")
SMALL = ("32x64", "16x256")
FORWARD, BOTH = ("forward",), ("forward", "backward")

IDEAS = (
    Idea("one read of memory", LARGE, BOTH, (Patch(routes, "fused", lambda *shape_and_strides: None),)),
    Idea(
        "statistics in the order of memory",
        (*ROWS, "32x256x56x56 last"),
        ("moments", "forward"),
        (Patch(routes, "lot", lambda plan, C: 1), Patch(schedule, "LOT_BYTES", 0), Patch(schedule, "ALONG_BYTES", NEVER)),
        exact=False,
    ),
    Idea(
        "stores past the cache",
        LARGE,
        ("inference", "forward"),
        (Patch(config, "STREAM_BYTES", NEVER),),
        (Patch(config, "STREAM_BYTES", 0),),
        taken=_streams,
    ),
    Idea("blocks, not Welford's update of every value", LARGE, FORWARD, instead=_images(textbook.welford), exact=False),
    Idea("explicit vectors, not plain loops", LARGE, FORWARD, instead=_images(textbook.loops), exact=False),
    Idea("short rows as columns", SHORT, BOTH, (Patch(schedule, "short", lambda N, S, itemsize, applied: False),), exact=False),
    Idea("threads for large calls", LARGE, BOTH, (Patch(config, "SERIAL_BYTES", NEVER),)),
    Idea("no threads for small calls", SMALL, BOTH, (Patch(config, "SERIAL_BYTES", 0),)),
    Idea("each shape planned once", SMALL, BOTH, tuple(Patch(m, name, f.__wrapped__) for m, name, f in _remembering())),
)


def calls(idea: Idea, p: Problem, what: str) -> dict[str, Call]:
    """The call without the idea and with it, each for its own patches."""
    with_it = own(p, what)
    return {"without": with_it if idea.instead is None else idea.instead(p), "with": with_it}


def compare(idea: Idea, p: Problem, what: str) -> None:
    """AssertionError where the results without the idea are not those with it: bit for bit where it must not change one."""
    both = calls(idea, p, what)
    with patched(idea.on):
        expected = [np.array(a, order="K") for a in both["with"].read(both["with"].run())]
    p.out[...] = 0
    with patched(idea.off):
        wrong = disagreement(both["without"], expected, p.dtype, p.count)
        if wrong is None and idea.exact:
            found = both["without"].read(both["without"].run())
            changed = [str(i) for i, (f, e) in enumerate(zip(found, expected, strict=True)) if not np.array_equal(f, e)]
            wrong = f"result {', '.join(changed)} changes its bits" if changed else None
    if wrong is not None:
        raise AssertionError(f"{idea.name}, {p.name} {what}: {wrong}")


def measure(idea: Idea, p: Problem, what: str, seconds: float) -> dict[str, Any]:
    """Compare, then time both ways by turns."""
    compare(idea, p, what)
    taken, made = idea.taken(p, what), calls(idea, p, what)
    with ExitStack() as switch:

        def put(patches: Patches) -> None:
            switch.close()
            switch.enter_context(patched(patches))

        before = {"without": partial(put, idea.off), "with": partial(put, idea.on)}
        times = rounds({name: call.run for name, call in made.items()}, seconds, before=before)
    return {
        "idea": idea.name,
        "shape": p.name,
        "pass": what,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "worth": paired(times["without"], times["with"]),
        "taken": taken,
        "rounds": len(times["with"]),
    }


def measured(ideas: Sequence[Idea], seconds: float) -> dict[str, Any]:
    """Every idea on its shapes and passes."""
    from rich.console import Console
    from rich.progress import track

    facts, crowd = machine.facts(int(quickbench.machine()["threads"]), kept=False), Crowd()
    problem = cache(partial(Problem, dtype="float32"))
    steps = [(idea, shape, what) for idea in ideas for shape in idea.shapes for what in idea.passes]
    console = Console(stderr=True)
    records = [
        crowd.watch(partial(measure, idea, problem(shape), what, seconds))
        for idea, shape, what in track(steps, "", console=console, disable=not console.is_terminal)
    ]
    return {"kind": "ideas", "machine": facts, "seconds": seconds, "doubt": crowd.doubt(int(facts["threads"])), "records": records}


def table(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One line per idea, shape and pass."""
    lines = []
    for record in records:
        name = record["idea"] + ("" if record["taken"] else " *")
        seconds = [report.milliseconds(record["seconds"][way]) for way in ("without", "with")]
        lines.append([name, record["shape"], record["pass"], *seconds, f"{record['worth']:.2f}x"])
    return ["idea", "shape", "pass", "without it", "with it", "worth"], lines


def note(result: Mapping[str, Any]) -> str:
    """What the columns mean, where and when they were measured."""
    facts = result["machine"]
    forced = " * Forced here: by itself fastbn leaves it out, the arrays fit this processor's last-level cache."
    idle = "" if all(record["taken"] for record in result["records"]) else forced
    return (
        "Medians of fastbn's own call on float32 data, channels first, results in memory given to it, without the idea and with it by "
        f"turns in one process; worth is the median of their ratios within a round.{idle} {quickbench.sentence(facts)}; "
        f"{facts['cache'] / 2**20:.0f} MB of cache."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Time fastbn's own calls with each of its ideas off and on, by turns.")
    each = f"of rounds for each shape and pass (default: {SECONDS:g})"
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help=each)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="replace the block between <!-- ideas:begin --> and <!-- ideas:end -->")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where the machine was too busy for --readme."""
    screen.need(command=COMMAND)
    if args.seconds <= 0:
        raise ValueError(f"--seconds: given {args.seconds}, want more than 0")
    if args.readme:
        quickbench.replace_block(args.readme, "ideas", None)
    if args.json:
        check_output(args.json, 2**20)
    result = measured(IDEAS, args.seconds)
    headers, lines = table(result["records"])
    screen.table(headers, lines)
    print(textwrap.fill(note(result), 110))
    if args.json:
        with replacing(args.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
        print(f"wrote {args.json}")
    if result["doubt"]:
        print(f"{COMMAND}: {result['doubt']}", file=sys.stderr)
    if args.readme and result["doubt"]:
        print(f"{COMMAND}: {args.readme} is left as it was", file=sys.stderr)
        return 1
    if args.readme:
        notes = f"{note(result)} Written by `{COMMAND} --readme {args.readme.name}`."
        quickbench.replace_block(args.readme, "ideas", quickbench.markdown(headers, lines, notes))
        print(f"wrote the ideas into {args.readme}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code: 0, 1 where the README was left, 2 for bad input."""
    return command.main(_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
