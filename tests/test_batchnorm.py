"""The layer: which statistics each mode uses, how the running ones move, what is saved."""

from typing import Any

import numpy as np
import published
import pytest
from tolerances import check, scales

import fastbn

EPS = 1e-5
SHAPE = (6, 3, 5)


def _batch(seed: int, dtype: str = "float32", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 2 + seed).astype(dtype)


def _layer(backend: str, channels: int = 3, **options: Any) -> fastbn.BatchNorm:
    """A layer whose parameters and running statistics all differ from their first values."""
    bn = fastbn.BatchNorm(channels, backend=backend, **options)
    for name, start in (("gamma", 0.5), ("beta", -1.0), ("running_mean", 2.0), ("running_var", 3.0)):
        if getattr(bn, name) is not None:
            getattr(bn, name)[...] = start + np.arange(channels)
    return bn


def _mode(bn: fastbn.BatchNorm, training: bool) -> fastbn.BatchNorm:
    """Training, or evaluation with a backward."""
    return bn.train() if training else bn.eval(backward=True)


def _check_y(y: np.ndarray, x: np.ndarray, mean: Any, var: Any, bn: fastbn.BatchNorm) -> None:
    want = published.normalized(x, mean, var, bn.gamma, bn.beta, bn.axis, bn.eps)
    check("y", x.dtype, y, want, scales(x, x, mean, var, bn.gamma, bn.beta, bn.axis, bn.eps, True).y)


def _check_gradients(
    dx: np.ndarray, dy: np.ndarray, x: np.ndarray, mean: Any, var: Any, bn: fastbn.BatchNorm, training: bool
) -> None:
    want = published.gradients(dy, x, mean, var, bn.gamma, bn.axis, bn.eps, training)
    scale = scales(dy, x, mean, var, bn.gamma, bn.beta, bn.axis, bn.eps, training)
    check("dx", x.dtype, dx, want.dx, scale.dx)
    assert bn.dgamma is not None
    assert bn.dbeta is not None
    check("dgamma", x.dtype, bn.dgamma, want.dgamma, scale.dgamma)
    check("dbeta", x.dtype, bn.dbeta, want.dbeta, scale.dbeta)


def test_first_values() -> None:
    bn = fastbn.BatchNorm(3)
    assert (bn.num_features, bn.eps, bn.momentum, bn.axis, bn.dtype) == (3, 1e-5, 0.1, 1, np.float32)
    assert (bn.affine, bn.track_running_stats, bn.unbiased_running_var, bn.training, bn.backend) == (
        True,
        True,
        True,
        True,
        None,
    )
    for array, value in ((bn.gamma, 1), (bn.beta, 0), (bn.running_mean, 0), (bn.running_var, 1)):
        assert array is not None
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, [value] * 3)
    assert bn.num_batches_tracked == 0
    assert bn.dgamma is None
    assert bn.dbeta is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_uses_the_batch_and_moves_the_running_statistics(dtype: str, backend: str) -> None:
    bn, x = _layer(backend, dtype=dtype), _batch(1, dtype)
    before = bn.state_dict()
    y = bn(x)
    s = published.statistics(x, 1)
    _check_y(y, x, s.mean, s.var, bn)
    unbiased = s.var * s.count / (s.count - 1)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    np.testing.assert_allclose(bn.running_mean, 0.9 * before["running_mean"] + 0.1 * s.mean, rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, 0.9 * before["running_var"] + 0.1 * unbiased, rtol=1e-6)
    assert bn.running_mean.dtype == bn.running_var.dtype == dtype
    assert bn.num_batches_tracked == 1
    np.testing.assert_array_equal(bn.gamma, before["weight"])
    np.testing.assert_array_equal(bn.beta, before["bias"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_eval_uses_the_running_statistics_and_moves_nothing(dtype: str, backend: str) -> None:
    bn, x = _layer(backend, dtype=dtype).eval(), _batch(1, dtype)
    before = bn.state_dict()
    y = bn(x)
    _check_y(y, x, before["running_mean"], before["running_var"], bn)
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_train_and_eval_return_the_layer() -> None:
    bn = fastbn.BatchNorm(3)
    assert bn.eval() is bn
    assert not bn.training
    assert bn.train() is bn
    assert bn.training
    assert bn.train(False) is bn
    assert not bn.training


def test_call_is_forward(backend: str) -> None:
    x = _batch(1)
    np.testing.assert_array_equal(_layer(backend)(x), _layer(backend).forward(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_backward_in_both_modes(dtype: str, axis: int, training: bool, backend: str) -> None:
    bn = _mode(_layer(backend, SHAPE[axis], dtype=dtype, axis=axis), training)
    x, dy = _batch(1, dtype), _batch(2, dtype)
    s = published.statistics(x, axis)
    mean, var = (s.mean, s.var) if training else (bn.running_mean, bn.running_var)
    bn(x)
    dx = bn.backward(dy)
    _check_gradients(dx, dy, x, mean, var, bn, training)
    assert dx.dtype == dtype
    for gradient in (bn.dgamma, bn.dbeta):
        assert gradient is not None
        assert gradient.dtype == dtype
        assert gradient.shape == (SHAPE[axis],)


@pytest.mark.parametrize("training", [True, False])
def test_backward_is_that_of_its_forward_whatever_changes_since(training: bool, backend: str) -> None:
    bn, x, dy = _mode(_layer(backend), training), _batch(1), _batch(2)
    bn(x)
    want = bn.backward(dy).copy(), np.copy(bn.dgamma), np.copy(bn.dbeta)
    bn(x)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.gamma is not None
    bn.running_mean += 100
    bn.running_var *= 100
    bn.gamma *= 10
    bn.beta, bn.eps, bn.axis = None, 1.0, -1
    bn.train(not training)
    found = bn.backward(dy), bn.dgamma, bn.dbeta
    for got, was in zip(found, want, strict=True):
        np.testing.assert_array_equal(got, was)


def test_backward_of_the_last_forward_and_again(backend: str) -> None:
    bn, x, dy = _layer(backend), _batch(1), _batch(2)
    bn(_batch(5, shape=(2, 3)))
    bn(x)
    first = bn.backward(dy)
    s = published.statistics(x, 1)
    _check_gradients(first, dy, x, s.mean, s.var, bn, True)
    np.testing.assert_array_equal(bn.backward(dy), first)


def test_out_of_forward_and_backward(backend: str) -> None:
    x, dy, want = _batch(1), _batch(2), _layer(backend)
    y, dx = want(x), want.backward(dy)
    bn, out = _layer(backend), np.empty_like(x)
    assert bn(x, out=out) is out
    np.testing.assert_array_equal(out, y)
    dy_again = dy.copy()
    assert bn.backward(dy_again, out=dy_again) is dy_again
    np.testing.assert_array_equal(dy_again, dx)
    x_again = x.copy()
    bn(x_again)
    assert bn.backward(dy, out=x_again) is x_again
    np.testing.assert_array_equal(x_again, dx)
    x_again = x.copy()
    assert bn(x_again, x_again) is x_again
    np.testing.assert_array_equal(x_again, y)


@pytest.mark.parametrize("unbiased", [True, False])
def test_momentum_none_is_the_average_of_all_batches(unbiased: bool, backend: str) -> None:
    bn = fastbn.BatchNorm(3, momentum=None, unbiased_running_var=unbiased, dtype="float64", backend=backend)
    seen = []
    for seed in range(5):
        x = _batch(seed, "float64", (2 + seed, 3, 4))
        s = published.statistics(x, 1)
        seen.append((s.mean, s.var * (s.count / (s.count - 1) if unbiased else 1)))
        bn(x)
        np.testing.assert_allclose(bn.running_mean, np.mean([mean for mean, _ in seen], 0), rtol=1e-12)
        np.testing.assert_allclose(bn.running_var, np.mean([var for _, var in seen], 0), rtol=1e-12)
    assert bn.num_batches_tracked == 5


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("unbiased", [True, False])
def test_momentum_is_the_weight_of_the_new_value(momentum: float, unbiased: bool, backend: str) -> None:
    bn = fastbn.BatchNorm(3, momentum=momentum, unbiased_running_var=unbiased, dtype="float64", backend=backend)
    mean, var = np.zeros(3), np.ones(3)
    for seed in range(3):
        x = _batch(seed, "float64")
        s = published.statistics(x, 1)
        mean = (1 - momentum) * mean + momentum * s.mean
        var = (1 - momentum) * var + momentum * s.var * (s.count / (s.count - 1) if unbiased else 1)
        bn(x)
    np.testing.assert_allclose(bn.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, var, rtol=1e-12)


def test_many_equal_batches_leave_the_running_statistics_at_theirs(backend: str) -> None:
    bn, x = fastbn.BatchNorm(3, backend=backend), _batch(1)
    for _ in range(300):
        bn(x)
    s = published.statistics(x, 1)
    np.testing.assert_allclose(bn.running_mean, s.mean, rtol=2e-6)
    np.testing.assert_allclose(bn.running_var, s.var * s.count / (s.count - 1), rtol=2e-6)
    assert bn.num_batches_tracked == 300


def test_affine_false_has_no_parameters_and_no_gradients_of_them(backend: str) -> None:
    bn, x, dy = _layer(backend, affine=False), _batch(1), _batch(2)
    assert bn.gamma is None
    assert bn.beta is None
    assert list(bn.state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]
    s = published.statistics(x, 1)
    _check_y(bn(x), x, s.mean, s.var, bn)
    want = published.gradients(dy, x, s.mean, s.var, None, 1, EPS, True)
    check("dx", "float32", bn.backward(dy), want.dx, scales(dy, x, s.mean, s.var, None, None, 1, EPS, True).dx)
    assert bn.dgamma is None
    assert bn.dbeta is None


@pytest.mark.parametrize("absent", ["gamma", "beta"])
def test_one_parameter_taken_away(absent: str, backend: str) -> None:
    bn, x = _layer(backend), _batch(1)
    bn(x)
    bn.backward(x)  # leaves gradients of both
    setattr(bn, absent, None)
    y = bn(x)
    s = published.statistics(x, 1)
    _check_y(y, x, s.mean, s.var, bn)
    bn.backward(x)
    assert (bn.dgamma is None, bn.dbeta is None) == (absent == "gamma", absent == "beta")
    assert {"gamma": "weight", "beta": "bias"}[absent] not in bn.state_dict()


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics_the_batch_is_used_in_both_modes(training: bool, backend: str) -> None:
    bn, x, dy = _mode(_layer(backend, track_running_stats=False), training), _batch(1), _batch(2)
    assert bn.running_mean is None
    assert bn.running_var is None
    s = published.statistics(x, 1)
    _check_y(bn(x), x, s.mean, s.var, bn)
    _check_gradients(bn.backward(dy), dy, x, s.mean, s.var, bn, True)
    assert bn.num_batches_tracked == 0
    assert list(bn.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_moves_nothing(training: bool, backend: str) -> None:
    bn = _mode(_layer(backend), training)
    before = bn.state_dict()
    for shape in ((0, 3), (0, 3, 4), (2, 3, 0)):
        x = np.empty(shape, np.float32)
        assert bn(x).shape == shape
        assert bn.backward(x).shape == shape
        np.testing.assert_array_equal(bn.dgamma, np.zeros(3))
        np.testing.assert_array_equal(bn.dbeta, np.zeros(3))
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_one_value_per_channel_is_fine_in_eval(backend: str) -> None:
    bn, x = _layer(backend).eval(), _batch(1, shape=(1, 3))
    _check_y(bn(x), x, bn.running_mean, bn.running_var, bn)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_reach_the_running_statistics_of_their_channel(value: float, backend: str) -> None:
    bn, clean, x = _layer(backend), _layer(backend), _batch(1)
    clean(x)
    x[0, 1, 0] = value
    bn(x)
    for found, want in ((bn.running_mean, clean.running_mean), (bn.running_var, clean.running_var)):
        assert found is not None
        assert want is not None
        assert not np.isfinite(found[1])
        np.testing.assert_array_equal(found[[0, 2]], want[[0, 2]])


def test_what_exceeds_float32_becomes_inf_without_a_warning(backend: str) -> None:
    bn, x = _layer(backend), _batch(0) * np.float32(1e30)
    y = bn(x)
    assert np.isfinite(y).all()
    assert np.isposinf(bn.running_var).all()
    bn.backward(np.full(SHAPE, 3e38, np.float32))
    assert np.isposinf(bn.dbeta).all()


def test_state_dict_is_a_copy_in_pytorchs_keys_and_shapes() -> None:
    bn = _layer("reference")
    state = bn.state_dict()
    shapes = {"weight": (3,), "bias": (3,), "running_mean": (3,), "running_var": (3,), "num_batches_tracked": ()}
    assert {key: value.shape for key, value in state.items()} == shapes
    assert state["num_batches_tracked"].dtype == np.int64
    for value in state.values():
        value += 1
    np.testing.assert_array_equal(bn.gamma, [0.5, 1.5, 2.5])
    np.testing.assert_array_equal(bn.running_mean, [2, 3, 4])
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"dtype": "float64"}])
def test_load_state_dict_is_the_inverse(options: dict[str, Any], backend: str) -> None:
    bn, x = _layer(backend, **options), _batch(1, options.get("dtype", "float32"))
    bn(x)
    other = fastbn.BatchNorm(3, backend=backend, **options)
    gamma = other.gamma
    other.load_state_dict(bn.state_dict())
    assert other.gamma is gamma  # in place: an optimizer may hold it
    for key, value in other.state_dict().items():
        np.testing.assert_array_equal(value, bn.state_dict()[key])
        assert value.dtype == bn.state_dict()[key].dtype
    np.testing.assert_array_equal(other.eval()(x), bn.eval()(x))


def test_load_state_dict_takes_lists_integers_and_other_precisions_and_copies() -> None:
    bn = _layer("reference")
    given = np.array([4.0, 5.0, 6.0])
    bn.load_state_dict(
        {"weight": [1, 2, 3], "bias": given, "running_mean": given, "running_var": given.astype(np.float16)}
    )
    given += 1
    np.testing.assert_array_equal(bn.gamma, [1, 2, 3])
    for array in (bn.beta, bn.running_mean, bn.running_var):
        assert array is not None
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, [4, 5, 6])
    assert bn.num_batches_tracked == 0  # older dictionaries have none: kept as it was


def test_reset(backend: str) -> None:
    bn = _layer(backend)
    bn(_batch(1))
    bn.reset_running_stats()
    np.testing.assert_array_equal(bn.running_mean, np.zeros(3))
    np.testing.assert_array_equal(bn.running_var, np.ones(3))
    assert bn.num_batches_tracked == 0
    np.testing.assert_array_equal(bn.gamma, [0.5, 1.5, 2.5])
    bn.reset_parameters()
    np.testing.assert_array_equal(bn.gamma, np.ones(3))
    np.testing.assert_array_equal(bn.beta, np.zeros(3))


def test_repr_has_what_differs_between_layers() -> None:
    assert repr(fastbn.BatchNorm(3)) == (
        "BatchNorm(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, axis=1, dtype=float32)"
    )
    assert repr(fastbn.BatchNorm(8, 0.1, None, False, False, -1, "float64")) == (
        "BatchNorm(8, eps=0.1, momentum=None, affine=False, track_running_stats=False, axis=-1, dtype=float64)"
    )
