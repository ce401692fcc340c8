"""Memory: what a call takes beyond its inputs and outputs, by formula; and that no call keeps any.

NumPy reports its memory to tracemalloc, and kernels allocate none: what is seen here is all there is.
"""

import tracemalloc
from collections.abc import Callable, Iterator

import numba
import numpy as np
import pytest
from processes import Run, compiled

import fastbn
from fastbn.cpu import schedule

pytestmark = compiled
THREADS = min(2, numba.config.NUMBA_NUM_THREADS)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The same number on every machine: each thread has workspaces of its own."""
    fastbn.set_num_threads(THREADS)
    yield
    fastbn.set_num_threads(None)


def _calls(shape: tuple[int, ...], dtype: str, channels_last: bool) -> dict[str, Callable[[], object]]:
    """A call of each pass, with memory for its result."""
    x = np.ones(shape, dtype)
    x[::2] = 2
    if channels_last:
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    out, m = np.empty_like(x), fastbn.moments(x)
    gamma = np.ones(shape[1], np.float64 if dtype == "float64" else np.float32)
    var = m.var()
    return {
        "moments": lambda: fastbn.moments(x),
        "forward": lambda: fastbn.batch_norm(x, gamma, gamma, out=out),
        "inference": lambda: fastbn.batch_norm_inference(x, m.mean, var, gamma, gamma, out=out),
        "backward": lambda: fastbn.batch_norm_backward(x, x, m, gamma, out=out),
        "backward at inference": lambda: fastbn.batch_norm_inference_backward(x, x, m.mean, var, gamma, out=out),
    }


def _peak(call: Callable[[], object]) -> int:
    """Bytes that a call has allocated at most, at any one time."""
    call()  # compiles, plans
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _parts(shape: tuple[int, ...], dtype: str, channels_last: bool) -> int:
    """How many partitions the schedule cuts the values of a channel into, for the statistics."""
    itemsize, (N, C), S = np.dtype(dtype).itemsize, shape[:2], int(np.prod(shape[2:]))
    columns = (
        schedule.of_columns(N * S, C, 1, itemsize, True)
        if channels_last or S == 1
        else schedule.of_columns(N, C, S, itemsize, True)
    )
    return max(columns.parts, schedule.of_rows(N, C, S, itemsize).parts)


def _bound(shape: tuple[int, ...], dtype: str, channels_last: bool) -> int:
    """8 bytes for each of 6 C statistics a partition, and for the 12 rows of workspace of 4 tasks a thread; 4 KiB for
    Python's objects.

    A row of workspace is as long as the columns that a task walks: a channel's own, or those of channels (and rows,
    where channels are few) side by side, but never more than the 1024 that stay in a first-level cache, rounded up to a
    panel.
    """
    channels = max(shape[1], schedule.FOLDED)
    columns = min(schedule.COLUMNS, channels * max(1, schedule.SHORT_BYTES // 4)) + schedule.FOLDED
    return 8 * (6 * channels * (_parts(shape, dtype, channels_last) + 1) + 4 * THREADS * 12 * columns) + 4096


SHAPES = [
    ((16, 64, 56, 56), False),
    ((16, 64, 56, 56), True),
    ((1, 3, 1024, 1024), False),  # few channels, in partitions
    ((32, 512, 14, 14), False),  # short rows
    ((65536, 64), False),  # flat
    ((400000, 4), False),  # rows folded
    ((1024, 8192), False),  # many channels
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "channels_last"), SHAPES, ids=str)
def test_a_call_takes_memory_for_its_statistics_only(shape: tuple[int, ...], channels_last: bool, dtype: str) -> None:
    bound = _bound(shape, dtype, channels_last)
    assert 4 * bound < int(np.prod(shape)) * np.dtype(dtype).itemsize  # a copy of anything would show
    for name, call in _calls(shape, dtype, channels_last).items():
        assert _peak(call) <= bound, name


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((16, 32, 40, 40), False), ((16, 32, 40, 40), True), ((65536, 32), False)], ids=str
)
def test_it_does_not_grow_with_the_batch(shape: tuple[int, ...], channels_last: bool) -> None:
    """Four times the batch may have four times the partitions, which are bounded, and no more of anything else.

    But for 2 KiB: where two kernels run instead of one, a few arrays of (C,) more pass between them, and Python's
    objects for these.
    """
    shapes = shape, (4 * shape[0], *shape[1:])
    small, large = (_calls(shape, "float32", channels_last) for shape in shapes)
    parts, more = (_parts(shape, "float32", channels_last) for shape in shapes)
    assert more <= schedule.PARTS
    for name, call in large.items():
        assert _peak(call) <= _peak(small[name]) * more / parts + 2048, name


@pytest.mark.process
def test_nothing_is_kept(run: Run) -> None:
    """After 50 calls of each pass, of layers too, Python holds what it held; after 10000 the process has the memory
    that it had.
    """
    code = """
        import gc, resource, tracemalloc
        small, large = np.ones((64, 16, 40), np.float32), np.ones((8, 16, 128, 128), np.float32)
        out, outs = np.empty_like(large), np.empty_like(small)
        layer = fastbn.BatchNorm(16)
        def calls(times, x, out):
            for _ in range(times):
                y, m = fastbn.batch_norm(x, out=out)
                fastbn.batch_norm_backward(x, x, m, out=out)
                fastbn.batch_norm_inference(x, m.mean, m.var(), out=out)
                fastbn.moments(x)
                layer(x)
                layer.backward(x)
        calls(20, large, out), calls(20, small, outs)
        tracemalloc.start()
        calls(5, large, out), calls(5, small, outs), gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        calls(50, large, out), calls(50, small, outs), gc.collect()
        print(tracemalloc.get_traced_memory()[0] - before)
        tracemalloc.stop()
        unit = 1024 if sys.platform == "linux" else 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        calls(1500, small, outs)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
        """
    pytest.importorskip("resource", reason="Windows does not tell")
    kept, grown = map(int, run(code, "tbb")[0].split())
    assert kept < 16384  # of 600 passes: not one small array each
    assert grown < 2**20
