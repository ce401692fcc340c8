"""Streams: which handle, whose memory is allocated under which, who waits for whom, on which GPU. PyTorch and CuPy are
stand-ins here.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from absurd import ABSURD

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")

import stand_ins
from stand_ins import KINDS, LEGACY, OTHER, OWN, THIRD, Array, Machine

import fastbn
from fastbn.cuda import streams
from fastbn.cuda.kernels import jit

pytestmark = pytest.mark.peers


def test_a_stream_of_every_library_is_known_by_its_handle() -> None:
    from cuda.bindings import driver, runtime
    from cuda.core import LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM, Stream
    from numba.cuda.cudadrv.driver import Stream as NumbaStream

    class Index:
        def __index__(self) -> int:
            return 8

    for given, want in (
        (8, 8),
        (np.int64(8), 8),
        (np.uint64(2**63), 2**63),
        (Index(), 8),
        (driver.CUstream(8), 8),
        (runtime.cudaStream_t(8), 8),
        (Stream.from_handle(8), 8),
        (NumbaStream(driver.CUstream(8)), 8),
        (NumbaStream(driver.CUstream(8), external=True), 8),
        (SimpleNamespace(cuda_stream=8), 8),
        (SimpleNamespace(ptr=8), 8),
        (SimpleNamespace(__cuda_stream__=lambda: (0, 8)), 8),
        (LEGACY_DEFAULT_STREAM, LEGACY),
        (PER_THREAD_DEFAULT_STREAM, 2),
        # 0 is the legacy default stream, whatever the bindings take it for where
        # CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM is set.
        (0, LEGACY),
        (driver.CUstream(0), LEGACY),
        (NumbaStream(driver.CUstream(0)), LEGACY),
        (SimpleNamespace(cuda_stream=0), LEGACY),
        (SimpleNamespace(ptr=0), LEGACY),
    ):
        assert streams.handle(given) == want, given
    absurd = {
        **ABSURD,
        "whole float": 8.0,
        "digits": "8",
        "bytes": bytearray(b"8"),
        "float without axes": np.array(8.0),
    }
    for name, value in absurd.items():
        with pytest.raises((TypeError, ValueError), match=r"^stream: given .*, want a handle"):
            streams.handle(value)
            pytest.fail(name)


def test_the_bindings_launch_on_the_handle_that_was_meant() -> None:
    assert int(jit._stream(LEGACY).handle) == LEGACY
    assert int(jit._stream(OTHER).handle) == OTHER


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Stand-ins for the libraries, and x on GPU 1, where 0 is the current one."""
    return stand_ins.installed(monkeypatch)


def given(machine: Machine, kind: str, shape: tuple[int, ...], stream: int | None = None, device: int = 1) -> Array:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return KINDS[kind](machine, values, device, stream)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [None, OWN, OTHER, 0])
def test_memory_belongs_to_the_stream_of_the_call_and_its_gpu(kind: str, stream: int | None, machine: Machine) -> None:
    x, dy, gamma = (given(machine, kind, shape) for shape in ((4, 3, 6, 7), (4, 3, 5, 6), (3,)))
    x.array = x.array[:, :, 1:, 1:]  # which no two strides describe: a copy is made
    own = OWN if kind != "numba" else LEGACY
    want = own if stream is None else stream or LEGACY
    y, m = fastbn.batch_norm(x, gamma, stream=stream)
    found = fastbn.batch_norm_backward(dy, x, m, gamma, stream=stream)
    assert all(type(array) is KINDS[kind] and array.home == 1 for array in (y, m.mean, m.m2, *found))
    assert machine.allocated
    for what, device, under in machine.allocated:
        assert (device, under) == (1, 0 if kind == "numba" and what == "array" else want), what
    assert machine.launched
    assert set(machine.launched) == {(1, want, 1)}
    assert machine.device == 0
    assert machine.current == {"torch": OWN, "cupy": OWN}
    assert machine.given_back == 0
    assert not machine.waited
    recorded = {(array.array.ctypes.data, want) for array in (x, dy, gamma, m.mean, m.m2)}
    assert set(machine.recorded) == (recorded if kind == "torch" and want != own else set())


@pytest.mark.parametrize(
    ("kind", "current", "stream", "recorded"),
    [
        ("cupy", OTHER, None, True),  # CuPy's current stream, which is not PyTorch's
        ("cupy", OWN, None, False),
        ("cupy", OTHER, OWN, False),  # PyTorch's, though not CuPy's
        ("cupy", OWN, OTHER, True),
        ("numba", OWN, None, True),  # the legacy default stream
        ("numba", OWN, OWN, False),
        ("numba", OWN, OTHER, True),
        ("torch", OWN, OTHER, True),
        ("torch", OWN, None, False),
    ],
)
def test_a_tensor_is_recorded_wherever_the_stream_is_not_pytorchs(
    kind: str, current: int, stream: int | None, recorded: bool, machine: Machine
) -> None:
    machine.current["cupy"] = current
    x, gamma, out = given(machine, kind, (4, 3, 5)), given(machine, "torch", (3,)), given(machine, "torch", (4, 3, 5))
    fastbn.batch_norm(x, gamma, out=out, stream=stream)
    want = {array.array.ctypes.data for array in (x, gamma, out) if type(array) is KINDS["torch"]}
    assert {address for address, _ in machine.recorded} == (want if recorded else set())
    assert {under for _, under in machine.recorded} == ({machine.launched[0][1]} if recorded else set())
    assert (machine.device, machine.current) == (0, {"torch": OWN, "cupy": current})


@pytest.mark.parametrize("kind", ["torch", "cupy"])
def test_a_tensor_that_can_not_be_recorded_leaves_the_current_gpu_and_stream(
    kind: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(KINDS["torch"], "record_stream", lambda tensor, stream: asked.append(tensor) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastbn.batch_norm(
            given(machine, kind, (4, 3, 5)), given(machine, "torch", (3,)), given(machine, "torch", (3,)), stream=OTHER
        )
    assert (machine.device, machine.current) == (0, {"torch": OWN, "cupy": OWN})
    assert len(asked) == (3 if kind == "torch" else 2)  # the others are recorded all the same


def test_memory_is_given_back_where_a_launch_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.Kernel, "launch", lambda *given: 1 / 0)
    with pytest.raises(
        RuntimeError, match=r"CUDA failed at kernel rows\.moments_rows, .*stream 0x200: division by zero"
    ):
        fastbn.moments(given(machine, "numba", (4, 3, 5)), stream=OTHER)
    assert machine.given_back == 0
    assert [what for what, *_ in machine.allocated] == ["array", "pool"]
    assert machine.device == 0


@pytest.mark.parametrize(
    ("stream", "said", "want"),
    [
        (None, (None, None, None), []),
        (None, (OTHER, None, OTHER), []),  # x's own is the call's
        (None, (OTHER, THIRD, 0), [(OTHER, THIRD), (OTHER, LEGACY)]),
        (None, (None, OTHER, OTHER), [(LEGACY, OTHER)]),
        (OWN, (OTHER, THIRD, OTHER), [(OWN, OTHER), (OWN, THIRD)]),
        (OWN, (OWN, OWN, None), []),
    ],
)
def test_a_call_waits_for_the_streams_of_all_its_arrays(stream: Any, said: Any, want: Any, machine: Machine) -> None:
    x, out = (given(machine, "numba", (4, 3, 5), said[k]) for k in (0, 2))
    fastbn.batch_norm(x, given(machine, "numba", (3,), said[1]), out=out, stream=stream)
    assert machine.waited == want


def test_arrays_of_two_gpus_are_refused(machine: Machine) -> None:
    x, gamma = given(machine, "torch", (4, 3, 5)), given(machine, "torch", (3,), device=0)
    with pytest.raises(ValueError, match="gamma: given an array on GPU 0, want GPU 1, where x is"):
        fastbn.batch_norm(x, gamma)
    assert not machine.allocated


class Driver(SimpleNamespace):
    """The driver's functions, over the real types of cuda.bindings."""

    def __init__(self, pools: int) -> None:
        from cuda.bindings import driver

        super().__init__(**{name: getattr(driver, name) for name in dir(driver) if name.startswith(("CU", "cuuint"))})
        self.asked: list[tuple[Any, ...]] = []
        for name, *found in (
            ("cuDeviceGetAttribute", pools),
            ("cuMemPoolCreate", driver.CUmemoryPool(77)),
            ("cuMemPoolSetAttribute",),
            ("cuMemAllocFromPoolAsync", driver.CUdeviceptr(4096)),
            ("cuMemFreeAsync",),
        ):
            setattr(self, name, lambda *given, name=name, found=found: self.asked.append((name, *given)) or (0, *found))


def test_a_workspace_without_a_library_is_of_a_pool_in_the_order_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(pools=1)
    monkeypatch.setattr(jit, "_driver", lambda: driver)
    jit._pool.cache_clear()
    try:
        for stream in (2, OTHER):  # the first is another stream in each thread: nothing is kept for it
            owner, address = jit.raw(1000, stream, 1)
            assert address == 4096
            streams.give_back(owner)
    finally:
        jit._pool.cache_clear()
    names = [name for name, *_ in driver.asked]
    assert names == [
        "cuDeviceGetAttribute",
        "cuMemPoolCreate",
        "cuMemPoolSetAttribute",
        *2 * ["cuMemAllocFromPoolAsync", "cuMemFreeAsync"],
    ]
    (_, wanted), (_, pool, what, value) = driver.asked[1:3]
    assert (wanted.location.id, wanted.location.type.name) == (1, "CU_MEM_LOCATION_TYPE_DEVICE")
    assert (int(pool), what.name, int(value)) == (77, "CU_MEMPOOL_ATTR_RELEASE_THRESHOLD", jit.KEPT)
    assert [(nbytes, int(pool), stream) for _, nbytes, pool, stream in driver.asked[3::2]] == [
        (1000, 77, 2),
        (1000, 77, OTHER),
    ]
    assert driver.asked[4::2] == [("cuMemFreeAsync", 4096, 2), ("cuMemFreeAsync", 4096, OTHER)]


def test_a_refusal_of_the_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    refused = Driver(pools=1)
    refused.cuMemAllocFromPoolAsync = lambda *given: (driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, driver.CUdeviceptr(0))
    monkeypatch.setattr(jit, "_driver", lambda: refused)
    monkeypatch.setattr(jit, "_pool", lambda device: 77)
    with pytest.raises(RuntimeError, match="CUDA failed at cuMemAllocFromPoolAsync: CUDA_ERROR_OUT_OF_MEMORY"):
        jit.raw(1 << 50, OTHER, 0)


def test_a_wait_that_fails_leaves_the_current_gpu_and_stream_as_they_were(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "wait", lambda stream, other: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastbn.batch_norm(given(machine, "cupy", (4, 3, 5), THIRD), stream=OTHER)
    assert (machine.device, machine.current["cupy"]) == (0, OWN)
    assert not machine.allocated
