"""The plot of a result: each shape's ratio to the fastest peer and to the limit, by pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import targets
from bench.problem import PASSES

LOOK = {
    "forward": ("o", "#0072b2"),
    "backward": ("s", "#d55e00"),
    "inference": ("^", "#009e73"),
    "moments": ("D", "#7f7f7f"),
}
ROW_INCHES = 0.28
# of a row's height: markers of one shape do not cover each other
OFFSET = {what: (i - 1.5) * 0.2 for i, what in enumerate(PASSES)}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the plot of a result beside peers as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    records = result["records"]
    shapes = list(dict.fromkeys(record["shape"] for record in records))
    figure = Figure(figsize=(11, ROW_INCHES * len(shapes) + 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for record in records:
        what, cache = record["pass"], result["machine"]["cache"]
        y = shapes.index(record["shape"]) + OFFSET[what]
        marker, colour = LOOK[what]
        hollow = "none" if record["bytes"] <= targets.LIMIT_BYTES else colour
        for axes, value, target in (
            (left, record["ratio"], targets.peer_target(record)),
            (right, record["times_limit"], targets.limit_target(record, cache)),
        ):
            if value is not None and not (axes is right and record["group"] == "small"):  # all call, no memory
                axes.plot(
                    value, y, marker, color=colour, markerfacecolor=hollow, markersize=4, linestyle="none", zorder=3
                )
            if target is not None:
                axes.plot([target, target], [y - 0.1, y + 0.1], color=colour, linewidth=2, zorder=2)
    for i in range(len(shapes)):
        if i % 2:
            for axes in (left, right):
                axes.axhspan(i - 0.5, i + 0.5, color="#f2f2f2", zorder=0)
    for axes, label in (
        (left, "the fastest peer's time / fastbn's: larger is better"),
        (right, "fastbn's time / the limit's: smaller is better"),
    ):
        axes.set_xscale("log")
        _ticks(axes, (1.0, 1.5, 2.0, 3.0, 5.0) if axes is right else (1.0, 2.0, 5.0))
        axes.axvline(1.0, color="black", linewidth=0.8, zorder=1)
        axes.grid(axis="x", linewidth=0.4, alpha=0.6)
        axes.set_xlabel(label)
    left.set_yticks(range(len(shapes)), shapes, fontsize=8)
    left.set_ylabel("shape, channels first or last in memory")
    left.set_ylim(len(shapes) - 0.5, -0.5)
    handles = [Line2D([], [], marker=m, color=c, linestyle="none", label=what) for what, (m, c) in LOOK.items()]
    handles.append(
        Line2D([], [], marker="o", color="black", markerfacecolor="none", linestyle="none", label="arrays up to 4 MB")
    )
    handles.append(
        Line2D(
            [],
            [],
            marker="|",
            markersize=9,
            markeredgewidth=2,
            color="black",
            linestyle="none",
            label="target of the pass",
        )
    )
    facts = result["machine"]
    title = f"{result['dtype']}, {facts['processor']}, {facts['threads']} threads, {facts['date']}"
    figure.legend(
        handles=handles, ncols=len(handles), loc="outside upper center", fontsize=9, frameon=False, title=title
    )
    figure.savefig(path, format="png", dpi=110)


def _ticks(axes: Any, at: tuple[float, ...]) -> None:
    """Ratios as plain numbers, at these places in each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=at))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
