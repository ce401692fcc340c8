"""BatchNorm.recalibrate: running statistics that are those of all batches, and nothing half-written."""

import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from launch import python
from tolerances import check

import fastbn
from fastbn import progress
from fastbn.arguments.errors import MissingExtra

SIZES = (7, 1, 0, 12, 3)  # batches of all sizes: an average over batches would be another number
OTHERS = (0, 2, 3)


def _batches(offset: float = 3.0, dtype: Any = np.float32) -> list[np.ndarray]:
    """Channels of scales 1 to 3; each batch has a mean of its own."""
    rng = np.random.default_rng(0)
    scale = np.linspace(1.0, 3.0, 4).reshape(-1, 1, 1)
    return [(offset + scale * (rng.standard_normal((n, 4, 5, 6)) + i)).astype(dtype) for i, n in enumerate(SIZES)]


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_are_those_of_all_batches_together(dtype: str, unbiased: bool, offset: float, backend: str) -> None:
    batches = _batches(offset, dtype)
    layer = fastbn.BatchNorm(4, dtype=dtype, unbiased_running_var=unbiased, backend=backend, num_threads=1)
    layer(batches[0])  # has seen something before
    mean, var = layer.running_mean, layer.running_var
    assert layer.recalibrate(iter(batches), progress=False) is layer
    assert layer.running_mean is mean  # in place
    assert layer.running_var is var
    whole = np.concatenate(batches).astype(np.float64)
    want = whole.var(OTHERS, ddof=int(unbiased))
    check("mean", dtype, mean, whole.mean(OTHERS), np.maximum(np.abs(whole.mean(OTHERS)), np.sqrt(want)))
    check("var", dtype, var, want, want)
    assert (mean.dtype, var.dtype) == (np.dtype(dtype), np.dtype(dtype))
    assert layer.num_batches_tracked == 4  # an empty one is not counted, as in training


def test_evaluation_normalizes_the_whole() -> None:
    batches = _batches(1e2)
    layer = fastbn.BatchNorm(4, unbiased_running_var=False).recalibrate(batches, progress=False).eval()
    y = np.concatenate([layer(x) for x in batches]).astype(np.float64)
    np.testing.assert_allclose(y.mean(OTHERS), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.var(OTHERS), 1.0, rtol=1e-4)


def test_other_axes_dtypes_and_array_likes() -> None:
    batches = _batches()
    last = fastbn.BatchNorm(4, axis=-1).recalibrate([x.transpose(0, 2, 3, 1) for x in batches], progress=False)
    first = fastbn.BatchNorm(4).recalibrate(batches, progress=False)
    np.testing.assert_allclose(last.running_mean, first.running_mean, rtol=1e-6)
    halves = [x.astype(np.float16) for x in batches]
    half = fastbn.BatchNorm(4).recalibrate(halves, progress=False)
    want = np.concatenate(halves).astype(np.float64)
    np.testing.assert_allclose(half.running_var, want.var(OTHERS, ddof=1), rtol=1e-6)
    lists = fastbn.BatchNorm(2, dtype=np.float64).recalibrate([[[1.0, 2.0], [3.0, 6.0]]], progress=False)
    np.testing.assert_array_equal(lists.running_mean, [2.0, 4.0])
    np.testing.assert_array_equal(lists.running_var, [2.0, 8.0])


LOADERS: dict[str, Callable[[np.ndarray], Any]] = {
    "(input, target)": lambda x: (x, x + 100),
    "[input, target]": lambda x: [x, x + 100],
    "labels": lambda x: (x, np.arange(len(x))),
    "ragged labels": lambda x: [x, [[1], [2, 3]]],
    "(input,)": lambda x: (x,),
    "((input, mask), target)": lambda x: ((x, x > 0), [1]),
    "a list of numbers": lambda x: x.tolist(),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_of_what_a_loader_gives_the_first_array_is_taken(loader: str) -> None:
    batches = _batches(dtype=np.float64)
    want = fastbn.BatchNorm(4, dtype="float64").recalibrate(batches, progress=False)
    found = fastbn.BatchNorm(4, dtype="float64").recalibrate(
        (LOADERS[loader](x) for x in batches if len(x)), progress=False
    )
    assert _state(found) == _state(want)


def test_parameters_mode_and_saved_forward_are_left_alone() -> None:
    layer = fastbn.BatchNorm(4)
    layer.gamma[:] = 2.0
    x = _batches()[0]
    layer(x)
    dx = layer.backward(x)
    assert layer.recalibrate([x + 1], progress=False).training
    np.testing.assert_array_equal(layer.backward(x), dx)
    assert (layer.gamma == 2.0).all()
    assert not layer.eval().recalibrate([x], progress=False).training


def test_the_cumulative_average_goes_on_from_there() -> None:
    layer = fastbn.BatchNorm(4, momentum=None)
    batches = [x for x in _batches() if len(x) == 7] * 3
    layer.recalibrate(batches[:2], progress=False)
    before = layer.running_mean.copy()
    layer(batches[2] + 3)
    np.testing.assert_allclose(layer.running_mean, before + 1.0, rtol=1e-5)  # a third of the way to 3 more


def _state(layer: fastbn.BatchNorm) -> dict[str, bytes]:
    return {key: value.tobytes() for key, value in layer.state_dict().items()}


def _fails_at_the_end() -> Iterator[np.ndarray]:
    yield from _batches()
    raise OSError("the disk is gone")


ONE = np.ones((1, 4, 1, 1), np.float32)
REFUSED: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "batches: given no values, want at least one batch that has some (an iterator gives its batches "
                     "only once)"),
    ([ONE[:0]], ValueError, "batches: given no values, want at least one batch that has some (an iterator gives its "
                            "batches only once)"),
    ([ONE], ValueError, "batches: given one value per channel in all, want two or more: one has no unbiased variance"),
    (ONE, TypeError, "batches: given one ndarray, want an iterable of arrays: [x] for a single batch"),
    ([ONE, {"x": ONE, "y": ONE}], TypeError, "batches: batch 1: given dict with keys 'x', 'y', want arrays: "
                                             "(batch[key] for batch in loader), with the key of the input"),
    ([({"x": ONE}, ONE)], TypeError, "batches: batch 0: given dict with keys 'x', want arrays: (batch[key] for batch "
                                     "in loader), with the key of the input"),
    ({"a": ONE}, TypeError, "batches: given dict with keys 'a', want an iterable of arrays: its values()?"),
    ((ONE, ONE), TypeError, "batches: given a tuple, one (input, target) of a loader? want the loader, or [batch]"),
    *(
        ([ONE, batch], TypeError, "batches: batch 1: given a list of 3 arrays of shape (4, 1, 1), which forward would "
                                  "join to one, want an array: numpy.stack(batch), or batch[0] for the first alone")
        for batch in ([ONE[0]] * 3, ([ONE[0]] * 3, ONE))
    ),
    (7, TypeError, "batches: given int, want an iterable of arrays"),
    (_fails_at_the_end(), OSError, "the disk is gone"),
    ([ONE, ONE[:, :2]], ValueError, "batches: batch 1: x: given 2 channels along axis 1 of shape (1, 2, 1, 1), want "
                                    "4, as this layer has"),
    ([ONE, ONE.astype(np.float64)], TypeError, "batches: batch 1: x: given dtype float64, want float32, this layer's: "
                                               "convert x, or make the layer with dtype='float64'"),
    ([ONE, ONE.astype(int)], TypeError, "batches: batch 1: x: given dtype int64, want float16, bfloat16, float32 or "
                                        "float64: convert it first, e.g. x.astype('float32')"),
]  # fmt: skip


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize(("batches", "error", "message"), REFUSED)
def test_after_an_error_nothing_has_changed(batches: Any, error: type[Exception], message: str, progress: bool) -> None:
    if isinstance(batches, Iterator):
        batches = _fails_at_the_end()
    layer = fastbn.BatchNorm(4)
    layer(_batches()[0])
    before = _state(layer)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        layer.recalibrate(batches, progress=progress)
    assert _state(layer) == before


def test_one_value_is_enough_without_the_unbiased_variance() -> None:
    layer = fastbn.BatchNorm(4, unbiased_running_var=False).recalibrate([ONE * 5], progress=False)
    np.testing.assert_array_equal(layer.running_mean, np.full(4, 5.0))
    np.testing.assert_array_equal(layer.running_var, np.zeros(4))


def test_a_layer_without_running_statistics() -> None:
    message = "recalibrate: this layer keeps no running statistics; make it with track_running_stats=True"
    with pytest.raises(ValueError, match=f"^{message}$"):
        fastbn.BatchNorm(4, track_running_stats=False).recalibrate(_batches(), progress=False)


def test_nan_stays_in_its_channel() -> None:
    batches = _batches()
    clean = fastbn.BatchNorm(4).recalibrate(batches, progress=False)
    batches[3][2, 1, 0, 0] = np.nan
    layer = fastbn.BatchNorm(4).recalibrate(batches, progress=False)
    assert np.isnan(layer.running_var).tolist() == [False, True, False, False]
    np.testing.assert_array_equal(layer.running_mean[[0, 2, 3]], clean.running_mean[[0, 2, 3]])


def test_a_bar_counts_the_batches_where_there_is_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="a progress bar: pip install 'fastbn[demo]'")
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    fastbn.BatchNorm(4).recalibrate(_batches())
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "recalibrate" in shown
    assert "5/5" in shown
    monkeypatch.delenv("FORCE_COLOR")
    fastbn.BatchNorm(4).recalibrate(_batches())
    assert capsys.readouterr() == ("", "")


def test_without_rich_there_is_no_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "rich", None)
    found = fastbn.BatchNorm(4).recalibrate(_batches())
    assert _state(found) == _state(fastbn.BatchNorm(4).recalibrate(_batches(), progress=False))
    assert capsys.readouterr() == ("", "")
    with pytest.raises(MissingExtra, match=r"^this command needs rich: pip install 'fastbn\[demo\]'$") as raised:
        progress.need()
    assert raised.value.__suppress_context__  # rich's own traceback says no more


def test_rich_is_not_imported_without_a_bar() -> None:
    code = (
        "import sys, numpy, fastbn; fastbn.BatchNorm(2).recalibrate([numpy.eye(2, dtype='float32')], progress=False); "
        "print('rich' in sys.modules)"
    )
    assert python("-c", code) == "False\n"


def test_items_come_through_the_bar_as_they_are() -> None:
    pytest.importorskip("rich", reason="a progress bar: pip install 'fastbn[demo]'")
    with progress.tracked((str(i) for i in range(3)), "recalibrate") as items:
        assert list(items) == ["0", "1", "2"]
