"""fastbn.dask: statistics and normalization of dask arrays, by every scheduler, in any chunks, without keeping
blocks.
"""

import os
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from absurd import ABSURD, TAKEN, refused

import fastbn
from fastbn import Moments

pytest.importorskip("dask.array", reason="a bridge to dask: pip install 'fastbn[dask]'")
pytest.importorskip("distributed", reason="a bridge to dask: pip install 'fastbn[dask]'")
import dask
import dask.array as da
import ml_dtypes
from dask.diagnostics import ProgressBar
from distributed import Client, LocalCluster

import fastbn.dask as bridge

pytestmark = pytest.mark.peers

SHAPE = (26, 6, 11, 9)
CHUNKS = {
    "whole": SHAPE,
    "images": (4, 6, 11, 9),
    "every axis": (7, 4, 3, 5),
    "single values": (26, 1, 1, 1),
    "uneven, some empty": ((0, 25, 1), (2, 0, 4), (11,), (0, 1, 8)),
}
OTHERS = (0, 2, 3)


def _draw(offset: float, dtype: Any = np.float32) -> np.ndarray:
    """Channels of scales 1 to 3, and a trend along the first axis: blocks have different means."""
    x = np.random.default_rng(0).standard_normal(SHAPE) + np.linspace(-2.0, 2.0, SHAPE[0]).reshape(-1, 1, 1, 1)
    return (offset + x * np.linspace(1.0, 3.0, SHAPE[1]).reshape(-1, 1, 1)).astype(dtype)


def _check(m: Moments, x: np.ndarray, relative: float) -> None:
    """Against the formulas on the whole array, in extended precision where there is any."""
    wide = x.astype(np.longdouble)
    mean, var = wide.mean(OTHERS), wide.var(OTHERS)
    assert m.count == x.size // x.shape[1]
    assert (np.abs(m.mean - mean) <= relative * np.maximum(np.abs(mean), np.sqrt(var))).all()
    assert (np.abs(m.var() - var) <= relative * var).all()


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_moments_are_those_of_one_pass_however_the_array_is_chunked(dtype: str, offset: float) -> None:
    x = _draw(offset, dtype)
    found = [bridge.moments(da.from_array(x, chunks=chunks)).compute() for chunks in CHUNKS.values()]
    one_pass = fastbn.moments(x.astype(np.float64))
    for m in found:
        _check(m, x, 1e-12)
        np.testing.assert_allclose(m.mean, one_pass.mean, rtol=1e-12, atol=1e-12)
        # that of one pass: see tolerances
        np.testing.assert_allclose(m.var(), one_pass.var(), rtol=1e-12 if offset < 1e4 else 1e-10)
        np.testing.assert_allclose(m.var(), found[0].var(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1e2])
def test_half_precision_is_widened(dtype: Any, offset: float) -> None:
    x = _draw(offset, dtype)
    _check(bridge.moments(da.from_array(x, chunks=CHUNKS["every axis"])).compute(), x, 1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_stays(dtype: Any) -> None:
    x = _draw(1e2, dtype)[..., 0, 0]
    array = da.from_array(x, chunks=(7, 4))
    m = bridge.moments(array)
    y = bridge.normalize(array, m)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y.compute(), fastbn.batch_norm_inference(x, m.compute().mean, m.compute().var()))


@pytest.mark.parametrize("values", [1, 100, 5000])
def test_pieces_that_are_widened_at_a_time_are_the_whole(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "PIECE", values)
    x = _draw(1e2)
    _check(bridge.moments(da.from_array(x, chunks=(13, 6, 11, 9))).compute(scheduler="sync"), x, 1e-12)


@pytest.mark.parametrize(("rank", "axis"), [(2, 0), (2, 1), (2, -1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 2), (4, -1)])
def test_any_axis_and_rank(rank: int, axis: int) -> None:
    x = _draw(3.0)[(0,) * (4 - rank)]
    array = da.from_array(x, chunks=3)
    m, whole = bridge.moments(array, axis), fastbn.moments(x.astype(np.float64), axis)
    np.testing.assert_allclose(m.compute().mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(m.compute().var(), whole.var(), rtol=1e-12)
    y = bridge.normalize(array, m, axis=axis).compute()
    np.testing.assert_array_equal(y, fastbn.batch_norm_inference(x, m.compute().mean, m.compute().var(), axis=axis))


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("lazy", [True, False])
def test_normalize_is_batch_norm_inference_of_the_whole(lazy: bool, chunks: Any) -> None:
    x = _draw(1e2)
    gamma, beta = np.linspace(-2, 2, 6, dtype=np.float32), np.linspace(3, -1, 6, dtype=np.float32)
    array = da.from_array(x, chunks=chunks)
    m = bridge.moments(array)
    statistics = m.compute()
    y = bridge.normalize(array, m if lazy else statistics, gamma, beta, eps=1e-3)
    assert (y.shape, y.chunks, y.dtype) == (array.shape, array.chunks, array.dtype)
    want = fastbn.batch_norm_inference(x, statistics.mean, statistics.var(), gamma, beta, eps=1e-3)
    np.testing.assert_array_equal(y.compute(), want)
    only_beta = bridge.normalize(array, statistics, beta=beta).compute()
    np.testing.assert_array_equal(
        only_beta, fastbn.batch_norm_inference(x, statistics.mean, statistics.var(), beta=beta)
    )


def _bits(m: Moments, y: np.ndarray) -> tuple[int, bytes, bytes, bytes]:
    return m.count, m.mean.tobytes(), m.m2.tobytes(), y.tobytes()


def test_every_scheduler_gives_the_same_bits() -> None:
    array = da.from_array(_draw(1e2), chunks=CHUNKS["every axis"])
    m = bridge.moments(array)
    both = m, bridge.normalize(array, m)
    want = _bits(*dask.compute(*both, scheduler="sync"))
    assert _bits(*dask.compute(*both, scheduler="threads", num_workers=4)) == want
    with dask.config.set(split_every=2):  # the order of merges is fastbn's own
        m = bridge.moments(array)
        assert _bits(*dask.compute(m, bridge.normalize(array, m), scheduler="sync")) == want


@pytest.mark.ranks
def test_two_processes_share_the_blocks_and_give_the_same_bits() -> None:
    x = _draw(1e2)
    array = da.from_array(x, chunks=(1, 6, 11, 9))
    m = bridge.moments(array)
    want = _bits(*dask.compute(m, bridge.normalize(array, m), scheduler="sync"))
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        kept = client.persist(array)
        m = bridge.moments(kept)
        assert _bits(*dask.compute(m, bridge.normalize(kept, m), scheduler=client)) == want
        assert len(set(client.run(os.getpid).values()) - {os.getpid()}) == 2
        assert all(len(keys) > 0 for keys in client.has_what().values())


class _Source:
    """Makes blocks, and counts them: all that were made, and the most that were there at once."""

    def __init__(self, blocks: int, kind: str = "delayed") -> None:
        self.made = self.alive = self.most = 0
        if kind == "delayed":  # as files are read; blocks of map_blocks dask may make anew for each use
            make = dask.delayed(self._make)
            self.array = da.concatenate(
                [da.from_delayed(make(np.array([i])), (1, 3, 50), np.float32) for i in range(blocks)]
            )
        else:
            chunks, meta = ((1,) * blocks, (3,), (50,)), np.empty((0, 0, 0), np.float32)
            self.array = da.arange(blocks, chunks=1).map_blocks(
                self._make, chunks=chunks, new_axis=(1, 2), dtype=np.float32, meta=meta
            )

    def __dask_tokenize__(self) -> str:
        return f"source {id(self)}"

    def _make(self, number: np.ndarray) -> np.ndarray:
        x = np.random.default_rng(int(number[0])).standard_normal((1, 3, 50)).astype(np.float32)
        self.made += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(x, self._gone)
        return x

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("kind", ["delayed", "map_blocks"])
def test_one_graph_of_both_makes_each_block_once(kind: str) -> None:
    source = _Source(20, kind)
    m = bridge.moments(source.array)
    found, mean = dask.compute(m, bridge.normalize(source.array, m).mean(dtype=np.float64), scheduler="sync")
    assert source.made == 20
    assert found.count == 20 * 50
    assert abs(mean) < 1e-7


@pytest.mark.parametrize("kind", ["delayed", "map_blocks"])
def test_two_passes_hold_a_few_blocks(kind: str) -> None:
    source = _Source(60, kind)
    m = bridge.moments(source.array).compute(scheduler="threads", num_workers=2)
    mean = bridge.normalize(source.array, m).mean(dtype=np.float64).compute(scheduler="threads", num_workers=2)
    assert abs(mean) < 1e-7
    assert source.made == 120
    assert source.most <= 6


def test_the_same_call_has_the_same_keys() -> None:
    array = da.ones((4, 3), chunks=2)
    assert bridge.moments(array).key == bridge.moments(array).key != bridge.moments(array, 0).key
    first, second = (bridge.normalize(array, bridge.moments(array)).name for _ in range(2))
    assert first == second


def test_attributes_of_lazy_moments_are_lazy() -> None:
    x = _draw(0.0)
    m = bridge.moments(da.from_array(x, chunks=5))
    mean, unbiased = dask.compute(m.mean, m.var(ddof=1))
    np.testing.assert_allclose(mean, x.astype(float).mean(OTHERS), rtol=1e-12)
    np.testing.assert_allclose(unbiased, x.astype(float).var(OTHERS, ddof=1), rtol=1e-12)


def test_progress_is_shown_by_dask(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar():
        bridge.moments(da.ones((4, 3), chunks=2)).compute()
    assert "100% Completed" in capsys.readouterr().out


def test_nothing_to_count() -> None:
    empty = da.from_array(np.empty((0, 3, 4), np.float32), chunks=2)
    m = bridge.moments(empty)
    assert m.compute().count == 0
    np.testing.assert_array_equal(m.compute().mean, np.zeros(3))
    for moments in (m, m.compute()):
        y = bridge.normalize(empty, moments).compute()
        assert (y.shape, y.dtype) == ((0, 3, 4), np.float32)
    full = da.ones((2, 3, 4), chunks=2, dtype=np.float32)
    message = "moments: given statistics of no values, want those of some"
    with pytest.raises(ValueError, match=f"^{message}$"):
        bridge.normalize(full, m.compute())
    lazy = bridge.normalize(full, m)
    with pytest.raises(ValueError, match=f"^{message}$"):
        lazy.compute(scheduler="sync")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_channel(value: float) -> None:
    x = _draw(0.0)
    clean = bridge.moments(da.from_array(x, chunks=(5, 2, 11, 9))).compute()
    x[3, 1, 2, 2] = value
    array = da.from_array(x, chunks=(5, 2, 11, 9))
    m = bridge.moments(array).compute()
    assert not np.isfinite(m.var()[1])
    rest = [0, 2, 3, 4, 5]
    np.testing.assert_array_equal(m.mean[rest], clean.mean[rest])
    np.testing.assert_array_equal(m.m2[rest], clean.m2[rest])
    assert np.isfinite(bridge.normalize(array, m).compute()[:, rest]).all()


def test_swapped_bytes_come_out_native() -> None:
    x = _draw(0.0)
    array = da.from_array(x.astype(">f4"), chunks=5)
    m = bridge.moments(array)
    y = bridge.normalize(array, m)
    assert y.dtype == y.compute().dtype == np.float32
    np.testing.assert_array_equal(y.compute(), fastbn.batch_norm_inference(x, m.compute().mean, m.compute().var()))


FLOATS = "float16, bfloat16, float32 or float64: convert it first, e.g. array.astype('float32')"
ONES = da.ones((4, 3), chunks=2, dtype=np.float32)
MASKED = da.ma.masked_array(ONES, ONES > 2)
UNKNOWN = ONES[da.from_array(np.array([True, False, True, True]), chunks=2)]
REFUSED: list[tuple[Any, Any, type[Exception], str]] = [
    (np.ones((4, 3)), 1, TypeError, "array: given ndarray, want a dask array, e.g. dask.array.from_array(x, chunks); "
                                    "fastbn.moments and fastbn.batch_norm_inference take arrays in memory"),
    (da.ones((4, 3), dtype=int), 1, TypeError, f"array: given dtype int64, want {FLOATS}"),
    (da.ones((4, 3), dtype=complex), 1, TypeError, f"array: given dtype complex128, want {FLOATS}"),
    (da.ones((4, 3), dtype=bool), 1, TypeError, f"array: given dtype bool, want {FLOATS}"),
    (MASKED, 1, TypeError, "array: given a masked array, whose mask would be ignored; want a plain one, for example "
     "dask.array.ma.filled(array, 0)"),
    # as xarray's
    (SimpleNamespace(data=ONES), 1, TypeError, "array: given SimpleNamespace, want a dask array: its .data is one"),
    (SimpleNamespace(data=np.ones(2)), 1, TypeError, "array: given SimpleNamespace, want a dask array, e.g. "
                                                     "dask.array.from_array(x, "
     "chunks); fastbn.moments and fastbn.batch_norm_inference take arrays in memory"),
    (da.ones(()), 0, ValueError, "array: given rank 0, shape (); want rank 2 or more: a batch axis and a channel axis"),
    (da.ones(4), 0, ValueError, "array: given rank 1, shape (4,); want rank 2 or more: a batch axis and a channel "
                                "axis"),
    (ONES, 2, ValueError, "axis: given 2, want one from -2 to 1 for shape (4, 3)"),
    (ONES, 1.0, TypeError, "axis: given 1.0, want an integer from -2 to 1"),
    (da.ones((4, 0)), 1, ValueError, "array: given shape (4, 0), with no channels along axis 1; want at least one"),
    (UNKNOWN, 1, ValueError, "array: given chunks of unknown size along axis 0; call array.compute_chunk_sizes() "
                             "first"),
]  # fmt: skip


@pytest.mark.parametrize(("array", "axis", "error", "message"), REFUSED)
def test_what_can_not_be_is_refused_before_there_is_a_graph(
    array: Any, axis: Any, error: type[Exception], message: str
) -> None:
    of_moments = message.replace(": convert", ", or integers of 8 or 16 bits: convert")
    of_moments = of_moments.replace("float32')", "float64')") if "int64" in message else of_moments
    for call, said in (
        (lambda: bridge.moments(array, axis), of_moments),
        (lambda: bridge.normalize(array, bridge.moments(ONES), axis=axis), message),
    ):
        with pytest.raises(error, match=f"^{re.escape(said)}$"):
            call()


def test_blocks_that_are_masked_though_the_meta_is_plain_are_refused_when_computed() -> None:
    array = ONES.map_blocks(
        lambda block: np.ma.masked_greater(block, 2), dtype=np.float32, meta=np.empty((0, 0), np.float32)
    )
    said = next(message for given, _, _, message in REFUSED if given is MASKED)
    for lazy in (bridge.moments(array), bridge.normalize(array, fastbn.moments(np.ones((4, 3))))):
        with pytest.raises(TypeError, match=f"^{re.escape(said)}$"):
            lazy.compute(scheduler="sync")
    assert bridge.moments(da.ma.filled(array, 0)).compute(scheduler="sync").count == 4  # as it says


def test_what_the_messages_ask_for_is_taken() -> None:
    assert bridge.moments(UNKNOWN.copy().compute_chunk_sizes()).compute().count == 3
    assert bridge.moments(da.ma.filled(MASKED, 0)).compute().count == 4


SEEN = Moments(4, np.zeros(3), np.ones(3))
WANTED = "want what fastbn.dask.moments gives, or a fastbn.Moments of the host"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros(3),), TypeError, f"moments: given ndarray, {WANTED}"),
        ((Moments(4, np.zeros(2), np.ones(2)),), ValueError, "moments: given 2 channels, want 3, as the array has"),
        ((SEEN, np.ones(2, np.float32)), ValueError, "gamma: given shape (2,), want (3,), one value per channel of x"),
        ((SEEN, None, np.ones(3)), TypeError, "beta: given dtype float64, want float32 beside this x: convert it, e.g. "
         "beta.astype('float32')"),
        ((SEEN, None, None, 1, -1.0), ValueError, "eps: given -1.0, want a number that is not negative"),
    ],
)  # fmt: skip
def test_refused_beside_an_array(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        bridge.normalize(ONES, *arguments)


def test_lazy_moments_of_something_else_are_refused_when_computed() -> None:
    with pytest.raises(ValueError, match=r"^moments: given 4 channels, want 3, as the array has$"):
        bridge.normalize(ONES, bridge.moments(ONES, 0)).compute(scheduler="sync")
    with pytest.raises(TypeError, match=f"^moments: given int, {WANTED}$"):
        bridge.normalize(ONES, dask.delayed(7)).compute(scheduler="sync")


# What is taken, and refused in the documented words: integers, absurd options

X = np.random.default_rng(0).integers(0, 255, (20, 3, 7), np.uint8, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", ">i2"])
@pytest.mark.parametrize("chunks", [(20, 3, 7), (6, 2, 4), ((0, 19, 1), (3,), (7,))])
def test_moments_of_integers(dtype: str, chunks: Any) -> None:
    x = X.astype(dtype)
    m = bridge.moments(da.from_array(x, chunks)).compute(scheduler="synchronous")
    want = fastbn.moments(x.astype(np.float64), backend="reference")
    assert m.count == want.count
    np.testing.assert_allclose(m.mean, want.mean, rtol=1e-12)
    np.testing.assert_allclose(m.m2, want.m2, rtol=1e-12)


def test_integers_are_not_normalized() -> None:
    array = da.from_array(X, (4, 3, 7))
    with pytest.raises(
        TypeError,
        match=r"^array: given dtype uint8, want float16, bfloat16, float32 or float64: convert it first, e.g. arr",
    ):
        bridge.normalize(array, fastbn.moments(X))
    with pytest.raises(
        TypeError,
        match=r"^array: given dtype int64, .* or integers of 8 or 16 bits: convert it first, e.g. array.astype\('fl",
    ):
        bridge.moments(array.astype(np.int64))


ARRAY = da.from_array(X.astype(np.float32), (4, 3, 7))
CALLS: dict[str, Callable[..., Any]] = {
    "moments": lambda **given: bridge.moments(ARRAY, **given),
    "normalize": lambda **given: bridge.normalize(ARRAY, fastbn.moments(X), **given),
}


@pytest.mark.parametrize(("name", "argument"), [("moments", "axis"), ("normalize", "axis"), ("normalize", "eps")])
def test_absurd_arguments(name: str, argument: str) -> None:
    for absurd, value in ABSURD.items():
        if absurd not in TAKEN[argument]:
            refused(lambda value=value: CALLS[name](**{argument: value}), argument, absurd, [])
