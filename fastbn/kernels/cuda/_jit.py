"""How GPU kernels are declared, compiled for a dtype and launched."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
from numba import cuda

from fastbn.kernels.cuda import _gpu, _simulated

__all__ = ["KERNELS", "Kernel", "current", "device_of", "empty", "kernel", "on", "pointer", "put", "raw"]

DOUBLE = np.dtype(np.float64)


class Kernel:
    """One body, compiled for a dtype at its first launch.

    Parameters
    ----------
    body : function
        The kernel, in terms of `_gpu`.
    arguments : str
        A token per argument. Pointers: x as kept in memory, w to x's arithmetic (float32 for half precision), s to float64, t
        to statistics of a dtype of their own. Numbers: i4 and i8 integers, f float64.
    name : str, optional
        What errors call it; the body's name if None.
    """

    def __init__(self, body: Callable[..., Any], arguments: str, name: str | None = None) -> None:
        self.body, self.arguments = body, arguments.split()
        self.name = f"{body.__module__.rpartition('.')[2]}.{name or body.__name__}"

    def signature(self, dtype: np.dtype[Any], statistic: np.dtype[Any] = DOUBLE) -> Any:
        """The numba signature for memory of a dtype: float32, float64, uint16 for float16, int16 for bfloat16."""
        from numba.cuda import types  # not in the simulator of numba's own target

        stored = getattr(types, dtype.name)
        computed = stored if isinstance(stored, types.Float) else types.float32
        known = {
            "x": types.CPointer(stored),
            "w": types.CPointer(computed),
            "s": types.CPointer(types.float64),
            "t": types.CPointer(getattr(types, statistic.name)),
            "i4": types.int32,
            "i8": types.int64,
            "f": types.float64,
        }
        return types.void(*(known[token] for token in self.arguments))

    @cache  # noqa: B019 # kernels live as long as the program
    def compiled(self, dtype: np.dtype[Any], statistic: np.dtype[Any], device: int) -> Any:
        """The kernel for a device, the current one; compiled at the first time."""
        if _gpu.SIMULATED:
            return cuda.jit(_quietly(self.body))
        (made,) = cuda.jit(self.signature(dtype, statistic))(self.body).overloads.values()
        return made._codelibrary.get_cufunc().kernel

    @cached_property
    def converters(self) -> list[Callable[[Any], Any]]:
        """What makes each argument one of the driver's: numba-cuda asks for its type anew at every launch, 24 us for 16 arguments."""
        known = {"i4": ctypes.c_int32, "i8": ctypes.c_int64, "f": ctypes.c_double}
        return [known.get(token, int) for token in self.arguments]

    def launch(
        self,
        dtype: np.dtype[Any],
        statistic: np.dtype[Any],
        blocks: int,
        threads: int,
        stream: int,
        device: int,
        arguments: tuple[Any, ...],
    ) -> None:
        """Launch so many blocks on a stream of the current device, given by its handle."""
        compiled = self.compiled(dtype, statistic, device)
        if _gpu.SIMULATED:
            compiled[blocks, threads](*arguments)
            return
        # Not through numba's dispatcher, which would take the addresses for numbers, and warn of the few blocks that small arrays need.
        prepared = [convert(value) for convert, value in zip(self.converters, arguments, strict=True)]
        core = _core()
        core.launch(_stream(stream), _grid(blocks, threads), compiled, *prepared)


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
    """What a kernel takes for memory from low to high that is entered at an address; in the simulator, memory of the host."""
    if not _gpu.SIMULATED:
        return address
    flat = np.ctypeslib.as_array((ctypes.c_byte * (high - low)).from_address(low)).view(dtype) if high > low else np.empty(0, dtype)
    return _simulated.Memory(flat, (address - low) // dtype.itemsize)


def empty(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Fresh memory on the current device: numba's array."""
    return cuda.device_array(sizes, dtype, strides=strides) if math.prod(sizes) else cuda.device_array(sizes, dtype)


def put(array: np.ndarray[Any, Any], device: int) -> Any:
    """A copy of a host array on a device: numba's array."""
    if _gpu.SIMULATED:
        return cuda.to_device(array.copy())
    with cuda.gpus[device]:
        return cuda.to_device(array)


def raw(nbytes: int) -> tuple[Any, int]:
    """(owner, address) of fresh memory on the current device."""
    if _gpu.SIMULATED:
        array = np.empty(nbytes + 256, np.uint8)
        return array, -(-array.ctypes.data // 256) * 256
    array = cuda.device_array(nbytes, np.uint8)
    return array, int(array.__cuda_array_interface__["data"][0])


def device_of(address: int) -> int:
    """Index of the device that memory lies on."""
    if _gpu.SIMULATED:
        return 0
    from cuda.bindings import driver

    error, found = driver.cuPointerGetAttribute(driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
    if error:
        raise ValueError(f"no memory of a GPU at address {address:#x}: {error.name}")
    return int(found)


def current() -> int:
    """Index of the current device of this thread."""
    return 0 if _gpu.SIMULATED else int(cuda.get_current_device().id)


def on(device: int) -> Any:
    """A context in which a device is the current one."""
    return cuda.gpus[device]


KERNELS: list[Kernel] = []


def kernel(arguments: str, name: str | None = None) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a kernel's body; see `Kernel` for the tokens, and for a name of its own where a body is two kernels."""

    def decorate(body: Callable[..., Any]) -> Kernel:
        made = Kernel(body, arguments, name)
        KERNELS.append(made)
        return made

    return decorate
