"""Moments: count, mean and m2 as a value; RunningMoments: of data that come in chunks."""

import re

import numpy as np
import pytest

import fastbn
from fastbn import Moments, RunningMoments
from fastbn.arguments import dtypes
from fastbn.backends import select


def _of(values: np.ndarray) -> Moments:
    """The moments of an array (R, C), by their definition."""
    mean = values.mean(0)
    return Moments(len(values), mean, np.square(values - mean).sum(0))


ROWS = np.random.default_rng(0).standard_normal((12, 3)) * [1, 5, 0.1] + [0, 100, -7]
EMPTY = Moments(0, np.zeros(3), np.zeros(3))


@pytest.mark.parametrize("ddof", [0, 1, 2])
def test_var_and_std_are_numpys(ddof: int) -> None:
    m = _of(ROWS)
    np.testing.assert_allclose(m.var(ddof), ROWS.var(0, ddof=ddof), rtol=1e-12)
    np.testing.assert_allclose(m.std(ddof), ROWS.std(0, ddof=ddof), rtol=1e-12)


def test_var_defaults_to_the_biased_one() -> None:
    np.testing.assert_array_equal(_of(ROWS).var(), _of(ROWS).var(0))
    np.testing.assert_array_equal(_of(ROWS).std(), _of(ROWS).std(0))


@pytest.mark.parametrize(("count", "ddof"), [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)])
def test_var_is_nan_where_count_does_not_exceed_ddof(count: int, ddof: int) -> None:
    m = Moments(count, np.zeros(3), np.zeros(3))
    assert np.isnan(m.var(ddof)).all()
    assert np.isnan(m.std(ddof)).all()


def test_rstd_has_the_biased_variance_and_eps_within_the_root() -> None:
    np.testing.assert_allclose(_of(ROWS).rstd(0.5), 1 / np.sqrt(ROWS.var(0) + 0.5), rtol=1e-12)


def test_rstd_of_a_constant_channel_without_eps_is_infinite_without_a_warning() -> None:
    assert np.isposinf(Moments(4, np.ones(2), np.zeros(2)).rstd(0.0)).all()


@pytest.mark.parametrize("at", [1, 5, 11])
def test_merge_is_the_whole(at: int) -> None:
    left, right = _of(ROWS[:at]), _of(ROWS[at:])
    for merged in (left.merge(right), right.merge(left)):
        whole = _of(ROWS)
        assert merged.count == 12
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-13)


def test_merge_changes_neither_side_and_shares_no_memory() -> None:
    left, right = _of(ROWS[:5]), _of(ROWS[5:])
    before = [array.copy() for m in (left, right) for array in (m.mean, m.m2)]
    for merged in (left.merge(right), left.merge(EMPTY), EMPTY.merge(right), EMPTY.merge(EMPTY)):
        for m in (left, right, EMPTY):
            assert not np.shares_memory(merged.mean, m.mean)
            assert not np.shares_memory(merged.m2, m.m2)
    for array, was in zip([array for m in (left, right) for array in (m.mean, m.m2)], before, strict=True):
        np.testing.assert_array_equal(array, was)
    assert (left.count, right.count, EMPTY.count) == (5, 7, 0)


def test_merge_with_an_empty_side_is_the_other_to_the_last_bit() -> None:
    m = _of(ROWS)
    for merged in (m.merge(EMPTY), EMPTY.merge(m)):
        assert merged.count == m.count
        np.testing.assert_array_equal(merged.mean, m.mean)
        np.testing.assert_array_equal(merged.m2, m.m2)
    nothing = EMPTY.merge(EMPTY)
    assert nothing.count == 0
    np.testing.assert_array_equal(nothing.mean, 0)
    np.testing.assert_array_equal(nothing.m2, 0)


def test_merge_of_equal_means_keeps_the_mean_to_the_last_bit() -> None:
    third = np.full(2, 1e7 / 3)
    merged = Moments(3, third, np.zeros(2)).merge(Moments(1000, third.copy(), np.ones(2)))
    np.testing.assert_array_equal(merged.mean, third)
    np.testing.assert_array_equal(merged.m2, 1)


def test_counts_beyond_32_bits() -> None:
    half = Moments(3 * 2**40, np.zeros(1), np.full(1, 3.0 * 2**40))
    merged = half.merge(Moments(3 * 2**40, np.full(1, 2.0), np.full(1, 3.0 * 2**40)))
    assert merged.count == 6 * 2**40
    assert merged.mean == 1.0
    assert merged.var() == 2.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_merge_propagates_nan_and_inf_to_their_channel_only(value: float) -> None:
    bad = Moments(2, np.array([0.0, value, 0.0]), np.array([1.0, np.nan, 1.0]))
    for other in (_of(ROWS), bad):
        for merged in (bad.merge(other), other.merge(bad)):
            assert not np.isfinite(merged.mean[1])
            assert np.isnan(merged.m2[1])
            assert np.isfinite(merged.mean[[0, 2]]).all()
            assert np.isfinite(merged.m2[[0, 2]]).all()


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (None, TypeError, "merge: given NoneType, want Moments"),
        ((4, np.zeros(3), np.zeros(3)), TypeError, "merge: given tuple, want Moments"),
        (Moments(4, np.zeros(4), np.zeros(4)), ValueError, "merge: given 4 channels, want 3, as many as on the left"),
        (Moments(0, np.zeros(2), np.zeros(2)), ValueError, "merge: given 2 channels, want 3, as many as on the left"),
    ],
)
def test_merge_refuses_what_does_not_fit(other: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        _of(ROWS).merge(other)


def test_repr_names_every_part() -> None:
    assert repr(Moments(2, np.zeros(1), np.ones(1))) == "Moments(count=2, mean=array([0.]), m2=array([1.]))"


def test_moments_of_exact_data_are_exact(backend: str) -> None:
    """Pairs m(1 - k/8), m(1 + k/8): mean and variance are representable, in any order of summation."""
    k = np.repeat(np.arange(1, 5), 2) * np.tile([-1, 1], 4) / 8  # squares sum to 60 / 64
    m = np.array([1.0, 64.0, -2048.0])
    for dtype in ("float32", "float64"):
        for x, axis in (((m * (1 + k[:, None])).astype(dtype), 1), ((m[:, None] * (1 + k)).astype(dtype), 0)):
            found = fastbn.moments(x, axis, backend=backend)
            assert found.count == 8
            assert found.mean.dtype == found.m2.dtype == np.float64
            np.testing.assert_array_equal(found.mean, m)
            np.testing.assert_array_equal(found.m2, m**2 * 60 / 64)


# Made by hand: of stored counts and lists.


@pytest.mark.parametrize(
    "count", [np.int32(2_000_000_000), np.uint64(2_000_000_000), np.array(2_000_000_000), 2e9, np.float32(2e9)]
)
def test_counts_become_pythons(count: object) -> None:
    m = Moments(count, np.ones(2), np.ones(2))
    assert type(m.count) is int
    merged = m.merge(m)
    assert (type(merged.count), merged.count) == (int, 4_000_000_000)
    assert Moments(np.uint8(200), [1.0], [0.0]).merge(Moments(np.uint8(200), [1.0], [0.0])).count == 400


@pytest.mark.parametrize("kind", [list, tuple, np.float32, np.float16, ">f8", "int8", "bfloat16"])
def test_statistics_become_arrays_of_float64(kind: object) -> None:
    given = [1.0, 2.0]
    made = (
        kind(given)
        if kind in (list, tuple)
        else np.array(given).astype(dtypes.bfloat16() if kind == "bfloat16" else kind)
    )
    m = Moments(8, made, made)
    for values in (m.mean, m.m2):
        assert (type(values), values.dtype, values.dtype.isnative) == (np.ndarray, np.float64, True)
        np.testing.assert_array_equal(values, given)
    np.testing.assert_array_equal(m.var(), np.array(given) / 8)
    np.testing.assert_array_equal(fastbn.moments(np.eye(2, dtype="f4"), backend="reference").merge(m).count, 10)


def test_arrays_of_float64_are_not_copied() -> None:
    mean = np.zeros(3)
    assert Moments(1, mean, mean).mean is mean


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"count": 2.5}, ValueError, "count: given 2.5, want a whole number, 0 or more"),
        ({"count": -1}, ValueError, "count: given -1, want a whole number, 0 or more"),
        ({"count": float("nan")}, ValueError, "count: given nan, want a whole number, 0 or more"),
        ({"count": 2**63}, ValueError, f"count: given {2**63}, want a whole number, 0 or more, below 2**63"),
        ({"count": "8"}, TypeError, "count: given '8', want a whole number, 0 or more"),
        ({"count": [8]}, TypeError, "count: given [8], want a whole number, 0 or more"),
        ({"mean": None}, TypeError, "mean: given None, want an array"),
        ({"mean": 1.0}, ValueError, "mean: given shape (), want (C,), one value per channel"),
        ({"m2": np.ones((2, 1))}, ValueError, "m2: given shape (2, 1), want (C,), one value per channel"),
        ({"m2": np.ones(3)}, ValueError, "m2: given shape (3,), want (2,), that of mean"),
        ({"m2": ["1", "2"]}, TypeError, "m2: given dtype <U1, want numbers, of float64 or what becomes that"),
        ({"mean": np.ones(2, complex)}, TypeError, "mean: given dtype complex128, want numbers, of float64 or what "
                                                   "becomes that"),
        ({"m2": [[1.0], [1.0, 2.0]]}, TypeError, "m2: given ragged or mixed data"),
        ({"mean": np.ma.masked_all(2)}, TypeError,
         "mean: given a masked array, whose mask would be ignored; want a plain array, for example mean.filled(...)"),
    ],
)  # fmt: skip
def test_what_can_be_no_moments(given: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        Moments(**{"count": 8, "mean": np.ones(2), "m2": np.ones(2)} | given)


def test_what_was_assigned_later_becomes_that_too_or_is_refused() -> None:
    want = Moments(4, [1.0, 2.0], [3.0, 5.0])
    for name, value in (
        ("count", 4.0),
        ("count", np.int32(4)),
        ("mean", [1, 2]),
        ("mean", np.array([1, 2], "f4")),
        ("m2", (3, 5)),
    ):
        m = Moments(4, [1.0, 2.0], [3.0, 5.0])
        setattr(m, name, value)
        np.testing.assert_array_equal(m.var(1), want.var(1))
        seen = RunningMoments(2).merge(m).merge(m)
        for found in (m.merge(want), want.merge(m), m.merge(m), seen.moments):
            assert (type(found.count), found.count) == (int, 8)
            np.testing.assert_array_equal(found.mean, want.mean)
            np.testing.assert_array_equal(found.m2, 2 * want.m2)
    for name, value, message in (
        ("count", 1.5, "count: given 1.5, want a whole number, 0 or more"),
        ("mean", ["a", "b"], "mean: given dtype <U1, want numbers"),
        ("mean", [1.0], "m2: given shape (2,), want (1,), that of mean"),
        ("m2", None, "m2: given None, want an array"),
    ):
        setattr(m := Moments(4, [1.0, 2.0], [3.0, 5.0]), name, value)
        for act in (
            m.var,
            lambda m=m: m.merge(want),
            lambda m=m: want.merge(m),
            lambda m=m: RunningMoments(2).merge(m),
        ):
            with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
                act()


# What the backends compute of statistics.


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_rstd(count: int, backend: str) -> None:
    m2 = np.array([0.0, 1e-30, 2.5, 1e6, 1e40, np.inf, np.nan])
    for eps in (1e-5, 0.3, 0.0):
        found = select(backend).passes.rstd(m2, count, eps)
        assert (found.dtype, found.shape) == (np.float64, m2.shape)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(found, 1 / np.sqrt(m2 / count + eps), rtol=1e-15)


@pytest.mark.parametrize("strided", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_track(dtype: str, strided: tuple[int, int], backend: str) -> None:
    """Computed in float64 and rounded once, in memory of any stride; beyond float32 infinite, without a warning."""
    m = fastbn.Moments(8, np.array([1.0, -2.0 / 3, np.nan, 1e300]), np.array([3.0, 1e-9, 1.0, 1e300]))
    for weight in (0.0, 0.1, 1.0):
        values = np.array([0.5, 1 / 3, 7, 1], dtype), np.array([2, 1 / 7, 9, 1], dtype)
        mean, var = (np.repeat(each, step)[::step] for each, step in zip(values, strided, strict=True))
        with np.errstate(over="ignore"):
            wanted = [
                ((1 - weight) * old.astype(np.float64) + weight * new).astype(dtype)
                for old, new in ((mean, m.mean), (var, m.m2 / 7))
            ]
        select(backend).track(m, 7.0, weight, mean, var)
        np.testing.assert_allclose(mean, wanted[0], rtol=np.finfo(dtype).eps)
        np.testing.assert_allclose(var, wanted[1], rtol=np.finfo(dtype).eps)


# RunningMoments

DATA = (np.random.default_rng(0).standard_normal((20, 3, 6)) * 2 + 50).astype(np.float32)


def _check(r: RunningMoments, data: np.ndarray, axis: int) -> None:
    others = tuple(a for a in range(data.ndim) if a != axis % data.ndim)
    wide = data.astype(np.float64)
    assert r.count == data.size // data.shape[axis]
    np.testing.assert_allclose(r.mean, wide.mean(others), rtol=1e-7)
    np.testing.assert_allclose(r.var(), wide.var(others), rtol=1e-6)
    np.testing.assert_allclose(r.var(1), wide.var(others, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(r.std(), wide.std(others), rtol=1e-6)


@pytest.mark.parametrize("axis", [1, -2, 0, 2])
def test_chunks_are_the_whole(axis: int, backend: str) -> None:
    r = RunningMoments(DATA.shape[axis], axis, backend)
    cut = 2 if axis == 0 else 0  # along another axis than the channels
    for chunk in np.array_split(DATA, 4, cut):
        assert r.update(chunk) is r
    _check(r, DATA, axis)


def test_chunks_of_another_rank_and_dtype(backend: str) -> None:
    r = RunningMoments(3, -1, backend)
    r.update(DATA[:8].transpose(0, 2, 1)).update(DATA[8:].transpose(0, 2, 1).reshape(-1, 3).astype(np.float64))
    _check(r, DATA, 1)


def test_nothing_seen() -> None:
    r = RunningMoments(3)
    assert r.count == 0
    np.testing.assert_array_equal(r.mean, np.zeros(3))
    assert np.isnan(r.var()).all()
    assert np.isnan(r.std()).all()


def test_empty_chunks_change_nothing(backend: str) -> None:
    r = RunningMoments(3, backend=backend).update(DATA[:0])
    assert r.count == 0
    r.update(DATA)
    mean, var = r.mean.copy(), r.var()
    r.update(DATA[:0]).update(DATA[..., :0])
    _check(r, DATA, 1)
    np.testing.assert_array_equal(r.mean, mean)
    np.testing.assert_array_equal(r.var(), var)


def test_one_value_at_a_time(backend: str) -> None:
    r = RunningMoments(3, backend=backend)
    for row in DATA[:, :, 0]:
        r.update(row[None])
    _check(r, DATA[:, :, 0], 1)


def test_merge_takes_both_kinds_and_leaves_the_other_alone(backend: str) -> None:
    left, right = (
        RunningMoments(3, backend=backend).update(DATA[:7]),
        RunningMoments(3, backend=backend).update(DATA[7:]),
    )
    mean, count = right.mean.copy(), right.count
    assert left.merge(right) is left
    _check(left, DATA, 1)
    assert right.count == count
    np.testing.assert_array_equal(right.mean, mean)
    right.update(DATA)  # shares nothing with left
    _check(left, DATA, 1)
    other = RunningMoments(3, backend=backend).update(DATA[:7])
    other.merge(fastbn.moments(DATA[7:], backend=backend))
    np.testing.assert_array_equal(other.mean, left.mean)


def test_merge_with_an_empty_side(backend: str) -> None:
    seen, empty = RunningMoments(3, backend=backend).update(DATA), RunningMoments(3, backend=backend)
    mean, var = seen.mean.copy(), seen.var()
    for merged in (seen.merge(empty), RunningMoments(3).merge(seen)):
        assert merged.count == DATA.size // 3
        np.testing.assert_array_equal(merged.mean, mean)
        np.testing.assert_array_equal(merged.var(), var)
    assert empty.merge(RunningMoments(3)).count == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_channel_for_good(value: float, backend: str) -> None:
    bad = DATA.copy()
    bad[3, 1, 2] = value
    r = RunningMoments(3, backend=backend).update(DATA).update(bad).update(bad).update(DATA)
    assert not np.isfinite(r.mean[1])
    assert not np.isfinite(r.var()[1])
    clean = RunningMoments(3, backend=backend).update(DATA).update(DATA).update(DATA).update(DATA)
    np.testing.assert_array_equal(r.mean[[0, 2]], clean.mean[[0, 2]])
    np.testing.assert_array_equal(r.var()[[0, 2]], clean.var()[[0, 2]])


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (DATA[:, :2], ValueError, "chunk: given 2 channels along axis 1, want 3"),
        (DATA[:0, :2], ValueError, "chunk: given 2 channels along axis 1, want 3"),
        (
            DATA.astype(int),
            TypeError,
            "x: given dtype int64, want float16, bfloat16, float32 or float64, or integers of 8 or 16 bits: convert "
            "it first, e.g. x.astype('float64')",
        ),
        (DATA[0, 0], ValueError, "x: given rank 1, shape (6,); want rank 2 or more: a batch axis and a channel axis"),
    ],
)
def test_a_refused_chunk_changes_nothing(chunk: np.ndarray, error: type[Exception], message: str, backend: str) -> None:
    r = RunningMoments(3, backend=backend).update(DATA)
    before = r.count, r.mean.tobytes(), r.var().tobytes()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        r.update(chunk)
    assert (r.count, r.mean.tobytes(), r.var().tobytes()) == before


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (RunningMoments(4), ValueError, "other: given 4 channels along axis 1, want 3"),
        (Moments(1, np.zeros(2), np.zeros(2)), ValueError, "other: given 2 channels along axis 1, want 3"),
        (DATA, TypeError, "merge: given ndarray, want Moments"),
    ],
)
def test_a_refused_merge_changes_nothing(other: object, error: type[Exception], message: str) -> None:
    r = RunningMoments(3, backend="reference").update(DATA)
    before = r.count, r.mean.tobytes(), r.var().tobytes()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        r.merge(other)
    assert (r.count, r.mean.tobytes(), r.var().tobytes()) == before


@pytest.mark.parametrize(
    ("channels", "error", "message"),
    [
        (0, ValueError, "num_features: given 0, want at least 1"),
        (1.5, TypeError, "num_features: given 1.5, want a positive integer"),
    ],
)
def test_channels_are_a_positive_integer(channels: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        RunningMoments(channels)


def test_repr() -> None:
    assert repr(RunningMoments(3, axis=-1)) == "RunningMoments(3, axis=-1, count=0)"
