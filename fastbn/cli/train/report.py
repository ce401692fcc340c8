"""What the `train` command shows of two histories: the table, the closing lines, the plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fastbn.cli import plots
from fastbn.cli.train import training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = (90, 95, 99)  # percent of the better accuracy at the end: what the steps are counted for
ROWS = 10  # of the accuracies in the table, beside those of the first two checks
NEAR_CHANCE = 0.05  # of the way from chance to all that is still called near
RISING = 0.01  # the accuracy's range, at the least, over the last half of the steps, where it is no plateau
SETTLED = 200  # steps before which nothing is called a plateau
FELL = 0.05  # below the best check: fell back
UNSTEADY = 0.1  # of accuracy lost between checks, in all, over the last half of the steps

Histories = Mapping[bool, training.History]  # by whether the network has batch normalization


def counted(n: int, noun: str) -> str:
    """So many of them: 1 step, 2 steps."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _near(chance: float) -> float:
    """Below it, an accuracy is near chance."""
    return chance + NEAR_CHANCE * (1 - chance)


def _percent(accuracy: float, total: int) -> str:
    """So many percent, with digits enough to tell one image more from none."""
    return f"{100 * accuracy:.{1 if total < 1000 else 2}f} %"


def _targets(histories: Histories, chance: float) -> list[tuple[float, str]]:
    """(accuracy, its name) for each of SHARES of the better end, in whole images; none where both learned nothing."""
    ends = [history for history in histories.values() if history.diverged is None]
    if not ends:
        return []
    total, best = ends[0].total, max(history.correct[-1] for history in ends)
    if best < total * _near(chance):
        return []
    wanted = [(share, -(-share * best // 100) / total) for share in SHARES]
    return [(accuracy, f"{_percent(accuracy, total)} ({share} % of the better)") for share, accuracy in wanted]


def rows(histories: Histories, steps: int, chance: float) -> list[tuple[str, ...]]:
    """Build the table: accuracy after so many steps, steps until an accuracy, seconds."""
    both, checks = histories.values(), training.checked_steps(steps)
    last = len(checks) - 1
    shown = sorted({min(i, last) for i in (0, 1, 2)} | set(np.linspace(0, last, ROWS + 1).astype(int).tolist()))
    table: list[tuple[str, ...]] = [("test accuracy after step", "", "")]
    for i in shown:
        cells = (_percent(h.accuracy[i], h.total) if i < len(h.steps) else "-" for h in both)
        table.append((f"  {checks[i]:,}", *cells))
    if any(h.diverged for h in both):
        table.append(("diverged at step", *("-" if h.diverged is None else f"{h.diverged:,}" for h in both)))
    targets = _targets(histories, chance)
    if targets:
        table += [("", "", ""), (f"steps needed, checked {counted(last, 'time')}", "", "")]
    for accuracy, name in targets:
        needed = ((h.first(accuracy), f"not within {steps:,}" if h.diverged is None else "-") for h in both)
        table.append((f"  for {name}", *(never if first is None else f"{first:,}" for first, never in needed)))
    table += [("", "", ""), ("processor seconds, checks apart", *(f"{h.seconds:.1f}" for h in both))]
    return table


def summary(histories: Histories, chance: float) -> list[str]:
    """One sentence for each network: what it did."""
    targets = _targets(histories, chance)
    return [
        f"{plots.NAMES[norm].capitalize()}: {_did(history, targets, chance)}." for norm, history in histories.items()
    ]


def _did(history: training.History, targets: list[tuple[float, str]], chance: float) -> str:
    if history.diverged is not None:
        return f"diverged at step {history.diverged:,} (the loss is no longer a number; try a smaller --lr or --init)"
    accuracy = history.accuracy
    last, best, half = accuracy[-1], max(accuracy), accuracy[(len(accuracy) - 1) // 2 :]
    end = f"{_percent(last, history.total)} at the end"
    reached = [(first, name) for target, name in targets if (first := history.first(target)) is not None]
    after = "".join(f"{name} after {counted(first, 'step')}, " for first, name in reached[-1:])
    flat = max(half) - min(half) < RISING and history.steps[-1] >= SETTLED
    if best - last > FELL:
        return f"rose to {_percent(best, history.total)} and fell back, {end} (try a smaller --lr)"
    if reached and len(reached) == len(targets):
        return f"reached {after}{end}"
    if best < _near(chance):
        return f"{'on a plateau, ' if flat else ''}still near chance ({_percent(chance, history.total)}), {end}"
    drops = sum(max(0.0, before - now) for before, now in itertools.pairwise(half))
    if drops > UNSTEADY:
        return f"unsteady, {after}{end} (try a smaller --lr)"
    return f"{'on a plateau over the last half of the steps' if flat else 'slower'}, {after}{end}"


def figure(histories: Histories, title: str, steps: int, chance: float) -> Figure:
    """Draw both test accuracies over the steps, and where a network diverged, a cross."""
    from matplotlib.ticker import MaxNLocator

    made = plots.figure(title, (8, 5))
    axes = made.add_subplot()
    for norm, history in histories.items():
        _draw(axes, norm, history)
    seen = [100 * accuracy for history in histories.values() for accuracy in history.accuracy]
    margin = max(1.0, 0.05 * (max(seen) - min(seen)))
    low, high = max(min(seen) - margin, -1.0), min(max(seen) + margin, 101.0)
    if low <= 100 * chance <= high:
        axes.axhline(100 * chance, color="gray", linestyle=":", label="chance")
    axes.set(xlabel="training steps", ylabel="test accuracy (%)", xlim=(-0.01 * steps, 1.01 * steps), ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return made


def _draw(axes: Axes, norm: bool, history: training.History) -> None:
    style, percent = plots.STYLES[norm], [100 * accuracy for accuracy in history.accuracy]
    every = max(1, len(percent) // 10)
    axes.plot(history.steps, percent, label=plots.NAMES[norm], markevery=every, **style)
    if history.diverged is not None:
        cross = style | {"linestyle": "none", "marker": "X", "markersize": 11, "clip_on": False}
        label = f"{plots.NAMES[norm]}: diverged at step {history.diverged}"
        axes.plot([history.diverged], percent[-1:], label=label, **cross)
