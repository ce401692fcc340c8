"""The network that the commands train: layers, gradients, initial weights, prediction."""

import numpy as np
import pytest

import fastbn
from fastbn.cli.train import network as nets

SIZES = (4, 12, 12, 3)
NORMS = [nets.batch_norm, None]


def made(activation: str = "sigmoid", norm: nets.Norm | None = nets.batch_norm, seed: int = 0) -> nets.Network:
    return nets.Network(nets.initial_weights(SIZES, 0.03, seed), activation, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", nets.ACTIVATIONS)
def test_gradients_against_finite_differences(activation: str, norm: nets.Norm | None) -> None:
    rng = np.random.default_rng(3)
    network = nets.Network(nets.initial_weights((5, 4, 4, 3), 0.03, 1, np.float64), activation, norm)
    x, labels = rng.standard_normal((6, 5)), rng.integers(0, 3, 6)
    network.backward(nets.cross_entropy(network(x), labels)[1])
    for parameter, _ in network.parameters():
        # away from the start, where a ReLU may stand on its kink
        parameter += 0.5 * rng.standard_normal(parameter.shape)
    network.backward(nets.cross_entropy(network(x), labels)[1])
    pairs = [(parameter, gradient.copy()) for parameter, gradient in network.parameters()]
    # two hidden layers of weight, gamma, beta or of weight, bias; then weight, bias
    assert len(pairs) == (6 if norm is None else 8)
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


def test_a_network_of_one_layer_has_the_gradients_of_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((6, 5)), rng.integers(0, 3, 6)
    network = nets.Network(nets.initial_weights((5, 3), 0.03, 0, np.float64), "sigmoid", nets.batch_norm)
    network.backward(nets.cross_entropy(network(x), labels)[1])
    error = (network.predict(x) - np.eye(3)[labels]) / 6
    (_, dweight), (_, dbias) = network.parameters()
    np.testing.assert_allclose(dweight, x.T @ error, atol=1e-15)
    np.testing.assert_allclose(dbias, error.sum(axis=0), atol=1e-15)


def test_the_gradient_of_the_images_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody needs it, and it took 8 % of a step."""
    asked: list[int] = []
    real = nets.Linear.backward
    monkeypatch.setattr(nets.Linear, "backward", lambda self, dy: (asked.append(len(self.weight)), real(self, dy))[1])
    network = made()
    network.backward(nets.cross_entropy(network(np.eye(4, dtype=np.float32)), np.array([0, 1, 2, 0]))[1])
    assert asked == [12, 12]


def test_the_two_networks_start_from_the_same_weights_and_own_them() -> None:
    weights = nets.initial_weights(SIZES, "xavier", 0)
    ours, twin = (nets.Network(weights, "sigmoid", norm) for norm in NORMS)
    linear = [[layer for layer in network.layers if isinstance(layer, nets.Linear)] for network in (ours, twin)]
    for a, b, weight in zip(*linear, weights, strict=True):
        np.testing.assert_array_equal(a.weight, weight)
        np.testing.assert_array_equal(b.weight, weight)
        assert not np.shares_memory(a.weight, b.weight) and not np.shares_memory(a.weight, weight)
    assert [layer.bias is None for layer in linear[0]] == [True, True, False]
    assert [layer.bias is None for layer in linear[1]] == [False, False, False]


@pytest.mark.parametrize(
    ("init", "stds"),
    [("xavier", ((1 / 300) ** 0.5, (1 / 150) ** 0.5)), ("he", (0.005**0.5, 0.1)), (0.03, (0.03, 0.03))],
)  # fmt: skip
def test_initial_weights_have_the_spread_that_init_names(init: str | float, stds: tuple[float, float]) -> None:
    weights = nets.initial_weights((400, 200, 100), init, 0)
    for weight, shape, std in zip(weights, ((400, 200), (200, 100)), stds, strict=True):
        assert weight.shape == shape and weight.dtype == np.float32
        assert weight.std() == pytest.approx(std, rel=0.02) and abs(weight.mean()) < 0.02 * std
    (other, _), (again, _) = (nets.initial_weights((400, 200, 100), init, seed) for seed in (1, 0))
    np.testing.assert_array_equal(again, weights[0])
    assert (other != again).any()


def test_a_batch_norm_stands_before_each_activation() -> None:
    network = made("tanh")
    assert [type(layer) for layer in network.layers] == [nets.Linear, fastbn.BatchNorm, nets.Tanh] * 2 + [nets.Linear]
    assert network.norms == [network.layers[1], network.layers[4]]
    plain = made("relu", None)
    assert [type(layer) for layer in plain.layers] == [nets.Linear, nets.ReLU] * 2 + [nets.Linear]
    assert plain.norms == []


def test_everything_is_float32() -> None:
    network, x = made(), np.eye(4, dtype=np.float32)
    network.backward(nets.cross_entropy(network(x), np.array([0, 1, 2, 0]))[1])
    assert {array.dtype for pair in network.parameters() for array in pair} == {np.dtype(np.float32)}
    assert network.predict(x).dtype == np.float32


def seasoned() -> tuple[nets.Network, np.ndarray]:
    """A network whose running averages have seen a batch, and images."""
    network, x = made(), np.random.default_rng(5).standard_normal((24, 4)).astype(np.float32)
    network(x)
    return network, x


def test_prediction_of_a_batch_of_one_is_that_in_company() -> None:
    network, images = seasoned()
    alone = np.concatenate([network.predict(images[i : i + 1]) for i in range(len(images))])
    np.testing.assert_allclose(alone, network.predict(images), rtol=1e-5)
    np.testing.assert_allclose(alone.sum(axis=1), 1, rtol=1e-6)


def test_prediction_leaves_the_running_averages_and_goes_back_to_training() -> None:
    network, images = seasoned()
    before = [layer.state_dict() for layer in network.norms]
    network.predict(images)
    for layer, state in zip(network.norms, before, strict=True):
        assert layer.training
        for key, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, state[key])


def test_sigmoid_does_not_overflow() -> None:
    x = np.array([[-1e30, -5.0, 0.0, 5.0, 1e30]], np.float32)
    want = [[0, 1 / (1 + np.exp(5)), 0.5, 1 / (1 + np.exp(-5)), 1]]
    np.testing.assert_allclose(nets.Sigmoid()(x), want, atol=1e-7)
