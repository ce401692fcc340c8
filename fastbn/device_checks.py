"""Arrays on a GPU, as they come in: the checks of `checks` for them. Needs no kernel, so also where none can run."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from fastbn import checks, foreign, overlap
from fastbn.backends import devices
from fastbn.backends.devices import Buffer


def as_input(x: Any, name: str = "x") -> Buffer:
    """An input on a GPU; TypeError for a host array beside it."""
    if not foreign.on_device(x):
        raise TypeError(f"{name}: given {type(x).__name__} on the host, want an array on the GPU, where x is: copy it there first")
    return devices.view(x, name)


def as_parameter(value: Any, channels: int, dtype: str, name: str) -> Buffer | None:
    """gamma, beta: (C,) in the dtype of parameters, without gaps; or None."""
    if value is None:
        return None
    buffer = as_input(value, name)
    if buffer.dtype != dtype:
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want {dtype} beside this x: convert it")
    return _row(buffer, channels, name)


def as_statistic(value: Any, channels: int, name: str) -> Buffer:
    """mean, var: (C,) in float32 or float64, without gaps."""
    buffer = as_input(value, name)
    if buffer.dtype not in ("float32", "float64"):
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want float32 or float64")
    return _row(buffer, channels, name)


def as_moment(value: Any, name: str) -> Buffer:
    """mean, m2 of moments: (C,) in float64, without gaps."""
    buffer = as_input(value, name)
    if buffer.dtype != "float64":
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want float64")
    return _row(buffer, buffer.size, name)


def _row(buffer: Buffer, channels: int, name: str) -> Buffer:
    if buffer.shape != (channels,):
        raise ValueError(f"{name}: given shape {buffer.shape}, want ({channels},), one value per channel of x")
    if channels > 1 and buffer.strides != (1,):
        raise ValueError(f"{name}: given an array with gaps (strides {buffer.strides} elements), want a contiguous one: copy it first")
    return buffer


def check_out(out: Any, x: Buffer, *inputs: Buffer, **others: Any) -> Buffer:
    """An `out` that can take the result, as `checks.check_out` has it for the host."""
    buffer = as_input(out, "out")
    if buffer.dtype != x.dtype:
        raise TypeError(f"out: given dtype {buffer.dtype}, want {x.dtype}, the dtype of x")
    if buffer.shape != x.shape:
        raise ValueError(f"out: given shape {buffer.shape}, want {x.shape}, the shape of x")
    shadow = _shadow(buffer)
    if buffer.readonly:
        raise ValueError("out: given a read-only array, want one that can be written")
    checks.check_place(shadow, *(_shadow(array) for array in (x, *inputs)))
    checks.check_apart(shadow, **_shadows(others))
    return buffer


def check_apart(out: Any, **others: Any) -> None:
    """Memory that a result may take beside what a layer keeps, as `checks.check_apart` has it for the host."""
    checks.check_apart(_shadow(as_input(out, "out")), **_shadows(others))


def check_kept(arrays: Mapping[str, Any], channels: int, dtype: np.dtype[Any], written: bool, **beside: Any) -> None:
    """Arrays that a layer keeps, as `checks.check_kept` has it for the host; none has gaps."""
    places = []
    if not written:
        for name, value in arrays.items():
            as_statistic(value, channels, name)
        return
    for name, value in (*arrays.items(), *beside.items()):
        if (buffer := as_parameter(value, channels, dtype.name, name)) is not None:
            places.append((buffer.address, buffer.address + channels * buffer.itemsize))
            if name in arrays and buffer.readonly:
                raise ValueError(f"{name}: given a read-only array, want one that can be written: give it a copy")
    if any(begins < end for (_, end), (begins, _) in pairwise(sorted(places))):
        checks.check_disjoint(_shadows(arrays), **_shadows(beside))


class _Interface:
    """Where an array lies, for NumPy's arithmetic on addresses; nobody reads that memory on the host."""

    def __init__(self, buffer: Buffer) -> None:
        strides = tuple(s * buffer.itemsize for s in buffer.strides)
        self.__array_interface__ = {
            "shape": buffer.shape, "strides": strides, "typestr": f"|V{buffer.itemsize}", "data": (buffer.address, False), "version": 3,
        }  # fmt: skip


def _shadow(buffer: Buffer) -> Any:
    return np.empty(buffer.shape, f"|V{buffer.itemsize}") if not buffer.size else np.asarray(_Interface(buffer))


def _shadows(arrays: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in arrays.items() if value is not None}
    return {name: _shadow(value if isinstance(value, Buffer) else as_input(value, name)) for name, value in given.items()}


def parameters(x: Buffer) -> str:
    """The dtype of parameters beside x."""
    return "float64" if x.dtype == "float64" else "float32"


def check_features(x: Any, axis: int, channels: int, dtype: str) -> None:
    """An input that goes with a layer's parameters."""
    buffer = as_input(x)
    axis = checks.check_axis(buffer.shape, axis)
    if buffer.shape[axis] != checks.check_channels(channels):
        raise ValueError(
            f"x: given {buffer.shape[axis]} channels along axis {axis} of shape {buffer.shape}, want {channels}, as this layer has"
        )
    if (wanted := parameters(buffer)) != dtype:
        raise TypeError(f"x: given dtype {buffer.dtype}, want {dtype}, this layer's: convert x, or make the layer with dtype='{wanted}'")


def same_memory(a: Any, b: Any) -> bool:
    """Whether two arrays on a GPU are element for element the same memory."""
    return a is b or (devices.on_device(a) and overlap.same_memory(_shadow(devices.view(a, "out")), _shadow(devices.view(b, "x"))))
