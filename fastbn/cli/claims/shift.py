"""The claim that hidden layers see a steadier input while the layers before them change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastbn.cli import plots
from fastbn.cli.claims.runs import Finding, Plan, Report, Result, Results, Run, accuracy, build, descend, hidden_inputs
from fastbn.cli.train import training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = 1000  # of the test, the same at every check
CHECKS = 40
PERCENTILES = (15, 50, 85)  # as in Ioffe & Szegedy (2015), Figure 1 (b, c)
SETTLED = 10  # the first of so many parts of the training is left out of "afterwards"


def measure(run: Run, inputs: training.Inputs, report: Report) -> Result:
    """Bands of every unit's input over the training, and of each layer's most typical unit the band itself."""
    network, images = build(run, inputs), inputs.test[:IMAGES]
    steps = training.checked_steps(run.steps, CHECKS)
    bands: list[list[np.ndarray]] = []

    def after(step: int) -> None:
        if step in steps:
            bands.append([np.percentile(x, PERCENTILES, axis=0) for x, _ in hidden_inputs(network, images)])

    diverged = descend(run, network, inputs, report, after)
    seen = np.asarray(bands)  # (checks, layers, percentiles, units)
    begun = [step >= run.steps / SETTLED for step in steps[: len(seen)]]
    return {
        "accuracy": None if diverged else accuracy(network, inputs),
        "diverged": diverged,
        "steps": steps[: len(seen)],
        "layers": [_layer(seen[:, i], np.asarray(begun)) for i in range(run.hidden)],
    }


def _layer(bands: np.ndarray, begun: np.ndarray) -> Result:
    """Numbers of one layer, medians over its units: bands of shape (checks, percentiles, units)."""
    found: Result = {}
    for name, part in (("all", bands), ("afterwards", bands[begun])):
        move, ratio = movement(part)
        span = float(np.median(np.ptp(part[:, 1], axis=0)))
        found[name] = {"move": float(np.median(move)), "ratio": float(np.median(ratio)), "span": span}
    move, ratio = movement(bands)
    # the unit whose two numbers stand nearest the middle of their ranks
    ranks = np.argsort(np.argsort([move, ratio], axis=1), axis=1)
    unit = int(np.abs(ranks - (len(move) - 1) / 2).sum(axis=0).argmin())
    found["unit"], found["band"] = unit, bands[:, :, unit].round(4).T.tolist()
    return found


def movement(bands: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each unit: range of the median in units of the band's median width, and widest over narrowest width."""
    low, middle, high = bands[:, 0], bands[:, 1], bands[:, 2]
    width = np.maximum(high - low, np.finfo(np.float32).tiny)
    return np.ptp(middle, axis=0) / np.median(width, axis=0), width.max(axis=0) / width.min(axis=0)


class Shift:
    """The claim."""

    name = "shift"
    network = "three hidden layers of 100 sigmoids, Xavier, rate 0.1"
    sentence = "Hidden layers see a steadier input while the layers before them change."

    def runs(self, plan: Plan) -> list[Run]:
        """The paper's network at a rate where both learn."""
        run = Run("shift", "sigmoid", "xavier", 0.1, True, plan.steps, plan.seed)
        return [run, run.twin]

    def conclude(self, plan: Plan, results: Results) -> Finding:
        """Compare the bands of each layer."""
        ours, twin = (results[run] for run in self.runs(plan))
        layers = list(zip(ours["layers"], twin["layers"], strict=True))
        keys = [(key, part) for key in ("move", "ratio") for part in ("all", "afterwards")]
        rows = [
            (f"{i}, {side}", *(f"{layer[part][key]:.2f}" for key, part in keys))
            for i, pair in enumerate(layers, start=1)
            for side, layer in zip(("with", "without"), pair, strict=True)
        ]
        steadier = [sum(a[part][key] < b[part][key] for a, b in layers) for key, part in keys]
        moves, late_moves, ratios, late_ratios = steadier
        share = sum(steadier) / (len(keys) * len(layers))
        outcome = "holds" if share == 1 else "holds in part" if share > 0.5 else "does not hold"
        last, last_twin = (side["all"] for side in layers[-1])
        verdict = [
            f"In the last hidden layer the median of a unit's input moves by {last['move']:.2f} of its band's width "
            f"with and {last_twin['move']:.2f} without (by {last['span']:.2f} and {last_twin['span']:.2f} as it "
            f"stands); the band is at its widest {last['ratio']:.1f} and {last_twin['ratio']:.1f} times as wide as at "
            "its narrowest.",
            f"Of {len(layers)} layers {moves} have the steadier median and {ratios} the steadier width with batch "
            f"normalization over the whole training, {late_moves} and {late_ratios} after its first tenth.",
            "Part of it holds by construction: gamma and beta are all that can move the mean and the spread of a "
            "normalized input.",
            "Steadier is not the same as better: the networks end at "
            f"{_percent(ours)} with and {_percent(twin)} without.",
        ]
        done = (
            f"The inputs of every hidden sigmoid (Xavier, rate 0.1) for the same {min(IMAGES, plan.test_images):,} "
            f"test images, as one batch, looked at {len(ours['steps'])} times over {plan.steps:,} steps: the 15th, "
            "50th and 85th percentile of each unit, the band between the first and the last its spread. Of each "
            "unit: how far the 50th moves, in units of the band's median width, and the widest band over the "
            "narrowest; over the whole training, and without its first tenth. The table has each layer's median over "
            "its units, the picture the unit nearest that."
        )
        rule = (
            "The claim holds where all four numbers are smaller with batch normalization in every layer, in part where "
            "more than half of them are."
        )
        late = "without the first tenth"
        headers = ("layer", "median moves", late, "widest / narrowest", late)
        return Finding(done, rule, headers, rows, outcome, verdict)

    def draw(self, figure: Figure, plan: Plan, results: Results) -> None:
        """Bands of typical units: a row a layer, with and without side by side, on one scale."""
        pair = [results[run] for run in self.runs(plan)]
        grid = figure.subplots(len(pair[0]["layers"]), 2, sharex=True, sharey=True, squeeze=False)
        for column, (result, norm) in enumerate(zip(pair, (True, False), strict=True)):
            for row, layer in enumerate(result["layers"]):
                axes, (low, middle, high) = grid[row][column], layer["band"]
                plots.band(axes, result["steps"], low, middle, high, norm)
                title = f"hidden layer {row + 1}, unit {layer['unit']}, {plots.NAMES[norm]}"
                axes.set_title(title, fontsize="medium")
                axes.grid(alpha=0.3)
                axes.margins(x=0)
            grid[-1][column].set_xlabel("training steps")
            grid[0][column].legend(loc="upper left")
        for row in grid:
            row[0].set_ylabel("input of a sigmoid")


def _percent(result: Result) -> str:
    return "divergence" if result["accuracy"] is None else f"{result['accuracy']:.1f} %"
