"""The claim that the noise of a batch's statistics regularizes, slightly, and less so with larger batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastbn.cli import plots
from fastbn.cli.claims.runs import Finding, Plan, Report, Result, Results, Run, build, descend, hidden_inputs
from fastbn.cli.train import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (4, 8, 16, 32, 64, 128, 256, 512)  # a batch of two is normalized to -1 and 1, whatever its images
REPEATS = 200  # random companions
SEEDS = 3
BATCH = 512  # of the gradient, where the groups differ
IMAGES = 5000  # few enough that a network learns them by heart
SLOPE, NEAR_SLOPE = -0.5, 0.1
CERTAIN = 0.95  # of a difference between means over seeds, by Student's t


def measure_noise(run: Run, inputs: training.Inputs, report: Report) -> Result:
    """Standard deviation of one image's normalized values over random companions, by batch size and layer."""
    network = build(run, inputs)
    diverged = descend(run, network, inputs, report)
    rng = np.random.default_rng((run.seed, 4))
    image, noise = inputs.test[:1], []
    for size in SIZES:
        values = []  # (repeats, layers, units)
        for _ in range(REPEATS):
            # independent ones, also where a batch is a good part of all images
            companions = rng.integers(len(inputs.data.images), size=size - 1)
            x = np.concatenate([image, inputs[companions]])
            values.append([normalized[0] for _, normalized in hidden_inputs(network, x)])
        noise.append(np.std(values, axis=0).mean(axis=1).tolist())
    return {"diverged": diverged, "sizes": list(SIZES), "noise": noise}


def measure_gap(run: Run, inputs: training.Inputs, report: Report) -> Result:
    """Accuracy and loss on the training and the test images, both by running averages, after training on few."""
    data = inputs.data
    chosen = np.random.default_rng((run.seed, 3)).permutation(len(data.images))[: run.images]
    few = training.Inputs(data._replace(images=data.images[chosen], labels=data.labels[chosen]))
    network = build(run, few)
    diverged = descend(run, network, few, report)
    found: Result = {"diverged": diverged}
    if diverged is None:
        for side, x, labels in (("train", few[:], few.data.labels), ("test", few.test, data.test_labels)):
            probabilities = network.predict(x)
            true = np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(np.float32).tiny)
            found[side] = 100 * float((probabilities.argmax(axis=1) == labels).mean())
            found[f"{side}_loss"] = -float(np.log(true).mean())
        found["gap"] = found["train"] - found["test"]
    return found


def slope(sizes: Sequence[float], noise: Sequence[float]) -> float:
    """Of the line through the logarithms; images that are all the same make no noise."""
    positive = np.maximum(noise, np.finfo(np.float32).tiny)
    return float(np.polyfit(np.log(sizes), np.log(positive), 1)[0])


def mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error), the error infinite of less than two values."""
    n = len(values)
    if n == 0:
        return math.nan, math.inf
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf


def certain(differences: Sequence[float]) -> bool:
    """Whether their mean is not 0, by Student's t, both sides."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return False
    difference, error = mean(differences)
    return abs(difference) > float(t.ppf((1 + CERTAIN) / 2, n - 1)) * error


class Noise:
    """The claim."""

    name = "noise"
    network = "three hidden layers of 100; left sigmoid, Xavier, right ReLU, He; rate 0.1"
    sentence = "The noise of a mini-batch's statistics regularizes slightly, and less so with larger batches."

    def single(self, plan: Plan) -> Run:
        """The run whose statistics' noise is measured."""
        return Run("noise", "sigmoid", "xavier", 0.1, True, plan.steps, plan.seed)

    def groups(self, plan: Plan) -> dict[int | None, list[Run]]:
        """Runs by the size of the group that normalizes, None without normalization: one for each seed."""
        images = min(IMAGES, plan.images // 2)
        batch = min(BATCH, 2 ** int(math.log2(images / 2)))
        sizes = sorted({max(4, batch // part) for part in (64, 16, 4, 1)})
        run = Run("gap", "relu", "he", 0.1, True, max(1, plan.steps // 2), 0, batch=batch, images=images)
        return {
            size: [run._replace(seed=plan.seed + i, batch_norm=size is not None, group=size) for i in range(SEEDS)]
            for size in (*sizes, None)
        }

    def runs(self, plan: Plan) -> list[Run]:
        """One for the noise itself, some for its effect."""
        return [self.single(plan), *(run for runs in self.groups(plan).values() for run in runs)]

    def conclude(self, plan: Plan, results: Results) -> Finding:
        """Slope of the noise, and the gap between training and test by group."""
        noise, groups = results[self.single(plan)], self.groups(plan)
        sizes, first = noise["sizes"], [layers[0] for layers in noise["noise"]]
        known, found = dict(zip(sizes, first, strict=True)), slope(sizes, first)
        rows = [
            (
                "none at all" if size is None else str(size),
                f"{known[size]:.3f}" if size in known else "",
                *_cells(runs, results),
            )
            for size, runs in groups.items()
        ]
        gaps = {size: mean(_of("gap", runs, results))[0] for size, runs in groups.items()}
        tests = [found for runs in groups.values() for found in [mean(_of("test", runs, results))[0]] if found == found]
        given = [size for size in groups if size is not None]
        small, large = given[0], given[-1]
        to_large, to_none = ([b - a for a, b in self._pairs(groups, small, other, results)] for other in (large, None))
        less = small < large and certain(to_large)
        no_less = [str(size) for size in given if gaps[size] >= gaps[None]]  # nothing is, of a NaN
        as_said = abs(found - SLOPE) <= NEAR_SLOPE
        outcome = "undecided"
        if less and certain(to_none):
            outcome = "holds" if as_said and not no_less else "holds in part"
            if mean(to_large)[0] < 0 or mean(to_none)[0] < 0:
                outcome = "does not hold"
        difference, error = mean(to_large)
        verdict = [
            f"The noise falls from {first[0]:.2f} at batches of {sizes[0]} to {first[-1]:.3f} at {sizes[-1]}, with a "
            f"slope of {found:.2f} in the logarithms (-1/2 where images are independent).",
            f"Groups of {small} leave a gap of {_shown(gaps[small])} points between training and test, the whole "
            f"batch of {large} one of {_shown(gaps[large])}: the difference of {_shown(difference)} +- "
            f"{_shown(error)} points is {'certain' if less else 'not certain'} at {100 * CERTAIN:.0f} % over {SEEDS} "
            "seeds.",
            f"Without normalization the gap is {_shown(gaps[None])}"
            + (f": groups of {_listed(no_less)} do not regularize." if no_less else "."),
            f"A smaller gap is not yet a better network: with groups of {small} the training accuracy is "
            f"{_shown(mean(_of('train', groups[small], results))[0])} % (without normalization "
            f"{_shown(mean(_of('train', groups[None], results))[0])}), and the test accuracies lie between "
            f"{_shown(min(tests, default=math.nan))} and {_shown(max(tests, default=math.nan))} %.",
        ]
        run = groups[large][0]
        done = (
            f"Noise: a network of sigmoids (Xavier, rate 0.1, {plan.steps:,} steps); the normalized values of one "
            f"test image in {REPEATS} batches of random companions: their standard deviation, mean over the units. "
            "Effect: a network of ReLU (He, rate 0.1), which learns its images by heart with and without; "
            f"{run.steps:,} steps of {run.batch} out of {run.images:,} training images. The batch whose gradient is "
            f"taken stays, its statistics are those of groups within it; {SEEDS} seeds, +- their standard error; "
            "accuracies by the running averages."
        )
        rule = (
            "The claim holds where the gap of the smallest groups is below that of the whole batch and that without "
            f"normalization (certain at {100 * CERTAIN:.0f} % by Student's t), no group's gap is above the latter, "
            f"and the slope is within {NEAR_SLOPE:g} of -1/2; in part without the last two."
        )
        headers = (
            "normalized by groups of",
            "noise in layer 1",
            "training (%)",
            "test (%)",
            "gap (points)",
            "test loss",
        )
        return Finding(done, rule, headers, rows, outcome, verdict)

    def _pairs(
        self, groups: dict[int | None, list[Run]], size: int, other: int | None, results: Results
    ) -> list[list[float]]:
        """Gaps of two groups by seed, where neither diverged."""
        both = ([_of("gap", [run], results) for run in pair] for pair in zip(groups[size], groups[other], strict=True))
        return [[a[0], b[0]] for a, b in both if a and b]

    def draw(self, figure: Figure, plan: Plan, results: Results) -> None:
        """Noise over batch size in logarithms, with its -1/2 line; gap over group size, with its standard errors."""
        noise, groups = results[self.single(plan)], self.groups(plan)
        left, right = figure.subplots(1, 2)
        sizes = np.asarray(noise["sizes"], float)
        for i, values in enumerate(zip(*noise["noise"], strict=True)):
            label = f"hidden layer {i + 1}, slope {slope(noise['sizes'], values):.2f}"
            left.loglog(sizes, values, label=label, **plots.THREE[i])
        start = noise["noise"][0][0] * 0.8  # below the lines, so that it is seen
        left.loglog(sizes, start * (sizes / sizes[0]) ** SLOPE, color="0.4", linestyle=":", label="slope -1/2")
        plots.ticks(left.xaxis, noise["sizes"])
        plots.ticks(left.yaxis, plots.round_numbers(*left.get_ylim()))
        left.set(xlabel="images in the batch", ylabel="standard deviation", title="normalized values of one image")
        gaps = {size: mean(_of("gap", runs, results)) for size, runs in groups.items()}
        plain, error = gaps.pop(None)
        shown = [size for size in gaps if size is not None]
        values, errors = zip(*gaps.values(), strict=True)
        right.errorbar(
            shown,
            values,
            np.nan_to_num(errors, posinf=0),
            capsize=3,
            label=f"{plots.NAMES[True]}, +- standard error",
            **plots.STYLES[True],
        )
        right.axhline(plain, label=plots.NAMES[False], color=plots.STYLES[False]["color"], linestyle="--")
        if math.isfinite(error):
            right.axhspan(plain - error, plain + error, color=plots.STYLES[False]["color"], alpha=0.15, linewidth=0)
        right.set_xscale("log")
        plots.ticks(right.xaxis, shown)
        run = groups[None][0]
        right.set(
            xlabel="images whose statistics normalize",
            ylabel="training minus test accuracy (points)",
            title=f"gap after {run.steps:,} steps of {run.batch} out of {run.images:,}",
        )
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend()


def _of(key: str, runs: Sequence[Run], results: Results) -> list[float]:
    """What the runs say that did not diverge."""
    return [results[run][key] for run in runs if results[run]["diverged"] is None]


def _shown(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"


def _cells(runs: Sequence[Run], results: Results) -> tuple[str, ...]:
    """Training, test, gap and test loss in the table."""
    train, test, gap, loss = (mean(_of(key, runs, results)) for key in ("train", "test", "gap", "test_loss"))
    shown = f"{loss[0]:.2f}" if math.isfinite(loss[0]) else "-"
    return _shown(train[0]), _shown(test[0]), f"{_shown(gap[0])} +- {_shown(gap[1])}", shown


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
