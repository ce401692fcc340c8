"""Arrays on a GPU, as they come in: the checks of `checks` for them. Needs no kernel, so also where none can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastbn.arguments import checks, foreign, overlap
from fastbn.cuda import buffers
from fastbn.cuda.buffers import Buffer


def as_input(x: Any, name: str = "x") -> Buffer:
    """An input on a GPU; TypeError for a host array beside it."""
    if not foreign.on_device(x):
        raise TypeError(
            f"{name}: given {type(x).__name__} on the host, want an array on the GPU, where x is: copy it there first"
        )
    return buffers.view(x, name)


def optional(value: Any, name: str) -> Buffer | None:
    """The same of an input that may be absent."""
    return None if value is None else as_input(value, name)


def check_parameter(buffer: Buffer | None, channels: int, dtype: str, name: str) -> None:
    """gamma, beta: (C,) in the dtype of parameters, without gaps; or None."""
    if buffer is None:
        return
    if buffer.dtype != dtype:
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want {dtype} beside this x: convert it")
    _check_row(buffer, channels, name)


def check_statistic(buffer: Buffer, channels: int, name: str) -> None:
    """mean, var: (C,) in float32 or float64, without gaps."""
    if buffer.dtype not in ("float32", "float64"):
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want float32 or float64")
    _check_row(buffer, channels, name)


def as_moment(value: Any, name: str) -> Buffer:
    """mean, m2 of moments: (C,) in float64, without gaps."""
    buffer = as_input(value, name)
    if buffer.dtype != "float64":
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want float64")
    _check_row(buffer, buffer.size, name)
    return buffer


def _check_row(buffer: Buffer, channels: int, name: str) -> None:
    if buffer.shape != (channels,):
        raise ValueError(f"{name}: given shape {buffer.shape}, want ({channels},), one value per channel of x")
    if channels > 1 and buffer.strides != (1,):
        raise ValueError(
            f"{name}: given an array with gaps (strides {buffer.strides} elements), want a contiguous "
            f"one: copy it first"
        )


def check_pair(dy: Buffer, x: Buffer) -> None:
    """dy and x, alike."""
    if dy.shape != x.shape:
        raise ValueError(f"dy: given shape {dy.shape}, want {x.shape}, the shape of x")
    if dy.dtype != x.dtype:
        raise TypeError(f"dy: given dtype {dy.dtype}, want {x.dtype}, the dtype of x: convert one of them")


def check_room(out: Buffer | None, x: Buffer) -> None:
    """An `out` that can take the result, wherever it lies: what `checks.check_out` says of its kind."""
    if out is None:
        return
    if out.dtype != x.dtype:
        raise TypeError(f"out: given dtype {out.dtype}, want {x.dtype}, the dtype of x")
    if out.shape != x.shape:
        raise ValueError(f"out: given shape {out.shape}, want {x.shape}, the shape of x")
    checks.check_place(_shadow(out._replace(address=out.itemsize)))  # anywhere but at a null pointer


def check_out(out: Buffer | None, inputs: Sequence[Buffer], **others: Buffer | None) -> None:
    """An `out` where the result may be written, as `checks.check_out` has it for the host.

    Each input either itself or apart from it.
    """
    if out is None:
        return
    if out.readonly:
        raise ValueError("out: given a read-only array, want one that can be written")
    begin, end = out.span()
    # NumPy is asked only where bounds meet: for an `out` and three arrays beside it that takes 12 us, bounds 2.
    meeting = [
        a for a in inputs if _meet(a, begin, end) and not (a.address == out.address and a.strides == out.strides)
    ]
    if meeting:
        checks.check_place(_shadow(out), *map(_shadow, meeting))
    beside = {name: a for name, a in others.items() if a is not None and _meet(a, begin, end)}
    if beside:
        checks.check_apart(_shadow(out), **_shadows(beside))


def _meet(buffer: Buffer, begin: int, end: int) -> bool:
    low, high = buffer.span()
    return low < end and begin < high


def check_apart(out: Any, **others: Any) -> None:
    """Memory that a result may take beside what a layer keeps, as `checks.check_apart` has it for the host."""
    checks.check_apart(_shadow(as_input(out, "out")), **_shadows(others))


def check_kept(arrays: Mapping[str, Any], channels: int, dtype: np.dtype[Any], written: bool, **beside: Any) -> None:
    """Arrays that a layer keeps, as `checks.check_kept` has it for the host; none has gaps."""
    places = []
    if not written:
        for name, value in arrays.items():
            check_statistic(as_input(value, name), channels, name)
        return
    for name, value in (*arrays.items(), *beside.items()):
        if (buffer := optional(value, name)) is not None:
            check_parameter(buffer, channels, dtype.name, name)
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
            "shape": buffer.shape, "strides": strides, "typestr": f"|V{buffer.itemsize}", "data": (buffer.address,
            False), "version": 3,
        }  # fmt: skip


def _shadow(buffer: Buffer) -> Any:
    return np.empty(buffer.shape, f"|V{buffer.itemsize}") if not buffer.size else np.asarray(_Interface(buffer))


def _shadows(arrays: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in arrays.items() if value is not None}
    return {
        name: _shadow(value if isinstance(value, Buffer) else as_input(value, name)) for name, value in given.items()
    }


def check_features(x: Any, axis: int, channels: int, dtype: str) -> None:
    """An input that goes with a layer's parameters."""
    buffer = as_input(x)
    axis = checks.check_axis(buffer.shape, axis)
    if buffer.shape[axis] != checks.check_channels(channels):
        raise ValueError(
            f"x: given {buffer.shape[axis]} channels along axis {axis} of shape {buffer.shape}, want {channels}, as "
            f"this layer has"
        )
    if (wanted := buffer.parameters) != dtype:
        raise TypeError(
            f"x: given dtype {buffer.dtype}, want {dtype}, this layer's: convert x, or make the layer "
            f"with dtype='{wanted}'"
        )


def same_memory(a: Any, b: Any) -> bool:
    """Whether two arrays on a GPU are element for element the same memory."""
    return a is b or (
        buffers.on_device(a) and overlap.same_memory(_shadow(buffers.view(a, "out")), _shadow(buffers.view(b, "x")))
    )
