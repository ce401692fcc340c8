"""How GPU kernels are declared, compiled for a dtype and launched."""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numba import cuda

from fastbn.cpu import interrupts
from fastbn.cuda.kernels import disk, gpu, simulated
from fastbn.cuda.kernels.arguments import described

__all__ = ["KERNELS", "Kernel", "current", "device_of", "empty", "kernel", "on", "pointer", "put", "raw", "wait"]

DOUBLE = np.dtype(np.float64)
Target = tuple[int, int, str]  # compute capability, and "a" for the instructions of that one alone
KEPT = 64 * 2**20  # bytes of workspaces that a device keeps for the next calls

_NUMBERS: dict[str, Callable[[Any], Any]] = {"i4": np.int32, "i8": np.int64, "f": np.float64}
_WHOLE = {"i4": 32, "i8": 64}
_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)")
_compiling = threading.RLock()


class Kernel:
    """One body, compiled for a dtype at its first launch.

    Parameters
    ----------
    body : function
        The kernel, in terms of `gpu`.
    arguments : str
        A type per argument, as `fastbn.cuda.kernels.arguments` has them.
    name : str, optional
        What errors call it; the body's name if None.

    Attributes
    ----------
    options : dict
        What the compiler is told beside the signature.
    """

    # Threads of a block, blocks of a multiprocessor: 128 registers. Without, ptxas allows for blocks of 1024 threads:
    # it keeps within 64 registers and takes the loads of a step apart, so that each waits for the one before
    # (`python -m bench.sass`: 2 of 4 at once).
    options: ClassVar[dict[str, Any]] = {"launch_bounds": (256, 2)}

    def __init__(self, body: Callable[..., Any], arguments: str, name: str | None = None) -> None:
        self.body, self.arguments = body, arguments.split()
        self.names = body.__code__.co_varnames[: body.__code__.co_argcount]
        self.name = f"{body.__module__.rpartition('.')[2]}.{name or body.__name__}"
        self._made: dict[tuple[np.dtype[Any], np.dtype[Any], Target], Any] = {}
        self._on: dict[tuple[np.dtype[Any], np.dtype[Any], int], Any] = {}  # the same by device, for launches

    def signature(self, dtype: np.dtype[Any], statistic: np.dtype[Any] = DOUBLE) -> Any:
        """The numba signature for memory of a dtype: float32, float64, uint16 for float16, int16 for bfloat16."""
        from numba.cuda import types  # not in the simulator of numba's own target

        storage = getattr(types, dtype.name)
        computed = storage if isinstance(storage, types.Float) else types.float32
        known = {
            "x": types.CPointer(storage),
            "w": types.CPointer(computed),
            "s": types.CPointer(types.float64),
            "t": types.CPointer(getattr(types, statistic.name)),
            "i4": types.int32,
            "i8": types.int64,
            "f": types.float64,
        }
        return types.void(*(known[token] for token in self.arguments))

    def compiled(self, dtype: np.dtype[Any], statistic: np.dtype[Any], device: int) -> Any:
        """The kernel for a device, the current one; compiled at the first time, once for all devices of one kind."""
        if gpu.SIMULATED:
            return cuda.jit(_quietly(self.body))
        statistic, target = statistic if "t" in self.arguments else DOUBLE, target_of(device)
        # once, of threads that come at once; and broken off, it leaves a lock of llvmlite's held
        with _compiling, interrupts.deferred():
            if (dtype, statistic, target) not in self._made:
                self._made[dtype, statistic, target] = _loaded(*self._built(dtype, statistic, target))
            return self._made[dtype, statistic, target]

    def _built(self, dtype: np.dtype[Any], statistic: np.dtype[Any], target: Target) -> tuple[str, bytes]:
        """(name of its entry, machine code), from the disk where it is kept there."""
        tokens = hashlib.sha256(" ".join(self.arguments).encode()).hexdigest()[:8]  # one body may be two kernels
        name = f"{self.name}-{tokens}-{dtype}-{statistic}-{architecture(target)}"
        if (kept := disk.load(name)) is not None:
            return kept
        made = assembled(self.ptx(dtype, statistic, target), architecture(target))
        disk.save(name, *made)
        return made

    def ptx(self, dtype: np.dtype[Any], statistic: np.dtype[Any], target: Target) -> str:
        """What runs, but for the assembler's work: no link-time optimization comes between."""
        found: str = cuda.compile(
            self.body, self.signature(dtype, statistic), cc=target, device=False, abi="numba", **self.options
        )[0]
        return found

    def prepared(self, arguments: Sequence[Any]) -> list[Any]:
        """Arguments as the driver takes them; what is no number stays as it is.

        Raises
        ------
        ValueError
            A number that the kernel has no room for.
        """
        # NumPy's numbers: a launch with 17 arguments, without the driver, takes 10.6 us with those of ctypes made anew,
        # 1.7 with these.
        return [
            _number(self, k, token, value)
            for k, (token, value) in enumerate(zip(self.arguments, arguments, strict=True))
        ]

    def launch(
        self,
        dtype: np.dtype[Any],
        statistic: np.dtype[Any],
        blocks: int,
        threads: int,
        stream: int,
        device: int,
        arguments: Sequence[Any],
    ) -> None:
        """Launch so many blocks on a stream of the current device, given by its handle, with prepared arguments."""
        compiled = self._on.get((dtype, statistic, device))
        if compiled is None:
            compiled = self._on[dtype, statistic, device] = self.compiled(dtype, statistic, device)
        if gpu.SIMULATED:
            compiled[blocks, threads](*arguments)
            return
        # Not through numba's dispatcher, which would take the addresses for numbers, and warn of the few blocks that
        # small arrays need.
        _core().launch(_stream(stream), _grid(blocks, threads), compiled, *arguments)


def _number(kernel: Kernel, k: int, token: str, value: Any) -> Any:
    if isinstance(value, np.generic):  # of its own width, and no int to the check
        value = value.item()
    if not isinstance(value, int | float):
        return value
    if token in _WHOLE and not -(1 << (bits := _WHOLE[token]) - 1) <= value < 1 << bits - 1:
        raise ValueError(
            f"x: too large for kernel {kernel.name}, whose argument {k} of {bits} bits would be {value}: "
            f"give parts of it"
        )
    return value if gpu.SIMULATED or token not in _NUMBERS else _NUMBERS[token](value)


def target_of(device: int) -> Target:
    """What kernels are compiled for: the device's own instructions, where there are some that later devices lack."""
    major, minor = cuda.gpus[device].compute_capability
    return major, minor, "a" if (major, minor) >= (9, 0) else ""


def architecture(target: Target) -> str:
    """Its name to the assembler: sm_80, sm_90a."""
    return "sm_" + "".join(map(str, target))


def assembled(ptx: str, architecture: str) -> tuple[str, bytes]:
    """(name of its entry, machine code) of a kernel."""
    core = _core()
    linker = core.Linker(core.ObjectCode.from_ptx(ptx.encode()), options=core.LinkerOptions(arch=architecture))
    (entry,) = _ENTRY.findall(ptx)
    return entry, bytes(linker.link("cubin").code)


def _loaded(entry: str, code: bytes) -> Any:
    return _core().ObjectCode.from_cubin(code).get_kernel(entry)


def _quietly(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body in plain Python, as silent about NaN and Inf as the compiled one."""

    def run(*arguments: Any) -> None:
        with np.errstate(all="ignore"):
            body(*arguments)

    return run


@lru_cache(maxsize=256)
def _stream(handle: int) -> Any:
    return _core().Stream.from_handle(handle)


@lru_cache(maxsize=4096)
def _grid(blocks: int, threads: int) -> Any:
    return _core().LaunchConfig(grid=(blocks, 1, 1), block=(threads, 1, 1))


@lru_cache(maxsize=1)
def _core() -> Any:
    """NVIDIA's bindings, which numba-cuda launches with too."""
    import cuda.core

    return cuda.core


def pointer(address: int, low: int, high: int, dtype: np.dtype[Any]) -> Any:
    """What a kernel takes for memory from low to high that is entered at an address.

    In the simulator, memory of the host.
    """
    if not gpu.SIMULATED:
        return address
    flat = (
        np.ctypeslib.as_array((ctypes.c_byte * (high - low)).from_address(low)).view(dtype)
        if high > low
        else np.empty(0, dtype)
    )
    return simulated.Memory(flat, (address - low) // dtype.itemsize)


def empty(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Fresh memory on the current device: numba's array."""
    return cuda.device_array(sizes, dtype, strides=strides) if math.prod(sizes) else cuda.device_array(sizes, dtype)


def put(array: np.ndarray[Any, Any], device: int) -> Any:
    """A copy of a host array on a device: numba's array."""
    if gpu.SIMULATED:
        return cuda.to_device(array.copy())
    with cuda.gpus[device]:
        return cuda.to_device(array)


def raw(nbytes: int, stream: int, device: int) -> tuple[Any, int]:
    """(owner, address) of memory on the current device for what a stream does next; `Pooled.close` gives it back.

    Of a pool, in the stream's own order: right for a stream that is another one in each thread, for a handle that comes
    back, and while a graph is captured, where nothing else may be allocated.
    """
    if gpu.SIMULATED:
        array = np.empty(nbytes + 256, np.uint8)
        return array, -(-array.ctypes.data // 256) * 256
    # whose driver has none: as slow as numba's arrays, whose release waits for the device
    if (pool := _pool(device)) is None:
        array = cuda.device_array(nbytes, np.uint8)
        return array, int(array.__cuda_array_interface__["data"][0])
    taken = Pooled(int(_asked("cuMemAllocFromPoolAsync", nbytes, pool, stream)), stream)
    return taken, taken.address


class Pooled(NamedTuple):
    """Memory of a pool."""

    address: int
    stream: int

    def close(self) -> None:
        """Give it back, behind what the stream has been given to do.

        An error would be an earlier kernel's, which a launch reports.
        """
        _driver().cuMemFreeAsync(self.address, self.stream)


@lru_cache(maxsize=64)
def _pool(device: int) -> Any:
    """A pool of a device's memory; None where its driver has none."""
    driver = _driver()
    if not _asked("cuDeviceGetAttribute", driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, device):
        return None
    wanted = driver.CUmemPoolProps()
    wanted.allocType = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type, wanted.location.id = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, device
    pool = _asked("cuMemPoolCreate", wanted)
    _asked(
        "cuMemPoolSetAttribute",
        pool,
        driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
        driver.cuuint64_t(KEPT),
    )
    return pool


def wait(stream: int, other: int) -> None:
    """What a stream is given next waits for what another one has been given."""
    if not gpu.SIMULATED:
        # not `_stream`: these keep a context, and a handle comes back, perhaps on another device
        of = _core().Stream.from_handle
        of(stream).wait(of(other))


def device_of(address: int) -> int:
    """Index of the device that memory lies on."""
    if gpu.SIMULATED:
        return 0
    driver = _driver()
    error, found = driver.cuPointerGetAttribute(driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
    if error:
        raise ValueError(f"no memory of a GPU at address {address:#x}: {error.name}")
    return int(found)


def current() -> int | None:
    """Index of the current device of this thread; None where it has none yet."""
    if gpu.SIMULATED:
        return 0
    error, found = _driver().cuCtxGetDevice()
    return None if error else int(found)


def on(device: int) -> Any:
    """A context in which a device is the current one."""
    return cuda.gpus[device]


@lru_cache(maxsize=1)
def _driver() -> Any:
    """The driver's functions."""
    from cuda.bindings import driver

    return driver


def _asked(function: str, *arguments: Any) -> Any:
    """What a function of the driver gives; RuntimeError where it refuses."""
    error, *found = getattr(_driver(), function)(*arguments)
    if error:
        raise RuntimeError(f"CUDA failed at {function}: {error.name}")
    return found[0] if found else None


KERNELS: list[Kernel] = []


def kernel(name: str | None = None, **lines: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a kernel's body; lines say what its arguments are that `arguments.ARGUMENTS` does not, or otherwise.

    A name of its own is for a body that is two kernels.
    """

    def decorate(body: Callable[..., Any]) -> Kernel:
        made = Kernel(body, " ".join(line.split()[0] for line in described(body, lines).values()), name)
        KERNELS.append(made)
        return made

    return decorate
