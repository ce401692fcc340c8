"""Memory for the fuzz test: arrays that end, or begin, at a page that nobody may touch, and the shapes and strides that
lie in it.

Room that no element takes holds 0xFF, NaN in every dtype: a result shows that it was read, the next look at it that it
was written.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import random
from collections import defaultdict
from typing import Any

import ml_dtypes
import numpy as np

PAGE = mmap.PAGESIZE
FAR = 2**31 + PAGE  # bytes between the rows of an array that 32 bits can't walk
BLANK = 0xFF
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # which the module names from Python 3.13 on
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
_NORMAL = np.random.default_rng(0).standard_normal(2**16)
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def protect(address: int, size: int, may: int) -> None:
    """What the process may do with whole pages."""
    if _mprotect(address, size, may):
        raise OSError(ctypes.get_errno(), "mprotect")


BOTH = mmap.PROT_READ | mmap.PROT_WRITE


class Room:
    """Pages between two that nobody may touch."""

    def __init__(self, pages: int) -> None:
        self.pages, size = pages, pages * PAGE
        self._map = mmap.mmap(-1, size + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = np.frombuffer(self._map, np.uint8)
        self.address = whole.ctypes.data + PAGE
        self.bytes = whole[PAGE:-PAGE]
        self.windows = [self.bytes]
        protect(self.address - PAGE, PAGE, 0)
        protect(self.address + size, PAGE, 0)

    def blank(self) -> None:
        for window in self.windows:
            window.fill(BLANK)

    def taken(self) -> bytes:
        """All that is in it."""
        return b"".join(window.tobytes() for window in self.windows)

    def freeze(self, frozen: bool) -> None:
        for window in self.windows:
            protect(window.ctypes.data, window.nbytes, mmap.PROT_READ if frozen else BOTH)


class FarRoom(Room):
    """Three stretches of 16 pages, over 2 GiB apart, and nothing between them."""

    def __init__(self) -> None:
        self.pages, size = 0, 2 * FAR + 18 * PAGE
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
        whole = np.frombuffer(self._map, np.uint8)
        protect(whole.ctypes.data, size, 0)
        self.bytes, self.address = whole[PAGE:], whole.ctypes.data + PAGE
        self.windows = [self.bytes[start : start + 16 * PAGE] for start in (0, FAR, 2 * FAR)]
        self.freeze(False)


class World:
    """The memory of one call: rooms that were taken, what is in them, what may change."""

    def __init__(self) -> None:
        self._free: dict[int, list[Room]] = defaultdict(list)
        self._used: list[Room] = []
        self._frozen: list[Room] = []
        self._before: list[bytes] = []

    def room(self, nbytes: int) -> Room:
        """One for so many bytes; -1: for rows that are far apart."""
        pages = 0 if nbytes < 0 else 1 << max(0, (max(1, nbytes) - 1) // PAGE).bit_length()
        room = self._free[pages].pop() if self._free[pages] else Room(pages) if pages else FarRoom()
        room.blank()
        self._used.append(room)
        return room

    def end(self) -> None:
        """Take all rooms back."""
        self.thaw()
        for room in self._used:
            self._free[room.pages].append(room)
        self._used, self._before = [], []

    def freeze(self, array: Any) -> None:
        """Make the pages of an array read-only."""
        room = self.home(array)
        if room is not None and room not in self._frozen:
            room.freeze(True)
            self._frozen.append(room)

    def thaw(self) -> None:
        for room in self._frozen:
            room.freeze(False)
        self._frozen = []

    def home(self, array: Any) -> Room | None:
        """The room that an array lies in."""
        at = array.__array_interface__["data"][0]
        return next((room for room in self._used if room.address <= at <= room.address + room.bytes.nbytes), None)

    def look(self) -> None:
        """Remember what is there."""
        self._before = [room.taken() for room in self._used]

    def changed(self, *written: Any) -> bool:
        """Whether anything has changed since, beside the elements of these arrays (which are put back)."""
        self.thaw()
        kept = [np.array(array, copy=True, subok=False) for array in written]
        now = [room.taken() for room in self._used]
        if now == self._before:
            return False
        if not written:
            return True
        for array in written:  # blank in both: what differs then lies elsewhere
            plain(array).view(np.ndarray)[...] = np.zeros((), array.dtype)
        now = [room.taken() for room in self._used]
        for room, before in zip(self._used, self._before, strict=True):
            at = 0
            for window in room.windows:
                window[:] = np.frombuffer(before[at : at + window.nbytes], np.uint8)
                at += window.nbytes
        for array in written:
            plain(array)[...] = np.zeros((), array.dtype)
        then = [room.taken() for room in self._used]
        for array, values in zip(written, kept, strict=True):
            plain(array)[...] = values
        return now != then


def plain(array: Any) -> np.ndarray:
    """The same memory, writable, without a class of its own."""
    return np.asarray(array)


# Where elements lie


def compact(shape: tuple[int, ...], order: list[int], itemsize: int, pads: list[int]) -> list[int]:
    """Strides of axes in this order in memory, the last innermost, with so many elements more along each."""
    strides, step = [0] * len(shape), itemsize
    for a in reversed(order):
        strides[a] = step
        step *= max(1, shape[a] + pads[a])
    return strides


ORDERS = ("C", "F", "last", "outermost", "any")
TWISTS = ("", "", "", "gaps", "rows apart", "steps", "reversed", "some reversed", "records", "ones", "far")
REPEATS = ("broadcast", "windows")  # elements share memory: for inputs only


def strides(rng: random.Random, shape: tuple[int, ...], itemsize: int, axis: int, twist: str) -> list[int]:
    """Strides in bytes of one arrangement."""
    rank = len(shape)
    axes, order = list(range(rank)), rng.choice(ORDERS)
    if order == "F":
        axes.reverse()
    elif order == "any":
        rng.shuffle(axes)
    elif rank and order != "C":
        axes.remove(axis % rank)
        axes.insert(0 if order == "outermost" else rank, axis % rank)
    pads = [0] * rank
    if twist == "gaps":
        pads = [rng.choice((0, 0, 1, 2, 5)) if n > 1 or rank < 6 else 0 for n in shape]
    elif twist == "rows apart" and rank:
        pads[axes[-1]] = rng.choice((1, 3, 16))
    found = compact(shape, axes, itemsize, pads)
    if twist == "steps":
        found = [2 * step for step in found]
    elif twist == "records":
        size = itemsize + rng.choice((1, 3, 4, 22))
        found = [step // itemsize * size for step in found]
    elif twist == "reversed":
        found = [-step for step in found]
    elif twist == "some reversed":
        found = [rng.choice((1, -1)) * step for step in found]
    elif twist == "far" and rank and shape[0] in (2, 3) and math.prod(shape[1:]) * itemsize <= 12 * PAGE:
        found = [FAR, *strides(rng, shape[1:], itemsize, max(0, axis % rank - 1), "")]
    elif twist == "broadcast" and rank:
        found[rng.randrange(rank)] = 0
    elif twist == "windows" and rank > 1:
        a, b = rng.sample(range(rank), 2)
        found[a] = found[b] if rng.random() < 0.5 else itemsize
    if twist in ("ones", "") and rng.random() < (1.0 if twist else 0.1):
        found = [
            rng.choice((0, 7, -itemsize, 2**40, -(2**33) - 1)) if n == 1 else step
            for n, step in zip(shape, found, strict=True)
        ]
    return found


def span(shape: tuple[int, ...], steps: list[int], itemsize: int) -> tuple[int, int]:
    """(bytes before the first element, bytes from it on)."""
    if 0 in shape:
        return 0, itemsize
    reach = [(n - 1) * step for n, step in zip(shape, steps, strict=True)]
    return -sum(min(0, n) for n in reach), itemsize + sum(max(0, n) for n in reach)


def lay(
    world: World,
    rng: random.Random,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    steps: list[int] | None = None,
    skew: int | None = None,
) -> np.ndarray:
    """An array without values: at the front of its room, at the end, or so many bytes behind a 64-byte boundary."""
    steps = compact(shape, list(range(len(shape))), dtype.itemsize, [0] * len(shape)) if steps is None else steps
    before, after = span(shape, steps, dtype.itemsize)
    size = before + after
    far = max((abs(step) for step, n in zip(steps, shape, strict=True) if n > 1), default=0) >= FAR
    room = world.room(-1 if far and 0 not in shape else size + 64)
    place = rng.choice(("front", "end", "end", "middle")) if skew is None else "skewed"
    if far and 0 not in shape:
        start = rng.choice((0, 16 * PAGE - (size - FAR * (shape[0] - 1))))
    elif place == "front":
        start = 0
    elif place == "end":
        start = room.bytes.nbytes - size
    else:
        start = rng.randrange(0, 64, dtype.alignment) if skew is None else skew
    return np.ndarray(shape, dtype, room.bytes, start + before, tuple(steps))


def draw(rng: random.Random, shape: tuple[int, ...], offset: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Values that float16 holds to a few digits; multiples of 1/256, so that sums of equal ones are exact."""
    size = math.prod(shape)
    start = rng.randrange(max(1, _NORMAL.size - size))
    values = np.resize(_NORMAL[start : start + size], shape) if size else np.zeros(shape)
    return np.asarray(np.round((offset + scale * values) * 256) / 256)
