"""Arrays for the fuzz test: right kinds, and kinds that nobody should hand over, each with what it means, where it
means anything.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .arrays import BFLOAT16, DTYPES, REPEATS, TWISTS, World, compact, draw, lay, strides

RIGHT, ODD, UNKNOWN, WRONG = range(4)  # must be served; served right or refused; anything but harm; must be refused

Built = tuple[Any, Any]  # what is handed over, and what it means: None for nothing


class Given(NamedTuple):
    """One argument."""

    name: str
    value: Any
    wide: Any = None  # what it means
    kind: str = ""
    status: int = RIGHT
    says: tuple[str, ...] = ()  # other words by which an error may name it

    def __str__(self) -> str:
        return f"{self.name}={self.kind}" if self.kind else self.name


class Subclass(np.ndarray):
    """A subclass without any behaviour."""


class Wrapped:
    """What NumPy converts by a method."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.values, dtype)


class Interface:
    """What NumPy sees by an attribute."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.__array_interface__ = values.__array_interface__


def mapped(values: np.ndarray) -> np.ndarray:
    """The same values in a file, mapped to be read."""
    with tempfile.TemporaryDirectory() as folder:  # the mapping outlives its name
        path = Path(folder, "values")
        path.write_bytes(values.tobytes() or b"\0")
        found: np.ndarray = np.memmap(path, values.dtype, "r", shape=values.shape)
    return found


class Maker(NamedTuple):
    """Where arrays of one call come from."""

    world: World
    rng: random.Random

    def put(self, values: Any, dtype: Any, steps: list[int] | None = None, skew: int | None = None) -> np.ndarray:
        """Values in guarded memory."""
        values = np.asarray(values)
        found = lay(self.world, self.rng, values.shape, np.dtype(dtype), steps, skew)
        with np.errstate(all="ignore"):
            found[...] = values
        return found

    def frozen(self, values: Any, dtype: Any) -> np.ndarray:
        found = self.put(values, dtype)
        found.flags.writeable = False
        self.world.freeze(found)
        return found

    def tensor(self, values: Any, dtype: Any) -> Any:
        if "torch" not in sys.modules or dtype == BFLOAT16:
            return None, None
        return sys.modules["torch"].from_numpy(self.put(values, dtype)), values


def _same(
    build: Callable[[Maker, np.ndarray, np.dtype[Any]], Any],
) -> Callable[[Maker, np.ndarray, np.dtype[Any]], Built]:
    return lambda make, values, dtype: (build(make, values, dtype), values)


def _as(name: str) -> Callable[[Maker, np.ndarray, np.dtype[Any]], Built]:
    def build(make: Maker, values: np.ndarray, dtype: np.dtype[Any]) -> Built:
        found = make.put(np.abs(np.round(values)) + 1, name)
        return found, found.astype(np.float64)

    return build


def _rounded(other: Callable[[np.dtype[Any]], Any]) -> Callable[[Maker, np.ndarray, np.dtype[Any]], Built]:
    """Of another dtype, None where there is none, and meaning what that holds of the values."""

    def build(make: Maker, values: np.ndarray, dtype: np.dtype[Any]) -> Built:
        name = other(dtype)
        found = None if name is None else make.put(values, name)
        return found, None if found is None else found.astype(np.float64)

    return build


def _nothing(
    build: Callable[[Maker, np.ndarray, np.dtype[Any]], Any],
) -> Callable[[Maker, np.ndarray, np.dtype[Any]], Built]:
    return lambda make, values, dtype: (build(make, values, dtype), None)


def _steps(values: np.ndarray, size: int) -> list[int]:
    return compact(values.shape, list(range(values.ndim)), size, [0] * values.ndim)


def _first_for_all(make: Maker, values: np.ndarray, dtype: np.dtype[Any]) -> Built:
    found = make.put(values, dtype, [0] * values.ndim)
    return found, found.astype(np.float64)


INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")

# Of arrays of any shape that keep their meaning.
MEANING: dict[str, Callable[[Maker, np.ndarray, np.dtype[Any]], Built]] = {
    "strided": _same(lambda make, v, d: make.put(v, d, _steps(v, d.itemsize * make.rng.choice((2, 3, 4))))),
    "reversed": _same(lambda make, v, d: make.put(v, d, _steps(v, -d.itemsize))),
    "records": _same(lambda make, v, d: make.put(v, d, _steps(v, d.itemsize + make.rng.choice((1, 3, 22))))),
    "read-only": _same(lambda make, v, d: make.frozen(v, d)),
    "unaligned": _same(lambda make, v, d: make.put(v, d, skew=1 + 2 * make.rng.randrange(8))),
    "broadcast": _first_for_all,
    "mapped": _same(lambda make, v, d: mapped(v.astype(d))),
    "list": _same(lambda make, v, d: v.tolist() if v.size else None),
    "tuple": _same(lambda make, v, d: tuple(v.tolist()) if v.size and v.ndim else None),
    "own memory": _same(lambda make, v, d: v.astype(d)),
    "swapped": _same(lambda make, v, d: make.put(v, d.newbyteorder())),
    "subclass": _same(lambda make, v, d: make.put(v, d).view(Subclass)),
    "wrapped": _same(lambda make, v, d: Wrapped(make.put(v, d))),
    "interface": _same(lambda make, v, d: None if d == BFLOAT16 else Interface(make.put(v, d))),
    "memoryview": _same(lambda make, v, d: None if d == BFLOAT16 else memoryview(make.put(v, d))),
    "tensor": lambda make, v, d: make.tensor(v, d),
    "objects": _same(lambda make, v, d: v.astype(object)),
    "other float": _rounded(lambda d: "f4" if d.itemsize == 8 else "f8"),
    "float16": _rounded(lambda d: "f2" if d.itemsize > 2 else None),
    "bfloat16": _rounded(lambda d: BFLOAT16 if d.itemsize > 2 else None),
    "long double": _same(lambda make, v, d: make.put(v, np.longdouble)),
    "bool": lambda make, v, d: (make.put(v > 0, bool), (v > 0).astype(np.float64)),
    **{name: _as(name) for name in INTEGERS},
}

RAGGED = [[1.0, 2.0], [3.0]]

# And that mean nothing.
NONSENSE: dict[str, Callable[[Maker, np.ndarray, np.dtype[Any]], Built]] = {
    "masked": _nothing(lambda make, v, d: np.ma.masked_array(make.put(v, d), make.rng.random() < 0.5)),
    "list of masked": _nothing(
        lambda make, v, d: [np.ma.masked_array(row, True) for row in np.atleast_1d(v.astype(d))] or np.ma.masked
    ),
    "complex": _nothing(lambda make, v, d: make.put(v, "c8")),
    "dates": _nothing(lambda make, v, d: make.put(np.ones(v.shape, "i8"), "M8[s]")),
    "durations": _nothing(lambda make, v, d: make.put(np.ones(v.shape, "i8"), "m8[s]")),
    "text": _nothing(lambda make, v, d: np.full(v.shape, "1.5")),
    "bytes": _nothing(lambda make, v, d: np.full(v.shape, b"1.5")),
    "fields": _nothing(lambda make, v, d: np.zeros(v.shape, [("a", d), ("b", "i4")])),
    "None": _nothing(lambda make, v, d: None),
    "Nones": _nothing(lambda make, v, d: np.full(v.shape, None)),
    "a string": _nothing(lambda make, v, d: "abc"),
    "a dict": _nothing(lambda make, v, d: {"a": v}),
    "a set": _nothing(lambda make, v, d: {1.0, 2.0}),
    "an object": _nothing(lambda make, v, d: object()),
    "a generator": _nothing(lambda make, v, d: (float(n) for n in v.ravel())),
    "a function": _nothing(lambda make, v, d: len),
    "a class": _nothing(lambda make, v, d: np.ndarray),
    "ragged": _nothing(lambda make, v, d: RAGGED),
    "a number": _nothing(lambda make, v, d: 1.5),
    "0-d": _nothing(lambda make, v, d: make.put(1.5, d)),
    "empty": _nothing(lambda make, v, d: make.put(np.zeros(0), d)),
    "of rank 20": _nothing(lambda make, v, d: None if v.ndim > 12 else make.put(v.reshape((1,) * 20 + v.shape), d)),
    "more axes": _nothing(lambda make, v, d: None if v.ndim > 12 else make.put(v[None, ..., None, None], d)),
    "short": _nothing(
        lambda make, v, d: None if not v.ndim else make.put(v[:-1] if v.shape[0] > 1 or v.ndim == 1 else v[..., :-1], d)
    ),
    "long": _nothing(
        lambda make, v, d: make.put(np.concatenate([v, np.ones((1, *v.shape[1:]))]), d) if v.ndim else None
    ),
    "row": _nothing(lambda make, v, d: None if v.ndim > 12 else make.put(v[None], d)),
    "column": _nothing(lambda make, v, d: None if v.ndim > 12 else make.put(v[..., None], d)),
}
# wrong by their shape
BOUND_TO_VALUES = ("more axes", "short", "long", "row", "column", "empty", "of rank 20", "a number", "0-d")

# of (C,)
ARRAY_LIKE = (
    "strided",
    "reversed",
    "records",
    "read-only",
    "unaligned",
    "broadcast",
    "mapped",
    "list",
    "tuple",
    "own memory",
)


def vector(
    make: Maker,
    name: str,
    values: np.ndarray,
    dtype: Any,
    odd: bool,
    legal: Collection[str] = ARRAY_LIKE,
    optional: bool = True,
) -> Given:
    """A (C,) array: gamma, beta, statistics."""
    dtype = np.dtype(dtype)
    values = values.astype(dtype).astype(np.float64)  # what it holds of them
    if not odd:
        kind = make.rng.choice(("", "", "", *legal))
        value, wide = MEANING[kind](make, values, dtype) if kind else (make.put(values, dtype), values)
        return Given(name, value, wide, kind)
    while True:
        kind = make.rng.choice((*MEANING, *NONSENSE))
        value, wide = (MEANING.get(kind) or NONSENSE[kind])(make, values, dtype)
        if value is not None or (kind == "None" and not optional):
            return Given(name, value, wide, kind, WRONG if wide is None else RIGHT if kind in legal else ODD)


def data(
    make: Maker, name: str, values: np.ndarray, dtype: np.dtype[Any], axis: int, odd: bool, like: Given | None = None
) -> Given:
    """An array of any shape: x, or dy, which must be like it."""
    rng = make.rng
    values = values.astype(dtype).astype(np.float64)  # what it holds of them
    if odd:
        while True:
            kind = rng.choice((*MEANING, *NONSENSE))
            if like is None and kind in BOUND_TO_VALUES:
                kind = rng.choice(("a number", "0-d"))  # any shape will do for x, of two axes and more
            value, wide = (MEANING.get(kind) or NONSENSE[kind])(make, values, dtype)
            if value is not None or kind == "None":
                right = kind in ("read-only", "unaligned", "mapped", "swapped", "own memory")
                return Given(name, value, wide, kind, WRONG if wide is None else RIGHT if right else ODD)
    twist = rng.choice((*TWISTS, *REPEATS)) if 0 not in values.shape else ""
    kind, order = twist, "=" if rng.random() < 0.95 else ">"
    found = make.put(values, dtype.newbyteorder(order), strides(rng, values.shape, dtype.itemsize, axis, twist))
    if order == ">":
        kind += " swapped"
    elif rng.random() < 0.05:
        found, kind = make.put(values, dtype, skew=1), "unaligned"
    if rng.random() < 0.3:
        found.flags.writeable = False
        kind += " read-only"
    return Given(name, found, found.astype(np.float64), kind.strip())


def out(make: Maker, x: Given, axis: int, odd: bool, others: list[Given], beside: Collection[str] = ()) -> Given:
    """Where a result goes: nowhere, to memory of its own, to an input's, or to what it can't go to; `beside`: inputs it
    may be.
    """
    rng, shape = make.rng, np.shape(x.wide)
    plain = isinstance(x.value, np.ndarray) and x.value.dtype in DTYPES.values()
    if x.wide is None or not plain or (not odd and rng.random() < 0.4):
        return Given("out", None)
    dtype = x.value.dtype
    if not odd:
        inputs = [one for one in (x, *others) if one.name in beside and _takes(one.value, x.value)]
        if inputs and rng.random() < 0.4:
            one = rng.choice(inputs)
            found = _relabelled(rng, one.value)
            return Given(
                "out", found, kind=f"{one.name} itself" + ("" if found is one.value else ", other strides of length 1")
            )
        twist = rng.choice(TWISTS)
        found = make.put(np.zeros(shape), dtype, strides(rng, shape, dtype.itemsize, axis, twist))
        return Given("out", found, kind=twist or f"at {found.ctypes.data % 64} of 64")
    kind = rng.choice(tuple(OUTS))
    if rng.random() < 0.5:
        found, kind, status = _overlapping(make, x, others)
        return Given("out", found, kind=kind, status=status, says=tuple(one.name for one in others))
    value, meant = OUTS[kind](make, np.ones(shape), dtype)
    if value is None:
        return Given("out", None)
    return Given("out", value, kind=kind, status=ODD if meant is not None else WRONG)


OUTS: dict[str, Callable[[Maker, np.ndarray, np.dtype[Any]], Built]] = {
    **{name: MEANING[name] for name in ("swapped", "subclass", "other float", "float16", "bfloat16", "long double")},
    **{name: _nothing(MEANING[name]) for name in ("read-only", "bool", "int32", "uint16", "int64", "objects", "list")},
    "mapped": lambda make, v, d: (mapped(v.astype(d)), None),
    "broadcast": lambda make, v, d: (make.put(v, d, [0] * v.ndim), None) if v.size > 1 else (None, None),
    **{name: build for name, build in NONSENSE.items() if name not in ("None", "empty", "0-d")},
}


def _takes(value: Any, x: np.ndarray) -> bool:
    return (
        type(value) is np.ndarray
        and value.dtype == x.dtype
        and value.shape == x.shape
        and value.flags.writeable
        and not _repeated(value)
    )


def _repeated(value: np.ndarray) -> bool:
    """Whether elements share memory, or may."""
    reach = value.itemsize
    for step, n in sorted((abs(step), n) for step, n in zip(value.strides, value.shape, strict=True)):
        if n > 1 and step < reach:
            return True
        reach += step * (n - 1)
    return False


def _relabelled(rng: random.Random, value: np.ndarray) -> np.ndarray:
    """The same memory, perhaps with other strides of axes of length 1."""
    if 1 not in value.shape or rng.random() < 0.3:
        return value
    steps = tuple(
        rng.choice((0, 8, 2**20)) if n == 1 else step for n, step in zip(value.shape, value.strides, strict=True)
    )
    return np.lib.stride_tricks.as_strided(value, value.shape, steps)


def _overlapping(make: Maker, x: Given, others: list[Given]) -> tuple[Any, str, int]:
    """A result on top of an input, in part: what the input was is remembered elsewhere."""
    rng, shape, dtype = make.rng, x.value.shape, x.value.dtype
    arrays = [
        one for one in (x, *others) if type(one.value) is np.ndarray and one.value.flags.writeable and one.value.size
    ]
    one = rng.choice(arrays) if arrays else None
    room = None if one is None else make.world.home(one.value)
    size = math.prod(shape) * dtype.itemsize
    if one is None or room is None or room.bytes.nbytes < size or not size:
        return None, "", RIGHT
    at = one.value.__array_interface__["data"][0] - room.address
    start = min(
        max(0, at - rng.choice((0, 1, 2, size // dtype.itemsize - 1)) * dtype.itemsize), room.bytes.nbytes - size
    )
    steps = strides(rng, shape, dtype.itemsize, 0, "") if rng.random() < 0.3 else None
    if any(n == 1 for n in shape):
        steps = None
    found = np.ndarray(shape, dtype, room.bytes, start, steps)
    return found, f"over {one.name}", ODD


def values(make: Maker, shape: tuple[int, ...], channels: int | None = None) -> np.ndarray:
    """Of x: a mean and a scale for all; now and then equal values, NaN or infinity."""
    rng = make.rng
    found = draw(rng, shape, rng.choice((0.0, 0.0, 3.0, 100.0)), rng.choice((1.0, 1.0, 0.125, 8.0)))
    if rng.random() < 0.03:
        found[...] = 2.5
    elif rng.random() < 0.03 and found.size:
        found[np.unravel_index(rng.randrange(found.size), shape)] = rng.choice((math.nan, math.inf, -math.inf))
    return found


def dtype_of(make: Maker, names: Collection[str]) -> np.dtype[Any]:
    return DTYPES[make.rng.choice(tuple(names))]
