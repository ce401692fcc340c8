"""Arrays on a GPU: what `__cuda_array_interface__` says of them, and new ones of the same kind. No driver is touched at import."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastbn import dtypes, scalars
from fastbn.foreign import is_simulated
from fastbn.foreign import on_device as on_device

Ints = tuple[int, ...]

# What memory of each dtype is to the kernels: half precision is its bits, in the integer type that tells which one it is.
STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
}
_TYPES = {"<f4": "float32", "<f8": "float64", "<f2": "float16"}


class Buffer(NamedTuple):
    """An array on a GPU, as the kernels need to know it."""

    address: int  # of the first element
    shape: Ints
    strides: Ints  # in elements
    dtype: str  # float32, float64, float16 or bfloat16
    readonly: bool
    stream: int | None  # on which its producer works, where it says
    owner: Any

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return STORED[self.dtype].itemsize

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def span(self) -> tuple[int, int]:
        """First address, and the one behind the last."""
        if not self.size:
            return self.address, self.address
        low = sum(min(0, (n - 1) * s) for n, s in zip(self.shape, self.strides, strict=True))
        high = sum(max(0, (n - 1) * s) for n, s in zip(self.shape, self.strides, strict=True))
        return self.address + low * self.itemsize, self.address + (high + 1) * self.itemsize


def _library(value: Any) -> str:
    """The package that a value's type comes from."""
    return _root(type(value).__module__)


@lru_cache(maxsize=1024)
def _root(module: str) -> str:
    return str(module).partition(".")[0]


@lru_cache(maxsize=1)
def _memory() -> Any:
    """Where memory of a GPU comes from: imported late, for it imports numba.cuda; an import in a function takes 1 us, again and again."""
    from fastbn.kernels.cuda import _jit

    return _jit


def _dtype(given: Any, interface: dict[str, Any], name: str) -> str:
    typestr = interface["typestr"]
    if typestr not in _TYPES:
        own = str(getattr(given, "dtype", "")).rpartition(".")[2]
        if own == "bfloat16":
            return own
        raise TypeError(f"{name}: given dtype {own or typestr} (typestr {typestr!r}), want {dtypes.WANTED}: convert it first")
    return _TYPES[typestr]


def view(given: Any, name: str) -> Buffer:
    """The buffer of an array on a GPU.

    Raises
    ------
    TypeError
        Another dtype, a masked array, an interface that lacks what it should say.
    ValueError
        A null pointer, strides that are no whole number of elements, another number of strides than of axes.
    """
    if is_simulated(given):
        array = given._ary
        strides = tuple(s // array.itemsize for s in array.strides)
        return Buffer(
            array.ctypes.data,
            array.shape,
            strides,
            _dtype(given, {"typestr": array.dtype.str}, name),
            not array.flags.writeable,
            None,
            given,
        )
    if _library(given) == "torch":
        return _tensor(given, name)
    interface = given.__cuda_array_interface__
    try:
        shape, (address, readonly), version = tuple(interface["shape"]), interface["data"], interface["version"]
        dtype = _TYPES.get(interface["typestr"]) or _dtype(given, interface, name)
    except KeyError:
        missing = [key for key in ("shape", "typestr", "data", "version") if key not in interface]
        raise TypeError(f"{name}: its __cuda_array_interface__ lacks {', '.join(missing)}") from None
    if version < 2:
        raise TypeError(f"{name}: its __cuda_array_interface__ is of version {version}, want 2 or 3")
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: given a masked array, whose mask would be ignored; want a plain array")
    itemsize, steps, address = STORED[dtype].itemsize, interface.get("strides"), address or 0
    strides = _compact(shape) if steps is None else tuple(step // itemsize for step in steps)
    if len(strides) != len(shape):
        raise ValueError(f"{name}: its __cuda_array_interface__ has strides {steps} for shape {shape}")
    if address % itemsize or (steps is not None and any(step % itemsize for step in steps)):
        raise ValueError(f"{name}: given an array off its elements' boundary (address {address}, strides {steps}); copy it first")
    if not address and math.prod(shape):
        raise ValueError(f"{name}: given a null pointer for shape {shape}")
    return Buffer(address, shape, strides, dtype, bool(readonly), interface.get("stream"), given)


@lru_cache(maxsize=4096)
def _compact(shape: Ints) -> Ints:
    """Strides of an array without gaps."""
    return tuple(math.prod(shape[a + 1 :]) for a in range(len(shape)))


def _tensor(given: Any, name: str) -> Buffer:
    dtype = str(given.dtype).rpartition(".")[2]
    if dtype not in STORED:
        raise TypeError(f"{name}: given dtype {given.dtype}, want {dtypes.WANTED}: convert it first, e.g. {name}.float()")
    return Buffer(given.data_ptr(), tuple(given.shape), tuple(given.stride()), dtype, False, None, given)


def device_of(buffer: Buffer) -> int:
    """The index of the GPU that a buffer lies on."""
    root = _library(buffer.owner)
    if root == "torch":
        return int(buffer.owner.device.index)
    if root == "cupy":
        return int(buffer.owner.device.id)
    if is_simulated(buffer.owner) or not buffer.address:
        return 0
    return int(_memory().device_of(buffer.address))


def current_stream(buffer: Buffer) -> int:
    """The stream that work on a buffer goes to unless the caller names one: its library's current one, as a handle."""
    root = _library(buffer.owner)
    if root == "torch":
        import torch

        return int(torch.cuda.current_stream(buffer.owner.device).cuda_stream)
    if root == "cupy":
        import cupy

        return int(cupy.cuda.get_current_stream().ptr)
    return buffer.stream or 0


def handle(stream: Any) -> int:
    """The handle of a stream: of a number, or of PyTorch's, CuPy's or numba's stream.

    Raises
    ------
    TypeError
        Something else.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        if not 0 <= stream < 2**64:
            raise ValueError(f"stream: given {scalars.shown(stream)}, want a handle: the address of a stream, or 0")
        return stream
    for attribute in ("cuda_stream", "ptr"):
        if isinstance(found := getattr(stream, attribute, None), int):
            return found
    found = getattr(stream, "handle", None)
    value = getattr(found, "value", found)
    if found is not None and (value is None or isinstance(value, int)):
        return value or 0
    raise TypeError(f"stream: given {type(stream).__name__}, want a handle (int), or a stream of PyTorch, CuPy or numba")


def empty(shape: Ints, order: Ints, dtype: str, like: Buffer) -> Any:
    """Fresh memory on the device of `like`, an array of its kind; `order` lists the axes from the outermost in memory."""
    root = _library(like.owner)
    sizes, back, steps = _laid(shape, order)
    if root == "torch":
        import torch

        return torch.empty(sizes, dtype=getattr(torch, dtype), device=like.owner.device).permute(back)
    if root == "cupy":
        import cupy

        kind = like.owner.dtype if dtype == "bfloat16" else dtype
        with like.owner.device:
            return cupy.empty(sizes, kind).transpose(back)
    if dtype == "bfloat16":
        raise TypeError(f"x: given bfloat16 in a {type(like.owner).__name__}; want a PyTorch tensor or a CuPy array for it, or give out=")
    itemsize = STORED[dtype].itemsize
    return _memory().empty(shape, tuple(step * itemsize for step in steps), np.dtype(dtype))


@lru_cache(maxsize=4096)
def _laid(shape: Ints, order: Ints) -> tuple[Ints, Ints, Ints]:
    """Sizes from the outermost axis in memory, each axis' place among them, and strides in elements."""
    sizes, back = tuple(shape[a] for a in order), tuple(order.index(a) for a in range(len(order)))
    steps = _compact(sizes)
    return sizes, back, tuple(steps[k] for k in back)


OLDEST = (8, 0)  # compute capability; bfloat16 is rounded by an instruction of it
INSTALL = "pip install 'fastbn[cuda13]' (drivers from 580 on) or 'fastbn[cuda12]'"


@lru_cache(maxsize=1)
def declines() -> str | None:
    """Why no CUDA array can be served on this machine; None where one can. Asks the driver, once."""
    if importlib.util.find_spec("numba_cuda") is None and not _simulating():
        return f"NVIDIA's numba-cuda is not installed: {INSTALL}"
    if _simulating():
        return None
    cuda = _numba_cuda()
    if getattr(cuda, "implementation", "") != "NVIDIA":
        return (
            "numba's built-in CUDA target is in the place of NVIDIA's numba-cuda, whose .pth file did not run (pip install --target?): "
            "import _numba_cuda_redirector before numba, or install into an environment"
        )
    if not cuda.is_available():
        error = getattr(cuda.cudadrv.driver.driver, "initialization_error", None) or "which reports no error"
        said = " ".join(str(error).split())
        return f"no CUDA driver that works ({said}): install NVIDIA's driver, or give the container its GPUs (--gpus all)"
    if not len(cuda.gpus):
        return "the CUDA driver shows no device: check CUDA_VISIBLE_DEVICES"
    newest = max(cuda.gpus[k].compute_capability for k in range(len(cuda.gpus)))
    if newest < OLDEST:
        found, wanted = (".".join(map(str, version)) for version in (newest, OLDEST))
        return f"the newest GPU here is of compute capability {found}, want {wanted} or later (A100, RTX 30 and newer): use host arrays"
    return None


def _simulating() -> bool:
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def _numba_cuda() -> Any:
    from numba import cuda

    return cuda
