"""The same functions as `device` in plain Python, for numba's simulator.

Kernels as they stand, every line counted and debuggable.
A pointer is a `Memory`, which refuses what a GPU would do without a word: indices outside, groups off their boundary. A
group is a NumPy array. Tests make blocks small, for each thread of the simulator is one of Python's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.cuda.kernels.private import block_of

PLANES = 4  # numbers of a slot in shared memory

Array = NDArray[Any]


class Memory:
    """What a kernel sees as a pointer: a flat array, from its element `begin` on; indices before that are negative."""

    def __init__(self, array: Array, begin: int = 0) -> None:
        self.array, self.begin = array, begin
        self.kind = array.dtype.type if array.dtype.kind == "f" and array.itemsize > 2 else np.float32

    def span(self, index: int, count: int, aligned: bool) -> Array:
        """So many elements, as they are kept."""
        at = int(index) + self.begin
        assert count == 0 or 0 <= at <= self.array.size - count, f"elements {at} to {at + count} of {self.array.size}"
        if aligned:
            address = self.array.ctypes.data + at * self.array.itemsize
            assert address % (count * self.array.itemsize) == 0, f"a group off its boundary: element {at}"
        return self.array[at : at + count]


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call."""
    return function


def _mine() -> Any:
    return threading.current_thread()


def block() -> int:
    """Index of this block."""
    return int(_mine().blockIdx.x)


def thread() -> int:
    """Index of this thread in its block."""
    return int(_mine().threadIdx.x)


def threads() -> int:
    """Threads of a block."""
    return int(block_of(_mine())[1][0])


def blocks() -> int:
    """Blocks of the grid."""
    return int(block_of(_mine())[2][0])


def sync() -> None:
    """Wait for the block's other threads."""
    _mine().syncthreads()


def _slots(name: str) -> dict[int, Any]:
    """Shared memory of this block, of a name."""
    found: dict[int, Any] = block_of(_mine())[0].setdefault(f"fastbn_{name}", {})
    return found


def _widen(kept: Array) -> Array:
    if kept.dtype == np.uint16:
        half: Array = kept.view(np.float16).astype(np.float32)
        return half
    if kept.dtype == np.int16:
        wide: Array = (kept.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
        return wide
    same: Array = kept.copy()
    return same


def _narrow(group: Array, dtype: np.dtype[Any]) -> Array:
    if dtype == np.uint16:
        with np.errstate(over="ignore", under="ignore"):
            half: Array = group.astype(np.float16).view(np.uint16)
        return half
    if dtype == np.int16:
        bits = np.asarray(group, np.float32).view(np.uint32)
        rounded = (bits + ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16)
        quiet: Array = np.where(np.isnan(group), np.uint32(0x7FFF), rounded).astype(np.uint16).view(np.int16)
        return quiet
    return np.asarray(group, dtype)


def lanes(x: Memory) -> int:
    """Elements of a group of x."""
    return 16 // x.array.itemsize


def quotient(value: int, divisor: int) -> int:
    """value // divisor of numbers that are not negative."""
    return value // divisor


def scalar(x: Memory, value: float) -> Any:
    """A number as x is computed in."""
    return x.kind(value)


def broadcast(x: Memory, value: float) -> Array:
    """A number in every lane of a group of x."""
    return np.full(lanes(x), value, x.kind)


def load(x: Memory, index: int) -> Any:
    """x[index] as it is computed in."""
    return _widen(x.span(index, 1, aligned=True))[0]


def store(x: Memory, index: int, value: Any) -> None:
    """x[index] = value."""
    x.span(index, 1, aligned=True)[:] = _narrow(np.array([value], x.kind), x.array.dtype)


def load_group(x: Memory, index: int) -> Array:
    """The group from x[index] on: the address is a multiple of 16 bytes."""
    return _widen(x.span(index, lanes(x), aligned=True))


def store_group(x: Memory, index: int, group: Array) -> None:
    """A group to x[index] onwards: the address is a multiple of 16 bytes."""
    x.span(index, lanes(x), aligned=True)[:] = _narrow(group, x.array.dtype)


def load_any(x: Memory, index: int, count: int) -> Array:
    """The first `count` lanes of a group from x[index] on, wherever it lies; zeros behind them."""
    group, count = broadcast(x, 0.0), min(count, lanes(x))
    group[:count] = _widen(x.span(index, count, aligned=False))
    return group


def store_any(x: Memory, index: int, count: int, group: Array) -> None:
    """The first `count` lanes of a group, of whatever memory, to x[index] onwards, wherever it lies."""
    count = min(count, group.size)
    x.span(index, count, aligned=False)[:] = _narrow(group[:count], x.array.dtype)


def load_table(x: Memory, table: Memory, index: int) -> Array:
    """As many numbers of `table` from an index on as a group of x has lanes: the address is a multiple of 16 bytes."""
    step = lanes(table)
    return np.concatenate([load_group(table, index + k) for k in range(0, lanes(x), step)])


def gather(x: Memory, table: Memory, at: int, channel: int, column: int, columns: int, channels: int) -> Array:
    """A channel's number, from table[at] on.

    For each lane of x, the first of which is `column` of its channel's `columns`.
    """
    return np.array([load(table, at + (channel + (column + k) // columns) % channels) for k in range(lanes(x))], x.kind)


def split(x: Memory, low: Any, high: Any, count: int) -> Array:
    """One number in the first `count` lanes of a group of x, another in the others."""
    return np.array([low if k < count else high for k in range(lanes(x))], x.kind)


def total(group: Array) -> Any:
    """Sum of the lanes, by halves."""
    while group.size > 1:
        group = group[: group.size // 2] + group[group.size // 2 :]
    return group[0]


def inverse(value: Any) -> Any:
    """1 / value."""
    return type(value)(1) / value


def half(value: Any) -> Any:
    """0.5 in the type of a number."""
    return type(value)(0.5)


def first(group: Array) -> Any:
    """The first lane."""
    return group[0]


def few(x: Memory) -> int:
    """Slots of the array with one for each thread."""
    return threads()


def many(x: Memory) -> int:
    """Slots of the array with one for each lane of each thread."""
    return threads() * lanes(x)


def _putting(name: str, size: Callable[[Memory], int]) -> Callable[[Memory, int, Any], None]:
    def put(x: Memory, index: int, value: Any) -> None:
        assert 0 <= index < PLANES * size(x), f"slot {index} of {PLANES} x {size(x)}"
        _slots(f"{name} {x.kind.__name__}")[int(index)] = x.kind(value)

    return put


def _taking(name: str) -> Callable[[Memory, int], Any]:
    return lambda x, index: _slots(f"{name} {x.kind.__name__}")[int(index)]


put, take = _putting("few", few), _taking("few")
put_lane, take_lane = _putting("many", many), _taking("many")


def put_group(x: Memory, index: int, group: Array) -> None:
    """A group of x to the array of many, from a multiple of its lanes on."""
    assert index % lanes(x) == 0, f"a group off its boundary: slot {index}"
    for k, value in enumerate(group):
        put_lane(x, index + k, value)


def take_group(x: Memory, index: int) -> Array:
    """A group from there; NaN in lanes that nothing was put in."""
    assert index % lanes(x) == 0, f"a group off its boundary: slot {index}"
    slots = _slots(f"many {x.kind.__name__}")
    return np.array([slots.get(int(index) + k, np.nan) for k in range(lanes(x))], x.kind)
