"""The plot of `bench.resnet`.

A bar per network, memory order, mode and pass for each library, the batch norms' part of it dark.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"PyTorch": ("#d55e00", "#f0b899"), "fastbn": ("#0072b2", "#99c7e0")}  # its batch norms, the rest
HEIGHT = 0.38


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the plot as PNG: times relative to PyTorch's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    records = result["records"]
    figure = Figure(figsize=(10, 0.42 * len(records) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, record in enumerate(records):
        for k, (norms, (dark, light)) in enumerate(COLOURS.items()):
            whole = 1.0 if norms == "PyTorch" else 1 / record["ratio"]
            own = whole * max(0.0, record["shares"].get(norms, 0.0))
            y = i + (k - 0.5) * HEIGHT
            axes.barh(y, whole - own, HEIGHT, color=light)
            axes.barh(y, own, HEIGHT, left=whole - own, color=dark)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(
        range(len(records)), [f"{r['shape']} {r['layout']}, {r['mode']} {r['pass']}" for r in records], fontsize=8
    )
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.set_xlabel("time / PyTorch's: smaller is better")
    handles = [Patch(color=dark, label=f"{norms}'s batch norms") for norms, (dark, _) in COLOURS.items()]
    handles += [Patch(color=light, label=f"the rest with {norms}") for norms, (_, light) in COLOURS.items()]
    facts = result["machine"]
    title = (
        f"{result['images']} x 3 x {result['side']}², {facts['processor']}, {facts['threads']} threads, {facts['date']}"
    )
    figure.legend(handles=handles, ncols=4, loc="outside upper center", fontsize=9, frameon=False, title=title)
    figure.savefig(path, format="png", dpi=110)
