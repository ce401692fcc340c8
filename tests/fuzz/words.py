"""Numbers and words for the fuzz test: of each (value, meaning); of wrong ones values only."""

from __future__ import annotations

import datetime
import decimal
import fractions
import math
from typing import Any, NamedTuple

import numpy as np

from .kinds import ODD, WRONG, Given, Maker

Numbers = tuple[tuple[Any, Any], ...]


class Words(NamedTuple):
    """What one argument may be: the first is the usual one; what it may be refused or taken for; what it can't be."""

    right: Numbers
    strange: Numbers = ()
    wrong: tuple[Any, ...] = ()


HUGE = 10**400
JUNK: tuple[Any, ...] = (
    *(
        None,
        "x",
        b"1",
        [],
        {},
        (),
        object(),
        1j,
        np.array([0.1, 0.2]),
        np.zeros(0),
        [1, 2],
        len,
        datetime.date(2000, 1, 1),
    ),
    *(np.datetime64(5, "s"), np.ma.masked, Ellipsis, float, {1: 2}),
)
HALF: Numbers = ((np.array(0.5), 0.5), (np.array([0.5]), 0.5), (True, 1.0), (decimal.Decimal("0.5"), 0.5), (b"1", 1.0))
EPS = Words(
    (
        (1e-5, 1e-5),
        (1e-3, 1e-3),
        (np.float32(0.5), 0.5),
        (np.float64(1e-4), 1e-4),
        (1, 1.0),
        (fractions.Fraction(1, 8), 0.125),
    ),
    (("1e-5", 1e-5), *HALF),
    (-1.0, math.nan, math.inf, -math.inf, HUGE, -HUGE, "nan", *JUNK),
)
MOMENTUM = Words(
    ((0.1, 0.1), (0, 0.0), (1, 1.0), (None, None), (0.5, 0.5), (np.float32(0.25), 0.25), (1.5, 1.5), (-0.5, -0.5)),
    (("0.1", 0.1), *HALF),
    (math.nan, math.inf, HUGE, *JUNK[1:]),
)
THREADS = Words(
    ((None, None), (1, None), (2, None), (np.int64(2), None)),
    ((True, None), (1.0, None), (np.array(1), None), (np.uint8(1), None)),
    (0, -1, 10**30, 99999, "2", 1.5, math.nan, *JUNK[1:]),
)
BACKEND = Words(
    ((None, None), ("cpu", None), ("reference", None)),
    (("", None), (np.str_("cpu"), None), (False, None)),
    ("cuda", "nonsense", "CPU", 1, True, math.nan, b"cpu", *JUNK[1:]),
)
STREAM = Words(((None, None),), (), (0, 1, "a", object(), [], 1j))
FLAG = Words(
    ((True, True), (False, False)),
    ((1, True), (0, False), (np.True_, True), (np.False_, False)),
    (np.array([True, False]), np.zeros(3)),
)
BATCHES = Words(((0, 0), (5, 5)), ((np.int64(3), 3), (3.0, 3)), (np.inf, np.nan, -3, 0.5, HUGE, *JUNK))


def scalar(make: Maker, name: str, words: Words, odd: bool, usual: Any = None, says: tuple[str, ...] = ()) -> Given:
    """A number, or a word; mostly the usual one."""
    rng = make.rng
    if not odd:
        value, wide = (
            rng.choice(words.right) if rng.random() < 0.3 else words.right[0] if usual is None else (usual, usual)
        )
        return Given(name, value, wide, "" if value is words.right[0][0] else label(value), says=says)
    if words.strange and (not words.wrong or rng.random() < 0.3):
        value, wide = rng.choice(words.strange)
        return Given(name, value, wide, label(value), ODD, says)
    value = rng.choice(words.wrong)
    return Given(name, value, None, label(value), WRONG, says)


def label(value: Any) -> str:
    """For a person to read: numbers and words as they are, of all else the type."""
    if type(value) is int and abs(value) == HUGE:
        return "10**400" if value > 0 else "-10**400"
    return (
        repr(value)
        if isinstance(value, (int, float, str, bytes, decimal.Decimal)) or value is None
        else (f"a {type(value).__name__}")
    )


def axis_of(make: Maker, axis: int, rank: int, odd: bool) -> Given:
    """The channel axis."""
    right: Numbers = ((axis, axis), (axis - rank, axis), (np.int64(axis), axis))
    strange: Numbers = (
        (np.int8(axis), axis),
        (float(axis), axis),
        ([axis], axis),
        (np.array(axis), axis),
        (np.array([axis]), axis),
    )
    wrong = (rank, -rank - 1, 10**30, 99, "1", math.nan, 0.5, HUGE, *JUNK)
    return scalar(make, "axis", Words(right, strange, wrong), odd)
