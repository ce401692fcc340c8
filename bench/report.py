"""What is asked of the ratios, on two cores, and the tables of a result: every number comes from the JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bench import command, machine, small
from bench.problem import OWN, PASSES

Result = Mapping[str, Any]
Record = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]

COMMAND = "python -m bench.peers"


class Target(NamedTuple):
    """Least ratios of the fastest peer's time to fastbn's."""

    label: str
    groups: tuple[str, ...]
    passes: tuple[str, ...]
    every: float | None  # shape
    geomean: float | None

    def holds(self, cell: Mapping[str, Any]) -> bool:
        """Whether it is about this shape and pass."""
        return cell["group"] in self.groups and cell["pass"] in self.passes


LARGE = ("first", "last", "flat")
TARGETS = (
    Target("channels first, forward", ("first",), ("forward",), 1.2, 3.0),
    Target("channels first, backward", ("first",), ("backward",), 1.1, 1.8),
    Target("channels last and flat, forward and backward", ("last", "flat"), ("forward", "backward"), 1.0, 1.4),
    Target("inference", LARGE, ("inference",), 1.0, 1.1),
    Target("moments", LARGE, ("moments",), None, None),
)
LIMIT_BYTES = 4 * 2**20  # of the array, above which the limit is a target
HALF = 1.5  # times the speed of float32, on arrays over the cache


def peer_target(cell: Mapping[str, Any]) -> float | None:
    """The least ratio to the fastest peer wanted of a shape and pass."""
    return next((target.every for target in TARGETS if target.holds(cell)), None)


def limit_target(cell: Mapping[str, Any], cache: int) -> float | None:
    """The largest multiple of the limit's time wanted; None for small arrays, for moments, and off the table."""
    if cell["bytes"] <= LIMIT_BYTES or cell["pass"] == "moments" or cell["group"] == OWN:
        return None
    if cell["pass"] == "inference":
        return 1.1
    if cell["group"] == "first":
        short = cell["shape"].endswith("x7x7")
        return 1.5 if cell["pass"] == "backward" else 1.7 if short else 1.35
    return 2.0 if cell["bytes"] > cache else 1.6


def block(result: Result) -> str:
    """The name of a result's place in a page: peers, scaling, float16, ..."""
    if result["kind"] == "scaling" or result["dtype"] == "float32":
        return str(result["kind"])
    return str(result["dtype"])


def milliseconds(seconds: float) -> str:
    """Three digits, with its unit; no power of ten."""
    if seconds >= 0.1:
        return f"{seconds * 1e3:.0f} ms"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"


def _wanted(target: float | None, form: str) -> str:
    return "" if target is None else f" (target {form.format(target)})"


def _least(records: Sequence[Record], target: float | None) -> str:
    """The shape on which fastbn is least ahead."""
    worst = min(records, key=lambda record: record["ratio"])
    where = f"{worst['ratio']:.2f}x, {worst['shape']} {worst['pass']}, {worst['fastest']}"
    met = "" if target is None else f"; {sum(r['ratio'] >= target for r in records)} of {len(records)} at {target:g}x"
    return where + met


def _most(records: Sequence[Record], cache: int) -> str:
    """The large array on which fastbn is farthest from the limit, in units of what is wanted there."""
    bounded = [(r, bound) for r in records if (bound := limit_target(r, cache)) is not None]
    if not bounded:
        return "-"
    worst, bound = max(bounded, key=lambda pair: pair[0]["times_limit"] / pair[1])
    met = sum(r["times_limit"] <= limit for r, limit in bounded)
    return (
        f"{worst['times_limit']:.2f}, {worst['shape']} {worst['pass']} (target {bound:g}); {met} of {len(bounded)} "
        "within"
    )


def summary(result: Result) -> Table:
    """Each target beside what was measured."""
    lines = []
    for target in TARGETS:
        found = [r for r in result["records"] if target.holds(r) and r["ratio"] is not None]
        if found:
            mean = statistics.geometric_mean(r["ratio"] for r in found)
            cells = [
                _least(found, target.every),
                f"{mean:.2f}x{_wanted(target.geomean, '{:g}x')}",
                _most(found, result["machine"]["cache"]),
            ]
            lines.append([target.label, *cells])
    return ["", "the fastest peer, least", "geometric mean", "the limit, arrays over 4 MB, worst"], lines


def by_shape(records: Sequence[Record], cell: Callable[[Record], str]) -> Table:
    """One line per shape, one column per pass."""
    found: dict[str, dict[str, Record]] = {}
    for record in records:
        found.setdefault(record["shape"], {})[record["pass"]] = record
    passes = [name for name in PASSES if any(name in by_pass for by_pass in found.values())]
    rows = [
        [shape, *(cell(by_pass[name]) if name in by_pass else "-" for name in passes)]
        for shape, by_pass in found.items()
    ]
    return ["shape", *passes], rows


def _peer_cell(record: Record) -> str:
    peer = "no peer" if record["fastest"] is None else f"{record['ratio']:.2f}x {record['fastest']}"
    return f"{milliseconds(record['seconds']['fastbn'])}, {peer}, {record['times_limit']:.2f}"


def _half_cell(record: Record) -> str:
    peer = "" if record["fastest"] is None else f", {record['ratio']:.2f}x {record['fastest']}"
    return (
        f"{milliseconds(record['seconds']['fastbn'])}, {record['float32']:.2f}x float32{peer}, "
        f"{record['times_limit']:.2f}"
    )


def _scaling_cell(record: Record) -> str:
    return " / ".join(milliseconds(seconds) for seconds in record["seconds"].values()) + (
        f", {list(record['speedup'].values())[-1]:.2f}x"
    )


def small_calls(result: Result) -> Table:
    """Small arrays: each call of fastbn's, and the peer's as a multiple."""
    headers, columns = ["shape"], []
    for pair in small.PAIRS:
        limit = small.LIMITS.get(pair.own)
        if pair.own not in columns:
            headers.append(pair.own + ("" if limit is None else f" (target {limit * 1e6:g} µs)"))
            columns.append(pair.own)
        headers.append(pair.peer + _wanted(pair.target, "{:g}x"))
        columns.append(f"{pair.own} / {pair.peer}")
    lines = []
    for record in result["small"]:
        values = {
            **{name: milliseconds(s) for name, s in record["seconds"].items()},
            **{n: f"{r:.1f}x" for n, r in record["ratios"].items()},
        }
        lines.append([record["shape"], *(values.get(column, "-") for column in columns)])
    return headers, lines


def refusals(result: Result) -> list[str]:
    """Who was not timed and why, with the number of shapes and passes."""
    counted: dict[tuple[str, str], int] = {}
    for record in result["records"]:
        for peer, reason in record.get("refused", {}).items():
            counted[peer, reason] = counted.get((peer, reason), 0) + 1
    return [f"{peer} ({number}x): {reason}" for (peer, reason), number in counted.items()]


NOTES = {
    "peers": "A cell: fastbn's time; the fastest peer's as a multiple of it, and who that is; fastbn's as a multiple "
    "of the limit's, the best copy (forward, inference), triad (backward) or read (moments) of its bytes. {dtype}; "
    "medians of ratios paired within a round.",
    "half": "A cell: fastbn's time in {dtype}; its float32 time and the fastest peer's as multiples of it; and as a "
    f"multiple of the limit's, the best copy, triad or read of the same bytes. Target: {HALF:g}x float32 on arrays "
    "over the cache.",
    "scaling": "A cell: fastbn's time at {counts} threads, and how many times as fast as one thread the last is. "
    "{dtype}.",
}


def tables(result: Result) -> list[Table]:
    """Every table of a result, the shortest first."""
    if result["kind"] == "scaling":
        return [by_shape(result["records"], _scaling_cell)]
    half = result["dtype"] in ("float16", "bfloat16")
    shapes = by_shape(result["records"], _half_cell if half else _peer_cell)
    return [table for table in (() if half else (summary(result), small_calls(result))) if table[1]] + [shapes]


def note(result: Result) -> str:
    """What the cells mean, where and when they were measured."""
    kind = "half" if result["dtype"] in ("float16", "bfloat16") and result["kind"] == "peers" else result["kind"]
    counts = " / ".join(result["records"][0]["seconds"]) if kind == "scaling" else ""
    meaning = NOTES[kind].format(dtype=result["dtype"], counts=counts)
    return f"{meaning} {machine.sentence(result['machine'])}."


def paragraphs(result: Result, data: str | None, plot: str | None) -> list[str]:
    """Of the page's block: tables, the plot where there is one, what the cells mean, and how it was written."""
    parts = [command.markdown(*table) for table in tables(result)]
    if plot is not None:
        parts.append(f"![time against the fastest peer and against the limit, by shape and pass]({plot})")
    written = f"Written by `{COMMAND}`{'' if data is None else f' from [its results]({data})'}."
    return [*parts, f"{note(result)} {written}"]
