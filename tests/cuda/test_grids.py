"""How arrays are cut for a GPU: every element exactly once, at any size, and sizes that the hardware and float32 can
take.
"""

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastbn.arguments import layout
from fastbn.cuda import buffers, grids, views

SIZES = st.integers(1, 40)
LANES = st.sampled_from([2, 4, 8])


def _in_slots(grid: grids.Rows, S: int, lanes: int, begin: int) -> list[int]:
    """Elements of a row that a slot covers, where the row begins so many elements behind a boundary."""
    head = -begin % lanes
    return [head + v * lanes + k for v in range(grid.slots if grid.chunk else 0) for k in range(lanes)]


def _outside(grid: grids.Rows, S: int, lanes: int, begin: int) -> list[int]:
    """The others, as `fastbn.cuda.kernels.rows.rest_at` finds them."""
    head = -begin % lanes
    return [e if e < head else e + S - grid.rest for e in range(grid.rest)]


@given(N=SIZES, C=SIZES, S=st.integers(1, 300), lanes=LANES, begin=st.integers(0, 7), even=st.booleans())
def test_rows_cover_every_element_once(N: int, C: int, S: int, lanes: int, begin: int, even: bool) -> None:
    even = even and S % lanes == 0
    grid = grids.rows(N, C, S, lanes, even)
    begins = {0} if even else {begin % lanes}
    for start in begins:
        covered = sorted(_in_slots(grid, S, lanes, start) + _outside(grid, S, lanes, start))
        assert covered == list(range(S))
    for total, chunk in ((N * grid.slots, grid.chunk), (N * grid.rest, grid.chunk_rest)):
        pieces = [range(part * chunk, min(part * chunk + chunk, total)) for part in range(grid.parts)]
        assert [j for piece in pieces for j in piece] == (list(range(total)) if chunk else [])
    assert grid.chunk or grid.rest == S
    assert (grid.step_n * grid.slots + grid.step_v, grid.step_v < grid.slots) == (grids.THREADS, True)


@given(R=st.integers(1, 3000), C=SIZES, S=st.integers(1, grids.SHORT), lanes=LANES, contiguous=st.booleans())
def test_columns_cover_every_element_once(R: int, C: int, S: int, lanes: int, contiguous: bool) -> None:
    grid = grids.columns(R, C, S, lanes, contiguous)
    assert grid.R * grid.W + grid.rest == R * C * S
    assert grid.rest < grid.W
    assert contiguous or (grid.fold, grid.rest) == (1, 0)
    seen = np.zeros((grid.R, -(-grid.W // lanes)), int)
    assert 1 <= grid.across <= grids.THREADS
    assert grid.units == 1 or grid.across * lanes % S == 0, "a channel of two blocks"
    for block in range(grid.blocks):
        part, first = block // grid.units, block % grid.units * grid.across
        start = part * grid.chunk
        assert start < grid.R, "a part without rows"
        seen[start : start + grid.chunk, first : first + grid.across] += 1
    assert (seen == 1).all()
    assert grid.copies == (grid.fold if grid.units > 1 else 1)


@given(entries=st.integers(1, 5000), C=st.integers(1, 5000))
def test_every_channel_is_finished_once(entries: int, C: int) -> None:
    across = grids.finish(entries, C)
    assert grids.THREADS % across == 0
    assert across * min(grids.THREADS // grids.SECTOR, entries) <= grids.THREADS
    assert across < 2 * C


every_group = given(
    N=SIZES,
    C=SIZES,
    S=SIZES,
    lanes=LANES,
    tables=st.sampled_from([1, grids.TABLES]),
    gaps=st.sampled_from(["none", "outer", "both"]),
)


@every_group
def test_runs_cover_every_element_once_and_know_its_channel(
    N: int, C: int, S: int, lanes: int, tables: int, gaps: str
) -> None:
    outer, inner = {"none": (C * S, S), "outer": (C * S + 3, S), "both": (C * (S + 2), S + 2)}[gaps]
    with mock.patch.object(grids, "TABLES", tables):  # of one column no table is short enough
        grid = grids.runs(N, C, S, lanes, [(outer, inner)])
    seen = np.zeros((N, C, S), int)
    for run in range(grid.runs):
        n, m = divmod(run, grid.inner)
        begin = 0 if grid.runs == 1 else n * outer + (m * inner if grid.inner > 1 else 0)
        for e in range(grid.length):
            channel, position = (run * grid.per_run + e // S) % C, e % S
            image = (run * grid.per_run + e // S) // C
            if gaps == "none":
                assert begin + e == (image * C + channel) * S + position
            else:
                assert begin + e == image * outer + channel * inner + position
            seen[image, channel, position] += 1
    assert (seen == 1).all()
    assert grid.groups * lanes >= grid.length > (grid.groups - 1) * lanes
    threads = np.arange(grid.blocks(grids.THREADS) * grids.THREADS)
    first = threads + threads // grid.apart * (grids.EACH - 1) * grid.apart  # as `apply.first_of` has it
    groups = first[:, None] + np.arange(grids.EACH) * grid.apart
    assert (np.sort(groups[groups < grid.runs * grid.groups]) == np.arange(grid.runs * grid.groups)).all()
    if grid.steps[0] and not (grid.runs > 1 and grid.length % lanes):
        taken = groups[groups[:, -1] < grid.runs * (grid.length // lanes)]
        run, e = taken // grid.groups, taken % grid.groups * lanes
        at = run // grid.inner * outer + run % grid.inner * inner + e
        assert (np.diff(at) == grid.steps[0]).all()
        found = (run * grid.per_run + e // grid.S) % grid.C, e % grid.S
        channels = (run * grid.per_run + e // S) % C
        assert (channels == channels[:, :1]).all()
        assert (found[0] == found[0][:, :1]).all()
        assert grid.mode == grids.ONE or (found[1] == found[1][:, :1]).all()


@every_group
def test_groups_find_their_coefficients(N: int, C: int, S: int, lanes: int, tables: int, gaps: str) -> None:
    outer, inner = {"none": (C * S, S), "outer": (C * S + 3, S), "both": (C * (S + 2), S + 2)}[gaps]
    with mock.patch.object(grids, "TABLES", tables):  # of one column no table is short enough
        grid = grids.runs(N, C, S, lanes, [(outer, inner)])
    places = [
        (copy * C + c) * grid.columns + j for copy in range(grid.copies) for c in range(C) for j in range(grid.columns)
    ]
    table = dict(
        zip(places, (c for _ in range(grid.copies) for c in range(C) for _ in range(grid.columns)), strict=True)
    )
    for run in range(min(grid.runs, 3 * C)):
        for e in range(0, min(grid.length, 3 * C * S * lanes), lanes):
            count = min(lanes, grid.length - e)
            want = [
                (run * (1 if grid.runs > 1 and grid.inner > 1 else C * grid.runs) + (e + k) // S) % C
                for k in range(count)
            ]
            c, s = (run * grid.per_run + e // grid.S) % grid.C, e % grid.S
            if grid.mode == grids.TABLE:
                assert [table[s + k] for k in range(count)] == want
            else:
                assert [c if grid.mode == grids.ONE or k < S - s else (c + 1) % C for k in range(count)] == want


HUGE = [
    (1, 1, 2**33),
    (2**13, 64, 2**14),
    (2**33, 1, 1),
    (2**25, 256, 1),
    (1, 2**20, 2**13),
    (2**10, 2**20, 8),
    (3, 5, 7 * 2**27 + 1),
]


@pytest.mark.parametrize(("N", "C", "S"), HUGE)
@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_arrays_of_billions_of_elements(N: int, C: int, S: int, lanes: int) -> None:
    grid = grids.rows(N, C, S, lanes, S % lanes == 0)
    assert grid.parts * grid.chunk >= N * grid.slots * (grid.chunk > 0)
    assert grid.parts * grid.chunk_rest >= N * grid.rest
    assert grid.chunk * lanes + grid.chunk_rest <= 2 * grids.EXACT, "more values of a part than a float32 counts"
    assert grid.blocks(C) < 2**31
    cut = grids.columns(N, C, S, lanes, True) if C * S < 2**31 else None
    if cut is not None:
        assert cut.R * cut.W + cut.rest == N * C * S
        assert cut.parts * cut.chunk >= cut.R
        assert cut.chunk <= grids.EXACT
        assert cut.blocks < 2**31
    flat = grids.runs(N, C, S, lanes, [(C * S, S)])
    assert flat.runs * flat.length == N * C * S
    assert flat.blocks(grids.THREADS) < 2**31


@pytest.mark.parametrize(
    ("N", "C", "S"),
    [(2, 10_000_001, 1), (2, 2**28 + 1, 1), (8, 2**28 + 1, 1), (63, 10_000_001, 1), (2**20, 2001, 1), (3, 100_001, 5)],
)
@pytest.mark.parametrize("lanes", [2, 4, 8])
def test_a_table_of_coefficients_is_no_longer_than_the_array(N: int, C: int, S: int, lanes: int) -> None:
    """But for what each channel takes: four numbers of float32 beside as many as there are in a column, or of
    float64.
    """
    grid = grids.runs(N, C, S, lanes, [(C * S, S)])
    columns = grid.S if grid.mode == grids.TABLE else grid.C
    assert 4 * columns * (8 if lanes == 2 else 4) <= max(
        N * C * S * 16 // lanes, 4 * (C * S + lanes) * (8 if lanes == 2 else 4)
    )
    assert columns < 2**31


def test_large_arrays_keep_a_device_busy_and_small_ones_do_not_shatter() -> None:
    for N, C, S in ((32, 64, 112 * 112), (32, 1024, 14 * 14), (4, 8, 640 * 1024), (1, 3, 1024 * 1024)):
        assert grids.FULL <= grids.rows(N, C, S, 4, True).blocks(C) <= 2 * grids.BLOCKS
    assert grids.columns(65536, 64, 1, 4, True).blocks >= grids.FULL
    assert grids.rows(2, 16, 64, 4, True).parts == 1


def test_more_channels_than_32_bits_count_are_refused() -> None:
    grids.check_channels(2**31 - 8)
    for shape, axis in (((2, 2**31 - 7), 1), ((1, 2**32, 1, 1), 1)):
        buffer = buffers.Buffer(
            0, shape, tuple(math.prod(shape[a + 1 :]) for a in range(len(shape))), "float16", False, None, None
        )
        plan = layout.planned(shape, tuple(2 * step for step in buffer.strides), axis, 2)
        with pytest.raises(
            ValueError, match=rf"x: given {shape[1]} channels, want at most 2147483640 on a GPU: pass it in slices"
        ):
            views.view(buffer, plan)


def test_one_launch_where_two_parts_would_only_fill_idle_multiprocessors() -> None:
    for C, whole in ((grids.ENOUGH, True), (grids.ENOUGH - 1, False)):
        buffer = buffers.Buffer(0, (8, C, 1120), (C * 1120, 1120, 1), "float32", False, None, None)
        x = views.View(buffer, 8, C, 1120, C * 1120, 1120)
        assert views.reduction(x).entries > 1
        plan = views.fused_reduction(x, x)
        assert (plan.whole, plan.entries == 1) == (whole, whole)
        assert plan.rows is not None
        assert plan.rows.parts * plan.rows.chunk >= 8 * 280
        assert plan.rows.chunk == 8 * 280 or not whole
