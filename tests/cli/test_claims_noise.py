"""The claims on a batch's statistics, their noise and what stands in for them in use: arithmetic and outcomes."""

import math
from typing import Any

import numpy as np
import pytest

from fastbn.batchnorm import BatchNorm
from fastbn.cli.claims import noise, runs, serving
from fastbn.cli.claims.runs import Result, Run
from fastbn.cli.train import training

from .test_claims_experiments import PLAN, RUN, quiet, trained
from .test_training import toy


@pytest.fixture(scope="module")
def inputs() -> training.Inputs:
    return training.Inputs(toy())


# Noise.


def test_slope_of_a_power() -> None:
    sizes = [4, 16, 64]
    assert noise.slope(sizes, [3 * size**-0.5 for size in sizes]) == pytest.approx(-0.5)


def test_a_mean_and_its_standard_error() -> None:
    assert noise.mean([1.0, 2.0, 6.0]) == pytest.approx((3, math.sqrt(7 / 3)))
    assert noise.mean([5.0]) == (5, math.inf)
    assert math.isnan(noise.mean([])[0])


def test_the_noise_is_that_of_the_companions(inputs: training.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "REPEATS", 400)
    found = noise.measure_noise(RUN._replace(measure="noise"), inputs, quiet)
    assert found["sizes"] == list(noise.SIZES) and np.shape(found["noise"]) == (8, 3)
    assert -0.55 < noise.slope(found["sizes"], [layers[0] for layers in found["noise"]]) < -0.45  # of 60 images, too
    # of the first layer against itself, drawn otherwise
    network, rng = trained(RUN, inputs), np.random.default_rng(99)
    values = []
    for _ in range(400):
        z = np.concatenate([inputs.test[:1], inputs[rng.integers(60, size=7)]]) @ network.first.weight
        values.append((z[0] - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5))
    assert found["noise"][1][0] == pytest.approx(np.std(values, axis=0).mean(), rel=0.1)


def test_the_gap_is_between_the_images_trained_on_and_the_test(inputs: training.Inputs) -> None:
    run = RUN._replace(measure="gap", images=24, batch=12, group=4)
    found = noise.measure_gap(run, inputs, quiet)
    chosen = np.random.default_rng((0, 3)).permutation(60)[:24]
    data = inputs.data
    few = training.Inputs(data._replace(images=data.images[chosen], labels=data.labels[chosen]))
    network = trained(run, few)
    right = network.predict(few[:]).argmax(axis=1) == data.labels[chosen]
    assert found["train"] == pytest.approx(100 * right.mean())
    assert (
        found["test"] == pytest.approx(runs.accuracy(network, few)) and found["gap"] == found["train"] - found["test"]
    )
    probabilities = network.predict(few.test)[np.arange(24), data.test_labels]
    assert found["test_loss"] == pytest.approx(-np.log(probabilities).mean(), rel=1e-5)


@pytest.mark.parametrize("images", [60, 673 * 2, 60_000])
def test_groups_divide_the_gradients_batch(images: int) -> None:
    made = noise.Noise().groups(PLAN._replace(images=images))
    assert list(made)[-1] is None and len(made) > 2
    for size, group in made.items():
        assert [run.seed for run in group] == [0, 1, 2] and len({run.batch for run in group}) == 1
        assert all(run.group == size and run.batch_norm == (size is not None) for run in group)
        assert group[0].batch % (size or 1) == 0 and group[0].batch * 2 <= group[0].images <= images / 2
    if images == 60_000:
        assert list(made) == [8, 32, 128, 512, None] and made[8][0].images == 5000


def gaps(small: Any, large: Any, plain: Any, power: float = -0.5) -> dict[Run, Result]:
    """Made-up results: gaps by seed of the smallest group, the largest and none, else 3.5; None diverged."""
    claim, plan = noise.Noise(), PLAN._replace(images=60_000)
    found: dict[Run, Result] = {
        claim.single(plan): {"sizes": [4, 8, 16], "noise": [[size**power, 1, 1] for size in (4, 8, 16)]}
    }
    for size, group in claim.groups(plan).items():
        given = {8: small, 512: large, None: plain}.get(size, [3.5] * 3)
        for run, gap in zip(group, given, strict=True):
            found[run] = {"diverged": 9}
            if gap is not None:
                found[run] = {"diverged": None, "train": 90, "test": 90 - gap, "test_loss": 0.5, "gap": gap}
    return found


@pytest.mark.parametrize(
    ("results", "outcome", "words"),
    [
        (gaps([1, 2, 3], [4, 5, 6.1], [7, 8, 9.1]), "holds", "difference of 3.0 +- 0.0 points is certain at 95 %"),
        (gaps([1, 2, 3], [4, 5, 6.1], [7, 8, 9.1], -0.2), "holds in part", "slope of -0.20"),
        (gaps([1, 2, 3], [4, 5, 6.1], [3, 4, 5.1]), "holds in part", "is 4.0: groups of 512 do not regularize."),
        (gaps([4, 5, 6], [1, 2, 3.1], [7, 8, 9.1]), "does not hold", "difference of -3.0"),
        (gaps([4, 5, 6], [7, 8, 9.1], [1, 2, 3.1]), "does not hold", "groups of 8, 32, 128 and 512 do not regularize"),
        (gaps([1, 2, 3], [3, 0, 4], [7, 8, 9]), "undecided", "points is not certain"),
        (gaps([1, 2, 3], [4, 5, 6.1], [3, 0, 4]), "undecided", "points is certain"),
        # of three seeds 2.9 standard errors are chance
        (gaps([0, 0, 0], [1, 1, 2.4], [7, 8, 9]), "undecided", "1.5 +- 0.5 points is not certain"),
        (gaps([0, 0, 0], [0, 0, 0], [0, 0, 0]), "undecided", "0.0 +- 0.0 points is not certain"),
        (gaps([1, None, None], [4, 5, 6], [7, 8, 9]), "undecided", "+- - points is not certain"),
        (gaps([None] * 3, [4, 5, 6], [7, 8, 9]), "undecided", "Groups of 8 leave a gap of - points"),
        (gaps([1, 2, 3], [4, 5, 6.1], [None] * 3), "undecided", "Without normalization the gap is -."),
    ],
)
def test_the_outcome_of_noise(results: dict[Run, Result], outcome: str, words: str) -> None:
    found = noise.Noise().conclude(PLAN._replace(images=60_000), results)
    text = " ".join(found.verdict)
    assert found.outcome == outcome and words in text and "nan" not in text and "inf" not in text
    assert [row[0] for row in found.rows] == ["8", "32", "128", "512", "none at all"]
    assert found.rows[0][1] == f"{results[noise.Noise().single(PLAN)]['noise'][1][0]:.3f}"
    assert not found.rows[3][1]
    assert all(len(row) == len(found.headers) == 6 for row in found.rows)


# Test time.


@pytest.mark.parametrize(("steps", "want"), [(2000, [20, 100, 500, 2000]), (400, [20, 100, 400]), (20, [20]), (1, [1])])
def test_when_the_estimates_are_compared(steps: int, want: list[int]) -> None:
    assert serving.looks(steps) == want


def test_the_whole_sets_statistics(inputs: training.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "CHUNK", 7)
    network = trained(RUN, inputs)
    before = [norm.state_dict() for norm in network.norms]
    whole = serving.recalibrated(network, inputs)
    x = inputs[:].astype(np.float64)
    for i, (norm, was) in enumerate(zip(whole.norms, before, strict=True)):
        z = x @ whole.layers[3 * i].weight
        np.testing.assert_allclose(norm.running_mean, z.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(norm.running_var, z.var(axis=0, ddof=1), rtol=1e-4)
        x = norm.gamma * (z - norm.running_mean) / np.sqrt(norm.running_var + norm.eps) + norm.beta
        x = 1 / (1 + np.exp(-x))
        np.testing.assert_array_equal(network.norms[i].running_mean, was["running_mean"])
    assert all(norm.training for norm in whole.norms)


def test_batches_by_their_own_statistics(inputs: training.Inputs) -> None:
    network = trained(RUN, inputs)
    before = network.norms[0].running_mean.copy()
    x = inputs.test
    for given, _ in runs.hidden_inputs(network, x):
        x = 1 / (1 + np.exp(-given))
    last = network.layers[-1]
    right = (x @ last.weight + last.bias).argmax(axis=1) == inputs.data.test_labels
    assert serving.own_statistics(network, inputs, 24) == pytest.approx(100 * right.mean())
    assert 0 <= serving.own_statistics(network, inputs, 7) <= 100
    np.testing.assert_array_equal(network.norms[0].running_mean, before)


def test_an_image_alone(inputs: training.Inputs) -> None:
    network = trained(RUN, inputs)
    found = serving.alone(network, inputs.test, inputs.data.test_labels)
    assert found["images"] == 24 and found["normalizations"] == [24] * 3 and found["answers"] == 24
    assert 0 <= found["network"] <= 24 and found["difference"] < 1e-5
    assert found["accuracy"] == pytest.approx(runs.accuracy(network, inputs))
    assert all(norm.training for norm in network.norms)


class _Company(BatchNorm):
    """One whose answer depends on the other images, in evaluation too."""

    def __call__(self, x: np.ndarray) -> np.ndarray:  # type: ignore[override]
        return x - x.mean(axis=0)


def test_a_normalization_that_looks_at_the_company_is_noticed(inputs: training.Inputs) -> None:
    network = trained(RUN, inputs)
    network.layers[4] = _Company(100)
    assert serving.alone(network, inputs.test, inputs.data.test_labels)["normalizations"] == [24, 0, 24]


@pytest.mark.parametrize(
    ("running", "alone", "answers", "outcome"),
    [
        (80.0, 24, 24, "holds"),
        (81.1, 24, 24, "holds in part"),
        (78.9, 24, 24, "holds in part"),
        (80.0, 23, 24, "holds in part"),
        (80.0, 24, 23, "holds in part"),
        (70.0, 23, 24, "does not hold"),
    ],
)
def test_the_outcome_of_test(running: float, alone: int, answers: int, outcome: str) -> None:
    claim = serving.Serving()
    single = {"images": 24, "normalizations": [24, alone], "network": 3, "difference": 1e-7, "answers": answers}
    result = {
        "compared": [{"step": 5, "running": 10.0, "whole": 40.0}, {"step": 20, "running": running, "whole": 80.0}],
        "own": [[2, 30.0], [8, 70.0]],
        "alone": single | {"accuracy": 79.2},
    }
    found = claim.conclude(PLAN, {claim.run(PLAN): result})
    assert found.outcome == outcome
    bits, stay = ("all 24" if n == 24 else "23 of 24" for n in (alone, answers))
    assert found.verdict[2].endswith(f"for {bits} images, and {stay} answers stay.")
    assert "stay for 3 of 24" in found.verdict[3]
    assert found.rows == [
        ("all test images, after 5 steps", "10.0", "40.0", ""),
        ("all test images, after 20 steps", f"{running:.1f}", "80.0", ""),
        ("batches of 2", "", "", "30.0"),
        ("batches of 8", "", "", "70.0"),
        ("one at a time, 24 of them", "79.2", "", ""),
    ]
