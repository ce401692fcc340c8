"""Streams of the libraries that arrays on a GPU come from, and memory that belongs to one."""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np

from fastbn.arguments import scalars
from fastbn.cuda import buffers
from fastbn.cuda.buffers import LEGACY, Buffer
from fastbn.cuda.kernels import private


def current_stream(buffer: Buffer, device: int) -> int:
    """The stream that work on a buffer goes to unless the caller names one.

    Its library's current one of its device, as a handle.
    """
    root = buffers.library(buffer.owner)
    if root == "torch":
        return private.raw_stream(sys.modules["torch"], device) or LEGACY
    if root == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr) or LEGACY
    return buffer.stream or LEGACY


def handle(stream: Any) -> int:
    """The handle of a stream: a number, or a stream of PyTorch, CuPy, numba, cuda.core or cuda.bindings.

    Raises
    ------
    TypeError
        Something else.
    ValueError
        A number that is no address.
    """
    found = _handle(stream)
    if found is None:
        shown = scalars.shown(stream) if isinstance(stream, numbers.Number) else type(stream).__name__
        raise TypeError(f"stream: given {shown}, want a handle (int), or a stream of PyTorch, CuPy or numba")
    if not 0 <= found < 2**64:
        raise ValueError(f"stream: given {scalars.shown(found)}, want a handle: the address of a stream, or 0")
    return found or LEGACY


def _handle(stream: Any) -> int | None:
    if type(stream) is int:
        return stream
    try:
        if isinstance(stream, bool | np.bool_):
            return None
        # of those that are not whole int() would make some
        if isinstance(stream, numbers.Number) or hasattr(stream, "dtype"):
            return operator.index(cast(Any, stream))
        if isinstance(found := getattr(stream, "cuda_stream", None), int):  # PyTorch's
            return found
        if hasattr(stream, "__cuda_stream__"):
            protocol = stream.__cuda_stream__
            return int((protocol() if callable(protocol) else protocol)[1])
        if isinstance(found := getattr(stream, "ptr", None), int):  # CuPy's
            return found
        # the driver's own type, in cuda.bindings
        if hasattr(type(stream), "__int__") or hasattr(type(stream), "__index__"):
            return int(stream)
    except Exception:  # whatever a library's object raises, it is no stream
        pass
    return None


def allocating(like: Buffer, stream: int, device: int) -> AbstractContextManager[Any]:
    """Within it a library's memory belongs to a stream that is not its current one.

    What is given back is taken again behind its work.
    """
    root = buffers.library(like.owner)
    if root not in ("torch", "cupy"):
        return nullcontext()  # numba's is of no stream
    library = sys.modules[root].cuda
    if root == "torch":
        context: AbstractContextManager[Any] = library.stream(_of_library(library, stream, device))
        return context
    own: AbstractContextManager[Any] = (
        library.Stream.null if stream == LEGACY else library.ExternalStream(stream, device)
    )
    return own


def lent(arrays: Sequence[Buffer], stream: int, device: int) -> list[Buffer]:
    """PyTorch's tensors among the arrays of a call on a stream that is not PyTorch's current one: see `used`."""
    tensors = [buffer for buffer in arrays if buffers.library(buffer.owner) == "torch" and buffer.size]
    return tensors if tensors and current_stream(tensors[0], device) != stream else []


def used(tensor: Buffer, stream: int, device: int) -> None:
    """Tell PyTorch that a stream works on a tensor.

    Its memory is not another's before that is done. The other libraries don't ask.
    """
    tensor.owner.record_stream(_of_library(sys.modules["torch"].cuda, stream, device))


def _of_library(cuda: Any, stream: int, device: int) -> Any:
    """PyTorch's stream of a handle."""
    return cuda.default_stream(device) if stream == LEGACY else cuda.ExternalStream(stream, device)


def workspace(nbytes: int, like: Buffer, stream: int, device: int) -> tuple[Any, int]:
    """(owner, address) of memory for one call, of the library of an array, or of a pool of the device.

    See `give_back`.
    """
    root = buffers.library(like.owner)
    if root == "torch":
        torch = sys.modules["torch"]
        owner = torch.empty(nbytes, dtype=torch.uint8, device=like.owner.device)
        return owner, buffers.address(owner)
    if root == "cupy":
        cupy = sys.modules["cupy"]
        with like.owner.device:
            owner = cupy.empty(nbytes, "uint8")
        return owner, int(owner.__cuda_array_interface__["data"][0])
    found: tuple[Any, int] = buffers.memory().raw(nbytes, stream, device)
    return found


def give_back(owner: Any) -> None:
    """A workspace whose call has been queued.

    What a library counts references of, and orders by its stream, needs no word.
    """
    if hasattr(owner, "close"):
        owner.close()
