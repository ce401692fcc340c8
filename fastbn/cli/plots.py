"""What the commands' pictures have in common: names, colours, marks, and how they are written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

NAMES = {True: "with batch normalization", False: "without"}
# Blue and orange of Okabe & Ito (2008), which the colour-blind tell apart; a dark and a light one, so in grey, too.
STYLES: dict[bool, dict[str, Any]] = {
    True: {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 4},
    False: {"color": "#E69F00", "linestyle": "--", "marker": "s", "markersize": 4},
}
# Others of them, where lines are not with and without.
THREE: tuple[dict[str, Any], ...] = (
    {"color": "#009E73", "linestyle": "-", "marker": "o", "markersize": 4},
    {"color": "#CC79A7", "linestyle": "--", "marker": "s", "markersize": 4},
    {"color": "#000000", "linestyle": "-.", "marker": "^", "markersize": 4},
)


def defaults() -> AbstractContextManager[None]:
    """Matplotlib's own settings, whatever the user's file says: TeX may not be there, nor take a title."""
    from matplotlib import style

    context: AbstractContextManager[None] = style.context("default")
    return context


def figure(title: str, size: tuple[float, float]) -> Figure:
    """An empty one, of so many inches, that no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)  # whatever the user's settings say
    # a directory's name in it, of any letters
    made.suptitle(title.encode(errors="backslashreplace").decode(), parse_math=False, fontsize="medium")
    return made


def save(made: Figure, file: IO[bytes], suffix: str) -> None:
    """Write it as png, pdf or svg."""
    with warnings.catch_warnings():
        # of the title's letters: the font's box stands for them
        warnings.filterwarnings("ignore", "Glyph .* missing from ")
        made.savefig(file, format=suffix, dpi=120)


def accuracies(
    axes: Axes, values: Sequence[float], found: Sequence[float | None], norm: bool, floor: float | None
) -> None:
    """A line of accuracies, shaded above a floor; where there is none, for the run diverged, a cross at the foot."""
    y = np.array([np.nan if accuracy is None else accuracy for accuracy in found])
    axes.plot(values, y, label=NAMES[norm], **STYLES[norm])
    if floor is not None:
        out = [(value, accuracy) for value, accuracy in zip(values, y, strict=True) if accuracy < floor]
        hollow = STYLES[norm] | {"linestyle": "", "markerfacecolor": "white", "zorder": 2.5}
        axes.plot(*np.transpose(out or [(values[0], np.nan)]), **hollow)
        # hatched, so that both are seen where they overlap, in grey too
        colour = STYLES[norm]["color"]
        look: dict[str, Any] = {"color": colour, "alpha": 0.25} if norm else {"facecolor": "none", "hatch": "///"}
        look |= {"linewidth": 0, "label": f"{NAMES[norm]}: usable, the others hollow"}
        axes.fill_between(values, floor, y, where=y >= floor, interpolate=True, edgecolor=colour, **look)
    gone = [value for value, accuracy in zip(values, found, strict=True) if accuracy is None]
    if gone:
        mark = "+" if norm else "x"  # both are seen, one on the other
        cross = STYLES[norm] | {"linestyle": "", "marker": mark, "markersize": 9, "markeredgewidth": 2}
        foot: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 3}
        axes.plot(gone, [0] * len(gone), label=f"{NAMES[norm]}: diverged, no accuracy", **cross, **foot)


def band(
    axes: Axes, steps: Sequence[int], low: Sequence[float], middle: Sequence[float], high: Sequence[float], norm: bool
) -> None:
    """The 15th to the 85th percentile, and the median."""
    colour = STYLES[norm]["color"]
    axes.fill_between(steps, low, high, color=colour, alpha=0.3, linewidth=0, label="15th to 85th percentile")
    axes.plot(steps, middle, label="median", color=STYLES[norm]["color"], linestyle=STYLES[norm]["linestyle"])


def ticks(axis: Axis, values: Sequence[float]) -> None:
    """Just these along a logarithmic axis, in plain numbers."""
    axis.set_ticks(list(values), [f"{value:,g}" for value in values])
    axis.set_ticks([], minor=True)


def round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two positive numbers."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [number for decade in decades for step in (1, 2, 5) if low <= (number := step * 10.0**decade) <= high]


def legend(made: Figure, all_axes: Iterable[Axes]) -> None:
    """One for all, each word once."""
    known = {text: mark for axes in all_axes for mark, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    made.legend(known.values(), known.keys(), loc="outside lower center", ncols=3)
