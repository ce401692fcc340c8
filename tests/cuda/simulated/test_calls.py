"""What the simulated GPU does beside the contract: long parts, positions of 64 bits, moments as values, workspaces,
errors.
"""

import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from launch import at_once
from numba import cuda as numba_cuda
from shapes import Case

import fastbn
from fastbn.cuda import backend, buffers, checks, grids, launches, streams, views
from fastbn.cuda.kernels import apply, jit, simulated
from tests import test_contract as contract
from tests import test_kept
from tests.cuda.simulated import gpu
from tests.test_contract import inputs, verify

WRITING = {name: call for name, call in contract.WRITING.items() if not name.startswith("BatchNorm")}
ONE_LAUNCH = (
    Case((3, 2, 53), 1, "rows of odd size"),
    Case((2, 2, 160), 1, "rows in whole groups"),
    Case((31, 7), 1, "channels last"),
    Case((5, 9), 1, "channels last, threads without a channel"),
)
LONG_PARTS = (
    Case((2, 2, 80), 1, "rows in whole groups"),
    Case((3, 2, 53), 1, "rows of odd size"),
    Case((43, 16), 1, "channels last"),
)


@pytest.mark.parametrize("call", ["moments", *WRITING])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_that_take_a_thread_many_steps(call: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "DEEP", 1000)
    monkeypatch.setattr(grids, "FULL", 1)
    for case in LONG_PARTS:
        i = inputs(case, dtype)
        verify(contract.CALLS[call](i, "cuda"), i)


@pytest.mark.parametrize("call", WRITING)
def test_positions_of_64_bits_give_the_same_bits(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (Case((3, 2, 6, 8), 1, "rows"), Case((9, 5), 1, "columns")):
        i = inputs(case, "float32")
        want = WRITING[call](i, "cuda")
        with monkeypatch.context() as patch:
            patch.setattr(grids, "LONG", 0)
            launches.program.cache_clear()
            for kernel in (apply.normalize, apply.gradient):  # which would be the wrong ones
                patch.setattr(kernel, "launch", None)
            for name, array in WRITING[call](i, "cuda").items():
                np.testing.assert_array_equal(array, want[name])


def test_bfloat16_memory_in_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With arrays that say they hold it, for numba's have no bfloat16: the float32 result, rounded."""
    monkeypatch.setattr(
        buffers, "_dtype", lambda given, interface, name: "bfloat16" if given.dtype == np.int16 else str(given.dtype)
    )
    for shape in ((3, 2, 5, 7), (21, 16), (9, 5)):
        x, dy = (np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16) for seed in (4, 5))
        bits = [gpu.on_gpu(array.view(np.int16)) for array in (x, dy, np.zeros_like(x), np.zeros_like(x))]
        m = fastbn.batch_norm(bits[0], out=bits[2])[1]
        fastbn.batch_norm_backward(bits[1], bits[0], m, out=bits[3])
        y, want = fastbn.batch_norm(x, backend="reference")
        dx = fastbn.batch_norm_backward(dy, x, want, backend="reference")[0]
        for found, expected in ((bits[2], y), (bits[3], dx)):
            values = gpu.on_host(found).view(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_allclose(values, expected.astype(np.float32), rtol=2**-8, atol=1e-6)
        np.testing.assert_allclose(gpu.on_host(m.mean), want.mean, rtol=1e-6, atol=1e-7)


def test_moments_are_values_on_the_gpu() -> None:
    x = np.random.default_rng(6).normal(3, 2, (8, 3, 5)).astype(np.float32)
    halves = [fastbn.moments(gpu.on_gpu(np.ascontiguousarray(half))) for half in (x[:3], x[3:])]
    both = halves[0].merge(halves[1])
    want = fastbn.moments(x, backend="reference")
    assert both.count == want.count
    for found, expected in (
        (both.mean, want.mean),
        (both.m2, want.m2),
        (both.var(), want.var()),
        (both.var(1), want.var(1)),
        (both.std(), want.std()),
        (both.rstd(1e-5), want.rstd(1e-5)),
    ):
        np.testing.assert_allclose(gpu.on_host(found), expected, rtol=1e-6)
    assert np.isnan(gpu.on_host(both.var(ddof=both.count))).all()
    with pytest.raises(TypeError, match="merge: given Moments, want moments that are on the GPU too"):
        both.merge(want)
    with pytest.raises(ValueError, match="merge: given 5 channels, want 3"):
        both.merge(fastbn.moments(gpu.on_gpu(x), axis=2))


def test_running_moments_of_chunks() -> None:
    x = np.random.default_rng(9).normal(3, 2, (12, 3, 5)).astype(np.float32)
    seen = gpu.RunningMoments(3, 1, "cuda")
    for chunk in (x[:0], x[:2], x[2:7], x[7:]):
        seen.update(chunk)
    want = fastbn.moments(x, backend="reference")
    assert seen.seen.count == want.count
    np.testing.assert_allclose(seen.mean, want.mean, rtol=1e-6)
    np.testing.assert_allclose(seen.var(), want.var(), rtol=1e-6)
    with pytest.raises(TypeError, match="merge: given moments that are on a GPU"):
        want.merge(seen.seen.moments)


def test_every_run_gives_the_same_bits() -> None:
    i = inputs(Case((3, 2, 6, 8), 1, "several parts of a channel"), "float32")
    first = {name: call(i, "cuda") for name, call in WRITING.items()}
    for _ in range(2):
        for name, call in WRITING.items():
            for key, array in call(i, "cuda").items():
                np.testing.assert_array_equal(array, first[name][key])


def test_a_call_takes_its_own_workspace_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []
    raw = jit.raw
    monkeypatch.setattr(
        jit, "raw", lambda nbytes, stream, device: taken.append((nbytes, stream)) or raw(nbytes, stream, device)
    )
    x = gpu.on_gpu(np.random.default_rng(7).standard_normal((4, 3, 5)).astype(np.float32))
    for stream in (None, None, 5, np.int64(5)):
        fastbn.batch_norm(x, stream=stream)
    assert [stream for _, stream in taken] == [buffers.LEGACY, buffers.LEGACY, 5, 5]
    assert len({nbytes for nbytes, _ in taken}) == 1
    assert taken[0][0] < 4096
    with pytest.raises(TypeError, match="stream: given str"):
        fastbn.batch_norm(x, stream="5")


def test_what_is_launched_is_written_once_for_arrays_that_lie_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(7).standard_normal((4, 3, 5)).astype(np.float32)
    for _ in range(3):
        for eps in (1e-5, 1e-3):
            y = fastbn.batch_norm(gpu.on_gpu(x.copy()), eps=eps)[0]
            want = fastbn.batch_norm(x, eps=eps, backend="reference")[0]
            np.testing.assert_allclose(gpu.on_host(y), want, rtol=1e-5, atol=1e-6)
    assert launches.program.cache_info().misses == 1
    assert launches.program.cache_info().maxsize == launches.PROGRAMS  # others make room
    fastbn.batch_norm(gpu.on_gpu(x[:2]))
    fastbn.batch_norm(gpu.on_gpu(x.astype(np.float64)))
    fastbn.batch_norm(gpu.on_gpu(x), axis=0)
    assert launches.program.cache_info().misses == 4
    fastbn.batch_norm(gpu.on_gpu(x), out=gpu.on_gpu(x.copy()))
    monkeypatch.setattr(checks, "_shadow", lambda buffer: pytest.fail("NumPy was asked about memory that lies apart"))
    fastbn.batch_norm(given := gpu.on_gpu(x), out=given)
    fastbn.batch_norm(gpu.on_gpu(x), out=gpu.on_gpu(x.copy()))


def test_a_launch_that_fails_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("out of luck")

    monkeypatch.setattr(apply.normalize, "launch", fail)
    x = gpu.on_gpu(np.ones((4, 3, 5), np.float32))
    words = (
        r"CUDA failed at kernel apply.normalize, 1 blocks of 8 threads, x \(4, 3, 5\) float32, stream 0x5: out of luck"
    )
    given: list[Any] = []
    monkeypatch.setattr(streams, "give_back", given.append)
    with pytest.raises(RuntimeError, match=words):
        fastbn.batch_norm(x, stream=5)
    assert len(given) == 1  # its workspace


def test_threads_at_once_on_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = threading.Lock()

    def one_by_one(function: Any) -> Any:  # as the simulator wants it; calls are cut into by each other all the same
        def run(*given: Any) -> Any:
            with turn:
                found = function(*given)
            time.sleep(1e-3)
            return found

        return run

    monkeypatch.setattr(jit.Kernel, "launch", one_by_one(jit.Kernel.launch))
    monkeypatch.setattr(jit, "empty", one_by_one(jit.empty))
    x = np.random.default_rng(8).standard_normal((4, 2, 6, 6)).astype(np.float32)
    want = gpu.batch_norm(x, None, None, 1, 1e-5, None, backend="cuda")[0]
    found: list[np.ndarray] = []
    at_once([lambda: found.append(gpu.batch_norm(x, None, None, 1, 1e-5, None, backend="cuda")[0])] * 3)
    for array in found:
        np.testing.assert_array_equal(array, want)
    assert len(found) == 3


X = np.ones((4, 3, 5), np.float32)
THREE = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda g: fastbn.batch_norm(g(X), THREE),
            TypeError,
            "gamma: given ndarray on the host, want an array on the GPU, where x is",
        ),
        (
            lambda g: fastbn.batch_norm(g(X), g(THREE.astype("f8"))),
            TypeError,
            "gamma: given dtype float64, want float32 beside this x",
        ),
        (lambda g: fastbn.batch_norm(g(X), g(np.ones(4, "f4"))), ValueError, r"gamma: given shape \(4,\), want \(3,\)"),
        (lambda g: fastbn.batch_norm(g(X), g(np.ones(6, "f4")[::2])), ValueError, "gamma: given an array with gaps"),
        (lambda g: fastbn.batch_norm(g(X.astype("i4"))), TypeError, "x: given dtype int32.* want float16"),
        (
            lambda g: fastbn.moments(g(X.astype("u1"))),
            TypeError,
            "x: given dtype uint8.* want float16.*: convert it first",
        ),
        (lambda g: fastbn.moments(g(X)).var("1"), TypeError, "^ddof: given '1', want a number$"),
        (lambda g: fastbn.moments(g(X)).rstd(np.ones(2)), TypeError, "^eps: given"),
        (lambda g: fastbn.moments(g(X), stream=10**400), ValueError, "^stream: given"),
        (lambda g: fastbn.batch_norm(g(X), axis=3), ValueError, "axis: given 3, want one from -3 to 2"),
        (lambda g: fastbn.batch_norm(g(X[0, 0])), ValueError, "x: given rank 1"),
        (lambda g: fastbn.batch_norm(g(X), eps=0), ValueError, "eps: given 0, want a positive number"),
        (
            lambda g: fastbn.batch_norm(g(X[:1, :, :1])),
            ValueError,
            "Expected more than 1 value per channel when training",
        ),
        (lambda g: fastbn.batch_norm(g(X), out=X.copy()), TypeError, "out: given ndarray on the host"),
        (lambda g: fastbn.batch_norm(g(X), out=g(X.astype("f8"))), TypeError, "out: given dtype float64, want float32"),
        (
            lambda g: fastbn.batch_norm(g(X), out=g(X[:2])),
            ValueError,
            r"out: given shape \(2, 3, 5\), want \(4, 3, 5\)",
        ),
        (
            lambda g: fastbn.batch_norm(g(X), out=g(np.broadcast_to(X, X.shape))),
            ValueError,
            "out: given a read-only array",
        ),
        (
            lambda g: fastbn.batch_norm_inference(g(X), g(THREE), None),
            ValueError,
            "given running mean without running var",
        ),
        (
            lambda g: fastbn.batch_norm_inference(g(X), g(THREE), g(THREE.astype("f2"))),
            TypeError,
            "var: given dtype float16, want float32 or",
        ),
        (
            lambda g: fastbn.batch_norm_backward(g(X[:2]), g(X), None),
            ValueError,
            r"dy: given shape \(2, 3, 5\), want \(4, 3, 5\)",
        ),
        (
            lambda g: fastbn.batch_norm_backward(g(X.astype("f8")), g(X), None),
            TypeError,
            "dy: given dtype float64, want float32",
        ),
        (
            lambda g: fastbn.batch_norm_backward(g(X), g(X), None),
            TypeError,
            "moments: given NoneType, want the Moments",
        ),
        (
            lambda g: fastbn.batch_norm_backward(g(X), g(X), fastbn.moments(X)),
            TypeError,
            "moments.mean: given ndarray on the host",
        ),
    ],
)
def test_errors_say_what_is_wanted(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(gpu.on_gpu)


def test_out_that_overlaps_an_input_in_part_is_refused() -> None:
    memory = np.zeros(100, np.float32)
    x, out = memory[:60].reshape(4, 3, 5), memory[20:80].reshape(4, 3, 5)
    with pytest.raises(ValueError, match="out: given an array that overlaps an input in part"):
        fastbn.batch_norm(gpu.on_gpu(x), out=gpu.on_gpu(out))
    twice = np.lib.stride_tricks.as_strided(memory, (4, 3, 5), (0, 20, 4))
    with pytest.raises(ValueError, match="out: given an array whose elements share memory"):
        fastbn.batch_norm(gpu.on_gpu(np.ones((4, 3, 5), np.float32)), out=gpu.on_gpu(twice))


@pytest.mark.parametrize("function", test_kept.OUT)
def test_out_lies_apart_from_parameters_and_statistics(function: str) -> None:
    call, like, rows = test_kept.OUT[function]
    x, C = test_kept.X, test_kept.C
    for name in rows:
        memory = np.ones(x.size + C, np.float32)
        given = dict.fromkeys(like, gpu.on_gpu(x)) | dict.fromkeys(rows, gpu.on_gpu(np.ones(C, np.float32)))
        given["out"] = gpu.on_gpu(memory[: x.size].reshape(x.shape))
        for row in (memory[3:][:C], memory[x.size - 1 :][:C]):
            with pytest.raises(
                ValueError, match=rf"^out: given an array that overlaps (moments\.)?{name}; want memory apart from it$"
            ):
                call(**given | {name: gpu.on_gpu(row)})
        assert (memory == 1).all()
        call(**given | {name: gpu.on_gpu(memory[x.size :])})


def test_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gamma = gpu.on_gpu(X), gpu.on_gpu(THREE)
    monkeypatch.setattr(buffers, "device_of", lambda buffer: int(buffer.owner is gamma))
    with pytest.raises(ValueError, match="gamma: given an array on GPU 1, want GPU 0, where x is"):
        fastbn.batch_norm(x, gamma)


def test_strides_of_more_axes_than_a_copy_takes() -> None:
    x = np.ones((4,) * 7, np.float32)[(slice(None, None, 2),) * 7]
    with pytest.raises(ValueError, match="copy it to contiguous memory first"):
        fastbn.batch_norm(gpu.on_gpu(x))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("call", ["batch_norm", "batch_norm_backward"])
def test_one_launch_gives_the_bits_of_three(call: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    launch = jit.Kernel.launch
    monkeypatch.setattr(jit.Kernel, "launch", lambda kernel, *given: seen.append(kernel.name) or launch(kernel, *given))
    monkeypatch.setattr(grids, "DEEP", 1000)  # one part to a channel, whatever its size
    for case in ONE_LAUNCH:
        i = inputs(case, dtype)
        launches.program.cache_clear()
        found, fused = WRITING[call](i, "cuda"), seen.copy()
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(views, "fused_reduction", lambda out, *arrays: views.reduction(*arrays))
            launches.program.cache_clear()
            want, apart = WRITING[call](i, "cuda"), seen.copy()
        seen.clear()
        assert [name.startswith("fused.") for name in fused].count(True) == 1
        assert not any(name.startswith("fused.") for name in apart)
        assert len(apart) == len(fused) + 2
        for name, array in found.items():
            np.testing.assert_array_equal(array, want[name], err_msg=f"{case}: {name}")


def test_a_barrier_that_not_every_thread_reaches_is_an_error() -> None:
    def parted() -> None:
        if simulated.thread() > 0:
            simulated.sync()

    with pytest.raises(AssertionError, match="wait at a barrier, and others have ended"):
        numba_cuda.jit(parted)[1, 8]()


def test_workspace_is_what_a_call_needs() -> None:
    """By arithmetic: no table of coefficients where one launch takes none, nor one longer than rows of many channels
    need.
    """
    one = ((4, 3), (3, 1), "float32", 0)
    given = (((3,), (1,), "float64", 0),) * 2
    assert launches.program(backend._backward, (one, one, *given, None, None, None), 1, ("mean", "var"), True).work == 0
    for C in (10_000_001, 2**28 + 1):
        x, means = ((2, C), (C, 1), "float16", 0), ((C,), (1,), "float32", 0)
        program = launches.program(backend._inference, (x, means, means, None, None, None), 1)
        assert 12 * C <= program.work <= 12 * (C + 8) + launches.ALIGNED
