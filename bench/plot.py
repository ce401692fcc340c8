"""The plots of results, as PNG: `bench.peers`, `bench.gpu`, `bench.resnet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import report
from bench.problem import PASSES

LOOK = {
    "forward": ("o", "#0072b2"),
    "backward": ("s", "#d55e00"),
    "inference": ("^", "#009e73"),
    "moments": ("D", "#7f7f7f"),
}
COLOURS = {"PyTorch": ("#d55e00", "#f0b899"), "fastbn": ("#0072b2", "#99c7e0")}  # a network's batch norms, the rest
# of a row's height: markers of one shape do not cover each other
OFFSET = {what: (i - 1.5) * 0.2 for i, what in enumerate(PASSES)}
BAR = 0.38  # likewise


def _figure(width: float, rows: int, inches: float, above: float) -> Any:
    """A figure without a window, of so many inches for each row and above them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, inches * rows + above), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path, handles: Sequence[Any], title: str) -> None:
    look = {"loc": "outside upper center", "fontsize": 9, "frameon": False}
    figure.legend(handles=handles, ncols=min(len(handles), 6), title=title, **look)
    figure.savefig(path, format="png", dpi=110)


def _sides(names: Sequence[str]) -> tuple[Any, Any, Any]:
    """(figure, its left and right half) with a row for each name, and a mark for each pass."""
    figure = _figure(11, len(names), 0.28, 2.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        for i in range(1, len(names), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="#f2f2f2", zorder=0)
        axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_ylim(len(names) - 0.5, -0.5)
    return figure, left, right


def _mark(axes: Any, value: float | None, row: int, what: str, filled: bool = True) -> None:
    marker, colour = LOOK[what]
    face = colour if filled else "none"
    if value is not None:
        look = {"color": colour, "markerfacecolor": face, "markersize": 4, "linestyle": "none", "zorder": 3}
        axes.plot(value, row + OFFSET[what], marker, **look)


def _handles() -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], marker=m, color=c, linestyle="none", label=what) for what, (m, c) in LOOK.items()]


def _ticks(axes: Any, at: tuple[float, ...]) -> None:
    """Ratios as plain numbers, at these places in each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=at))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Of a result beside peers: each shape's ratio to the fastest peer and to the limit, by pass."""
    from matplotlib.lines import Line2D

    facts = result["machine"]
    names = list(dict.fromkeys(record["shape"] for record in result["records"]))
    figure, left, right = _sides(names)
    for record in result["records"]:
        what, row = record["pass"], names.index(record["shape"])
        # small arrays are all call, no memory
        times_limit = None if record["group"] == "small" else record["times_limit"]
        for axes, value, target in (
            (left, record["ratio"], report.peer_target(record)),
            (right, times_limit, report.limit_target(record, facts["cache"])),
        ):
            _mark(axes, value, row, what, filled=record["bytes"] > report.LIMIT_BYTES)
            if target is not None:
                y = row + OFFSET[what]
                axes.plot([target, target], [y - 0.1, y + 0.1], color=LOOK[what][1], linewidth=2, zorder=2)
    for axes, label, at in (
        (left, "the fastest peer's time / fastbn's: larger is better", (1.0, 2.0, 5.0)),
        (right, "fastbn's time / the limit's: smaller is better", (1.0, 1.5, 2.0, 3.0, 5.0)),
    ):
        _ticks(axes, at)
        axes.axvline(1.0, color="black", linewidth=0.8, zorder=1)
        axes.set_xlabel(label)
    left.set_ylabel("shape, channels first or last in memory")
    black: dict[str, Any] = {"color": "black", "linestyle": "none"}
    small = Line2D([], [], marker="o", markerfacecolor="none", label="arrays up to 4 MB", **black)
    wanted = Line2D([], [], marker="|", markersize=9, markeredgewidth=2, label="target of the pass", **black)
    title = f"{result['dtype']}, {facts['processor']}, {facts['threads']} threads, {facts['date']}"
    _save(figure, path, [*_handles(), small, wanted], title)


def draw_gpu(result: Mapping[str, Any], path: Path, ratio: float, of_copy: float) -> None:
    """Of a result on a GPU: each shape's ratio to PyTorch's best, and its share of the copy's bandwidth, by pass."""
    names = list(dict.fromkeys(f"{r['shape']} {r['dtype']}" for r in result["records"]))
    figure, left, right = _sides(names)
    for r in result["records"]:
        row = names.index(f"{r['shape']} {r['dtype']}")
        _mark(left, r["ratio"], row, r["pass"])
        _mark(right, r["of_copy"], row, r["pass"])
    for axes, target, label in (
        (left, ratio, "PyTorch's best time / fastbn's: larger is better"),
        (right, of_copy, "share of the copy's bandwidth: larger is better"),
    ):
        axes.axvline(target, color="black", linewidth=0.8)
        axes.set_xlabel(label)
    left.set_xscale("log")
    right.set_xlim(left=0)
    _save(figure, path, _handles(), f"{result['machine']['device']}, {result['machine']['date']}")


def draw_networks(result: Mapping[str, Any], path: Path) -> None:
    """Of whole networks: time relative to PyTorch's, the batch norms' part of it dark."""
    from matplotlib.patches import Patch

    records, facts = result["records"], result["machine"]
    figure = _figure(10, len(records), 0.42, 1.8)
    axes = figure.subplots()
    for i, record in enumerate(records):
        for k, (norms, (dark, light)) in enumerate(COLOURS.items()):
            whole = 1.0 if norms == "PyTorch" else 1 / record["ratio"]
            own = whole * max(0.0, record["shares"].get(norms, 0.0))
            y = i + (k - 0.5) * BAR
            axes.barh(y, whole - own, BAR, color=light)
            axes.barh(y, own, BAR, left=whole - own, color=dark)
    axes.axvline(1.0, color="black", linewidth=0.8)
    rows = [f"{r['shape']} {r['layout']}, {r['mode']} {r['pass']}" for r in records]
    axes.set_yticks(range(len(records)), rows, fontsize=8)
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xlabel("time / PyTorch's: smaller is better")
    handles = [Patch(color=dark, label=f"{norms}'s batch norms") for norms, (dark, _) in COLOURS.items()]
    handles += [Patch(color=light, label=f"the rest with {norms}") for norms, (_, light) in COLOURS.items()]
    batch = f"{result['images']} x 3 x {result['side']}²"
    _save(figure, path, handles, f"{batch}, {facts['processor']}, {facts['threads']} threads, {facts['date']}")
