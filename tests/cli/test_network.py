"""The network, optimizers and training loop of the `train` command."""

from types import SimpleNamespace

import numpy as np
import pytest

import fastbn
from fastbn.cli.train import network as nets
from fastbn.cli.train.data import Dataset

SIZES = (4, 12, 12, 3)


def toy(train: int = 60, test: int = 24) -> Dataset:
    """Three classes of four pixels that any network can learn."""
    rng = np.random.default_rng(5)
    labels = np.arange(train + test) % 3
    images = (np.eye(4)[labels] + 0.2 * rng.random((train + test, 4))).astype(np.float32)
    return Dataset("toy", (2, 2), images[:train], labels[:train], images[train:], labels[train:])


def toy_network(activation: str = "sigmoid", batch_norm: bool = True, seed: int = 0) -> nets.Network:
    return nets.Network(nets.initial_weights(SIZES, seed), activation, batch_norm)


def toy_train(
    optimizer: str = "sgd", steps: int = 40, seed: int = 0, batch_norm: bool = True
) -> tuple[nets.Network, nets.History]:
    data, network = toy(), toy_network(batch_norm=batch_norm, seed=seed)
    chosen = nets.batches(len(data.images), 20, steps, seed)
    return network, nets.train(
        network, nets.OPTIMIZERS[optimizer](), nets.OPTIMIZERS[optimizer].rate, data, chosen, steps
    )


# The network.


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", nets.ACTIVATIONS)
def test_gradients_against_finite_differences(activation: str, batch_norm: bool) -> None:
    rng = np.random.default_rng(3)
    network = nets.Network(nets.initial_weights((5, 4, 4, 3), 1, np.float64), activation, batch_norm)
    x, labels = rng.standard_normal((6, 5)), rng.integers(0, 3, 6)
    network.backward(nets.cross_entropy(network(x), labels)[1])
    for parameter, _ in network.parameters():
        # away from the start, where a ReLU may stand on its kink
        parameter += 0.5 * rng.standard_normal(parameter.shape)
    network.backward(nets.cross_entropy(network(x), labels)[1])
    pairs = [(parameter, gradient.copy()) for parameter, gradient in network.parameters()]
    # two hidden layers of weight, gamma, beta or of weight, bias; then weight, bias
    assert len(pairs) == (8 if batch_norm else 6)
    h = 1e-5
    for parameter, gradient in pairs:
        assert parameter.dtype == gradient.dtype == np.float64
        numeric = np.empty_like(parameter)
        for i in np.ndindex(parameter.shape):
            kept = parameter[i]
            losses = []
            for parameter[i] in (kept + h, kept - h):
                losses.append(nets.cross_entropy(network(x), labels)[0])
            parameter[i] = kept
            numeric[i] = (losses[0] - losses[1]) / (2 * h)
        assert np.abs(gradient).max() > 1e-4
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_the_two_networks_start_from_the_same_weights_and_own_them() -> None:
    weights = nets.initial_weights(SIZES, 0)
    ours, twin = nets.Network(weights, "sigmoid", True), nets.Network(weights, "sigmoid", False)
    linear = [[layer for layer in network.layers if isinstance(layer, nets.Linear)] for network in (ours, twin)]
    for a, b, weight in zip(*linear, weights, strict=True):
        np.testing.assert_array_equal(a.weight, weight)
        np.testing.assert_array_equal(b.weight, weight)
        assert not np.shares_memory(a.weight, b.weight) and not np.shares_memory(a.weight, weight)
    assert [layer.bias is None for layer in linear[0]] == [True, True, False]
    assert [layer.bias is None for layer in linear[1]] == [False, False, False]


def test_a_batch_norm_stands_before_each_activation() -> None:
    kinds = [type(layer) for layer in toy_network("tanh").layers]
    assert kinds == [nets.Linear, fastbn.BatchNorm, nets.Tanh] * 2 + [nets.Linear]
    assert [type(layer) for layer in toy_network("relu", False).layers] == [nets.Linear, nets.ReLU] * 2 + [nets.Linear]


def test_everything_is_float32() -> None:
    network, _ = toy_train("adam", steps=3)
    assert {array.dtype for pair in network.parameters() for array in pair} == {np.dtype(np.float32)}
    assert network.predict(toy().test_images).dtype == np.float32


def test_prediction_of_a_batch_of_one_is_that_in_company() -> None:
    network, _ = toy_train()
    images = toy().test_images
    alone = np.concatenate([network.predict(images[i : i + 1]) for i in range(len(images))])
    np.testing.assert_allclose(alone, network.predict(images), rtol=1e-5)
    np.testing.assert_allclose(alone.sum(axis=1), 1, rtol=1e-6)


def test_prediction_leaves_the_running_averages_and_goes_back_to_training() -> None:
    network, _ = toy_train()
    layers = [layer for layer in network.layers if isinstance(layer, fastbn.BatchNorm)]
    before = [layer.state_dict() for layer in layers]
    network.predict(toy().test_images)
    for layer, state in zip(layers, before, strict=True):
        assert layer.training
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, state[key])


def test_sigmoid_does_not_overflow() -> None:
    x = np.array([[-1e30, -5.0, 0.0, 5.0, 1e30]], np.float32)
    want = [[0, 1 / (1 + np.exp(5)), 0.5, 1 / (1 + np.exp(-5)), 1]]
    np.testing.assert_allclose(nets.Sigmoid()(x), want, atol=1e-7)


def test_inputs_are_normalized_by_the_training_images_alone() -> None:
    data = toy()
    found = nets.normalize_inputs(data)
    mean, var = data.images.mean(axis=0, dtype=np.float64), data.images.var(axis=0, dtype=np.float64)
    for given, normalized in ((data.images, found.images), (data.test_images, found.test_images)):
        assert normalized.dtype == np.float32
        np.testing.assert_allclose(normalized, (given - mean) / np.sqrt(var + nets.PIXEL_EPS), atol=1e-6)
    np.testing.assert_allclose(found.images.mean(axis=0), 0, atol=1e-6)


def test_batches_are_shuffled_passes_over_all_images() -> None:
    chosen = list(nets.batches(10, 3, 7, seed=4))
    assert [len(batch) for batch in chosen] == [3] * 7
    for first in (0, 3):  # three batches to a pass, one image left out
        assert len(set(np.concatenate(chosen[first : first + 3]).tolist())) == 9
    assert sorted(next(nets.batches(10, 10, 1, seed=4))) == list(range(10))
    for a, b in zip(chosen, nets.batches(10, 3, 7, seed=4), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.concatenate(chosen).tolist() != np.concatenate(list(nets.batches(10, 3, 7, seed=5))).tolist()


# The optimizers.


def steps_of(optimizer: str, gradients: list[float]) -> float:
    """How far, in rates, a parameter goes down under these gradients."""
    parameter, made = np.zeros(1), nets.OPTIMIZERS[optimizer]()
    for gradient in gradients:
        made.step(SimpleNamespace(parameters=lambda g=gradient: iter([(parameter, np.array([g]))])), 0.5)
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
@pytest.mark.parametrize("optimizer", nets.OPTIMIZERS)
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


@pytest.mark.parametrize("optimizer", nets.OPTIMIZERS)
def test_each_optimizer_lowers_the_loss_and_updates_gamma_and_beta(optimizer: str) -> None:
    data, network = toy(), toy_network()
    made = nets.OPTIMIZERS[optimizer]()
    layers = [layer for layer in network.layers if isinstance(layer, fastbn.BatchNorm)]
    held = [array for layer in layers for array in (layer.gamma, layer.beta)]
    before = [array.copy() for array in held]
    losses = []
    for _ in range(30):
        loss, gradient = nets.cross_entropy(network(data.images), data.labels)
        network.backward(gradient)
        made.step(network, made.rate)
        losses.append(loss)
    assert losses[-1] < 0.98 * losses[0]
    for array, was in zip(held, before, strict=True):
        assert (array != was).any()
    # in place
    assert all(
        a is b for a, b in zip(held, [array for layer in layers for array in (layer.gamma, layer.beta)], strict=True)
    )


# Training.


def test_same_seed_same_run_other_seed_another() -> None:
    (a, history), (b, again), (c, other) = toy_train(), toy_train(), toy_train(seed=1)
    assert history.correct == again.correct and history.steps == again.steps == other.steps
    for (x, _), (y, _), (z, _) in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        np.testing.assert_array_equal(x, y)
        assert (x != z).any()


def test_history_counts_what_the_network_gets_right() -> None:
    network, history = toy_train(steps=85)
    data = toy()
    assert (
        history.steps == [*range(0, 85, 2), 85]
        and history.total == 24
        and history.seconds > 0
        and history.diverged is None
    )
    assert history.correct[-1] == (network.predict(data.test_images).argmax(axis=1) == data.test_labels).sum()
    assert history.accuracy[-1] > 0.9 > history.accuracy[0]


def test_first_counts_in_whole_images() -> None:
    history = nets.History(450, [0, 50, 100], [45, 440, 441])  # 441 / 450 is 98 % exactly
    assert history.first(98) == 100 and history.first(97) == 50 and history.first(10) == 0 and history.first(99) is None


def test_the_rate_falls_to_zero_over_the_last_quarter() -> None:
    rates: list[float] = []
    optimizer = SimpleNamespace(step=lambda network, rate: rates.append(rate))
    nets.train(toy_network(), optimizer, 0.2, toy(), nets.batches(60, 20, 8, 0), 8)
    assert rates == pytest.approx([0.2] * 7 + [0.1])


def test_a_rate_far_too_high_is_noticed() -> None:
    network = toy_network("relu", batch_norm=False)
    history = nets.train(network, nets.Optimizer(), 1e30, toy(), nets.batches(60, 20, 40, 0), 40)
    assert history.diverged is not None and 1 < history.diverged < 10
    assert history.steps[-1] < history.diverged
