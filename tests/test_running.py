"""RunningMoments: statistics of data that come in chunks."""

import re

import numpy as np
import pytest

import fastbn
from fastbn import Moments, RunningMoments

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
            "it first, "
            "e.g. x.astype('float64')",
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
