"""The experiments of the `claims` command: their arithmetic, on runs of a few steps and on made-up results."""

from typing import Any

import numpy as np
import pytest

from fastbn.batchnorm import BatchNorm
from fastbn.cli.claims import CLAIMS, noise, processes, runs, shift, sweeps
from fastbn.cli.claims.runs import Plan, Result, Run
from fastbn.cli.train import network as nets
from fastbn.cli.train import training

from .test_training import toy

PLAN = Plan(20, 0, 60, 24, 100 / 3)
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


def followed(run: Run, inputs: training.Inputs, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """Weights at the start, batches and images of a run."""
    seen: list[Any] = []
    real = training.descend

    def spy(network: nets.Network, optimizer: Any, rate: float, given: training.Inputs, chosen: Any, *rest: Any) -> Any:
        batches = list(chosen)
        weights = [layer.weight.copy() for layer in network.layers if isinstance(layer, nets.Linear)]
        seen.append((np.concatenate([w.ravel() for w in weights]), np.array(batches), given.data.images))
        return real(network, optimizer, rate, given, iter(batches), *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "descend", spy)
        processes.measured(run, inputs, quiet)
    return seen[0]


@pytest.mark.parametrize("measure", ["accuracy", "shift", "gap"])
def test_with_and_without_differ_in_nothing_else(
    measure: str, inputs: training.Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RUN._replace(measure=measure, steps=3, images=40 if measure == "gap" else None)
    ours, twin, other = (followed(one, inputs, monkeypatch) for one in (run, run.twin, run._replace(seed=1)))
    for a, b in zip(ours, twin, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (ours[0] != other[0]).all() and (ours[1] != other[1]).any()
    assert (ours[2] != other[2]).any() == (measure == "gap")


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
    assert claim.floor(points, PLAN, results) == 85 and claim.usable(points, PLAN, results) == [[2, 3, 5], [3]]
    found = claim.conclude(PLAN, results)
    assert found.headers[:3] == ("hidden layers", *(f"sigmoid, Xavier, rate 0.1, {s}" for s in ("with", "without")))
    assert [row[:3] for row in found.rows] == [
        ("2", "90.0", "80.0"),
        ("3", "89.0", "85.1"),
        ("5", "85.0", "diverged at 7"),
        ("10", "84.9", "10.0"),
        ("20", "diverged at 7", "diverged at 7"),
        ("the best", "90.0", "85.1"),
        ("within 5 points", "3 of 5", "1 of 5"),
    ]
    assert all(len(row) == len(found.headers) == 7 for row in found.rows)
    # one setting passes, in the others 70 is more than 5 points above 60, and so without not even the easiest trains
    assert found.outcome == "holds in part"
    assert found.verdict[0] == "sigmoid, Xavier, rate 0.1: 2 to 5 (3 of 5) with, 3 (1 of 5) without."
    assert found.verdict[1].endswith(
        "none without, not even the easiest: that is the rate's doing and says nothing of depth."
    )
    assert found.verdict[-1] == "At the best of all settings a network gets 90.0 % with and 85.1 % without."


@pytest.mark.parametrize(
    ("ours", "twin", "outcome", "words"),
    [
        ([90.0] * 9, [90.0] * 9, "holds in part", "0.001 to 10 (9 of 9) without, little or no difference."),
        ([90.0] * 9, [90.0] * 8 + [10.0], "holds in part", "0.001 to 3 (8 of 9) without, little or no difference."),
        ([90.0] * 9, [90.0] * 7 + [10.0] * 2, "holds", "0.001 to 1 (7 of 9) without."),
        ([90.0] * 9, [90.0, 10.0, 90.0] + [10.0] * 6, "holds", "0.001 and 0.01 (2 of 9) without."),
        ([40.0] * 9, [90.0] * 9, "holds in part", "none with, 0.001 to 10 (9 of 9) without."),
        ([90.0] * 9, [None] * 9, "holds", "none without."),
        ([None] * 9, [None] * 9, "holds in part", "none with, none without, little or no difference."),
        ([34.0] * 9, [34.0] * 9, "holds in part", "none with, none without, little or no difference."),  # chance
    ],
)
def test_the_outcome_of_a_sweep_follows_the_numbers(ours: Any, twin: Any, outcome: str, words: str) -> None:
    """The second of its two settings passes."""
    found = sweeps.INIT.conclude(PLAN, swept(sweeps.INIT, ours, twin))
    assert found.outcome == outcome and found.verdict[0].endswith(words)


@pytest.mark.parametrize(("accuracy", "outcome"), [(None, "undecided"), (34.0, "undecided"), (100.0, "does not hold")])
def test_a_sweep_that_shows_nothing(accuracy: Any, outcome: str) -> None:
    results = {
        run: {"accuracy": accuracy, "early": accuracy, "diverged": None if accuracy else 7}
        for run in sweeps.RATE.runs(PLAN)
    }
    found = sweeps.RATE.conclude(PLAN, results)
    assert found.outcome == outcome and "what is gained" not in " ".join(found.verdict)
    assert found.verdict[-1].startswith("Nothing was learned") == (outcome == "undecided")


def test_a_claim_of_speed_asks_for_speed() -> None:
    results = swept(sweeps.RATE, [90.0] * 9, [90.0] + [10.0] * 8)
    first = sweeps.RATE.points(PLAN)[0][4]
    for early, outcome in ((46.0, "holds in part"), (46.1, "holds")):  # 45 without
        results[first]["early"] = early
        found = sweeps.RATE.conclude(PLAN, results)
        assert found.outcome == outcome
        assert f"after 2 steps the best are at {early:.1f} and 45.0 %." in found.verdict[0]
    assert found.verdict[-1].endswith("90.0 % without: what is gained is range and speed, not accuracy.")


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
    want = {"move": 5 / np.median(width), "ratio": width[-1] / width[0], "span": 5}
    assert found["all"] == pytest.approx(want)
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
        numbers = {"move": by / 10, "ratio": by, "span": by / 5}
        layer = {"all": numbers, "afterwards": numbers, "unit": 0, "band": [[0], [0], [0]]}
        return {"accuracy": 80.0 + by, "diverged": None, "steps": [0], "layers": [layer] * 3}

    pair = [side(2.0), side(9.0)]
    found = shift.Shift().conclude(PLAN, dict(zip(shift.Shift().runs(PLAN), pair[:: -1 if swap else 1], strict=True)))
    assert found.outcome == outcome and len(found.rows) == 6 and len(found.rows[0]) == len(found.headers) == 5
    if not swap:
        assert found.rows[:2] == [
            ("1, with", "0.20", "0.20", "2.00", "2.00"),
            ("1, without", "0.90", "0.90", "9.00", "9.00"),
        ]
        assert "by 0.20 of its band's width with and 0.90 without (by 0.40 and 1.80 as it stands)" in found.verdict[0]
        assert found.verdict[-1].endswith("82.0 % with and 89.0 % without.")
