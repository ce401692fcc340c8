"""The same input gives the same bits: on any number of threads, in every run, wherever its memory lies, through fused
or separate calls.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
from launch import python
from shapes import COMPACT, CPU_DTYPES, HALF, every_dtype_and_backend, parameter_dtype

import fastbn
from fastbn.backends import select
from fastbn.cpu.threads import limited

SMALL = ((3, 5, 7), (8, 4), (5, 6, 7, 7), (20, 40), (1000, 5))
LARGE = (
    (4, 16, 64, 64),  # 1 MB, 16 channels that stay in a cache each
    (2, 2, 600, 501),  # few channels in several parts, rows of odd length
    (24, 96, 7, 7),  # short rows
    (6000, 70),  # rank 2: more columns than a panel
    (150, 2100),  # many channels, few rows
    (60000, 5),  # rows that are folded, with some left over
)
compiled = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="plain Python takes minutes for arrays large enough for several threads"
)
# in every dtype and layout: a small one, and both kinds of kernels on threads
WHOLE = ((3, 5, 7), (4, 16, 64, 64), (6000, 70))


def _given(shape: tuple[int, ...], dtype: str, layout: str) -> Any:
    """All are of a full run; by default the shapes above in float32 and float64, the others in float32 and the two
    common layouts.
    """
    covered = dtype not in HALF and (shape in WHOLE or (dtype == "float32" and layout in ("C", "channels_last")))
    marks = [*([compiled] if shape in LARGE else []), *([] if covered else [pytest.mark.full])]
    return pytest.param(shape, dtype, layout, marks=marks)


every_case = pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [_given(*case) for case in itertools.product(SMALL + LARGE, CPU_DTYPES, COMPACT)],
    ids=str,
)
every_dtype = pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=[pytest.mark.full] * (dtype in HALF)) for dtype in CPU_DTYPES]
)

Arrays = dict[str, np.ndarray]


def _draw(shape: tuple[int, ...], dtype: str, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, dy, gamma, beta) that round at every step."""
    rng = np.random.default_rng(0)
    x, dy = 100.0 + rng.standard_normal(shape), rng.standard_normal(shape)
    gamma, beta = rng.standard_normal((2, shape[1])).astype(parameter_dtype(dtype))
    return COMPACT[layout](x.astype(dtype), 1), COMPACT[layout](dy.astype(dtype), 1), gamma, beta


def _results(x: np.ndarray, dy: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> Arrays:
    """What every public function gives."""
    y, m = fastbn.batch_norm(x, gamma, beta)
    alone = fastbn.moments(x)
    found = {"mean": m.mean, "m2": m.m2, "mean alone": alone.mean, "m2 alone": alone.m2, "y": y}
    found["y at inference"] = fastbn.batch_norm_inference(x, m.mean, m.var(), gamma, beta)
    found |= zip(("dx", "dgamma", "dbeta"), fastbn.batch_norm_backward(dy, x, m, gamma), strict=True)
    backward = fastbn.batch_norm_inference_backward(dy, x, m.mean, m.var(), gamma)
    return found | {
        f"{name} at inference": value for name, value in zip(("dx", "dgamma", "dbeta"), backward, strict=True)
    }


def _bits(array: np.ndarray) -> bytes:
    return array.tobytes()


def _same(got: Arrays, want: Arrays) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if _bits(got[name]) != _bits(want[name])] == []


@pytest.fixture
def threads() -> Iterator[None]:
    """Leave the number of threads as it was."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


@every_case
@pytest.mark.usefixtures("threads")
def test_one_and_two_threads(shape: tuple[int, ...], dtype: str, layout: str) -> None:
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba has one thread here; 4 are forced upon it below")
    given = _draw(shape, dtype, layout)
    numba.set_num_threads(1)
    one = _results(*given)
    for _ in range(3):  # two threads meet differently in every run
        numba.set_num_threads(2)
        _same(_results(*given), one)


@every_case
def test_run_to_run(shape: tuple[int, ...], dtype: str, layout: str) -> None:
    first = _results(*_draw(shape, dtype, layout))
    for _ in range(3):
        _same(_results(*_draw(shape, dtype, layout)), first)  # new memory each time


def digests() -> dict[str, dict[str, str]]:
    """Of everything in float32; of a few shapes, in the two common layouts, in the other dtypes."""
    return {
        str(case): {name: hashlib.sha256(_bits(array)).hexdigest() for name, array in _results(*_draw(*case)).items()}
        for case in itertools.product(SMALL + LARGE, CPU_DTYPES, COMPACT)
        if case[1] == "float32" or (case[0] in WHOLE and case[2] in ("C", "channels_last"))
    }


@pytest.fixture(scope="module")
def one_thread() -> dict[str, dict[str, str]]:
    with limited(1):
        return digests()


@compiled
@pytest.mark.process
@pytest.mark.parametrize(
    "environment",
    [
        {"NUMBA_NUM_THREADS": "4"},
        {"NUMBA_NUM_THREADS": "3", "NUMBA_THREADING_LAYER": "workqueue", "FASTBN_STREAM_BYTES": str(2**60)},
        {"NUMBA_NUM_THREADS": "2", "FASTBN_STREAM_BYTES": "0"},
    ],
    ids=str,
)
def test_other_processes(environment: dict[str, str], one_thread: dict[str, dict[str, str]]) -> None:
    """More threads than cores, another threading layer, every store past the cache or none: never another bit."""
    code = "import json, numba, tests.test_determinism as t; print(json.dumps([numba.get_num_threads(), t.digests()]))"
    threads, found = json.loads(python("-c", code, **environment))
    assert threads == int(environment["NUMBA_NUM_THREADS"])
    assert found.keys() == one_thread.keys()
    assert {case for case in found if found[case] != one_thread[case]} == set()


@every_case
def test_out_gives_the_same_bits(shape: tuple[int, ...], dtype: str, layout: str) -> None:
    """In place, in the other input's place, in memory of another order, between gaps."""
    x, dy, gamma, beta = _draw(shape, dtype, layout)
    y, m = fastbn.batch_norm(x, gamma, beta)
    inference = fastbn.batch_norm_inference(x, m.mean, m.var(), gamma, beta)
    gradients = fastbn.batch_norm_backward(dy, x, m, gamma)
    constant = fastbn.batch_norm_inference_backward(dy, x, m.mean, m.var(), gamma)

    def twin(array: np.ndarray) -> np.ndarray:
        return COMPACT[layout](array, 1)

    def apart() -> list[np.ndarray]:
        other = "C" if layout != "C" else "channels_last"
        gaps = COMPACT[layout](np.empty(tuple(n + 2 for n in shape), dtype), 1)[tuple(slice(1, n + 1) for n in shape)]
        return [COMPACT[other](np.empty(shape, dtype), 1), gaps]

    for out in (own := twin(x), *apart()):
        got, found = fastbn.batch_norm(own if out is own else x, gamma, beta, out=out)
        assert got is out
        _same({"y": got, "mean": found.mean, "m2": found.m2}, {"y": y, "mean": m.mean, "m2": m.m2})
    for out in (own := twin(x), *apart()):
        assert _bits(
            fastbn.batch_norm_inference(own if out is own else x, m.mean, m.var(), gamma, beta, out=out)
        ) == _bits(inference)
    own_x, own_dy = twin(x), twin(dy)
    for out in (own_x, own_dy, *apart()):
        given = own_dy if out is own_dy else dy, own_x if out is own_x else x
        for want, got in zip(gradients, fastbn.batch_norm_backward(*given, m, gamma, out=out), strict=True):
            assert _bits(got) == _bits(want)
    own_x, own_dy = twin(x), twin(dy)
    for out in (own_x, own_dy, *apart()):
        given = own_dy if out is own_dy else dy, own_x if out is own_x else x
        for want, got in zip(
            constant, fastbn.batch_norm_inference_backward(*given, m.mean, m.var(), gamma, out=out), strict=True
        ):
            assert _bits(got) == _bits(want)


def _placed(array: np.ndarray, offset: int) -> np.ndarray:
    """The same values in the same memory order, `offset` bytes beyond a 64-byte boundary."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    copy = np.ndarray(array.shape, array.dtype, raw, start, array.strides)
    copy[...] = array
    assert copy.ctypes.data % 64 == offset
    return copy


@every_case
def test_memory_anywhere(shape: tuple[int, ...], dtype: str, layout: str) -> None:
    """Vectors begin at the row, not at a boundary: alignment, even of less than an element, changes no bit."""
    x, dy, gamma, beta = _draw(shape, dtype, layout)
    want = _results(x, dy, gamma, beta)
    for there, here in ((0, 0), (8, 40), (60, 4), (1, 0), (0, 7)):
        _same(_results(_placed(x, there), _placed(dy, here), gamma, beta), want)
        out = _placed(np.empty_like(x), here)
        assert _bits(fastbn.batch_norm(_placed(x, there), gamma, beta, out=out)[0]) == _bits(want["y"])
        m = fastbn.moments(x)
        assert _bits(fastbn.batch_norm_backward(dy, _placed(x, there), m, gamma, out=out)[0]) == _bits(want["dx"])


@pytest.mark.parametrize("dtype", ["float32", "float64", pytest.param("float16", marks=pytest.mark.full)])
@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 6, 17, 17), (40, 33), (64, 3), (6, 3, 8, 8)], ids=str)
def test_not_a_number_at_every_alignment_of_out(
    shape: tuple[int, ...], layout: str, dtype: str, replan: Callable[..., None]
) -> None:
    """NaN of both signs in x and dy: the same bits at every place of `out` in a vector: 16 of float32, past the cache
    or into it.
    """
    rng = np.random.default_rng(0)
    x, dy = (COMPACT[layout](rng.standard_normal(shape).astype(dtype), 1) for _ in range(2))
    for array in (x, dy):
        sick = rng.random(shape) < 0.2
        sick[:, 0] = False
        array[sick] = np.where(rng.random(sick.sum()) < 0.5, np.nan, -np.nan)
    constants = np.zeros(shape[1]), np.ones(shape[1])
    found: dict[str, set[bytes]] = {}
    for nbytes in (0, 2**60):
        replan(STREAM_BYTES=nbytes)
        for offset in range(0, 64, x.itemsize):
            out = _placed(np.empty_like(x), offset)
            m = fastbn.batch_norm(x, out=out)[1]
            found.setdefault("y", set()).add(_bits(out))
            found.setdefault("dx", set()).add(_bits(fastbn.batch_norm_backward(dy, x, m, out=out)[0]))
            found.setdefault("y at inference", set()).add(_bits(fastbn.batch_norm_inference(x, *constants, out=out)))
            constant = fastbn.batch_norm_inference_backward(dy, x, *constants, out=out)[0]
            found.setdefault("dx at inference", set()).add(_bits(constant))
    assert {name: len(bits) for name, bits in found.items()} == dict.fromkeys(found, 1)


STRIDED = {
    "every second of the batch": lambda a: a[::2],
    "some of the channels": lambda a: a[:, 1:-1],
    "every second of the last axis": lambda a: a[..., ::2],
}


@pytest.mark.parametrize("name", STRIDED)
@every_dtype
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((6, 8, 5, 12), "C"),
        pytest.param((8, 18, 64, 64), "C", marks=compiled),
        pytest.param((4, 4, 300, 300), "C", marks=compiled),
        # a few channels would be folded where there are no gaps: then the copy is another layout
        ((30, 72), "channels_last"),
        pytest.param((6000, 72), "channels_last", marks=compiled),
        pytest.param((2, 72, 60, 64), "channels_last", marks=compiled),
    ],
    ids=str,
)
def test_strided_input_as_its_copy(shape: tuple[int, ...], layout: str, dtype: str, name: str) -> None:
    x, dy, gamma, beta = _draw(shape, dtype, layout)
    x, dy = STRIDED[name](x), STRIDED[name](dy)
    gamma, beta = gamma[: x.shape[1]].copy(), beta[: x.shape[1]].copy()
    assert not (x.flags.c_contiguous or x.flags.f_contiguous)
    copies = COMPACT[layout](x, 1), COMPACT[layout](dy, 1)
    _same(_results(x, dy, gamma, beta), _results(*copies, gamma, beta))


@every_dtype_and_backend
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "dims",
    [
        (3, 5, 7),
        (20, 40),
        (9, 3),
        pytest.param((4, 16, 4096), marks=compiled),
        pytest.param((2, 3, 90300), marks=compiled),
        pytest.param((24, 96, 49), marks=compiled),
        pytest.param((6000, 70), marks=compiled),
        pytest.param((150, 2100), marks=compiled),
        pytest.param((60000, 5), marks=compiled),
    ],
    ids=str,
)
def test_separate_calls_as_the_fused_ones(dims: tuple[int, ...], affine: bool, dtype: str, backend: str) -> None:
    """On canonical views: moments + normalize is forward, grad_reduce + grad_input is backward."""
    b, eps = select(backend).passes, 1e-5
    x, dy, gamma, beta = _draw(dims, dtype, "C")
    scale, shift = (gamma, beta) if affine else (None, None)
    y, fused = b.forward(x, scale, shift, eps, np.empty_like(x))
    m = b.moments(x)
    rstd = m.rstd(eps)
    separate = b.normalize(x, m.mean, rstd, scale, shift, np.empty_like(x))
    assert m.count == fused.count
    _same({"y": separate, "mean": m.mean, "m2": m.m2}, {"y": y, "mean": fused.mean, "m2": fused.m2})

    for training in (True, False):
        dx, dgamma, dbeta = b.backward(dy, x, m.mean, rstd, scale, np.empty_like(x), training)
        sums = b.grad_reduce(dy, x, m.mean, rstd)
        alone = b.grad_input(dy, x, m.mean, rstd, scale, sums if training else None, m.count, np.empty_like(x))
        _same({"dx": alone, "dbeta": sums[0], "dgamma": sums[1]}, {"dx": dx, "dbeta": dbeta, "dgamma": dgamma})
