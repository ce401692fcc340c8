"""Arrays on a GPU: what `__cuda_array_interface__` says of them, and new ones of the same kind.

No driver is touched at import.
"""

from __future__ import annotations

import importlib.util
import math
import operator
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastbn.arguments import dtypes, layout
from fastbn.arguments.errors import BackendUnavailable
from fastbn.arguments.foreign import is_simulated
from fastbn.arguments.foreign import on_device as on_device

Ints = tuple[int, ...]
# shape, strides in elements, dtype, bytes from a 16-byte boundary: what launches depend on
Geometry = tuple[Ints, Ints, str, int]

# the legacy default stream, whatever handle 0 is to the driver's bindings (another one in each thread, where so asked
# for)
LEGACY = 1

# What memory of each dtype is to the kernels.
STORAGE = {"float32": dtypes.FLOAT32, "float64": dtypes.FLOAT64} | dtypes.HALF_STORAGE
# by name: NumPy takes 2 us for a dtype's
PARAMETERS: dict[str, str] = {name: dtypes.of_parameters(storage).name for name, storage in STORAGE.items()}
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
        return STORAGE[self.dtype].itemsize

    @property
    def storage(self) -> np.dtype[Any]:
        """What its memory is to the kernels."""
        return STORAGE[self.dtype]

    @property
    def parameters(self) -> str:
        """The dtype of parameters beside it."""
        return PARAMETERS[self.dtype]

    @property
    def computed(self) -> np.dtype[Any]:
        """What it is computed in."""
        return STORAGE[PARAMETERS[self.dtype]]

    @property
    def geometry(self) -> Geometry:
        """How it lies in memory, wherever that is."""
        return self.shape, self.strides, self.dtype, self.address & 15

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def span(self) -> tuple[int, int]:
        """First address, and the one behind the last."""
        begin, end = _reach(self.shape, self.strides)
        return self.address + begin * self.itemsize, self.address + end * self.itemsize


@lru_cache(maxsize=4096)
def _reach(shape: Ints, strides: Ints) -> tuple[int, int]:
    """First element, and the one behind the last, from the one at index 0."""
    if not math.prod(shape):
        return 0, 0
    steps = [(n - 1) * s for n, s in zip(shape, strides, strict=True)]
    return sum(min(0, step) for step in steps), sum(max(0, step) for step in steps) + 1


def stand_in(geometry: Geometry, number: int) -> Buffer:
    """A buffer like those that lie so, at its place from a 16-byte boundary; a number for its owner."""
    shape, strides, dtype, address = geometry
    return Buffer(address, shape, strides, dtype, False, None, number)


def geometries(*buffers: Buffer | None) -> tuple[Geometry | None, ...]:
    """How the arrays of a call lie; None for one that is absent, or is made for the result."""
    return tuple([None if buffer is None else buffer.geometry for buffer in buffers])


def library(value: Any) -> str:
    """The package that an array comes from: "torch" and "cupy" of subclasses too."""
    cls: Any = type(value)
    return _root(cls)


@lru_cache(maxsize=256)
def _root(cls: Any) -> str:
    roots = [str(base.__module__).partition(".")[0] for base in cls.__mro__]
    return next((root for root in roots if root in ("torch", "cupy")), roots[0])


@lru_cache(maxsize=1)  # an import in a function takes 1 us, again and again
def memory() -> Any:
    """Where memory of a GPU comes from: imported late, for it imports numba.cuda."""
    from fastbn.cuda.kernels import jit

    return jit


def _dtype(array: Any, interface: dict[str, Any], name: str) -> str:
    typestr = interface["typestr"]
    if typestr not in _TYPES:
        own = str(getattr(array, "dtype", "")).rpartition(".")[2]
        if own == "bfloat16":
            return own
        raise TypeError(
            f"{name}: given dtype {own or typestr} (typestr {typestr!r}), want {dtypes.WANTED}: convert it first"
        )
    return _TYPES[typestr]


def view(array: Any, name: str) -> Buffer:
    """The buffer of an array on a GPU.

    Raises
    ------
    TypeError
        Another dtype, a masked array, an interface that lacks what it should say.
    ValueError
        A null pointer, strides that are no whole number of elements, another number of strides than of axes.
    """
    if is_simulated(array):
        own = _private().simulated_array(array)
        strides = tuple(step // own.itemsize for step in own.strides)
        dtype = _dtype(array, {"typestr": own.dtype.str}, name)
        return Buffer(own.ctypes.data, own.shape, strides, dtype, not own.flags.writeable, None, array)
    if library(array) == "torch":
        return _tensor(array, name)
    interface = array.__cuda_array_interface__
    try:
        shape, (address, readonly), version = _ints(interface["shape"], name), interface["data"], interface["version"]
        dtype = _TYPES.get(interface["typestr"]) or _dtype(array, interface, name)
    except KeyError:
        missing = [key for key in ("shape", "typestr", "data", "version") if key not in interface]
        raise TypeError(f"{name}: its __cuda_array_interface__ lacks {', '.join(missing)}") from None
    if version < 2:
        raise TypeError(f"{name}: its __cuda_array_interface__ is of version {version}, want 2 or 3")
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: given a masked array, whose mask would be ignored; want a plain array")
    itemsize, steps, stream = STORAGE[dtype].itemsize, interface.get("strides"), interface.get("stream")
    address, steps = _ints((address or 0,), name)[0], None if steps is None else _ints(steps, name)
    strides = layout.compact(shape) if steps is None else tuple(step // itemsize for step in steps)
    if len(strides) != len(shape):
        raise ValueError(f"{name}: its __cuda_array_interface__ has strides {steps} for shape {shape}")
    if address % itemsize or (steps is not None and any(step % itemsize for step in steps)):
        raise ValueError(
            f"{name}: given an array off its elements' boundary (address {address}, strides {steps}); copy it first"
        )
    if not address and 0 not in shape:
        raise ValueError(f"{name}: given a null pointer for shape {shape}")
    producer = None if stream is None else _ints((stream,), name)[0] or LEGACY
    return Buffer(address, shape, strides, dtype, bool(readonly), producer, array)


def _ints(values: Any, name: str) -> Ints:
    """Whole numbers of an interface as Python's.

    Those of NumPy have a width, in which products and masks wrap or raise.
    """
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        raise TypeError(
            f"{name}: its __cuda_array_interface__ has {values!r} where it should have whole numbers"
        ) from None


def _tensor(tensor: Any, name: str) -> Buffer:
    dtype = _of_torch(tensor.dtype)
    if dtype is None:
        raise TypeError(
            f"{name}: given dtype {tensor.dtype}, want {dtypes.WANTED}: convert it first, e.g. {name}.float()"
        )
    if tensor.requires_grad:
        instead = "or a module of fastbn.torch, such as BatchNorm2d"
        raise TypeError(
            f"{name}: given a tensor that requires a gradient, which this call does not record: "
            f"{name}.detach(), {instead}"
        )
    try:
        address, strides = tensor.data_ptr(), tensor.stride()
    except Exception as error:  # sparse ones; those of torch.func's transformations
        raise TypeError(
            f"{name}: given a tensor without memory of its own ({error}), want a plain one: {name}.to_dense()"
        ) from error
    if tensor.is_neg():
        raise TypeError(
            f"{name}: given a view whose memory holds the negated values, want memory of its own: {name}.resolve_neg()"
        )
    if not address and tensor.numel():
        raise TypeError(
            f"{name}: given a tensor without memory (of zeros, or a fake one), want a plain one: {name}.clone()"
        )
    return Buffer(address, tuple(tensor.shape), strides, dtype, False, None, tensor)


@lru_cache(maxsize=64)
def _of_torch(dtype: Any) -> str | None:
    """The name of PyTorch's dtype; None where kernels have none of it."""
    name = str(dtype).rpartition(".")[2]
    return name if name in STORAGE else None


def address(array: Any) -> int:
    """Where fresh memory begins: on a 16-byte boundary.

    Raises
    ------
    RuntimeError
        On none; without memory, as PyTorch makes tensors in some of its modes.
    """
    if library(array) != "torch":
        found = view(array, "result").address
    elif not (found := array.data_ptr()) and array.numel():
        raise RuntimeError(
            "PyTorch makes tensors without memory here, as within FakeTensorMode: call fastbn outside of it"
        )
    if found & 15:
        raise RuntimeError(
            f"{type(array).__name__}: fresh memory at address {found:#x}, want a 16-byte boundary: please report this"
        )
    return found


def device_of(buffer: Buffer) -> int:
    """The index of the GPU that a buffer lies on."""
    root = library(buffer.owner)
    if root == "torch":
        return int(buffer.owner.device.index)
    if root == "cupy":
        return int(buffer.owner.device.id)
    if is_simulated(buffer.owner) or not buffer.address:
        return 0
    return int(memory().device_of(buffer.address))


def empty(shape: Ints, order: Ints, dtype: str, like: Buffer) -> Any:
    """Fresh memory on the device of `like`, the current one, an array of its kind.

    `order` lists the axes from the outermost in memory.
    """
    root = library(like.owner)
    sizes, back, steps = _laid(shape, order)
    if root == "torch":
        torch = sys.modules["torch"]
        made = torch.empty(sizes, dtype=getattr(torch, dtype), device=like.owner.device)
        return made if back is None else made.permute(back)
    if root == "cupy":
        own = like.owner.dtype if dtype == "bfloat16" else dtype
        with like.owner.device:
            made = sys.modules["cupy"].empty(sizes, own)
        return made if back is None else made.transpose(back)
    if dtype == "bfloat16":
        raise TypeError(
            f"x: given bfloat16 in a {type(like.owner).__name__}; want a PyTorch tensor or a CuPy array "
            f"for it, or give out="
        )
    itemsize = STORAGE[dtype].itemsize
    return memory().empty(shape, tuple(step * itemsize for step in steps), np.dtype(dtype))


def pair(C: int, dtype: str, like: Buffer) -> tuple[int, Any, Any]:
    """(address, first row, second row) of fresh memory (2, C)."""
    both = empty((2, C), (0, 1), dtype, like)
    return address(both), both[0], both[1]


@lru_cache(maxsize=4096)
def _laid(shape: Ints, order: Ints) -> tuple[Ints, Ints | None, Ints]:
    """Sizes from the outermost axis in memory, each axis' place among them (None where it is its own), and strides."""
    sizes, back = tuple(shape[a] for a in order), tuple(order.index(a) for a in range(len(order)))
    steps = layout.compact(sizes)
    return sizes, None if back == tuple(range(len(back))) else back, tuple(steps[k] for k in back)


def strides_of(shape: Ints, order: Ints) -> Ints:
    """Strides, in elements, of what `empty` makes."""
    return _laid(shape, order)[2]


OLDEST = (8, 0)  # compute capability; bfloat16 is rounded by an instruction of it
INSTALL = "pip install 'fastbn[cuda13]' (drivers from 580 on) or 'fastbn[cuda12]'"


@lru_cache(maxsize=1)
def declines() -> str | None:
    """Why no CUDA array can be served on this machine; None where one can. Asks the driver, once."""
    if importlib.util.find_spec("numba_cuda") is None and not _simulating():
        return f"NVIDIA's numba-cuda is not installed: {INSTALL}"
    if _simulating():
        return None
    cuda, private = _numba_cuda(), _private()
    if not private.is_nvidias(cuda):
        return (
            "numba's built-in CUDA target is in the place of NVIDIA's numba-cuda, whose .pth file did not run (pip "
            "install --target?): "
            "import _numba_cuda_redirector before numba, or install into an environment"
        )
    if not cuda.is_available():
        error = private.driver_error(cuda)
        if error is None and not private.has_compiler(cuda):
            return (
                f"libNVVM, which compiles the kernels, is not installed: {INSTALL}, or a CUDA toolkit, and "
                f"CUDA_HOME says where it is"
            )
        said = " ".join(str(error or "which reports no error").split())
        return (
            f"no CUDA driver that works ({said}): install NVIDIA's driver, or give the container its GPUs (--gpus all)"
        )
    if not len(cuda.gpus):
        return "the CUDA driver shows no device: check CUDA_VISIBLE_DEVICES"
    newest = max(cuda.gpus[k].compute_capability for k in range(len(cuda.gpus)))
    if newest < OLDEST:
        found, wanted = (".".join(map(str, version)) for version in (newest, OLDEST))
        return (
            f"the newest GPU here is of compute capability {found}, want {wanted} or later (A100, RTX 30 and "
            f"newer): use host arrays"
        )
    return None


def check_served() -> None:
    """BackendUnavailable where no array on a GPU can be served on this machine."""
    reason = declines()
    if reason is not None:
        raise BackendUnavailable(
            f"this array lives on a GPU, which backend cuda can't serve: {reason}. Or copy it to the host."
        )


def _simulating() -> bool:
    from numba import config

    return bool(config.ENABLE_CUDASIM)


def _private() -> Any:
    from fastbn.cuda.kernels import private

    return private


def _numba_cuda() -> Any:
    from numba import cuda

    return cuda
