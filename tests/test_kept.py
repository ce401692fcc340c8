"""Arrays that a user gives a layer, and `out` beside parameters and statistics: served right, whatever their strides,
or refused.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from shapes import LAYOUTS

import fastbn
from fastbn.fold import fold

SHAPE, C = (6, 11, 5), 11
NAMES = ("gamma", "beta", "running_mean", "running_var")
X = np.random.default_rng(0).normal(3, 2, SHAPE).astype(np.float32)
STRIDED = [name for name in LAYOUTS if name not in ("broadcast", "one_channel_for_all", "big_endian")]


def _layer(backend: str, dtype: str = "float32") -> fastbn.BatchNorm:
    bn = fastbn.BatchNorm(C, dtype=dtype, backend=backend)
    for k, name in enumerate(NAMES):
        getattr(bn, name)[...] = np.linspace(0.5, 2 + k, C)
    return bn


def _root(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _train(bn: fastbn.BatchNorm, x: Any) -> list[Any]:
    """All that a layer does with what it keeps."""
    found = [bn(x), bn.backward(x), bn.dgamma, bn.dbeta, bn.eval()(x), *bn.folded_affine(), *bn.state_dict().values()]
    bn.train().recalibrate([x], progress=False)
    found += bn.state_dict().values()
    bn.load_state_dict({key: value + 1 for key, value in bn.state_dict().items()})
    return [*found, *bn.state_dict().values(), *fold(bn, np.ones((C, 2), "f4"))]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kept_arrays_of_any_stride_give_the_same_bits_and_nothing_beside_them_changes(dtype: str, backend: str) -> None:
    x = X.astype(dtype)
    want = _train(_layer(backend, dtype), x)
    for arrangement in STRIDED:
        bn = _layer(backend, dtype)
        for name in NAMES:
            setattr(bn, name, LAYOUTS[arrangement](getattr(bn, name), 0))
        first = {name: (getattr(bn, name), getattr(bn, name).copy()) for name in NAMES}
        beside = {name: _root(array).tobytes() for name, (array, _) in first.items()}
        for found, wanted in zip(_train(bn, x), want, strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=arrangement)
        for name, (array, value) in first.items():
            assert getattr(bn, name) is array
            array[...] = value
            assert _root(array).tobytes() == beside[name], f"{arrangement}: wrote beside {name}"


def test_parameters_and_statistics_as_columns_of_one_table(backend: str) -> None:
    want, bn = _layer(backend), _layer(backend)
    table = np.stack([getattr(bn, name) for name in NAMES], 1)
    bn.gamma, bn.beta, bn.running_mean, bn.running_var = table.T
    for found, wanted in zip(_train(bn, X), _train(want, X), strict=True):
        np.testing.assert_array_equal(found, wanted)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _strides(step: int) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.ones(C, np.float32), (C,), (step,))


_LENGTH = f"given shape {{0.shape}}, want ({C},), one value per channel of this layer"
_DTYPE = "given dtype {0.dtype}{2}, want float32, this layer's: bn.{1} = bn.{1}.astype('float32')"
_KIND = f"given {{0.__class__.__name__}}, want a numpy.ndarray of shape ({C},) and dtype float32"
_MASK = "given a masked array, whose mask would be ignored; want a plain array: bn.{1}.filled(...)"
_FIXED = "given a read-only array, want one that can be written: give it a copy"
_REPEATED = "given an array whose elements share memory (strides {0.strides}): give it a copy"
# What is wrong: the array, the error, and whether that is only one for who writes.
WRONG: dict[str, tuple[Any, type[Exception], str, bool]] = {
    "short": (np.ones(16, "f4")[:7], ValueError, _LENGTH, False),
    "long": (np.ones(16, "f4"), ValueError, _LENGTH, False),
    "of one value": (np.ones(1, "f4"), ValueError, _LENGTH, False),
    "empty": (np.ones(0, "f4"), ValueError, _LENGTH, False),
    "0-d": (np.ones((), "f4"), ValueError, _LENGTH, False),
    "a row": (np.ones((1, C), "f4"), ValueError, _LENGTH, False),
    "of rank 17": (np.ones((1,) * 16 + (C,), "f4"), ValueError, _LENGTH, False),
    "float64": (np.ones(C), TypeError, _DTYPE, True),
    "int64": (np.ones(C, int), TypeError, _DTYPE, False),
    "int32": (np.ones(C, "i4"), TypeError, _DTYPE, False),
    "float16": (np.ones(C, "f2"), TypeError, _DTYPE, False),
    "big-endian": (np.ones(C, ">f4"), TypeError, _DTYPE, True),
    "of objects": (np.ones(C, object), TypeError, _DTYPE, False),
    "a list": ([1.0] * C, TypeError, _KIND, False),
    "a number": (1.0, TypeError, _KIND, False),
    "masked": (np.ma.ones(C, "f4"), TypeError, _MASK, False),
    "read-only": (_read_only(np.ones(C, "f4")), ValueError, _FIXED, True),
    "broadcast": (np.broadcast_to(np.ones(1, "f4"), C), ValueError, _FIXED, True),
    "repeated": (_strides(0), ValueError, _REPEATED, True),
    "overlapping": (_strides(2), ValueError, _REPEATED, True),
}

STATE = {key: np.ones(C, "f4") for key in ("weight", "bias", "running_mean", "running_var")}
Use = Callable[[fastbn.BatchNorm, Any], Any]
# Each use of a layer's arrays: who does it, and whether it writes them.
USES: dict[str, tuple[Use, bool]] = {
    "training": (lambda bn, out: bn(X, out), True),
    "evaluation": (lambda bn, out: bn.eval()(X, out), False),
    "recalibrate": (lambda bn, out: bn.recalibrate([X], progress=False), True),
    "load_state_dict": (lambda bn, out: bn.load_state_dict(STATE), True),
    "state_dict": (lambda bn, out: bn.state_dict(), False),
    "folded_affine": (lambda bn, out: bn.folded_affine(), False),
    "fold": (lambda bn, out: fold(bn, np.ones((C, 2), "f4")), False),
    "to": (lambda bn, out: bn.to("cpu"), False),
}
RUNNING = ("training", "evaluation", "recalibrate")  # which ask of gamma and beta what batch_norm asks, or nothing


def _refused(bn: fastbn.BatchNorm, use: str, error: type[Exception], message: str) -> None:
    """Exactly this message, and nothing has changed: not the memory around an array either."""
    out = np.full(SHAPE, -7, np.float32)
    arrays = [array for name in NAMES if isinstance(array := getattr(bn, name), np.ndarray)]
    before = [_root(array).tobytes() for array in arrays]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        USES[use][0](bn, out)
    assert [_root(array).tobytes() for array in arrays] == before
    assert (out == -7).all()
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arrays_are_refused_before_anything_is_computed(what: str, backend: str) -> None:
    value, error, message, written = WRONG[what]
    order = " in swapped byte order" if what == "big-endian" else ""
    for use, (run, writes) in USES.items():
        for name in NAMES[2:] if use in RUNNING else NAMES:
            bn = _layer(backend)
            setattr(bn, name, value)
            if writes or not written:
                _refused(bn, use, error, f"{name}: {message.format(value, name, order)}")
            else:
                run(bn, None)


@pytest.mark.parametrize("use", USES)
def test_arrays_that_are_written_lie_apart(use: str, backend: str) -> None:
    whole = np.ones(2 * C, np.float32)
    pairs = [("running_mean", "running_var"), ("gamma", "running_mean"), ("beta", "running_var"), ("gamma", "beta")]
    for pair in pairs:
        writes = [name for name in pair if USES[use][1] and (use == "load_state_dict" or name in NAMES[2:])]
        for arrays in (
            (whole[:C], whole[:C]),
            (whole[:C], whole[C // 2 :][:C]),
            (whole[::2], whole[:C]),
            (whole[::2], whole[1::2]),
        ):
            bn = _layer(backend)
            for name, array in zip(pair, arrays, strict=True):
                setattr(bn, name, array)
            if writes and np.shares_memory(*arrays):
                other = next(name for name in pair if name != writes[0])
                message = (
                    f"{writes[0]}: given an array that overlaps {other}, want memory apart from it: give it a copy"
                )
                _refused(bn, use, ValueError, message)
            else:
                USES[use][0](bn, None)


def _outs(values: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """An `out`, and arrays (C,) within it, across its end, and in every other of its elements."""
    memory = np.full(values.size + C, 1.0, values.dtype)
    return memory[: values.size].reshape(values.shape), [memory[:C], memory[values.size - 1 :][:C], memory[: 2 * C : 2]]


COUNT = X.size // C


def _backward(mean: Any, m2: Any, **given: Any) -> Any:
    return fastbn.batch_norm_backward(moments=fastbn.Moments(COUNT, mean, m2), **given)


def _backward_input(**given: Any) -> Any:
    return fastbn.batch_norm_backward_input(count=COUNT, **given)


# Every function that takes `out`: arrays like it, and rows that it must lie apart from.
OUT: dict[str, tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]] = {
    "batch_norm": (fastbn.batch_norm, ("x",), ("gamma", "beta")),
    "batch_norm_inference": (fastbn.batch_norm_inference, ("x",), ("mean", "var", "gamma", "beta")),
    "batch_norm_backward": (_backward, ("dy", "x"), ("mean", "m2", "gamma")),
    "batch_norm_inference_backward": (fastbn.batch_norm_inference_backward, ("dy", "x"), ("mean", "var", "gamma")),
    "batch_norm_backward_input": (_backward_input, ("dy", "x"), ("mean", "var", "sum_dy", "sum_dy_xhat", "gamma")),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("function", OUT)
def test_out_lies_apart_from_parameters_and_statistics(function: str, dtype: str, backend: str) -> None:
    call, like, rows = OUT[function]
    values = X.astype(dtype)
    good = {name: values for name in like} | {name: np.ones(C, dtype) for name in rows}
    for name in rows:
        out, inside = _outs(values)
        called = f"moments.{name}" if function == "batch_norm_backward" and name != "gamma" else name
        if called != name and dtype != "float64":  # Moments keeps copies of these
            continue
        for array in inside:
            before = _root(out).tobytes()
            with pytest.raises(
                ValueError, match=f"^out: given an array that overlaps {called}; want memory apart from it$"
            ):
                call(**good | {name: array}, out=out, backend=backend)
            assert _root(out).tobytes() == before
    memory = np.ones(values.size + C, dtype)  # one memory, apart
    call(**good | dict.fromkeys(rows, memory[values.size :]), out=memory[: values.size].reshape(SHAPE), backend=backend)


def test_out_that_overlaps_what_is_converted_is_refused_too(backend: str) -> None:
    """Of a copy the result would be right, and the parameter gone."""
    out, inside = _outs(X)

    class Container:
        dtype = inside[0].dtype

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return inside[0]

    for gamma in (inside[0][::-1], Container()):
        with pytest.raises(ValueError, match=r"^out: given an array that overlaps gamma; want memory apart from it$"):
            fastbn.batch_norm(X, gamma, out=out, backend=backend)


@pytest.mark.parametrize("training", [True, False])
def test_out_of_a_layer_lies_apart_from_what_it_keeps(training: bool, backend: str) -> None:
    for name in NAMES:
        out, inside = _outs(X)
        for array in inside:
            bn = _layer(backend) if training else _layer(backend).eval(backward=True)
            setattr(bn, name, array)
            before = out.base.tobytes()
            message = f"^out: given an array that overlaps {name}; want memory apart from it$"
            with pytest.raises(ValueError, match=message):
                bn(X, out)
            assert out.base.tobytes() == before
            assert bn.num_batches_tracked == 0
            bn(X)
            before = out.base.tobytes()
            with pytest.raises(ValueError, match=message):
                bn.backward(X, out)
            assert out.base.tobytes() == before
            assert bn.dgamma is None


def test_the_same_memory_in_other_strides_of_axes_of_length_1_is_in_place(backend: str) -> None:
    """image[None] has a stride of 0 there, a reshaped one another."""
    want, _ = fastbn.batch_norm(X[None], backend=backend)
    for stride in (0, 4, -8, X.nbytes):
        image = X.copy()
        seen = np.lib.stride_tricks.as_strided(image, (1, *SHAPE), (stride, *image.strides))
        y, _ = fastbn.batch_norm(image[None], out=seen, backend=backend)
        np.testing.assert_array_equal(y, want)
    bn, image = fastbn.BatchNorm(SHAPE[0], backend=backend), X.copy()
    np.testing.assert_array_equal(bn(image[None], image.reshape(1, *SHAPE)), want)
    with pytest.raises(RuntimeError, match="which was overwritten by out=x"):
        bn.backward(X[None])


def test_in_place_in_swapped_byte_order_is_refused(backend: str) -> None:
    """The result is native: it would be read backwards."""
    x = X.astype(">f4")
    for out in (x, np.empty_like(x)):  # which share their dtype, the object
        before = x.tobytes()
        with pytest.raises(
            TypeError, match=r"^out: given dtype >f4 in swapped byte order, want float32, the dtype of x$"
        ):
            fastbn.batch_norm(x, out=out, backend=backend)
        assert x.tobytes() == before


def test_what_only_reads_statistics_takes_both_precisions(backend: str) -> None:
    for dtype, other in (("float32", "float64"), ("float64", "float32"), ("float32", ">f8")):
        x, want, bn = (
            X.astype(dtype),
            _layer(backend, dtype).eval(backward=True),
            _layer(backend, dtype).eval(backward=True),
        )
        for name in NAMES[2:]:
            setattr(bn, name, getattr(bn, name).astype(other))
            getattr(want, name)[...] = getattr(bn, name)
        y, dx = bn(x), bn.backward(x)
        assert y.dtype == dx.dtype == dtype
        np.testing.assert_allclose(y, want(x), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, want.backward(x), rtol=1e-5)
        np.testing.assert_allclose(bn.folded_affine(), want.folded_affine(), rtol=1e-6)
        for key, value in bn.state_dict().items():
            np.testing.assert_allclose(value, want.state_dict()[key], rtol=1e-6, err_msg=key)
