"""The training loop: inputs, batches, optimizers, and the history of the accuracy."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from fastbn.cli.train import network as nets
from fastbn.cli.train import training
from fastbn.cli.train.data import Dataset

from .test_network import made


def toy(train: int = 60, test: int = 24) -> Dataset:
    """Three classes of four pixels, from 0 to 120, that any network can learn."""
    rng = np.random.default_rng(5)
    labels = np.arange(train + test) % 3
    images = (100 * np.eye(4)[labels] + 20 * rng.random((train + test, 4))).astype(np.uint8)
    return Dataset("toy", (2, 2), 100, images[:train], labels[:train], images[train:], labels[train:])


def toy_train(optimizer: str = "sgd", steps: int = 40, seed: int = 0) -> tuple[nets.Network, training.History]:
    inputs, network = training.Inputs(toy()), made(seed=seed)
    chosen = training.batches(60, 20, steps, seed)
    kind = training.OPTIMIZERS[optimizer]
    return network, training.train(network, kind(), kind.rate, inputs, chosen, steps)


def test_inputs_are_normalized_by_the_training_images_alone() -> None:
    data = toy()
    inputs = training.Inputs(data)
    mean, var = data.images.mean(axis=0, dtype=np.float64), data.images.var(axis=0, dtype=np.float64)
    chosen = np.array([3, 0, 59])
    for given, normalized in (
        (data.images, inputs[:]),
        (data.images[chosen], inputs[chosen]),
        (data.test_images, inputs.test),
    ):
        assert normalized.dtype == np.float32
        want = (given - mean) / np.sqrt(var + training.PIXEL_EPS * data.ink**2)
        np.testing.assert_allclose(normalized, want, atol=1e-6)
    np.testing.assert_allclose(inputs[:].mean(axis=0), 0, atol=1e-6)
    assert data.images.dtype == np.uint8


def test_batches_are_shuffled_passes_over_all_images() -> None:
    chosen = list(training.batches(10, 3, 7, seed=4))
    assert [len(batch) for batch in chosen] == [3] * 7
    for first in (0, 3):  # three batches to a pass, one image left out
        assert len(set(np.concatenate(chosen[first : first + 3]).tolist())) == 9
    assert sorted(next(training.batches(10, 10, 1, seed=4))) == list(range(10))
    for a, b in zip(chosen, training.batches(10, 3, 7, seed=4), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.concatenate(chosen).tolist() != np.concatenate(list(training.batches(10, 3, 7, seed=5))).tolist()


# The optimizers.


def steps_of(optimizer: str, gradients: list[float]) -> float:
    """How far, in rates, a parameter goes down under these gradients."""
    parameter, kind = np.zeros(1), training.OPTIMIZERS[optimizer]()
    for gradient in gradients:
        kind.step(SimpleNamespace(parameters=lambda g=gradient: iter([(parameter, np.array([g]))])), 0.5)
    return float(-parameter[0] / 0.5)


@pytest.mark.parametrize(
    ("optimizer", "want"),
    [
        ("sgd", 3 + 3),
        ("momentum", 3 + (3 + 0.9 * 3)),
        ("rmsprop", 3 / np.sqrt(0.1 * 9) + 3 / np.sqrt(0.9 * 0.1 * 9 + 0.1 * 9)),
        ("adam", 1 + 1),  # a constant gradient moves by the rate
    ],
)
def test_two_steps_by_hand(optimizer: str, want: float) -> None:
    assert steps_of(optimizer, [3.0, 3.0]) == pytest.approx(want, rel=1e-7)


@pytest.mark.peers
@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_optimizers_agree_with_torch(optimizer: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is a peer to compare with, not a dependency")
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
        "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.5, alpha=0.9, eps=1e-8),
        "adam": lambda p: torch.optim.Adam(p, lr=0.5),
    }
    gradients = [3.0, -0.2, 0.0, 1.0, 1e-3]
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    peer = kinds[optimizer]([parameter])
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        peer.step()
    assert steps_of(optimizer, gradients) == pytest.approx(-float(parameter.detach()[0]) / 0.5, rel=1e-6)


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_each_optimizer_lowers_the_loss_and_updates_gamma_and_beta(optimizer: str) -> None:
    data, network, kind = toy(), made(), training.OPTIMIZERS[optimizer]()
    images = training.Inputs(data)[:]
    held = [array for layer in network.norms for array in (layer.gamma, layer.beta)]
    before = [array.copy() for array in held]
    losses = []
    for _ in range(30):
        loss, gradient = nets.cross_entropy(network(images), data.labels)
        network.backward(gradient)
        kind.step(network, kind.rate)
        losses.append(loss)
    assert losses[-1] < 0.98 * losses[0]
    for array, was in zip(held, before, strict=True):
        assert (array != was).any()
    after = [array for layer in network.norms for array in (layer.gamma, layer.beta)]
    assert all(a is b for a, b in zip(held, after, strict=True))  # in place


# Training.


def test_same_seed_same_run_other_seed_another() -> None:
    (a, history), (b, again), (c, other) = toy_train(), toy_train(), toy_train(seed=1)
    assert history.correct == again.correct and history.steps == again.steps == other.steps
    for (x, _), (y, _), (z, _) in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).any()


def test_history_counts_what_the_network_gets_right() -> None:
    seen: list[tuple[int, float]] = []
    inputs, network = training.Inputs(toy()), made()
    history = training.train(
        network, training.Optimizer(), 0.1, inputs, training.batches(60, 20, 85, 0), 85, lambda *now: seen.append(now)
    )
    assert history.steps == training.checked_steps(85) and history.total == 24
    assert history.seconds > 0 and history.diverged is None
    assert [step for step, _ in seen] == list(range(86))
    assert [seen[step] for step in history.steps] == list(zip(history.steps, history.accuracy, strict=True))
    assert history.correct[-1] == training.correct(network, inputs)
    assert history.correct[-1] == (network.predict(inputs.test).argmax(axis=1) == inputs.data.test_labels).sum()
    assert history.accuracy[-1] > 0.9 > history.accuracy[0]


@pytest.mark.parametrize("steps", [1, 2, 39, 40, 41, 79, 85, 2000, 50_000])
def test_checks_are_even(steps: int) -> None:
    checked = training.checked_steps(steps)
    gaps = np.diff(checked)
    assert checked[0] == 0 and checked[-1] == steps and len(gaps) == min(steps, training.CHECKS)
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert training.checked_steps(steps, 1) == [0, steps]


def test_first_counts_in_whole_images() -> None:
    history = training.History(450, [0, 50, 100], [45, 440, 441])  # 441 / 450 is 98 % exactly
    assert [history.first(accuracy) for accuracy in (0.98, 0.97, 0.1, 0.99)] == [100, 50, 0, None]


def test_the_rate_falls_to_zero_over_the_last_quarter() -> None:
    rates: list[float] = []
    optimizer = SimpleNamespace(step=lambda network, rate: rates.append(rate))
    seen: list[int] = []
    done = training.descend(
        made(), optimizer, 0.2, training.Inputs(toy()), training.batches(60, 20, 8, 0), 8, seen.append
    )
    assert rates == pytest.approx([0.2] * 7 + [0.1])
    assert seen == list(range(9)) and done[0] > 0 and done[1] is None


def test_a_rate_far_too_high_ends_the_training_where_the_loss_is_no_number() -> None:
    network, inputs = made("relu", None), training.Inputs(toy())
    history = training.train(network, training.Optimizer(), 1e30, inputs, training.batches(60, 20, 40, 0), 40)
    assert history.diverged is not None and 1 < history.diverged < 10
    assert history.steps == list(range(history.diverged))  # the check after that step would say nothing
    assert training.correct(network, inputs) == 0


def test_seconds_count_the_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time of the steps; what is looked at between them does not count, nor what other programs take."""
    clock = [0.0]
    monkeypatch.setattr(training.time, "thread_time", lambda: clock[0])

    def tick(seconds: float) -> None:
        clock[0] += seconds

    optimizer = SimpleNamespace(step=lambda network, rate: tick(1.0))
    seconds, _ = training.descend(
        made(), optimizer, 0.2, training.Inputs(toy()), training.batches(60, 20, 8, 0), 8, lambda step: tick(100.0)
    )
    assert seconds == 8.0


def test_a_batch_of_all_images_is_in_memory_once() -> None:
    """As float32: neither the bytes beside it, nor the last batch."""
    count, pixels = 4 * training.CHUNK, 64
    images = np.random.default_rng(0).integers(0, 256, (count, pixels), np.uint8)
    labels = np.arange(count) % 3
    inputs = training.Inputs(Dataset("", (8, 8), 255, images, labels, images[:10], labels[:10]))
    network = nets.Network(nets.initial_weights((pixels, 1, 3), "xavier", 0), "sigmoid", None)
    chosen = list(training.batches(count, count, 3, 0))
    tracemalloc.start()
    training.descend(network, training.Optimizer(), 0.1, inputs, chosen, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    batch = count * pixels * 4
    assert batch < peak < 1.4 * batch  # the scores, their gradient and a hidden unit are a tenth of it
