"""One contract for every public function, backend, dtype and memory arrangement, against the published formulas."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import published
import pytest
from shapes import (
    CASES,
    COMPACT,
    DTYPES,
    EMPTY,
    LAYOUTS,
    Case,
    arrange,
    draw,
    every_dtype_and_backend,
    memory_order,
    parameter_dtype,
)
from tolerances import check, scales

import fastbn

EPS = 1e-5
Results = dict[str, Any]


class Inputs(NamedTuple):
    x: Any
    dy: Any
    gamma: Any
    beta: Any
    mean: Any  # given statistics, as at inference
    var: Any
    axis: int


def inputs(case: Case, dtype: str, arrangement: str = "C", dy_arrangement: str | None = None) -> Inputs:
    x, dy, gamma, beta = draw(case, dtype)
    channels = case.shape[case.axis]
    mean, var = (np.linspace(*ends, channels).astype(parameter_dtype(dtype)) for ends in ((-1, 2), (0.5, 3)))
    for array in (gamma, beta, mean, var):
        array.flags.writeable = False
    dy = arrange(dy_arrangement or arrangement, dy, case.axis)
    return Inputs(arrange(arrangement, x, case.axis), dy, gamma, beta, mean, var, case.axis)


def _moments(i: Inputs, backend: str) -> Results:
    m = fastbn.moments(i.x, i.axis, backend=backend)
    return {"mean": m.mean, "var": m.var()}


def _running_moments(i: Inputs, backend: str) -> Results:
    r = fastbn.RunningMoments(np.shape(i.x)[i.axis], i.axis, backend).update(i.x)
    return {"mean": r.mean, "var": r.var()}


def _batch_norm(i: Inputs, backend: str, out: Any = None) -> Results:
    y, m = fastbn.batch_norm(i.x, i.gamma, i.beta, i.axis, EPS, out, backend=backend)
    return {"y": y, "mean": m.mean, "var": m.var()}


def _inference(i: Inputs, backend: str, out: Any = None) -> Results:
    return {
        "y.eval": fastbn.batch_norm_inference(i.x, i.mean, i.var, i.gamma, i.beta, i.axis, EPS, out, backend=backend)
    }


def _backward(i: Inputs, backend: str, out: Any = None) -> Results:
    m = fastbn.moments(i.x, i.axis, backend=backend)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(i.dy, i.x, m, i.gamma, i.axis, EPS, out, backend=backend)
    return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def _inference_backward(i: Inputs, backend: str, out: Any = None) -> Results:
    dx, dgamma, dbeta = fastbn.batch_norm_inference_backward(
        i.dy, i.x, i.mean, i.var, i.gamma, i.axis, EPS, out, backend=backend
    )
    return {"dx.eval": dx, "dgamma.eval": dgamma, "dbeta.eval": dbeta}


def _layer(i: Inputs, backend: str, out: Any, mode: str) -> Results:
    dtype = parameter_dtype(np.asarray(i.x).dtype)
    bn = fastbn.BatchNorm(np.shape(i.x)[i.axis], EPS, axis=i.axis, dtype=dtype, backend=backend)
    bn = bn.eval(backward=True) if mode else bn.train()
    bn.gamma, bn.beta = i.gamma, i.beta
    bn.running_mean, bn.running_var = np.array(i.mean, dtype), np.array(i.var, dtype)
    y = bn(i.x)
    dx = bn.backward(i.dy, out)
    found = {"y": y, "dx": dx, "dgamma": bn.dgamma, "dbeta": bn.dbeta}
    return {name + mode: array for name, array in found.items() if array is not None}


def _layer_training(i: Inputs, backend: str, out: Any = None) -> Results:
    return _layer(i, backend, out, "")


def _layer_eval(i: Inputs, backend: str, out: Any = None) -> Results:
    return _layer(i, backend, out, ".eval")


Call = Callable[..., Results]
STATISTICS: dict[str, Call] = {"moments": _moments, "RunningMoments": _running_moments}
WRITING: dict[str, Call] = {
    "batch_norm": _batch_norm,
    "batch_norm_inference": _inference,
    "batch_norm_backward": _backward,
    "batch_norm_inference_backward": _inference_backward,
    "BatchNorm": _layer_training,
    "BatchNorm.eval": _layer_eval,
}
CALLS = STATISTICS | WRITING
WHOLE = ("y", "y.eval", "dx", "dx.eval")


def written(found: Results) -> np.ndarray:
    """The array that `out` takes: dx where there is one, else y."""
    return [found[name] for name in WHOLE if name in found][-1]


def verify(found: Results, i: Inputs) -> None:
    """Right values, dtypes and shapes; mean and var in float64, y and dx in the native dtype of x, gradients of
    parameters in theirs.
    """
    x, dy = np.asarray(i.x), np.asarray(i.dy)
    native = x.dtype.newbyteorder("=")
    dtypes = {"mean": np.float64, "var": np.float64, "y": native, "dx": native}
    s = published.statistics(x, i.axis)
    assert found
    for name, array in found.items():
        quantity, _, constant = name.partition(".")
        mean, var = (i.mean, i.var) if constant else (s.mean, s.var)
        y = published.normalized(x, mean, var, i.gamma, i.beta, i.axis, EPS)
        g = published.gradients(dy, x, mean, var, i.gamma, i.axis, EPS, training=not constant)
        scale = scales(dy, x, mean, var, i.gamma, i.beta, i.axis, EPS, training=not constant)
        want = {"mean": mean, "var": var, "y": y, **g._asdict()}[quantity]
        assert type(array) is np.ndarray
        assert array.dtype == dtypes.get(quantity, parameter_dtype(native)), name
        check(quantity, native, array, want, getattr(scale, quantity))


@every_dtype_and_backend
@pytest.mark.parametrize("arrangement", LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_every_function_on_every_arrangement(call: str, arrangement: str, dtype: str, backend: str) -> None:
    for case in CASES:
        i = inputs(case, dtype, arrangement)
        before = [array.tobytes() for array in i[:6]]
        found = CALLS[call](i, backend)
        verify(found, i)
        assert [array.tobytes() for array in i[:6]] == before, f"{case}: an input changed"
        for name in set(WHOLE).intersection(found):
            compact = found[name].transpose(
                memory_order(found[name]) + [a for a in range(i.x.ndim) if i.x.shape[a] == 1]
            )
            assert compact.flags.c_contiguous, f"{case}: {name} has gaps"
            assert 0 in i.x.strides or memory_order(found[name]) == memory_order(i.x), (
                f"{case}: {name} in another memory order than x"
            )


@pytest.mark.parametrize("call", ["batch_norm_backward", "batch_norm_inference_backward", "BatchNorm"])
def test_dy_in_another_arrangement_than_x(call: str, backend: str) -> None:
    case = Case((3, 4, 5, 6), 1, "four different lengths: no two orders of the axes look alike")
    for arrangement in COMPACT:
        for dy_arrangement in LAYOUTS:
            i = inputs(case, "float32", arrangement, dy_arrangement)
            found = CALLS[call](i, backend)
            verify(found, i)
            assert memory_order(written(found)) == memory_order(i.x)


@pytest.mark.parametrize("rank", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("call", CALLS)
def test_every_axis_of_every_rank(call: str, rank: int, backend: str) -> None:
    shape = (3, 2, 4, 2, 3, 2)[:rank]
    for axis in range(-rank, rank):
        i = inputs(Case(shape, axis, "every axis"), "float32")
        verify(CALLS[call](i, backend), i)


@pytest.mark.parametrize("call", CALLS)
def test_numpy_integer_as_axis(call: str, backend: str) -> None:
    i = inputs(Case((4, 3, 5), 1, "an axis from an index computation"), "float32")
    verify(CALLS[call](i._replace(axis=np.int64(-2)), backend), i)


OUT = [name for name in LAYOUTS if name not in ("broadcast", "one_channel_for_all", "big_endian")]  # those are refused
X_BESIDE_OUT = ["C", "Fortran", "channels_last", "crop", "strided"]


def writable(values: np.ndarray, arrangement: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(array, the whole memory that it is a part of)."""
    array = LAYOUTS[arrangement](values, axis)
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return array, root


@every_dtype_and_backend
@pytest.mark.parametrize("call", WRITING)
def test_out_takes_the_result_and_nothing_beside_it_changes(call: str, dtype: str, backend: str) -> None:
    for case in (
        Case((9, 5), 1, "rank 2"),
        Case((3, 4, 21), 1, "rows with a tail"),
        Case((2, 3, 4, 5), -1, "channels innermost"),
    ):
        for arrangement in X_BESIDE_OUT:
            i = inputs(case, dtype, arrangement)
            want = written(WRITING[call](i, backend))
            for out_arrangement in OUT:
                out, root = writable(np.full(case.shape, -7.0, dtype), out_arrangement, case.axis)
                before, outside = out.copy(), root.tobytes()
                found = written(WRITING[call](i, backend, out))
                assert found is out
                np.testing.assert_array_equal(out, want, err_msg=f"{case}: x {arrangement}, out {out_arrangement}")
                out[...] = before
                assert root.tobytes() == outside, f"{case}: wrote beside out, {out_arrangement}"


@every_dtype_and_backend
@pytest.mark.parametrize("over", ["x", "dy"])
@pytest.mark.parametrize("call", WRITING)
def test_out_may_be_an_input_itself(call: str, over: str, dtype: str, backend: str) -> None:
    if over == "dy" and call in ("batch_norm", "batch_norm_inference"):
        over = "x"  # no dy there; the same as the other parameter
    for case in (
        Case((9, 5), 1, "rank 2"),
        Case((3, 4, 21), 1, "rows with a tail"),
        Case((70, 33), 1, "more columns than a vector"),
    ):
        for arrangement in OUT:
            i = inputs(case, dtype, arrangement)
            want = written(WRITING[call](i, backend))
            array, root = writable(getattr(i, over), arrangement, case.axis)
            outside = root.tobytes()
            for out in (array, array[...]):  # the same object, then the same memory
                assert written(WRITING[call](i._replace(**{over: array}), backend, out)) is out
                np.testing.assert_array_equal(out, want, err_msg=f"{case}: {over} {arrangement}")
                out[...] = getattr(i, over)
                assert root.tobytes() == outside, f"{case}: wrote beside out, {arrangement}"


@pytest.mark.parametrize("call", CALLS)
def test_empty_batches(call: str, backend: str) -> None:
    for dtype in DTYPES:  # no kernel runs, so every backend takes them all
        for case in EMPTY:
            i = inputs(case, dtype)
            channels = case.shape[case.axis]
            for name, array in CALLS[call](i, backend).items():
                quantity = name.partition(".")[0]
                assert array.shape == (case.shape if quantity in ("y", "dx") else (channels,))
                wanted = {"mean": "float64", "var": "float64", "y": dtype, "dx": dtype}.get(
                    quantity, parameter_dtype(dtype)
                )
                assert array.dtype == wanted
                np.testing.assert_array_equal(array, np.full_like(array, np.nan if quantity == "var" else 0.0))
            if call in WRITING:
                out = np.empty(case.shape, dtype)
                assert written(WRITING[call](i, backend, out)) is out


@every_dtype_and_backend
@pytest.mark.parametrize(
    "call", ["moments", "RunningMoments", "batch_norm_inference", "batch_norm_inference_backward", "BatchNorm.eval"]
)
def test_one_value_per_channel_where_the_batch_is_not_asked(call: str, dtype: str, backend: str) -> None:
    for case in (Case((1, 5), 1, "rank 2"), Case((1, 5, 1, 1), 1, "rank 4"), Case((37, 1), 0, "channels first")):
        for arrangement in LAYOUTS:
            i = inputs(case, dtype, arrangement)
            verify(CALLS[call](i, backend), i)


@every_dtype_and_backend
@pytest.mark.parametrize("call", WRITING)
def test_gamma_and_beta_each_optional(call: str, dtype: str, backend: str) -> None:
    for case in (Case((9, 5), 1, "channels last"), Case((3, 4, 21), 1, "channels first")):
        full = inputs(case, dtype)
        for absent in ({"gamma": None}, {"beta": None}, {"gamma": None, "beta": None}):
            i = full._replace(**absent)
            found = WRITING[call](i, backend)
            verify(found, i)
            if call.startswith("BatchNorm"):
                assert {"gamma", "beta"} - set(absent) == {
                    name[1:].partition(".")[0] for name in found if name[1:4] in ("gam", "bet")
                }


@every_dtype_and_backend
@pytest.mark.parametrize("call", WRITING)
def test_parameters_and_statistics_of_any_stride(call: str, dtype: str, backend: str) -> None:
    for case in (Case((9, 5), 1, "channels last"), Case((3, 4, 21), 1, "channels first")):
        i = inputs(case, dtype)
        want = WRITING[call](i, backend)
        for arrangement in ("reversed", "strided", "unaligned", "packed"):
            given = {name: arrange(arrangement, getattr(i, name), 0) for name in ("gamma", "beta", "mean", "var")}
            for name, array in WRITING[call](i._replace(**given), backend).items():
                np.testing.assert_array_equal(array, want[name])
        same_in_float64 = {name: getattr(i, name).astype(np.float64) for name in ("mean", "var")}
        for name, array in WRITING[call](i._replace(**same_in_float64), backend).items():
            np.testing.assert_array_equal(array, want[name])


class _Container:
    """Something that NumPy can read, as a data frame or another library's tensor."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.dtype = array.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._array, dtype)


@pytest.mark.parametrize("call", CALLS)
def test_lists_and_other_containers(call: str, backend: str) -> None:
    wide = inputs(Case((3, 4, 5), 1, "small enough for a list"), "float64")
    want = CALLS[call](wide, backend)
    lists = Inputs(*(array.tolist() for array in wide[:6]), wide.axis)
    containers = Inputs(*map(_Container, wide[:6]), wide.axis)
    subclass = wide._replace(x=wide.x.view(type("Subclass", (np.ndarray,), {})))
    if call.startswith("BatchNorm"):  # its parameters are arrays
        lists, containers = (i._replace(gamma=wide.gamma, beta=wide.beta) for i in (lists, containers))
    for given in (lists, containers, subclass):
        for name, array in CALLS[call](given, backend).items():
            assert type(array) is np.ndarray
            np.testing.assert_array_equal(array, want[name])


# How much of a channel of each result is not finite when one value of that channel of x or dy is not.
REACH = {
    "x": {"mean": "all", "var": "all", "y": "all", "dx": "all", "dgamma": "all", "dbeta": "none"},
    "dy": {"mean": "none", "var": "none", "y": "none", "dx": "all", "dgamma": "all", "dbeta": "all"},
}
REACH["x"] |= {"y.eval": "one", "dx.eval": "none", "dgamma.eval": "all", "dbeta.eval": "none"}
REACH["dy"] |= {"y.eval": "none", "dx.eval": "one", "dgamma.eval": "all", "dbeta.eval": "all"}


@every_dtype_and_backend
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("poisoned", ["x", "dy"])
@pytest.mark.parametrize("call", CALLS)
def test_nan_and_inf_stay_in_their_channel(call: str, poisoned: str, value: float, dtype: str, backend: str) -> None:
    for case in (Case((9, 5), 1, "channels last"), Case((70, 33), 1, "panels"), Case((3, 4, 21), 1, "channels first")):
        clean = inputs(case, dtype)
        array = getattr(clean, poisoned).copy()
        array[(2, 1, 7)[: array.ndim]] = value  # in channel 1
        found = CALLS[call](clean._replace(**{poisoned: array}), backend)
        for name, want in CALLS[call](clean, backend).items():
            channels = 1 if name in WHOLE else 0
            got, want = np.moveaxis(found[name], channels, 0), np.moveaxis(want, channels, 0)
            others = np.arange(len(want)) != 1
            np.testing.assert_array_equal(got[others], want[others], err_msg=f"{name}: another channel changed")
            reached = {"all": want[1].size, "one": 1, "none": 0}[REACH[poisoned][name]]
            assert np.count_nonzero(~np.isfinite(got[1])) == reached, name
