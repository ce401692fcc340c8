"""The backward in two halves: parts of a batch, their sums added up, give the gradients of the whole."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import published
import pytest
from shapes import CASES, COMPACT, DTYPES, EMPTY, LAYOUTS, Case, arrange, draw, every_dtype_and_backend
from tolerances import check, scales

import fastbn

EPS = 1e-5


def pieces(case: Case) -> list[tuple[slice, ...]]:
    """An empty part, one value of the longest axis beside the channels', none again, and the rest."""
    axis = case.axis % len(case.shape)
    along = max((a for a in range(len(case.shape)) if a != axis), key=lambda a: case.shape[a])
    return [(slice(None),) * along + (slice(a, b),) for a, b in itertools.pairwise((0, 0, 1, 1, case.shape[along]))]


def in_parts(
    x: Any, dy: Any, s: Any, gamma: Any, case: Case, backend: str | None = None
) -> tuple[np.ndarray, Any, Any]:
    """dx, sum_dy and sum_dy_xhat of the whole, computed in parts."""
    parts = pieces(case)
    statistics = (s.mean, s.var)
    sums = [fastbn.batch_norm_backward_reduce(dy[p], x[p], *statistics, case.axis, EPS, backend=backend) for p in parts]
    assert all(a.dtype == b.dtype == np.float64 for a, b in sums)
    assert not any(total.any() for total in (*sums[0], *sums[2]))  # of empty parts
    whole = [np.add.reduce(both) for both in zip(*sums, strict=True)]
    dx = np.empty_like(x)
    for p in parts:
        dx[p] = fastbn.batch_norm_backward_input(
            dy[p], x[p], *statistics, *whole, s.count, gamma, case.axis, EPS, backend=backend
        )
    return dx, *whole


def verify(x: np.ndarray, dy: np.ndarray, gamma: Any, case: Case, s: Any, found: tuple[np.ndarray, Any, Any]) -> None:
    g = published.gradients(dy, x, s.mean, s.var, gamma, case.axis, EPS, training=True)
    scale = scales(dy, x, s.mean, s.var, gamma, None, case.axis, EPS, training=True)
    check("dx", x.dtype, found[0], g.dx, scale.dx)
    check("dbeta", x.dtype, found[1], g.dbeta, scale.dbeta)
    check("dgamma", x.dtype, found[2], g.dgamma, scale.dgamma)


@pytest.mark.parametrize("case", CASES, ids=str)
@every_dtype_and_backend
def test_parts_give_the_gradients_of_the_whole(dtype: str, backend: str, case: Case) -> None:
    x, dy, gamma, _ = draw(case, dtype)
    s = published.statistics(x, case.axis)
    for array in (x, dy, gamma, s.mean, s.var):
        array.flags.writeable = False
    verify(x, dy, gamma, case, s, in_parts(x, dy, s, gamma, case, backend))


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_at_any_offset(dtype: str, layout: str, offset: float) -> None:
    case, rng = Case((6, 5, 4, 4), 1, "enough values for sums that cancel"), np.random.default_rng(0)
    x, dy = (COMPACT[layout](rng.normal(at, 1, case.shape).astype(dtype), 1) for at in (offset, 0))
    gamma = rng.normal(1, 0.3, 5).astype(dtype)
    s = published.statistics(x, 1)
    verify(x, dy, gamma, case, s, in_parts(x, dy, s, gamma, case))
    verify(x, dy, None, case, s, in_parts(x, dy, s, None, case))


@pytest.mark.parametrize("arrangement", LAYOUTS)
def test_memory_arrangements_and_out(arrangement: str) -> None:
    case = Case((4, 6, 5, 5), 1, "a batch of images")
    x, dy, gamma, _ = draw(case, "float32")
    for first, second in ((arrangement, "C"), (arrangement, arrangement), ("C", arrangement)):
        z, dz = arrange(first, x, 1), arrange(second, dy, 1)
        s = published.statistics(z, 1)
        want = published.gradients(dz, z, s.mean, s.var, gamma, 1, EPS, training=True).dx
        scale = scales(dz, z, s.mean, s.var, gamma, None, 1, EPS, training=True).dx
        given = (s.mean, s.var, *fastbn.batch_norm_backward_reduce(dz, z, s.mean, s.var), s.count, gamma)
        check("dx", x.dtype, fastbn.batch_norm_backward_input(dz, z, *given), want, scale)
        own = dz.astype(dz.dtype.newbyteorder("="), order="K", copy=True)
        for dout, out in ((dz, np.empty(z.shape, np.float32)), (own, own)):
            assert fastbn.batch_norm_backward_input(dout, z, *given, out=out) is out
            check("dx", x.dtype, out, want, scale)


@pytest.mark.parametrize("case", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_part(dtype: str, case: Case) -> None:
    x, channels = np.empty(case.shape, dtype), case.shape[case.axis]
    mean = var = np.ones(channels)
    sums = fastbn.batch_norm_backward_reduce(x, x, mean, var, case.axis)
    for total in sums:
        np.testing.assert_array_equal(total, np.zeros(channels))
    for count in (0, 5):
        dx = fastbn.batch_norm_backward_input(x, x, mean, var, *sums, count, axis=case.axis)
        assert dx.shape == x.shape
        assert dx.dtype == x.dtype
    assert fastbn.batch_norm_backward_input(x, x, mean, var, *sums, 5, axis=case.axis, out=x) is x


def test_nan_and_inf_stay_in_their_channel() -> None:
    case = Case((4, 3, 5), 1, "three channels")
    x, dy, gamma, _ = draw(case, "float32")
    s = published.statistics(x, 1)
    clean = in_parts(x, dy, s, gamma, case)
    dy[2, 1, 3], dy[3, 2, 0] = np.nan, np.inf
    dx, *sums = in_parts(x, dy, s, gamma, case)
    np.testing.assert_array_equal(dx[:, 0], clean[0][:, 0])
    assert np.isnan(dx[:, 1]).all()
    assert not np.isfinite(sums[0][1:]).any()


def test_the_same_bits_on_any_number_of_threads() -> None:
    x = np.random.default_rng(0).normal(3, 2, (16, 32, 28, 28)).astype(np.float32)  # 1.6 MB: for the parallel kernels
    m = fastbn.moments(x)
    found = []
    for n in (1, None):
        sums = fastbn.batch_norm_backward_reduce(x, x, m.mean, m.var(), num_threads=n)
        found.append((*sums, fastbn.batch_norm_backward_input(x, x, m.mean, m.var(), *sums, m.count, num_threads=n)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


X = np.ones((4, 3, 2), np.float32)
V = np.ones(3)
GOOD: dict[str, Any] = {"dy": X, "x": X, "mean": V, "var": V, "sum_dy": V, "sum_dy_xhat": V, "count": 8}
WRONG: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"x": X.astype(int)}, TypeError, "x: given dtype int64, want float16, bfloat16, float32 or float64"),
    ({"dy": X[:2]}, ValueError, r"dy: given shape \(2, 3, 2\), want \(4, 3, 2\), the shape of x"),
    ({"dy": X.astype(float)}, TypeError, "dy: given dtype float64, want float32, the dtype of x"),
    ({"mean": V[:2]}, ValueError, r"mean: given shape \(2,\), want \(3,\)"),
    ({"var": V.astype(int)}, TypeError, "var: given dtype int64, want float32 or float64"),
    ({"var": None}, ValueError, "given running mean without running var"),
    ({"axis": 3}, ValueError, "axis: given 3, want one from -3 to 2"),
    ({"eps": 0.0}, ValueError, "eps: given 0.0, want a positive number"),
    ({"num_threads": 0}, ValueError, "num_threads: given 0, want 1 to"),
    ({"stream": 0}, TypeError, "stream: given one for an array on the host"),
    ({"backend": "tpu"}, fastbn.BackendUnavailable, "backend='tpu' can't be served"),
)
WRONG_INPUT: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"sum_dy": V[:2]}, ValueError, r"sum_dy: given shape \(2,\), want \(3,\)"),
    ({"sum_dy_xhat": V.astype(np.float16)}, TypeError, "sum_dy_xhat: given dtype float16, want float32 or float64"),
    ({"count": 7}, ValueError, "count: given 7, want at least 8, the values per channel of this part"),
    ({"count": 8.0}, TypeError, "count: given 8.0, want a whole number"),
    ({"gamma": V}, TypeError, "gamma: given dtype float64, want float32"),
    ({"out": np.empty((4, 3, 3), np.float32)}, ValueError, "out: given shape"),
    (
        {"dy": X[:1, :, :1], "x": X[:1, :, :1], "count": 1},
        ValueError,
        "Expected more than 1 value per channel when training",
    ),
)


def _reduce(given: dict[str, Any]) -> Any:
    return fastbn.batch_norm_backward_reduce(
        **{k: v for k, v in given.items() if k not in ("sum_dy", "sum_dy_xhat", "count")}
    )


def _input(given: dict[str, Any]) -> Any:
    return fastbn.batch_norm_backward_input(**given)


def _refused(call: Callable[[dict[str, Any]], Any], wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    call(GOOD)
    with pytest.raises(kind, match=words):
        call(GOOD | wrong)


@pytest.mark.parametrize(
    ("wrong", "kind", "words"), WRONG, ids=lambda value: str(list(value)) if isinstance(value, dict) else ""
)
def test_errors_of_both(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    _refused(_reduce, wrong, kind, words)
    _refused(_input, wrong, kind, words)


@pytest.mark.parametrize(
    ("wrong", "kind", "words"), WRONG_INPUT, ids=lambda value: str(list(value)) if isinstance(value, dict) else ""
)
def test_errors_of_the_second(wrong: dict[str, Any], kind: type[Exception], words: str) -> None:
    _refused(_input, wrong, kind, words)
