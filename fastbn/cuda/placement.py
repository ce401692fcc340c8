"""Where a layer's arrays live: to a GPU and back, and changed in place on either side."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import checks, scalars
from fastbn.cuda import buffers
from fastbn.cuda import checks as device_checks

Array = NDArray[Any]

LIBRARIES = ("torch", "cupy", "numba")


def chosen(library: str | None) -> str:
    """The library whose arrays a layer on a GPU holds.

    The one asked for, else the first of PyTorch and CuPy that is imported, else numba.

    Raises
    ------
    TypeError
        No name.
    ValueError
        No such library.
    """
    if library is None:
        return next((name for name in LIBRARIES if name in sys.modules and name != "numba" and _usable(name)), "numba")
    want = f"want one of {', '.join(LIBRARIES)}: the library of the layer's arrays"
    if not isinstance(library, str):
        raise TypeError(f"kind: given {scalars.shown(library)}, {want}")
    if library not in LIBRARIES:
        raise ValueError(f"kind: given {library!r}, {want}")
    return library


def _usable(name: str) -> bool:
    """Whether a library that is imported reaches a GPU."""
    return name != "torch" or bool(sys.modules["torch"].cuda.is_available())


def parsed(device: Any) -> int | None:
    """The index of "cuda" or "cuda:1"; None for "cpu".

    Raises
    ------
    ValueError
        Something else.
    """
    try:
        name, _, index = str(device).partition(":")  # also of torch.device
    except Exception:
        name = index = ""
    if name == "cpu" and not index:
        return None
    if name == "cuda" and (not index or (index.isascii() and index.isdigit() and len(index) < 6)):
        return int(index or 0)
    raise ValueError(f"device: given {scalars.shown(device)}, want 'cpu', 'cuda' or 'cuda:N'")


def to_device(array: Array, index: int, library: str) -> Any:
    """A copy of a host array on a GPU, as an array of a library's.

    Raises
    ------
    BackendUnavailable
        No CUDA here.
    """
    buffers.check_served()
    if library == "torch":
        import torch

        return torch.from_numpy(array.copy()).to(f"cuda:{index}")
    if library == "cupy":
        import cupy

        with cupy.cuda.Device(index):
            return cupy.array(array)
    from fastbn.cuda.kernels import jit

    return jit.put(array, index)


def to_host(array: Any) -> Array:
    """A copy on the host; waits for what is queued on it."""
    if isinstance(array, np.ndarray):
        own: Array = array.copy()
        return own
    if not buffers.on_device(array):
        return np.array(array)
    library = buffers.library(array)
    if library == "torch":
        array = array.detach().resolve_neg().cpu()
    found: Any = array.numpy() if library == "torch" else array.get() if library == "cupy" else array.copy_to_host()
    host: Array = np.asarray(found)
    return host


def overwrite(target: Any, values: Array) -> None:
    """Change an array in place to values of the host, on either side."""
    if isinstance(target, np.ndarray):
        target[...] = values
        return
    library, values = buffers.library(target), np.ascontiguousarray(values, str(target.dtype).rpartition(".")[2])
    if library == "torch":
        import torch

        target.detach().copy_(torch.from_numpy(values))
    elif library == "cupy":
        target.set(values)
    else:
        target.copy_to_device(values)


def renewed(old: Any, values: Array) -> Any:
    """Values to begin with again: in the old array where that is on a GPU, else the new one."""
    if old is None or not buffers.on_device(old):
        return values
    overwrite(old, values)
    return old


def check(x_on_gpu: bool, **arrays: Any) -> None:
    """TypeError where a layer's array is not on the side of x."""
    for name, array in arrays.items():
        if array is not None and buffers.on_device(array) != x_on_gpu:
            here, there, to = ("the host", "a GPU", "cuda") if x_on_gpu else ("a GPU", "the host", "cpu")
            raise TypeError(f"{name}: this layer's is on {here}, x on {there}: move the layer, bn.to('{to}')")


def check_kept(arrays: Mapping[str, Any], channels: int, dtype: np.dtype[Any], written: bool, **beside: Any) -> None:
    """Arrays that a layer keeps, on either side: see `checks.check_kept`."""
    sides: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}), ({}, {})]
    for place, group in enumerate((arrays, beside)):
        for name, array in group.items():
            if array is not None:
                sides[buffers.on_device(array)][place][name] = array
    (host, host_beside), (device, device_beside) = sides
    checks.check_kept(host, channels, dtype, written, **host_beside)
    if device:
        device_checks.check_kept(device, channels, dtype, written, **device_beside)


def check_apart(out: Any, **others: Any) -> None:
    """An `out`, on either side, apart from what a layer keeps.

    What else it may be, the function that takes it will say.
    """
    if isinstance(out, np.ndarray):
        checks.check_apart(out, **{name: array for name, array in others.items() if not buffers.on_device(array)})
    elif out is not None and buffers.on_device(out):
        device_checks.check_apart(out, **{name: array for name, array in others.items() if buffers.on_device(array)})
