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
    whole: bool = False  # values are whole numbers, each of which the axis names
    speed: bool = False  # the claim is of speed, too

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

    def usable(self, points: list[Run], results: Results) -> list[list[float]]:
        """Values that come near the best of the setting, with and without."""
        floor = self.floor(points, results)
        return [
            [
                value
                for value, run in zip(self.values, side, strict=True)
                if results[run]["accuracy"] is not None and results[run]["accuracy"] >= floor
            ]
            for side in _sides(points)
        ]

    def floor(self, points: list[Run], results: Results) -> float:
        """The accuracy that a run of this setting must reach."""
        return max(_best(side, "accuracy", results) for side in _sides(points)) - NEAR

    def conclude(self, plan: Plan, results: Results) -> Finding:
        """Count the values that train."""
        points, count = self.points(plan), len(self.values)
        rows = [
            (f"{value:g}", *(_cell(results[run]) for runs in points for run in (runs[i], runs[i].twin)))
            for i, value in enumerate(self.values)
        ]
        usable = [self.usable(runs, results) for runs in points]
        bests, earlies = (
            [[_best(side, key, results) for side in _sides(runs)] for runs in points] for key in ("accuracy", "early")
        )
        early = max(1, plan.steps // EARLY)
        for what, pairs in (("best", bests), (f"best after {early:,} steps", earlies)):
            rows.append((what, *(f"{best:.1f}" if best else "-" for pair in pairs for best in pair)))
        rows.append((f"within {NEAR:g} points", *(f"{len(found)} of {count}" for pair in usable for found in pair)))

        more, fewer = (sum(sign * (len(a) - len(b)) > 0 for a, b in usable) for sign in (1, -1))
        faster = sum(a > b for a, b in earlies)
        every = more == len(points) and (faster == len(points) or not self.speed)
        outcome = "holds" if every else "holds in part" if more > fewer else "does not hold"
        texts = [
            f"{setting.name}: {_values(a)} with, {_values(b)} without"
            for setting, (a, b) in zip(self.settings, usable, strict=True)
        ]
        verdict = f"Within {NEAR:g} points of the best of both come: {'; '.join(texts)}."
        if same := [s.name for s, (a, b) in zip(self.settings, usable, strict=True) if abs(len(a) - len(b)) <= 1]:
            verdict += f" Little or no difference there: {'; '.join(same)}."
        if self.speed:
            ahead = "; ".join(
                f"{s.name}: {a:.1f} and {b:.1f} %" for s, (a, b) in zip(self.settings, earlies, strict=True)
            )
            verdict += f" After {early:,} steps the best with and without are at: {ahead}."
        final, plain = (max(side) for side in zip(*bests, strict=True))
        verdict += f" At the best of all these settings a network gets {final:.1f} % with and {plain:.1f} % without"
        if self.speed and abs(final - plain) < SAME:
            verdict += ": what is gained is range and speed, not accuracy"
        verdict += "."
        done = (
            f"{self.label.capitalize()}: {count} values from {min(self.values):g} to {max(self.values):g}, each with "
            f"and without batch normalization from the same weights and batches; accuracy on {plan.test_images:,} "
            "test images."
        )
        headers = (self.label, *(f"{s.name}, {side}" for s in self.settings for side in ("with", "without")))
        return Finding(done, headers, rows, outcome, verdict)

    def draw(self, figure: Figure, plan: Plan, results: Results) -> None:
        """A panel a setting, the usable range shaded under each line."""
        all_axes = figure.subplots(1, len(self.settings), sharey=True, squeeze=False)[0]
        for axes, setting, runs in zip(all_axes, self.settings, self.points(plan), strict=True):
            floor = self.floor(runs, results)
            for side, norm in zip(_sides(runs), (True, False), strict=True):
                plots.accuracies(axes, self.values, [results[run]["accuracy"] for run in side], norm, floor)
            axes.axhline(floor, color="0.4", linewidth=0.8, linestyle=":")
            axes.set(xlabel=self.label, xscale="log", title=setting.name)
            if self.whole:
                plots.ticks(axes.xaxis, self.values)
            axes.grid(alpha=0.3)
        all_axes[0].set_ylabel(f"test accuracy (%) after {plan.steps:,} steps")
        plots.legend(figure, all_axes)


def _sides(points: list[Run]) -> tuple[list[Run], list[Run]]:
    """With, and without."""
    return points, [run.twin for run in points]


def _best(runs: list[Run], key: str, results: Results) -> float:
    return max(results[run][key] or 0.0 for run in runs)


def _cell(result: Result) -> str:
    return f"diverged at {result['diverged']}" if result["diverged"] else f"{result['accuracy']:.1f}"


def _values(found: list[float]) -> str:
    return f"{len(found)} ({', '.join(f'{value:g}' for value in found)})" if found else "none"


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
    whole=True,
)
