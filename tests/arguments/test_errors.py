"""Every bad input: its exact message, raised before anything is allocated or changed."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from shapes import HALF

import fastbn

SHAPE = (4, 3, 5)
MORE = (
    "give more, or take running statistics: batch_norm_inference, bn.eval() of a layer that keeps them (else it is "
    "as in training)"
)
BIG = {half: np.dtype(half).newbyteorder(">") for half in HALF}


def _good(**given: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "x": rng.standard_normal(SHAPE).astype(np.float32),
        "dy": rng.standard_normal(SHAPE).astype(np.float32),
        "gamma": np.full(3, 2, np.float32),
        "beta": np.full(3, 3, np.float32),
        "mean": np.zeros(3, np.float32),
        "var": np.ones(3, np.float32),
        "moments": fastbn.Moments(20, np.zeros(3), np.ones(3)),
        "out": np.full(SHAPE, -7, np.float32),
        "axis": 1,
        "eps": 1e-5,
    }
    return arrays | given


def _moments(a: dict[str, Any], backend: str) -> Any:
    return fastbn.moments(a["x"], a["axis"], backend=backend)


def _running_moments(a: dict[str, Any], backend: str) -> Any:
    return fastbn.RunningMoments(3, a["axis"], backend).update(a["x"])


def _batch_norm(a: dict[str, Any], backend: str) -> Any:
    return fastbn.batch_norm(a["x"], a["gamma"], a["beta"], a["axis"], a["eps"], a["out"], backend=backend)


def _inference(a: dict[str, Any], backend: str) -> Any:
    return fastbn.batch_norm_inference(
        a["x"], a["mean"], a["var"], a["gamma"], a["beta"], a["axis"], a["eps"], a["out"], backend=backend
    )


def _backward(a: dict[str, Any], backend: str) -> Any:
    return fastbn.batch_norm_backward(
        a["dy"], a["x"], a["moments"], a["gamma"], a["axis"], a["eps"], a["out"], backend=backend
    )


def _inference_backward(a: dict[str, Any], backend: str) -> Any:
    return fastbn.batch_norm_inference_backward(
        a["dy"], a["x"], a["mean"], a["var"], a["gamma"], a["axis"], a["eps"], a["out"], backend=backend
    )


FUNCTIONS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "moments": _moments,
    "RunningMoments": _running_moments,
    "batch_norm": _batch_norm,
    "batch_norm_inference": _inference,
    "batch_norm_backward": _backward,
    "batch_norm_inference_backward": _inference_backward,
}
EVERY = tuple(FUNCTIONS)
STATISTICS = ("moments", "RunningMoments")  # which take integers of 8 and 16 bits too
FORWARD = ("batch_norm", "batch_norm_inference")
BACKWARD = ("batch_norm_backward", "batch_norm_inference_backward")
WRITING = FORWARD + BACKWARD
BOUND = ("moments", *WRITING)  # which see the array whose axis it is
TRAINING = ("batch_norm", "batch_norm_backward")
INFERENCE = ("batch_norm_inference", "batch_norm_inference_backward")


def refused(function: str, backend: str, error: type[Exception], message: str, given: dict[str, Any]) -> None:
    """Exactly this message, and not one byte of an argument changed."""
    arguments = _good(**given)
    before = {
        name: value.tobytes() for name, value in arguments.items() if type(value) is np.ndarray and value.nbytes < 1e6
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        FUNCTIONS[function](arguments, backend)
    assert type(caught.value) is error
    assert all(arguments[name].tobytes() == value for name, value in before.items())


class _OnGpu:
    # the protocol's name, read by hasattr only
    __cuda_array_interface__: dict[str, Any] = {"version": 3}  # noqa: RUF012


def _float32(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def _overlapping() -> dict[str, np.ndarray]:
    memory = np.zeros((5, 3, 5), np.float32)
    return {"x": memory[:4], "out": memory[1:]}


def _overlapping_dy() -> dict[str, np.ndarray]:
    memory = np.zeros((5, 3, 5), np.float32)
    return {"dy": memory[:4], "out": memory[1:]}


def _reversed() -> dict[str, np.ndarray]:
    x = _float32(*SHAPE)
    return {"x": x, "out": x[::-1]}


def _read_only() -> np.ndarray:
    array = _float32(*SHAPE)
    array.flags.writeable = False
    return array


def _of(dtype: str, **given: Any) -> dict[str, Any]:
    """x, dy and out of this dtype."""
    return {name: np.ones(SHAPE, dtype) for name in ("x", "dy", "out")} | given


WANT_STATISTICS = (
    "want float16, bfloat16, float32 or float64, or integers of 8 or 16 bits: convert it first, e.g. {0}.astype('{1}')"
)
WANT_FLOAT = "want float16, bfloat16, float32 or float64: convert it first, e.g. {0}.astype('float32')"

# What to give in place of a good argument, who must refuse it, with what.
BAD: list[tuple[str, tuple[str, ...], dict[str, Any], type[Exception], str]] = [
    ("rank 0", EVERY, {"x": np.float32(1), "dy": np.float32(1)}, ValueError,
     "x: given rank 0, shape (); want rank 2 or more: a batch axis and a channel axis"),
    ("rank 1", EVERY, {"x": _float32(4), "dy": _float32(4)}, ValueError,
     "x: given rank 1, shape (4,); want rank 2 or more: a batch axis and a channel axis"),
    ("axis too large", EVERY, {"axis": 3}, ValueError, "axis: given 3, want one from -3 to 2 for shape (4, 3, 5)"),
    ("axis too small", EVERY, {"axis": -4}, ValueError, "axis: given -4, want one from -3 to 2 for shape (4, 3, 5)"),
    ("axis a float", BOUND, {"axis": 1.0}, TypeError, "axis: given 1.0, want an integer from -3 to 2"),
    ("axis a bool", BOUND, {"axis": True}, TypeError, "axis: given True, want an integer from -3 to 2"),
    ("axis None", BOUND, {"axis": None}, TypeError, "axis: given None, want an integer from -3 to 2"),
    ("axis a tuple", BOUND, {"axis": (1,)}, TypeError, "axis: given (1,), want an integer from -3 to 2"),
    ("no channels", EVERY, {"x": _float32(4, 0, 5), "dy": _float32(4, 0, 5)}, ValueError,
     "x: given shape (4, 0, 5), with no channels along axis 1; want at least one"),
    *(
        (f"x of {dtype}", WRITING, {"x": np.ones(SHAPE, dtype)}, TypeError, f"x: given dtype {dtype}, "
                                                                            f"" + WANT_FLOAT.format("x"))
        for dtype in ("int64", "int8", "uint8", "bool", "complex64", "object", "float8_e5m2", "int4", "<U1",
        "datetime64[s]")
    ),
    *(
        (f"x of {dtype}", STATISTICS, {"x": np.ones(SHAPE, dtype)}, TypeError,
         f"x: given dtype {dtype}, " + WANT_STATISTICS.format("x",
         "float64" if "int" in dtype and dtype != "int4" else "float32"))
        for dtype in ("int64", "uint32", "bool", "complex64", "object", "float8_e5m2", "int4", "<U1", "datetime64[s]")
    ),
    ("x a list of integers", WRITING, {"x": [[1, 2], [3, 4]]}, TypeError,
     "x: given dtype int64, " + WANT_FLOAT.replace("{0}.astype('float32')", "numpy.asarray(x, 'float32')")),
    ("x None", EVERY, {"x": None}, TypeError, "x: given None, want an array"),
    ("x masked", EVERY, {"x": np.ma.masked_array(_float32(*SHAPE))}, TypeError,
     "x: given a masked array, whose mask would be ignored; want a plain array, for example x.filled(...)"),
    ("dy on a GPU", BACKWARD, {"dy": _OnGpu()}, TypeError,
     "dy: given an array on a GPU (_OnGpu), want a host array: copy it to the host first"),
    ("dy masked", BACKWARD, {"dy": np.ma.masked_array(_float32(*SHAPE))}, TypeError,
     "dy: given a masked array, whose mask would be ignored; want a plain array, for example dy.filled(...)"),
    ("dy of integers", BACKWARD, {"dy": np.ones(SHAPE, int)}, TypeError,
     "dy: given dtype int64, " + WANT_FLOAT.format("dy")),
    ("dy of float64", BACKWARD, {"dy": np.ones(SHAPE)}, TypeError,
     "dy: given dtype float64, want float32, the dtype of x: convert one of them"),
    ("dy a list of floats beside float32", BACKWARD, {"dy": np.ones(SHAPE).tolist()}, TypeError,
     "dy: given dtype float64, want float32, the dtype of x: convert one of them"),
    ("dy of another shape", BACKWARD, {"dy": _float32(4, 3, 6)}, ValueError, "dy: given shape (4, 3, 6), want (4, 3, "
                                                                             "5), the shape of x"),
    ("dy that broadcasts", BACKWARD, {"dy": _float32(1, 3, 5)}, ValueError, "dy: given shape (1, 3, 5), want (4, 3, "
                                                                            "5), the shape of x"),
    ("gamma of float64", WRITING, {"gamma": np.ones(3)}, TypeError,
     "gamma: given dtype float64, want float32 beside this x: convert it, e.g. gamma.astype('float32')"),
    ("beta of float64", FORWARD, {"beta": np.ones(3)}, TypeError,
     "beta: given dtype float64, want float32 beside this x: convert it, e.g. beta.astype('float32')"),
    ("gamma of float32 beside float64", WRITING, _of("float64"), TypeError,
     "gamma: given dtype float32, want float64 beside this x: convert it, e.g. gamma.astype('float64')"),
    *(
        (f"{name} of {half} beside {dtype}", functions, _of(dtype, **{name: np.ones(3, half)}), TypeError,
         f"{name}: given dtype {half}, want float32 beside this x: convert it, e.g. {name}.astype('float32')")
        for name, functions in (("gamma", WRITING), ("beta", FORWARD)) for half in HALF for dtype in (*HALF, "float32")
    ),
    *(
        (f"gamma of float64 beside {half}", WRITING, _of(half, gamma=np.ones(3)), TypeError,
         "gamma: given dtype float64, want float32 beside this x: convert it, e.g. gamma.astype('float32')")
        for half in HALF
    ),
    *(
        (f"{name} of {dtype} beside {x}", functions, _of(x, **{name: np.ones(SHAPE, dtype)}), TypeError,
         f"{name}: given dtype {dtype}, want {x}, the dtype of x{advice}")
        for name, functions, advice in (("dy", BACKWARD, ": convert one of them"), ("out", WRITING, ""))
        for x, dtype in (("float16", "bfloat16"), ("bfloat16", "float16"), ("bfloat16", "float32"), ("float32",
        "float16"))
    ),
    ("gamma of integers", WRITING, {"gamma": np.ones(3, int)}, TypeError,
     "gamma: given dtype int64, want float32 beside this x: convert it, e.g. gamma.astype('float32')"),
    ("gamma of another length", WRITING, {"gamma": _float32(4)}, ValueError,
     "gamma: given shape (4,), want (3,), one value per channel of x"),
    ("gamma that broadcasts", WRITING, {"gamma": _float32(1)}, ValueError,
     "gamma: given shape (1,), want (3,), one value per channel of x"),
    ("gamma of rank 2", WRITING, {"gamma": _float32(3, 1)}, ValueError,
     "gamma: given shape (3, 1), want (3,), one value per channel of x"),
    ("beta a scalar", FORWARD, {"beta": 0.5}, ValueError, "beta: given shape (), want (3,), one value per channel of "
                                                          "x"),
    ("mean of another length", INFERENCE, {"mean": _float32(4)}, ValueError,
     "mean: given shape (4,), want (3,), one value per channel of x"),
    ("var of another length", INFERENCE, {"var": _float32(2)}, ValueError, "var: given shape (2,), want (3,), one "
                                                                           "value per channel of x"),
    ("mean of integers", INFERENCE, {"mean": np.ones(3, int)}, TypeError, "mean: given dtype int64, want float32 or "
                                                                          "float64"),
    ("var complex", INFERENCE, {"var": np.ones(3, complex)}, TypeError, "var: given dtype complex128, want float32 or "
                                                                        "float64"),
    *(
        (f"{name} of {half} beside {x}", INFERENCE, _of(x, **{name: np.ones(3, half)}), TypeError,
         f"{name}: given dtype {half}, want float32 or float64")
        for name in ("mean", "var") for half in HALF for x in (half, "float32")
    ),
    ("mean without var", INFERENCE, {"var": None}, ValueError,
     "given running mean without running var; want both, or neither for batch statistics"),
    ("var without mean", INFERENCE, {"mean": None}, ValueError,
     "given running var without running mean; want both, or neither for batch statistics"),
    *(
        (f"eps {eps}", TRAINING, {"eps": eps}, ValueError, f"eps: given {eps}, want a positive number in training, "
                                                           f"e.g. 1e-5")
        for eps in (0, -1e-5, float("nan"), float("inf"))
    ),
    *(
        (f"eps {eps}", INFERENCE, {"eps": eps}, ValueError, f"eps: given {eps}, want a number that is not negative")
        for eps in (-1e-5, float("nan"), float("inf"))
    ),
    ("eps a word", WRITING, {"eps": "small"}, TypeError, "eps: given 'small', want a number"),
    ("eps None", WRITING, {"eps": None}, TypeError, "eps: given None, want a number"),
    ("one value per channel", ("batch_norm",), {"x": _float32(1, 3, 1), "out": None}, ValueError,
     f"Expected more than 1 value per channel when training, got input size (1, 3, 1): {MORE}"),
    ("one value per channel", ("batch_norm_backward",),
     {"x": _float32(1, 3), "dy": _float32(1, 3), "out": None, "moments": fastbn.Moments(1, np.zeros(3), np.zeros(3))},
     ValueError,
     f"Expected more than 1 value per channel when training, got input size (1, 3): {MORE}"),
    ("moments a tuple", ("batch_norm_backward",), {"moments": (np.zeros(3), np.ones(3))}, TypeError,
     "moments: given tuple, want the Moments that batch_norm returned"),
    ("moments None", ("batch_norm_backward",), {"moments": None}, TypeError,
     "moments: given NoneType, want the Moments that batch_norm returned"),
    ("moments of other channels", ("batch_norm_backward",), {"moments": fastbn.Moments(20, np.zeros(4), np.ones(4))},
    ValueError,
     "moments: given 4 channels, want 3, as x has"),
    ("moments of another count", ("batch_norm_backward",), {"moments": fastbn.Moments(19, np.zeros(3), np.ones(3))},
    ValueError,
     "moments: given statistics of 19 values per channel, want 20, as x has"),
    ("out a list", WRITING, {"out": [1.0]}, TypeError, "out: given list, want a numpy.ndarray of shape (4, 3, 5) and "
                                                       "dtype float32"),
    ("out of float64", WRITING, {"out": np.ones(SHAPE)}, TypeError, "out: given dtype float64, want float32, the "
                                                                    "dtype of x"),
    ("out big-endian", WRITING, {"out": np.ones(SHAPE, ">f4")}, TypeError,
     "out: given dtype >f4 in swapped byte order, want float32, the dtype of x"),
    *(
        (f"out big-endian {half}", WRITING, _of(half, out=np.ones(SHAPE, BIG[half])), TypeError,
         f"out: given dtype {BIG[half]} in swapped byte order, want {half}, the dtype of x")
        for half in HALF
    ),
    ("out of another shape", WRITING, {"out": _float32(4, 3, 4)}, ValueError, "out: given shape (4, 3, 4), want (4, "
                                                                              "3, 5), the shape of x"),
    ("out read-only", WRITING, {"out": _read_only()}, ValueError, "out: given a read-only array, want one that can be "
                                                                  "written"),
    ("out of shared elements", WRITING, {"out": np.lib.stride_tricks.as_strided(_float32(3, 5), SHAPE, (0, 20, 4))},
    ValueError,
     "out: given an array whose elements share memory (strides (0, 20, 4)), want one of its own memory"),
    ("out overlaps x", WRITING, _overlapping(), ValueError,
     "out: given an array that overlaps an input in part; want the input itself, or memory apart from it"),
    ("out overlaps dy", BACKWARD, _overlapping_dy(), ValueError,
     "out: given an array that overlaps an input in part; want the input itself, or memory apart from it"),
    ("out is x backwards", WRITING, _reversed(), ValueError,
     "out: given an array that overlaps an input in part; want the input itself, or memory apart from it"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "given", "error", "message"),
    [pytest.param(name, *rest, id=f"{name}: {what}") for what, names, *rest in BAD for name in names],
)
def test_bad_input(function: str, given: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    refused(function, backend, error, message, given)


@pytest.mark.parametrize(
    ("name", "functions"),
    [("x", EVERY), ("dy", BACKWARD), ("gamma", WRITING), ("beta", FORWARD), ("mean", INFERENCE), ("var", INFERENCE)],
)
def test_ragged_lists(name: str, functions: tuple[str, ...], backend: str) -> None:
    for function in functions:
        with pytest.raises(
            TypeError,
            match=rf"^{name}: given ragged or mixed data \(.*inhomogeneous.*\), want an array of float32 or float64$",
        ):
            FUNCTIONS[function](_good(**{name: [[1.0, 2.0], [3.0]]}), backend)


# 2^46 and more elements: whoever allocates an array like x fails with MemoryError, whatever the machine, and never gets
# to the error.
HUGE = (1 << 23, 3, 1 << 22)


def _huge(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


def test_huge_shape_cannot_be_allocated() -> None:
    with pytest.raises(MemoryError):
        np.empty(HUGE, np.float32)


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
@pytest.mark.parametrize(
    ("given", "message", "functions"),
    [
        ({"axis": 5}, "axis: given 5", EVERY),
        ({"gamma": _float32(4)}, "gamma: given shape (4,)", WRITING),
        ({"gamma": np.ones(3)}, "gamma: given dtype float64", WRITING),
        ({"beta": _float32(4)}, "beta: given shape (4,)", FORWARD),
        ({"mean": _float32(4)}, "mean: given shape (4,)", INFERENCE),
        ({"eps": -1.0}, "eps: given -1.0", WRITING),
        ({"dy": _float32(4)}, "dy: given shape (4,)", BACKWARD),
        (
            {"moments": fastbn.Moments(20, np.zeros(3), np.ones(3))},
            "moments: given statistics of 20 values",
            ("batch_norm_backward",),
        ),
        ({"out": _float32(4)}, "out: given shape (4,)", WRITING),
        ({"out": _huge(HUGE, "f4")}, "out: given a read-only array", WRITING),
    ],
    ids=lambda value: None if isinstance(value, tuple | dict) else value,
)
def test_nothing_is_allocated_before_the_error(
    given: dict[str, Any], message: str, functions: tuple[str, ...], dtype: str, backend: str
) -> None:
    x = _huge(HUGE, dtype)
    moments = fastbn.Moments(x.size // 3, np.zeros(3), np.ones(3))
    for function in functions:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            FUNCTIONS[function](_good(**{"x": x, "dy": x, "out": None, "moments": moments} | given), backend)


@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_nothing_is_allocated_before_the_count_is_checked(dtype: str, backend: str) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fastbn.batch_norm(_huge((1, 1 << 46), dtype), backend=backend)
