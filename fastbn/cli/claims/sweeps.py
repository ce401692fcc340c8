"""Claims on what trains at all: over learning rates, initial weights and depths, with and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fastbn.cli import plots
from fastbn.cli.claims.runs import Finding, Plan, Report, Result, Results, Run, accuracy, build, descend
from fastbn.cli.train import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAR = 5.0  # points below the best accuracy that still count as trained
FEWER = 2  # values at least that must work more with than without, where a range is called wider
SAME = 1.0  # points between accuracies that are called the same
EARLY = 10  # the accuracy is looked at after one step in so many, too
DECADES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)


def measure(run: Run, inputs: training.Inputs, report: Report) -> Result:
    """Accuracy at the end and after the first tenth of the steps, both None where the run diverged before."""
    network = build(run, inputs)
    early: list[float] = []

    def after(step: int) -> None:
        if step == max(1, run.steps // EARLY):
            early.append(accuracy(network, inputs))

    diverged = descend(run, network, inputs, report, after)
    return {
        "accuracy": None if diverged else accuracy(network, inputs),
        "early": early[0] if early else None,
        "diverged": diverged,
    }


class Setting(NamedTuple):
    """One panel: a network, and the field of its runs that is varied."""

    name: str
    run: Run


class Sweep(NamedTuple):
    """A claim that compares accuracies over the values of one field."""

    name: str
    sentence: str
    field: str
    label: str
    values: Sequence[float]
    settings: tuple[Setting, ...]
    network: str = "three hidden layers of 100"
    speed: bool = False  # the claim is of speed, too
    harder: bool = False  # values are whole numbers, each harder than the one before

    def runs(self, plan: Plan) -> list[Run]:
        """With and without, for each value in each setting."""
        return [run for points in self.points(plan) for with_norm in points for run in (with_norm, with_norm.twin)]

    def points(self, plan: Plan) -> list[list[Run]]:
        """Of each setting the runs with batch normalization."""
        return [
            [
                Run(**{**run._asdict(), self.field: value, "steps": plan.steps, "seed": plan.seed})
                for value in self.values
            ]
            for _, run in self.settings
        ]

    def usable(self, points: list[Run], plan: Plan, results: Results) -> list[list[float]]:
        """Values that come near the best of the setting, with and without."""
        floor = self.floor(points, plan, results)
        return [
            [
                value
                for value, run in zip(self.values, side, strict=True)
                if results[run]["accuracy"] is not None and results[run]["accuracy"] >= floor
            ]
            for side in _sides(points)
        ]

    def floor(self, points: list[Run], plan: Plan, results: Results) -> float:
        """The accuracy that a run of this setting must reach: near the best, and more than chance."""
        best = max(_best(side, "accuracy", results) or 0.0 for side in _sides(points))
        return max(best - NEAR, plan.chance + SAME)

    def conclude(self, plan: Plan, results: Results) -> Finding:
        """Count the values that train."""
        points, count = self.points(plan), len(self.values)
        rows = [
            (f"{value:g}", *(_cell(results[run]) for runs in points for run in (runs[i], runs[i].twin)))
            for i, value in enumerate(self.values)
        ]
        usable = [self.usable(runs, plan, results) for runs in points]
        bests, earlies = (
            [[_best(side, key, results) for side in _sides(runs)] for runs in points] for key in ("accuracy", "early")
        )
        early = max(1, plan.steps // EARLY)
        rows.append(("the best", *(_percent(best) for pair in bests for best in pair)))
        if self.speed:
            found = (_percent(best) for pair in earlies for best in pair)
            rows.append((f"the best after {early:,} steps", *found))
        rows.append((f"within {NEAR:g} points", *(f"{len(found)} of {count}" for pair in usable for found in pair)))

        sentences, passed = [], 0
        for setting, (ours, twins), (ours_early, twins_early) in zip(self.settings, usable, earlies, strict=True):
            text = f"{setting.name}: {self._named(ours)} with, {self._named(twins)} without"
            holds = len(ours) >= len(twins) + FEWER
            if not holds and abs(len(ours) - len(twins)) < FEWER:
                text += ", little or no difference"
            if self.harder and holds and not twins:
                text += ", not even the easiest: that is the rate's doing and says nothing of depth"
                holds = False
            if self.speed:
                text += f"; after {early:,} steps the best are at {_percent(ours_early)} and {_percent(twins_early)} %"
                holds &= (ours_early or 0.0) > (twins_early or 0.0) + SAME
            passed += holds
            sentences.append(f"{text}.")
        outcome = "holds" if passed == len(points) else "holds in part" if passed else "does not hold"
        final, plain = (
            max((best for best in side if best is not None), default=None) for side in zip(*bests, strict=True)
        )
        text = f"At the best of all settings a network gets {_percent(final)} % with and {_percent(plain)} % without"
        if self.speed and passed and abs((final or 0.0) - (plain or 0.0)) <= SAME:
            text += ": what is gained is range and speed, not accuracy"
        if not any(found for pair in usable for found in pair):
            outcome, text = "undecided", f"Nothing was learned: none comes above chance, {plan.chance:.1f} %"
        rule = (
            f"A setting passes where at least {FEWER} values more come within {NEAR:g} points of the setting's best "
            "accuracy with batch normalization than without"
            + (" (of which the easiest must be one)" if self.harder else "")
            + (f", and after a tenth of the steps the best is ahead by more than {SAME:g} point" if self.speed else "")
            + ". The claim holds where all settings pass, in part where some do."
        )
        done = (
            f"{self.label.capitalize()}: {count} values from {min(self.values):g} to {max(self.values):g}, each with "
            "batch normalization and without, from the same weights and batches; accuracy on "
            f"{plan.test_images:,} test images, in percent."
        )
        headers = (self.label, *(f"{s.name}, {side}" for s in self.settings for side in ("with", "without")))
        return Finding(done, rule, headers, rows, outcome, [*sentences, f"{text}."])

    def _named(self, found: list[float]) -> str:
        """Which values, as a range where they are neighbours."""
        if not found:
            return "none"
        start = list(self.values).index(found[0])
        words = [f"{value:g}" for value in found]
        if len(found) > 2 and list(self.values[start : start + len(found)]) == found:
            return f"{words[0]} to {words[-1]} ({len(found)} of {len(self.values)})"
        return f"{' and '.join(words)} ({len(found)} of {len(self.values)})"

    def draw(self, figure: Figure, plan: Plan, results: Results) -> None:
        """A panel a setting, the usable range shaded under each line; below it, where speed counts, the early ones."""
        grid = figure.subplots(1 + self.speed, len(self.settings), sharex=True, sharey="row", squeeze=False)
        for column, (setting, runs) in enumerate(zip(self.settings, self.points(plan), strict=True)):
            for row, key in enumerate(("accuracy", "early")[: 1 + self.speed]):
                axes, floor = grid[row][column], None if row else self.floor(runs, plan, results)
                for side, norm in zip(_sides(runs), (True, False), strict=True):
                    plots.accuracies(axes, self.values, [results[run][key] for run in side], norm, floor)
                if floor is not None:
                    axes.axhline(floor, color="0.3", linewidth=0.8, label=f"{NEAR:g} points below the best")
                    axes.set_title(setting.name)
                axes.axhline(plan.chance, color="0.5", linestyle=":", label="chance")
                axes.set_xscale("log")
                if self.harder:
                    plots.ticks(axes.xaxis, self.values)
                axes.grid(alpha=0.3)
            grid[-1][column].set_xlabel(self.label)
        for row, steps in zip(grid, (plan.steps, max(1, plan.steps // EARLY)), strict=False):
            row[0].set_ylabel(f"test accuracy (%) after {steps:,} steps")
        plots.legend(figure, grid.ravel())


def _sides(points: list[Run]) -> tuple[list[Run], list[Run]]:
    """With, and without."""
    return points, [run.twin for run in points]


def _best(runs: list[Run], key: str, results: Results) -> float | None:
    """None where all diverged."""
    return max((results[run][key] for run in runs if results[run][key] is not None), default=None)


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.1f}"


def _cell(result: Result) -> str:
    return f"diverged at {result['diverged']}" if result["diverged"] else f"{result['accuracy']:.1f}"


def _run(activation: str, init: str | float, rate: float) -> Run:
    return Run("accuracy", activation, init, rate, True, 0, 0)


RATE = Sweep(
    "rate",
    "Training is faster, and a much wider range of learning rates works.",
    "rate",
    "learning rate",
    DECADES,
    (
        Setting("sigmoid, Xavier", _run("sigmoid", "xavier", 0)),
        Setting("sigmoid, std 0.03", _run("sigmoid", 0.03, 0)),
        Setting("ReLU, He", _run("relu", "he", 0)),
    ),
    speed=True,
)
INIT = Sweep(
    "init",
    "A much wider range of initial weights works.",
    "init",
    "initial standard deviation",
    DECADES,
    (Setting("sigmoid, rate 0.1", _run("sigmoid", 0, 0.1)), Setting("ReLU, rate 0.1", _run("relu", 0, 0.1))),
)
DEPTH = Sweep(
    "depth",
    "Deeper networks train.",
    "hidden",
    "hidden layers",
    (2, 3, 5, 10, 20),
    (
        Setting("sigmoid, Xavier, rate 0.1", _run("sigmoid", "xavier", 0.1)),
        Setting("ReLU, He, rate 0.1", _run("relu", "he", 0.1)),
        Setting("ReLU, He, rate 1", _run("relu", "he", 1.0)),
    ),
    network="hidden layers of 100",
    harder=True,
)
