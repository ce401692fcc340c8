"""The claim that a network can be used without a batch: by running averages, by the whole set's statistics, alone."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np

from fastbn.batchnorm import BatchNorm
from fastbn.cli import plots
from fastbn.cli.claims.runs import Finding, Plan, Report, Result, Results, Run, accuracy, build, descend
from fastbn.cli.train import network as nets
from fastbn.cli.train import training
from fastbn.cli.train.data import Labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOMENTS = (20, 100, 500, 2000)  # steps after which the two ways are compared
SIZES = (2, 8, 60, 1000)  # batches normalized by their own statistics
ALONE = 1000  # test images that go through one at a time
CHUNK = 1000
NEAR = 1.0  # points


def looks(steps: int) -> list[int]:
    """Steps after which the two ways are compared: the last one always."""
    return sorted({step for step in MOMENTS if step < steps} | {steps})


def measure(run: Run, inputs: training.Inputs, report: Report) -> Result:
    """Accuracies by either estimate, by batches' own statistics, and what changes for an image alone."""
    network = build(run, inputs)
    compared: list[Result] = []

    def after(step: int) -> None:
        if step in looks(run.steps):
            whole = recalibrated(network, inputs)
            compared.append({"step": step, "running": accuracy(network, inputs), "whole": accuracy(whole, inputs)})

    diverged = descend(run, network, inputs, report, after)
    sizes = [size for size in SIZES if size <= len(inputs.test)]
    return {
        "diverged": diverged,
        "compared": compared,
        "own": [[size, own_statistics(network, inputs, size)] for size in sizes],
        "alone": alone(network, inputs.test[:ALONE], inputs.data.test_labels[:ALONE]),
    }


def recalibrated(network: nets.Network, inputs: training.Inputs) -> nets.Network:
    """A copy whose running statistics are those of all training images, layer by layer."""
    whole = copy.deepcopy(network)
    whole.set_training(False)
    n = len(inputs.data.images)
    x = np.concatenate([whole.first(inputs[i : i + CHUNK]) for i in range(0, n, CHUNK)])
    for layer in whole.layers[1:-1]:
        if isinstance(layer, BatchNorm):
            layer.recalibrate([x], progress=False)
        x = layer(x)
    whole.set_training(True)
    return whole


def own_statistics(network: nets.Network, inputs: training.Inputs, size: int) -> float:
    """Percent of the test images right where batches of so many random ones are normalized by their own statistics."""
    trial = copy.deepcopy(network)  # in training, which moves the running averages
    order = np.random.default_rng((0, size)).permutation(len(inputs.test))
    order = order[: len(order) // size * size].reshape(-1, size)
    right = sum(int((trial(inputs.test[i]).argmax(axis=1) == inputs.data.test_labels[i]).sum()) for i in order)
    return 100 * right / order.size


def alone(network: nets.Network, images: nets.Array, labels: Labels) -> Result:
    """Of images one at a time and together: how many have the same bits behind each normalization, and at the end."""
    network.set_training(False)
    same, x = [], images
    for layer in network.layers:
        y = layer(x)
        if isinstance(layer, BatchNorm):
            single = np.concatenate([layer(x[i : i + 1]) for i in range(len(x))])
            same.append(int((_bits(single) == _bits(y)).all(axis=1).sum()))
        x = y
    scores = np.concatenate([network(images[i : i + 1]) for i in range(len(images))])
    network.set_training(True)
    single, together = nets.softmax(scores), nets.softmax(x)
    return {
        "images": len(images),
        "normalizations": same,
        "network": int((_bits(single) == _bits(together)).all(axis=1).sum()),
        "difference": float(np.abs(single - together).max()),
        "answers": int((single.argmax(axis=1) == together.argmax(axis=1)).sum()),
        "accuracy": 100 * float((single.argmax(axis=1) == labels).mean()),
    }


def _bits(x: nets.Array) -> nets.Array:
    return np.ascontiguousarray(x).view(np.uint32)


def _of(counts: list[int], all_of_them: int) -> str:
    """How many of them, of the smallest count."""
    return f"all {all_of_them:,}" if min(counts) == all_of_them else f"{min(counts):,} of {all_of_them:,}"


class Serving:
    """The claim."""

    name = "test"
    network = "three hidden layers of 100 sigmoids, Xavier, rate 0.1"
    sentence = "At test time running averages do, so do the whole set's statistics, and an example can be served alone."

    def run(self, plan: Plan) -> Run:
        """The paper's network at a rate where it learns."""
        return Run("test", "sigmoid", "xavier", 0.1, True, plan.steps, plan.seed)

    def runs(self, plan: Plan) -> list[Run]:
        """One."""
        return [self.run(plan)]

    def conclude(self, plan: Plan, results: Results) -> Finding:
        """Compare the ways."""
        found = results[self.run(plan)]
        compared, own, single = found["compared"], found["own"], found["alone"]
        rows = [
            (f"all test images, after {c['step']:,} steps", f"{c['running']:.1f}", f"{c['whole']:.1f}", "")
            for c in compared
        ]
        rows += [(f"batches of {size:,}", "", "", f"{right:.1f}") for size, right in own]
        last, early, count = compared[-1], compared[0], single["images"]
        rows.append((f"one at a time, {count:,} of them", f"{single['accuracy']:.1f}", "", ""))
        exact = all(n == count for n in single["normalizations"])
        near = abs(last["running"] - last["whole"]) <= NEAR
        served = exact and single["answers"] == count
        outcome = "holds" if near and served else "holds in part" if near or served else "does not hold"
        verdict = [
            f"After {last['step']:,} steps the running averages give {last['running']:.1f} % and the whole set's "
            f"statistics {last['whole']:.1f} %; after {early['step']}, when the averages still remember their start, "
            f"{early['running']:.1f} and {early['whole']:.1f} %.",
            f"Test batches of {own[0][0]} normalized by their own statistics give {own[0][1]:.1f} %, of {own[-1][0]:,} "
            f"{own[-1][1]:.1f} %.",
            "One at a time: each normalization gives the bits that it gives among others for "
            f"{_of(single['normalizations'], count)} images, and {_of([single['answers']], count)} answers stay.",
            f"The bits at the network's end stay for {single['network']:,} of {count:,}: a matrix product of one row "
            f"may add in another order; probabilities differ by {single['difference']:.1e} at most.",
        ]
        done = (
            f"A network of sigmoids (Xavier, rate 0.1), looked at over {plan.steps:,} steps; test accuracy in percent. "
            f"The whole set's: the running statistics recalibrated over all {plan.images:,} training images, layer by "
            "layer. The batch's own: random batches of test images, each normalized by itself."
        )
        rule = (
            f"The claim holds where the two estimates are within {NEAR:g} point of each other at the end, every "
            "normalization gives an image alone the same bits as among others, and no answer changes; in part where "
            "one of both does."
        )
        headers = ("statistics", "running averages", "whole training set", "the batch's own")
        return Finding(done, rule, headers, rows, outcome, verdict)

    def draw(self, figure: Figure, plan: Plan, results: Results) -> None:
        """Both estimates over the steps; batches' own statistics over their size."""
        found = results[self.run(plan)]
        left, right = figure.subplots(1, 2, sharey=True)
        steps = [c["step"] for c in found["compared"]]
        for (key, name), style in zip(
            (("running", "running averages"), ("whole", "whole training set")), plots.THREE, strict=False
        ):
            left.plot(steps, [c[key] for c in found["compared"]], label=name, **style)
        left.set_xscale("log")
        plots.ticks(left.xaxis, steps)
        left.set(xlabel="training steps", ylabel="test accuracy (%)", title="two estimates of the statistics")
        sizes, accuracies = zip(*found["own"], strict=True)
        right.plot(sizes, accuracies, label="the batch's own", **plots.THREE[2])
        right.axhline(found["compared"][-1]["running"], label="running averages", color=plots.THREE[0]["color"])
        right.set_xscale("log")
        plots.ticks(right.xaxis, sizes)
        right.set(xlabel="images in the test batch", title=f"after {plan.steps:,} steps")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend()
