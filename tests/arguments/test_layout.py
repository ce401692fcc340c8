"""Plans: every array becomes canonical, without a copy where its memory allows it, and back again."""

import tracemalloc
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapes import CASES, COMPACT, DTYPES, LAYOUTS, Case, arrange, draw, memory_order

import fastbn
from fastbn.arguments import layout

X = Case((2, 3, 4, 5), 1, "four different lengths")


def _x(arrangement: str, case: Case = X, dtype: str = "float32") -> np.ndarray:
    return arrange(arrangement, draw(case, dtype)[0], case.axis)


def plan_of(x: np.ndarray, axis: int) -> tuple[layout.Plan, np.ndarray]:
    return layout.view_of(layout.planned(x.shape, x.strides, axis, x.itemsize), x)


@pytest.mark.parametrize(
    ("arrangement", "axis", "kind", "dims"),
    [
        ("C", 1, "channels_first", (2, 3, 20)),
        ("C", 0, "channels_first", (1, 2, 60)),
        ("C", 2, "channels_first", (6, 4, 5)),
        ("C", 3, "channels_last", (24, 5)),
        ("C", -1, "channels_last", (24, 5)),
        ("Fortran", 1, "channels_first", (20, 3, 2)),
        ("Fortran", 0, "channels_last", (60, 2)),
        ("Fortran", 3, "channels_first", (1, 5, 24)),
        ("channels_last", 1, "channels_last", (40, 3)),
        ("channels_last", 2, "channels_last", (30, 4)),
        ("channels_outermost", 1, "channels_first", (1, 3, 40)),
    ],
)
def test_kind_and_dims(arrangement: str, axis: int, kind: str, dims: tuple[int, ...]) -> None:
    case = X._replace(axis=axis)
    x = _x(arrangement, case)
    plan, view = plan_of(x, axis % x.ndim)
    assert (plan.kind, plan.dims, view.shape) == (kind, dims, dims)
    assert (plan.channels, plan.count) == (x.shape[axis], x.size // x.shape[axis])
    assert np.shares_memory(view, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("arrangement", COMPACT)
def test_compact_arrays_are_never_copied(arrangement: str, case: Case, dtype: str) -> None:
    x = _x(arrangement, case, dtype)
    view = plan_of(x, case.axis % x.ndim)[1]
    assert np.shares_memory(view, x)
    assert view.strides[-1] == x.itemsize or view.shape[-1] == 1


@pytest.mark.parametrize(
    ("shape", "window", "kind"),
    [
        # rows of the image dropped: S stays whole, channels move apart
        ((4, 6, 8, 10), np.s_[:, :, 1:5], "channels_first"),
        ((4, 6, 50), np.s_[:, 1:4, :], "channels_first"),  # channels dropped
        ((9, 6, 50), np.s_[::2], "channels_first"),  # samples dropped
        ((40, 16), np.s_[::3, 2:9], "channels_last"),  # samples and features dropped
    ],
)
def test_slices_that_two_strides_describe_are_not_copied(shape: tuple[int, ...], window: Any, kind: str) -> None:
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)[window]
    plan, view = plan_of(x, 1)
    assert plan.kind == kind
    assert np.shares_memory(view, x)
    assert memory_order(plan.empty(x.dtype)[0]) == memory_order(x)


@pytest.mark.parametrize("arrangement", ["strided", "reversed", "broadcast", "packed", "big_endian"])
def test_the_rest_is_copied_once_into_the_same_memory_order(arrangement: str) -> None:
    x = _x(arrangement)
    plan, view = plan_of(x, 1)
    assert not np.shares_memory(view, x)
    assert view.flags.c_contiguous
    assert view.dtype.isnative
    np.testing.assert_array_equal(plan.restore(view), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arrangement", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_channel_keeps_its_values(case: Case, arrangement: str, dtype: str) -> None:
    x = _x(arrangement, case, dtype)
    _holds_the_channels_of(x, case.axis % x.ndim)


def _holds_the_channels_of(x: np.ndarray, axis: int) -> None:
    plan, view = plan_of(x, axis)
    channels = np.sort(np.moveaxis(view, 1, 0).reshape(plan.channels, -1), axis=1)
    np.testing.assert_array_equal(channels, np.sort(np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1), axis=1))


@st.composite
def arrays(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """(x, axis): any shape, order of the axes in memory, and slicing with steps, backwards too; every value
    different.
    """
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, -1]), min_size=len(shape), max_size=len(shape)))
    margins = draw(st.lists(st.sampled_from([0, 0, 1]), min_size=len(shape), max_size=len(shape)))
    whole = np.empty(
        [abs(step) * n + margin for n, step, margin in zip(shape, steps, margins, strict=True)], np.float32
    )
    whole = whole.transpose(order).copy().transpose(np.argsort(order))
    window = tuple(slice(0, abs(step) * n, abs(step)) for n, step in zip(shape, steps, strict=True))
    x = whole[window][tuple(slice(None, None, -1 if step < 0 else 1) for step in steps)]
    x[...] = np.arange(x.size).reshape(x.shape)
    return x, draw(st.integers(0, len(shape) - 1))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_results_of_cubes_with_gaps_lie_where_they_belong(order: tuple[int, ...], axis: int) -> None:
    """Canonical dims that equal the shape do not say that the order is the same, too: all axes of a cube look alike."""
    x = np.random.default_rng(0).standard_normal((5, 4, 6)).astype(np.float32)[:3, :3, :3].transpose(order)
    y = fastbn.batch_norm_inference(x, np.zeros(3), np.ones(3), axis=axis, eps=0.0)
    np.testing.assert_array_equal(y, x)
    assert memory_order(y) == memory_order(x)


@given(arrays())
def test_any_array_keeps_its_channels(drawn: tuple[np.ndarray, int]) -> None:
    x, axis = drawn
    before = x.copy()
    _holds_the_channels_of(x, axis)
    np.testing.assert_array_equal(x, before)


@given(arrays())
def test_restore_is_the_inverse_and_empty_has_the_memory_order_of_x(drawn: tuple[np.ndarray, int]) -> None:
    x, axis = drawn
    plan, view = plan_of(x, axis)
    np.testing.assert_array_equal(plan.restore(np.ascontiguousarray(view)), x)
    whole, canonical = plan.empty(x.dtype)
    assert whole.shape == x.shape
    assert canonical.shape == plan.dims
    assert canonical.flags.writeable
    assert memory_order(whole) == memory_order(x)
    canonical[...] = view
    np.testing.assert_array_equal(whole, x)


@given(arrays())
def test_views_write_through(drawn: tuple[np.ndarray, int]) -> None:
    x, axis = drawn
    plan, _ = plan_of(x, axis)
    view = plan.view(x)
    if view is None:  # only where two strides can't describe it
        assert not x.flags.c_contiguous
        assert not x.flags.f_contiguous
        return
    view += 1000.0
    assert x.min() >= 1000.0
    np.testing.assert_array_equal(plan.restore(np.ascontiguousarray(view)), x)


@given(arrays(), st.data())
def test_view_as_pairs_every_element_with_its_own(drawn: tuple[np.ndarray, int], data: st.DataObject) -> None:
    """A dy in any memory order: the canonical views of x and dy run through the elements in the same order."""
    x, axis = drawn
    order = data.draw(st.permutations(range(x.ndim)))
    dy = (x * 2).transpose(order).copy().transpose(np.argsort(order))
    plan, view = plan_of(x, axis)
    np.testing.assert_array_equal(layout.view_as(plan, dy), view * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results_lie_on_a_64_byte_boundary(dtype: str) -> None:
    plan = layout.plan_for((64, 32, 33), dtype, 1)
    for _ in range(8):
        whole, canonical = plan.empty(np.dtype(dtype))
        assert whole.ctypes.data % 64 == 0
        assert canonical.ctypes.data % 64 == 0


def test_plan_for_is_the_plan_of_an_array_that_does_not_exist() -> None:
    for case in CASES:
        for arrangement, channels_last in (("C", False), ("channels_last", True)):
            x = _x(arrangement, case)
            axis = case.axis % x.ndim
            real = plan_of(x, axis)[0]
            planned = layout.plan_for(case.shape, np.float32, axis, channels_last)
            assert (planned.kind, planned.dims) == (real.kind, real.dims)
    assert layout.plan_for((1 << 20, 3, 1 << 20), np.float64, 1).dims == (1 << 20, 3, 1 << 20)


@pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT),
    reason="4 MB through plain Python kernels takes minutes, and vectors there are copies",
)
@pytest.mark.parametrize("arrangement", ["C", "Fortran", "channels_last"])
def test_no_copy_of_x_is_made(arrangement: str) -> None:
    """Only for the kernels: the reference holds float64 copies by design."""
    case = Case((16, 32, 64, 32), 1, "4 MB, which shows beside any workspace")
    x, dy = _x(arrangement, case), _x(arrangement, case)
    out = COMPACT[arrangement](x, 1)
    statistics = np.zeros(32), np.ones(32)

    def calls() -> None:
        m = fastbn.batch_norm(x, out=out, backend="cpu")[1]
        fastbn.batch_norm_backward(dy, x, m, out=out, backend="cpu")
        fastbn.batch_norm_inference(x, *statistics, out=out, backend="cpu")
        fastbn.moments(x, backend="cpu")

    calls()  # compiled
    tracemalloc.start()
    try:
        calls()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 4, f"{peak} bytes beside x, {x.nbytes} bytes"
