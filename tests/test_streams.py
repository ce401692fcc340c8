"""Streams: which handle, whose memory is allocated under which, who waits for whom, on which GPU. PyTorch and CuPy are stand-ins here."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from absurd import ABSURD

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")

import fastbn
from fastbn.backends import devices, streams
from fastbn.kernels.cuda import _jit

pytestmark = pytest.mark.peers

LEGACY, OWN, OTHER, THIRD = 1, 0x100, 0x200, 0x300


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
        # 0 is the legacy default stream, whatever the bindings take it for where CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM is set.
        (0, LEGACY),
        (driver.CUstream(0), LEGACY),
        (NumbaStream(driver.CUstream(0)), LEGACY),
        (SimpleNamespace(cuda_stream=0), LEGACY),
        (SimpleNamespace(ptr=0), LEGACY),
    ):
        assert streams.handle(given) == want, given
    absurd = {**ABSURD, "whole float": 8.0, "digits": "8", "bytes": bytearray(b"8"), "float without axes": np.array(8.0)}
    for name, value in absurd.items():
        with pytest.raises((TypeError, ValueError), match=r"^stream: given .*, want a handle"):
            streams.handle(value)
            pytest.fail(name)


def test_the_bindings_launch_on_the_handle_that_was_meant() -> None:
    assert int(_jit._stream(LEGACY).handle) == LEGACY
    assert int(_jit._stream(OTHER).handle) == OTHER


class Machine:
    """GPUs and libraries as far as fastbn asks them: what was allocated, waited for, launched, and where."""

    def __init__(self) -> None:
        self.device, self.current = 0, {"torch": OWN, "cupy": OWN}
        self.allocated: list[tuple[str, int, int]] = []  # what, device, stream
        self.waited: list[tuple[int, int]] = []
        self.launched: list[tuple[int, int, int]] = []  # device, stream, the current device
        self.recorded: list[tuple[int, int]] = []  # address, stream
        self.memory: dict[int, np.ndarray] = {}
        self.given_back = 0

    def take(self, what: str, shape: tuple[int, ...], dtype: Any, device: int, stream: int) -> np.ndarray:
        self.allocated.append((what, device, stream))
        return np.empty(shape, dtype)

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def under(self, library: str, stream: int) -> Iterator[None]:
        before, self.current[library] = self.current[library], stream
        try:
            yield
        finally:
            self.current[library] = before


class Within:
    """A library's stream or device: current as long as it is entered, also again."""

    def __init__(self, enter: Callable[[], Any], **says: int) -> None:
        self._enter = enter
        self.__dict__.update(says)

    def __enter__(self) -> None:
        self._entered = self._enter()
        self._entered.__enter__()

    def __exit__(self, *reason: Any) -> None:
        self._entered.__exit__(*reason)


class Array:
    """An array of a library on a GPU, in host memory."""

    def __init__(self, machine: Machine, array: np.ndarray, device: int, stream: int | None = None) -> None:
        self.machine, self.array, self.home, self.said = machine, array, device, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__ | {"version": 3, "stream": self.said}

    def __getitem__(self, k: int) -> Any:
        return type(self)(self.machine, self.array[k], self.home, self.said)


class Numba(Array):
    """As anything with the interface."""


class Cupy(Array):
    """CuPy's."""

    @property
    def device(self) -> Any:
        return Within(lambda: self.machine.on(self.home), id=self.home)


class Torch(Array):
    """PyTorch's."""

    is_cuda, requires_grad = True, False

    @property
    def device(self) -> Any:
        return SimpleNamespace(index=self.home)

    @property
    def dtype(self) -> str:
        return f"torch.{self.array.dtype}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def is_neg(self) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        self.machine.recorded.append((self.data_ptr(), stream.value))


Cupy.__module__, Torch.__module__ = "cupy", "torch"
KINDS: dict[str, type[Array]] = {"torch": Torch, "cupy": Cupy, "numba": Numba}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two GPUs, of which 0 is the current one, and libraries whose current stream is OWN."""
    found = Machine()

    def stream(library: str) -> Any:
        return lambda value, device: Within(lambda: found.under(library, value), value=value, device=device)

    def torch_empty(sizes: Any, dtype: Any, device: Any) -> Torch:
        shape = (sizes,) if isinstance(sizes, int) else tuple(sizes)
        return Torch(found, found.take("array", shape, dtype, device.index, found.current["torch"]), device.index)

    def cupy_empty(sizes: Any, dtype: Any) -> Cupy:
        return Cupy(found, found.take("array", sizes, dtype, found.device, found.current["cupy"]), found.device)

    def current(library: str, attribute: str) -> Any:
        return lambda device: SimpleNamespace(**{attribute: found.current[library] if device == 1 else THIRD})  # x is on GPU 1

    torch = SimpleNamespace(
        empty=torch_empty,
        uint8=np.uint8,
        float32=np.float32,
        float64=np.float64,
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda device: found.current["torch"] if device == 1 else THIRD),
        cuda=SimpleNamespace(
            ExternalStream=stream("torch"), default_stream=lambda device: stream("torch")(LEGACY, device), stream=lambda given: given
        ),
    )
    cupy = SimpleNamespace(
        empty=cupy_empty,
        cuda=SimpleNamespace(
            ExternalStream=stream("cupy"), get_current_stream=current("cupy", "ptr"), Stream=SimpleNamespace(null=stream("cupy")(LEGACY, 1))
        ),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(devices, "declines", lambda: None)

    def raw(nbytes: int, stream: int, device: int) -> tuple[Any, int]:
        memory = found.take("pool", (nbytes + 256,), np.uint8, found.device, stream)
        found.given_back -= 1
        return SimpleNamespace(memory=memory, close=lambda: setattr(found, "given_back", found.given_back + 1)), memory.ctypes.data & -256

    def launch(kernel: Any, dtype: Any, statistic: Any, blocks: int, threads: int, stream: int, device: int, arguments: Any) -> None:
        found.launched.append((device, stream, found.device))

    def empty(sizes: Any, strides: Any, dtype: Any) -> Numba:
        return Numba(found, found.take("array", sizes, dtype, found.device, 0), found.device)

    for name, fake in {
        "raw": raw,
        "empty": empty,
        "wait": lambda stream, other: found.waited.append((stream, other)),
        "current": lambda: found.device,
        "on": found.on,
        "device_of": lambda address: 1,
    }.items():
        monkeypatch.setattr(_jit, name, fake)
    monkeypatch.setattr(_jit.Kernel, "launch", launch)
    return found


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


def test_memory_is_given_back_where_a_launch_fails(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_jit.Kernel, "launch", lambda *given: 1 / 0)
    with pytest.raises(RuntimeError, match=r"CUDA failed at kernel fused\.forward_rows, .*stream 0x200: division by zero"):
        fastbn.batch_norm(given(machine, "numba", (4, 3, 5)), stream=OTHER)
    assert machine.given_back == 0
    assert [what for what, *_ in machine.allocated] == ["array", "array", "pool"]
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
    monkeypatch.setattr(_jit, "_driver", lambda: driver)
    _jit._pool.cache_clear()
    try:
        for stream in (2, OTHER):  # the first is another stream in each thread: nothing is kept for it
            owner, address = _jit.raw(1000, stream, 1)
            assert address == 4096
            streams.give_back(owner)
    finally:
        _jit._pool.cache_clear()
    names = [name for name, *_ in driver.asked]
    assert names == ["cuDeviceGetAttribute", "cuMemPoolCreate", "cuMemPoolSetAttribute", *2 * ["cuMemAllocFromPoolAsync", "cuMemFreeAsync"]]
    (_, wanted), (_, pool, what, value) = driver.asked[1:3]
    assert (wanted.location.id, wanted.location.type.name) == (1, "CU_MEM_LOCATION_TYPE_DEVICE")
    assert (int(pool), what.name, int(value)) == (77, "CU_MEMPOOL_ATTR_RELEASE_THRESHOLD", _jit.KEPT)
    assert [(nbytes, int(pool), stream) for _, nbytes, pool, stream in driver.asked[3::2]] == [(1000, 77, 2), (1000, 77, OTHER)]
    assert driver.asked[4::2] == [("cuMemFreeAsync", 4096, 2), ("cuMemFreeAsync", 4096, OTHER)]


def test_a_refusal_of_the_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import driver

    refused = Driver(pools=1)
    refused.cuMemFreeAsync = lambda *given: (driver.CUresult.CUDA_ERROR_INVALID_VALUE,)
    monkeypatch.setattr(_jit, "_driver", lambda: refused)
    with pytest.raises(RuntimeError, match="CUDA failed at cuMemFreeAsync: CUDA_ERROR_INVALID_VALUE"):
        _jit.Pooled(4096, OTHER).close()
