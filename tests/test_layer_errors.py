"""Every misuse of the layer: its exact message, with the layer and the arguments left as they were."""

import re
from typing import Any

import numpy as np
import pytest
from shapes import HALF

import fastbn

SHAPE = (4, 3, 5)


def _float32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _layer(backend: str, **options: Any) -> fastbn.BatchNorm:
    bn = fastbn.BatchNorm(3, backend=backend, **options)
    bn.running_mean, bn.running_var, bn.num_batches_tracked = (
        np.arange(3, dtype=bn.dtype),
        np.arange(1, 4, dtype=bn.dtype),
        7,
    )
    return bn


MORE = (
    "give more, or take running statistics: batch_norm_inference, bn.eval() of a layer that keeps them (else it is "
    "as in training)"
)
MEMORY = _float32(5, 3, 5)

LAYER_INPUT: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({}, {"x": _float32(4, 5, 3)}, ValueError, "x: given 5 channels along axis 1 of shape (4, 5, 3), want 3, as this "
                                               "layer has"),
    ({"axis": -1}, {"x": _float32(4, 3, 5)}, ValueError, "x: given 5 channels along axis 2 of shape (4, 3, 5), want "
                                                         "3, as this layer has"),
    ({"axis": 3}, {"x": _float32(4, 3, 5)}, ValueError, "axis: given 3, want one from -3 to 2 for shape (4, 3, 5)"),
    ({}, {"x": np.ones(SHAPE)}, TypeError,
     "x: given dtype float64, want float32, this layer's: convert x, or make the layer with dtype='float64'"),
    *(
        ({"dtype": "float64"}, {"x": np.ones(SHAPE, half)}, TypeError,
         f"x: given dtype {half}, want float64, this layer's: convert x, or make the layer with dtype='float32'")
        for half in HALF
    ),
    ({"dtype": "float64"}, {"x": _float32(*SHAPE)}, TypeError,
     "x: given dtype float32, want float64, this layer's: convert x, or make the layer with dtype='float32'"),
    ({}, {"x": np.ones(SHAPE, int)}, TypeError,
     "x: given dtype int64, " + "want float16, bfloat16, float32 or float64: convert it first, e.g. "
                                "x.astype('float32')"),
    ({}, {"x": _float32(1, 3, 1), "out": None}, ValueError,
     f"Expected more than 1 value per channel when training, got input size (1, 3, 1): {MORE}"),
    ({"track_running_stats": False}, {"x": _float32(1, 3, 1), "out": None}, ValueError,
     f"Expected more than 1 value per channel when training, got input size (1, 3, 1): {MORE}"),
    ({"eps": 0.0}, {}, ValueError, "eps: given 0.0, want a positive number in training, e.g. 1e-5"),
    ({}, {"out": _float32(4, 3, 4)}, ValueError, "out: given shape (4, 3, 4), want (4, 3, 5), the shape of x"),
    ({}, {"out": [1.0]}, TypeError, "out: given list, want a numpy.ndarray of shape (4, 3, 5) and dtype float32"),
    ({}, {"out": _read_only(_float32(*SHAPE))}, ValueError, "out: given a read-only array, want one that can be "
                                                            "written"),
    ({}, {"x": MEMORY[:4], "out": MEMORY[1:]}, ValueError,
     "out: given an array that overlaps an input in part; want the input itself, or memory apart from it"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "given", "error", "message"), LAYER_INPUT)
def test_layer_input(
    options: dict[str, Any], given: dict[str, Any], error: type[Exception], message: str, backend: str
) -> None:
    bn = _layer(backend, **options)
    arguments = {"x": _float32(*SHAPE), "out": np.full(SHAPE, -7, np.float32)} | given
    before = {name: np.array(value) for name, value in (*bn.state_dict().items(), *arguments.items())}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        bn(arguments["x"], arguments["out"])
    for name, value in (*bn.state_dict().items(), *arguments.items()):
        np.testing.assert_array_equal(value, before[name], err_msg=f"{name} changed")
    with pytest.raises(RuntimeError, match=r"^backward before forward"):
        bn.backward(arguments["x"])


PARAMETERS = (
    "want float32 or float64, the dtype of parameters and running statistics: x of float16 or bfloat16 goes "
    "with float32"
)
WEIGHT = "want a finite number: the weight of the new value (1 - decay elsewhere)"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_features": 0}, ValueError, "num_features: given 0, want at least 1"),
        ({"num_features": -3}, ValueError, "num_features: given -3, want at least 1"),
        ({"num_features": 2.0}, TypeError, "num_features: given 2.0, want a positive integer"),
        ({"num_features": True}, TypeError, "num_features: given True, want a positive integer"),
        ({"num_features": "3"}, TypeError, "num_features: given '3', want a positive integer"),
        ({"eps": -1.0}, ValueError, "eps: given -1.0, want a number that is not negative"),
        ({"eps": float("nan")}, ValueError, "eps: given nan, want a number that is not negative"),
        ({"eps": "small"}, TypeError, "eps: given 'small', want a number"),
        ({"momentum": float("inf")}, ValueError, f"momentum: given inf, {WEIGHT}"),
        ({"momentum": float("nan")}, ValueError, f"momentum: given nan, {WEIGHT}"),
        ({"momentum": "slow"}, TypeError, "momentum: given 'slow', want a number from 0 to 1, or None for the "
                                          "cumulative average"),
        ({"dtype": "float16"}, TypeError, f"dtype: given float16, {PARAMETERS}"),
        ({"dtype": "bfloat16"}, TypeError, f"dtype: given bfloat16, {PARAMETERS}"),
        ({"dtype": "float8_e5m2"}, TypeError, f"dtype: given float8_e5m2, {PARAMETERS}"),
        ({"dtype": int}, TypeError, f"dtype: given int64, {PARAMETERS}"),
        ({"dtype": "single precision"}, TypeError, f"dtype: given 'single precision', {PARAMETERS}"),
    ],
)  # fmt: skip
def test_layer_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fastbn.BatchNorm(**{"num_features": 3} | options)


BEFORE_FORWARD = "backward before forward: call the layer on x first, y = bn(x)"
OVERWRITTEN = "backward needs the x of the forward, which was overwritten by out=x: give another out, or none"
EVALUATION = (
    "backward after a forward in evaluation, which keeps no x unless asked to: bn.eval(backward=True), then y = bn(x)"
)


def test_a_layer_is_shown_with_a_dtype_that_was_assigned() -> None:
    bn = fastbn.BatchNorm(3)
    for dtype, shown in (("float64", "float64"), (np.float64, "float64"), ("whatever", "whatever"), (None, "None")):
        bn.dtype = dtype
        assert repr(bn).endswith(f"dtype={shown})")


def test_backward_after_evaluation_in_place_asks_for_what_helps(backend: str) -> None:
    bn, x = _layer(backend).eval(), np.arange(60, dtype=np.float32).reshape(SHAPE)
    bn(x, out=x)  # another out would not help
    with pytest.raises(RuntimeError, match=f"^{re.escape(EVALUATION)}$"):
        bn.backward(x)


@pytest.mark.parametrize("training", [True, False])
def test_backward_at_the_wrong_time(training: bool, backend: str) -> None:
    bn, x = _layer(backend), np.arange(60, dtype=np.float32).reshape(SHAPE)
    bn = bn.train() if training else bn.eval(backward=True)
    with pytest.raises(RuntimeError, match=f"^{re.escape(BEFORE_FORWARD)}$"):
        bn.backward(x)
    bn(x, out=x)
    with pytest.raises(RuntimeError, match=f"^{re.escape(OVERWRITTEN)}$"):
        bn.backward(_float32(*SHAPE))
    bn(x)
    bn.backward(_float32(*SHAPE), out=x)
    with pytest.raises(RuntimeError, match=f"^{re.escape(OVERWRITTEN)}$"):
        bn.backward(_float32(*SHAPE))
    bn(x)
    bn.backward(_float32(*SHAPE))


def test_backward_refuses_what_is_unlike_x(backend: str) -> None:
    bn, x = _layer(backend), np.arange(60, dtype=np.float32).reshape(SHAPE)
    bn(x)
    bn.backward(_float32(*SHAPE))
    before = (bn.dgamma, bn.dbeta)
    with pytest.raises(ValueError, match=f"^{re.escape('dy: given shape (4, 3), want (4, 3, 5), the shape of x')}$"):
        bn.backward(_float32(4, 3))
    with pytest.raises(
        TypeError, match=r"^dy: given dtype float64, want float32, the dtype of x: convert one of them$"
    ):
        bn.backward(np.ones(SHAPE))
    with pytest.raises(ValueError, match=r"^out: given shape"):
        bn.backward(_float32(*SHAPE), out=_float32(4, 3))
    assert bn.dgamma is before[0]
    assert bn.dbeta is before[1]


KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": None}, ValueError, f"state_dict: missing ['weight'], unexpected nothing; want {KEYS}"),
        ({"extra": _float32(3)}, ValueError, f"state_dict: missing nothing, unexpected ['extra']; want {KEYS}"),
        ({"bias": None, "offset": _float32(3)}, ValueError, f"state_dict: missing ['bias'], unexpected ['offset']; "
                                                            f"want {KEYS}"),
        ({"running_var": None}, ValueError, "given running mean without running var; want both, or neither for batch "
                                            "statistics"),
        ({"running_mean": None}, ValueError, "given running var without running mean; want both, or neither for batch "
                                             "statistics"),
        ({"running_var": _float32(4)}, ValueError, "state_dict: running_var given shape (4,), want (3,)"),
        ({"running_var": _float32(1)}, ValueError, "state_dict: running_var given shape (1,), want (3,)"),
        ({"num_batches_tracked": np.zeros(1, int)}, ValueError, "state_dict: num_batches_tracked given shape (1,), "
                                                                "want ()"),
        ({"running_var": ["a", "b", "c"]}, TypeError, "state_dict: running_var given as dtype <U1, want numbers"),
        ({"running_var": np.ones(3, complex)}, TypeError, "state_dict: running_var given as dtype complex128, want "
                                                          "numbers"),
        ({"num_batches_tracked": "many"}, TypeError,
         "state_dict: num_batches_tracked: given 'many', want an array: numpy.load(...) reads a file"),
    ],
)  # fmt: skip
def test_load_state_dict_takes_all_or_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    bn = _layer("reference")
    before = bn.state_dict()
    state = {key: value + 1 for key, value in before.items()} | change
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        bn.load_state_dict({key: value for key, value in state.items() if value is not None})
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[key], err_msg=f"{key} changed")


def test_load_state_dict_rejects_a_ragged_value() -> None:
    bn = _layer("reference")
    before = bn.state_dict()
    with pytest.raises((TypeError, ValueError), match="running_var"):
        bn.load_state_dict({key: value + 1 for key, value in before.items()} | {"running_var": [[1.0], [2.0, 3.0]]})
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[key], err_msg=f"{key} changed")


@pytest.mark.parametrize(
    "count", [float("nan"), float("inf"), -float("inf"), 2.5, -1, 2**63, 2**70, 1e300, np.float32(0.5)]
)
def test_load_state_dict_rejects_a_count_that_is_none(count: float) -> None:
    bn = _layer("reference")
    before = bn.state_dict()
    with pytest.raises(ValueError, match=r"^state_dict: num_batches_tracked: given .*, want a whole number, 0 or more"):
        bn.load_state_dict({key: value + 1 for key, value in before.items()} | {"num_batches_tracked": count})
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[key], err_msg=f"{key} changed")


@pytest.mark.parametrize("count", [float("nan"), None, 1.5, 2**63])
def test_a_bad_count_is_healed_by_what_replaces_it(count: Any) -> None:
    state = _layer("reference").state_dict()
    for act, want in (
        (lambda bn: bn.reset_running_stats(), 0),
        (lambda bn: bn.reset_parameters(), 0),
        (lambda bn: bn.load_state_dict(state), 7),
    ):
        bn = _layer("reference")
        bn.num_batches_tracked = count
        act(bn)
        assert bn.num_batches_tracked == want
        bn(_float32(*SHAPE))
    bn.num_batches_tracked = count
    with pytest.raises((TypeError, ValueError), match=r"^num_batches_tracked: given"):
        bn.load_state_dict({"running_mean": np.full(3, 9.0)}, strict=False)
    assert not (bn.running_mean == 9.0).any()


@pytest.mark.parametrize(
    "state", [5, None, "weight", [("weight", np.ones(3))], np.ones(3)], ids=lambda value: type(value).__name__
)
def test_a_state_is_a_mapping(state: Any) -> None:
    with pytest.raises(
        TypeError,
        match=rf"^state_dict: given {type(state).__name__}, want a mapping of .*, as state_dict\(\) gives it$",
    ):
        _layer("reference").load_state_dict(state)


def test_keys_that_are_not_strict() -> None:
    """As PyTorch: what is there is taken over, what is missing or too much is returned; other shapes are errors all the
    same.
    """
    bn = _layer("reference")
    before = bn.state_dict()
    assert bn.load_state_dict(before) == ([], [])
    some = {"running_mean": np.full(3, 9.0), "extra": "whatever", "num_batches_tracked": np.float32(5)}
    found = bn.load_state_dict(some, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["weight", "bias", "running_var"], ["extra"])
    assert bn.num_batches_tracked == 5
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, (before | some)[key], err_msg=key)
    with pytest.raises(ValueError, match=r"^state_dict: weight given shape \(4,\), want \(3,\)$"):
        bn.load_state_dict({"running_mean": np.zeros(3), "weight": np.ones(4)}, strict=False)
    np.testing.assert_array_equal(bn.running_mean, 9.0)
    assert bn.load_state_dict({}, strict=False).missing_keys == ["weight", "bias", "running_mean", "running_var"]


@pytest.mark.peers
def test_states_of_pytorch_in_every_dtype() -> None:
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.5, -3.0, 0.0078125]))
        layer.running_var.copy_(torch.tensor([3.1415927, 1e-3, 1e30]))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        state = layer.to(dtype).state_dict(keep_vars=True)  # whose parameters require a gradient
        bn = fastbn.BatchNorm(3)
        assert bn.load_state_dict(state) == ([], [])
        np.testing.assert_array_equal(bn.gamma, state["weight"].detach().float().numpy())
        np.testing.assert_array_equal(bn.running_var, state["running_var"].float().numpy())
