"""The experiments of the `claims` command: their arithmetic, on runs of a few steps and on made-up results."""

import math
from typing import Any

import numpy as np
import pytest

from fastbn.batchnorm import BatchNorm
from fastbn.cli.claims import CLAIMS, noise, processes, runs, serving, shift, sweeps
from fastbn.cli.claims.runs import Plan, Result, Run
from fastbn.cli.train import network as nets
from fastbn.cli.train import training

from .test_training import toy

PLAN = Plan(20, 0, 60, 24)
RUN = Run("accuracy", "sigmoid", "xavier", 0.1, True, 20, 0, batch=20)
X = np.random.default_rng(7).normal(2.0, 3.0, (24, 5)).astype(np.float32)
DY = np.random.default_rng(8).normal(size=(24, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def inputs() -> training.Inputs:
    return training.Inputs(toy())


def quiet(step: int) -> None:
    pass


def trained(run: Run, inputs: training.Inputs) -> nets.Network:
    network = runs.build(run, inputs)
    assert runs.descend(run, network, inputs, quiet) is None
    return network


# What results hold: where this changes, report.FORMAT is raised, or kept runs would be read that lack something.
KEYS = {
    "accuracy": {"accuracy", "early", "diverged"},
    "shift": {"accuracy", "diverged", "steps", "layers"},
    "noise": {"diverged", "sizes", "noise"},
    "gap": {"diverged", "train", "train_loss", "test", "test_loss", "gap"},
    "test": {"diverged", "compared", "own", "alone"},
}


@pytest.mark.parametrize("measure", processes.MEASURES)
def test_what_a_result_holds(measure: str, inputs: training.Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "REPEATS", 3)
    seen: list[int] = []
    images = 40 if measure == "gap" else None
    found = processes.measured(RUN._replace(measure=measure, steps=3, images=images), inputs, seen.append)
    assert set(found) == KEYS[measure] | {"seconds"}
    assert seen == [0, 1, 2, 3] and found["diverged"] is None and found["seconds"] >= 0


def test_every_claim_runs_what_can_be_measured() -> None:
    for claim in CLAIMS.values():
        made = claim.runs(PLAN)
        assert len(set(made)) == len(made) > 0
        assert {run.measure for run in made} <= set(processes.MEASURES)
        assert {run.steps for run in made} <= {20, 10} and {run.seed for run in made} <= {0, 1, 2}


# Groups within a batch.


def test_one_group_is_batch_normalization() -> None:
    ours, usual = runs.GhostBatchNorm(5, len(X)), BatchNorm(5)
    for layer in (ours, usual):
        layer.gamma[:], layer.beta[:] = [1, 2, 3, 4, 5], [5, 4, 3, 2, 1]
    for x, dy in ((X, DY), (DY, X)):
        np.testing.assert_array_equal(ours(x), usual(x))
        np.testing.assert_array_equal(ours.backward(dy), usual.backward(dy))
        for name in ("dgamma", "dbeta", "running_mean", "running_var"):
            np.testing.assert_allclose(getattr(ours, name), getattr(usual, name), rtol=1e-6)
    for layer in (ours, usual):
        layer.eval()
    np.testing.assert_allclose(ours(X), usual(X), rtol=1e-5)


def test_each_group_is_normalized_by_itself() -> None:
    layer, groups = runs.GhostBatchNorm(5, 8), [slice(g, None, 3) for g in range(3)]
    y, dx = layer(X), layer.backward(DY)
    dgamma, dbeta, mean, var = np.zeros(5), np.zeros(5), np.zeros(5), np.zeros(5)
    for group in groups:
        usual = BatchNorm(5)
        np.testing.assert_allclose(y[group], usual(X[group]), atol=1e-6)
        np.testing.assert_allclose(dx[group], usual.backward(DY[group]), atol=1e-6)
        dgamma, dbeta = dgamma + usual.dgamma, dbeta + usual.dbeta
        mean, var = mean + X[group].mean(axis=0) / 3, var + X[group].var(axis=0, ddof=1) / 3
    np.testing.assert_allclose(layer.dgamma, dgamma, rtol=1e-5)
    np.testing.assert_allclose(layer.dbeta, dbeta, rtol=1e-5)
    np.testing.assert_allclose(layer.running_mean, 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * var, rtol=1e-5)


@pytest.mark.parametrize(("batch_norm", "group", "kind"), [(True, None, BatchNorm), (True, 4, runs.GhostBatchNorm)])
def test_a_run_builds_its_network(inputs: training.Inputs, batch_norm: bool, group: int, kind: type) -> None:
    run = RUN._replace(hidden=4, group=group)
    network, twin = runs.build(run, inputs), runs.build(run.twin, inputs)
    assert [type(norm) for norm in network.norms] == [kind] * 4 and not twin.norms
    for a, b in zip(network.layers[::3], twin.layers[::2], strict=True):  # the matrices
        np.testing.assert_array_equal(a.weight, b.weight)


# What the layers see.


@pytest.mark.parametrize("batch_norm", [True, False])
def test_hidden_inputs(inputs: training.Inputs, batch_norm: bool) -> None:
    network = trained(RUN._replace(batch_norm=batch_norm), inputs)
    before = [norm.state_dict() for norm in network.norms]
    found, x = list(runs.hidden_inputs(network, inputs.test)), inputs.test.astype(np.float64)
    for i, (given, normalized) in enumerate(found):
        if batch_norm:
            linear, norm, _ = network.layers[3 * i : 3 * i + 3]
            z = x @ linear.weight
            want = (z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + norm.eps)
            np.testing.assert_allclose(normalized, want, atol=1e-4)
            want = norm.gamma * want + norm.beta
        else:
            linear = network.layers[2 * i]
            want = x @ linear.weight + linear.bias
            assert given is normalized
        np.testing.assert_allclose(given, want, atol=1e-4)
        x = 1 / (1 + np.exp(-want))
    assert len(found) == 3
    for norm, state in zip(network.norms, before, strict=True):
        assert norm.training
        np.testing.assert_array_equal(norm.running_mean, state["running_mean"])


# Sweeps.


def test_an_accuracy_and_an_early_one(inputs: training.Inputs) -> None:
    found = sweeps.measure(RUN, inputs, quiet)
    assert found["accuracy"] == runs.accuracy(trained(RUN, inputs), inputs)
    network = runs.build(RUN, inputs)
    short = training.batches(60, 20, 2, 0)
    training.descend(network, training.Optimizer(), 0.1, inputs, short, 20)
    assert found["early"] == runs.accuracy(network, inputs) and found["diverged"] is None


def test_a_run_that_diverges_has_no_accuracy(inputs: training.Inputs) -> None:
    found = sweeps.measure(RUN._replace(activation="relu", rate=1e30, batch_norm=False), inputs, quiet)
    assert found["accuracy"] is None and 1 < found["diverged"] < 10


def swept(claim: sweeps.Sweep, ours: list[Any], twin: list[Any]) -> dict[Run, Result]:
    """Made-up accuracies of a sweep's first setting, 70 and 60 elsewhere; None diverged at step 7."""
    found = {}
    for n, points in enumerate(claim.points(PLAN)):
        for i, run in enumerate(points):
            for given, one in zip((ours[i], twin[i]) if n == 0 else (70.0, 60.0), (run, run.twin), strict=True):
                found[one] = {"accuracy": given, "early": given and given / 2, "diverged": None if given else 7}
    return found


def test_a_sweep_counts_what_comes_near_the_best() -> None:
    claim = sweeps.DEPTH
    results = swept(claim, [90.0, 89.0, 85.0, 84.9, None], [80.0, 85.1, None, 10.0, None])
    points = claim.points(PLAN)[0]
    assert [run.hidden for run in points] == [2, 3, 5, 10, 20]
    assert claim.floor(points, results) == 85 and claim.usable(points, results) == [[2, 3, 5], [3]]
    found = claim.conclude(PLAN, results)
    assert found.headers[:3] == ("hidden layers", *(f"sigmoid, Xavier, rate 0.1, {s}" for s in ("with", "without")))
    assert [row[:3] for row in found.rows] == [
        ("2", "90.0", "80.0"),
        ("3", "89.0", "85.1"),
        ("5", "85.0", "diverged at 7"),
        ("10", "84.9", "10.0"),
        ("20", "diverged at 7", "diverged at 7"),
        ("best", "90.0", "85.1"),
        ("best after 2 steps", "45.0", "42.5"),
        ("within 5 points", "3 of 5", "1 of 5"),
    ]
    assert all(len(row) == len(found.headers) == 7 for row in found.rows)
    assert found.outcome == "holds"
    assert "sigmoid, Xavier, rate 0.1: 3 (2, 3, 5) with, 1 (3) without" in found.verdict
    assert "a network gets 90.0 % with and 85.1 % without." in found.verdict


@pytest.mark.parametrize(
    ("ours", "twin", "outcome", "words"),
    [
        ([90.0] * 9, [90.0] * 9, "holds in part", "Little or no difference there: sigmoid, rate 0.1."),
        ([10.0] * 9, [90.0] * 9, "does not hold", ": none with, 9 ("),
        ([90.0] * 9, [None] * 9, "holds", "without"),
        ([None] * 9, [None] * 9, "holds in part", ": none with, none without"),
    ],
)
def test_the_outcome_of_a_sweep_follows_the_numbers(ours: Any, twin: Any, outcome: str, words: str) -> None:
    found = sweeps.INIT.conclude(PLAN, swept(sweeps.INIT, ours, twin))
    assert found.outcome == outcome and words in found.verdict


def test_a_claim_of_speed_asks_for_speed() -> None:
    results = swept(sweeps.RATE, [90.0] * 9, [90.0] + [10.0] * 8)
    assert sweeps.RATE.conclude(PLAN, results).outcome == "holds in part"  # as far after two steps
    results[sweeps.RATE.points(PLAN)[0][4]]["early"] = 50.0
    found = sweeps.RATE.conclude(PLAN, results)
    assert found.outcome == "holds" and "sigmoid, Xavier: 50.0 and 45.0 %" in found.verdict


# Shift.


def test_movement_of_a_band() -> None:
    # two units: low, middle, high at three checks
    bands = np.array([[[0, 0], [1, 5], [2, 10]], [[0, 0], [2, 5], [4, 10]], [[0, 0], [3, 5], [8, 10]]], float)
    move, ratio = shift.movement(bands)
    np.testing.assert_allclose(move, [2 / 4, 0])
    np.testing.assert_allclose(ratio, [4, 1])


def test_the_typical_unit_stands_in_the_middle() -> None:
    rng = np.random.default_rng(1)
    moves = rng.permutation(11)
    checks = np.linspace(0, 1, 7)[:, None, None]
    bands = np.array([-1.0, 0.0, 1.0])[None, :, None] * (1 + moves * checks) + moves * checks
    found = shift._layer(bands, np.arange(7) > 0)
    assert moves[found["unit"]] == 5  # of 0 to 10
    np.testing.assert_allclose(found["band"], bands[:, :, found["unit"]].T, atol=1e-4)
    width = 2 * (1 + 5 * np.linspace(0, 1, 7))
    assert found["all"] == pytest.approx({"move": 5 / np.median(width), "ratio": width[-1] / width[0]})
    assert found["afterwards"]["ratio"] == pytest.approx(width[-1] / width[1])


def test_bands_are_those_of_the_test_images(inputs: training.Inputs) -> None:
    run = RUN._replace(measure="shift")
    found = shift.measure(run, inputs, quiet)
    assert found["steps"] == list(range(21)) and len(found["layers"]) == 3
    network = trained(run, inputs)
    for layer, (x, _) in zip(found["layers"], runs.hidden_inputs(network, inputs.test), strict=True):
        want = np.percentile(x[:, layer["unit"]], (15, 50, 85))
        np.testing.assert_allclose([part[-1] for part in layer["band"]], want, atol=1e-4)


@pytest.mark.parametrize(("swap", "outcome"), [(False, "holds"), (True, "does not hold")])
def test_the_outcome_of_shift(inputs: training.Inputs, swap: bool, outcome: str) -> None:
    def side(by: float) -> Result:
        numbers = {"move": by / 10, "ratio": by}
        layer = {"all": numbers, "afterwards": numbers, "unit": 0, "band": [[0], [0], [0]]}
        return {"accuracy": 80.0 + by, "diverged": None, "steps": [0], "layers": [layer] * 3}

    pair = [side(2.0), side(9.0)]
    found = shift.Shift().conclude(PLAN, dict(zip(shift.Shift().runs(PLAN), pair[:: -1 if swap else 1], strict=True)))
    assert found.outcome == outcome and len(found.rows) == 3 and len(found.rows[0]) == len(found.headers) == 9
    if not swap:
        assert found.rows[0] == ("1", "0.20", "0.90", "0.20", "0.90", "2.00", "9.00", "2.00", "9.00")
        assert "82.0 % with and 89.0 % without" in found.verdict


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
    assert found["sizes"] == [4, 8, 16, 32] and np.shape(found["noise"]) == (4, 3)  # of 60 images
    # of the first layer against itself, drawn otherwise
    network, rng = trained(RUN, inputs), np.random.default_rng(99)
    values = []
    for _ in range(400):
        z = np.concatenate([inputs.test[:1], inputs[rng.permutation(60)[:7]]]) @ network.first.weight
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


def gaps(small: Any, large: Any, plain: Any = 5.0, power: float = -0.5) -> dict[Run, Result]:
    """Made-up results: the gaps of the smallest and the largest group by seed, None diverged."""
    claim, plan = noise.Noise(), PLAN._replace(images=60_000)
    found: dict[Run, Result] = {
        claim.single(plan): {"sizes": [4, 8, 16], "noise": [[size**power] * 3 for size in (4, 8, 16)]}
    }
    for size, group in claim.groups(plan).items():
        given = {8: small, 512: large}.get(size, [plain] * 3)
        for run, gap in zip(group, given, strict=True):
            found[run] = {"diverged": 9}
            if gap is not None:
                found[run] = {"diverged": None, "train": 90, "test": 90 - gap, "test_loss": 0.5, "gap": gap}
    return found


@pytest.mark.parametrize(
    ("results", "outcome", "words"),
    [
        (gaps([1, 2, 3], [4, 5, 6.1]), "holds", "difference of 3.0 +- 0.0, more than 2 standard errors"),
        (gaps([1, 2, 3], [4, 5, 6.1], power=-0.2), "holds in part", "slope of -0.20"),
        (gaps([4, 5, 6.1], [1, 2, 3]), "does not hold", "difference of -3.0"),
        (gaps([1, 2, 3], [3, 0, 4]), "undecided", "not more than 2 standard errors"),
        (gaps([1, None, None], [4, 5, 6]), "undecided", "+- inf"),
        (gaps([None] * 3, [4, 5, 6]), "undecided", "+- inf"),
    ],
)
def test_the_outcome_of_noise(results: dict[Run, Result], outcome: str, words: str) -> None:
    found = noise.Noise().conclude(PLAN._replace(images=60_000), results)
    assert found.outcome == outcome and words in found.verdict
    assert [row[0] for row in found.rows] == ["8", "32", "128", "512", "none at all"]
    assert found.rows[0][1] and not found.rows[3][1] and len(found.headers) == 6


def test_groups_that_do_not_regularize_are_named() -> None:
    plan = PLAN._replace(images=60_000)
    verdict = noise.Noise().conclude(plan, gaps([1, 2, 3], [4, 5, 6.3])).verdict
    assert "Without normalization it is 5.0, so groups of 32, 128 and 512 do not regularize." in verdict
    verdict = noise.Noise().conclude(plan, gaps([1, 2, 3], [4, 5, 6.3], plain=9)).verdict
    assert "Without normalization it is 9.0, so groups of 32 and 128 do not regularize." in verdict


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
    found = serving.alone(network, inputs.test)
    assert found["images"] == 24 and found["normalizations"] == [24] * 3 and found["answers"] == 24
    assert 0 <= found["network"] <= 24 and found["difference"] < 1e-5
    assert all(norm.training for norm in network.norms)


class _Company(BatchNorm):
    """One whose answer depends on the other images, in evaluation too."""

    def __call__(self, x: np.ndarray) -> np.ndarray:  # type: ignore[override]
        return x - x.mean(axis=0)


def test_a_normalization_that_looks_at_the_company_is_noticed(inputs: training.Inputs) -> None:
    network = trained(RUN, inputs)
    network.layers[4] = _Company(100)
    assert serving.alone(network, inputs.test)["normalizations"] == [24, 0, 24]


@pytest.mark.parametrize(
    ("running", "alone", "outcome"),
    [(80.0, 24, "holds"), (70.0, 24, "holds in part"), (80.0, 23, "holds in part"), (70.0, 23, "does not hold")],
)
def test_the_outcome_of_test(running: float, alone: int, outcome: str) -> None:
    claim = serving.Serving()
    result = {
        "compared": [{"step": 5, "running": 10.0, "whole": 40.0}, {"step": 20, "running": running, "whole": 80.0}],
        "own": [[2, 30.0], [8, 70.0]],
        "alone": {"images": 24, "normalizations": [24, alone], "network": 3, "difference": 1e-7, "answers": 24},
    }
    found = claim.conclude(PLAN, {claim.run(PLAN): result})
    assert found.outcome == outcome and "bits for 24, " in found.verdict and "the whole network for 3:" in found.verdict
    assert found.rows[0] == ("running averages, whole set after 5 steps", "10.0", "40.0")
    assert found.rows[-1] == ("a test batch's own, batches of 8", "70.0", "")
