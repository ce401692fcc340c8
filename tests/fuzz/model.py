"""A BatchNorm for the fuzz test, what each of its attributes means, and every kind of array and word in them."""

from __future__ import annotations

import contextlib
import decimal
import fractions
from typing import Any

import numpy as np

import fastbn

from .arrays import draw
from .judge import DOCUMENTED, Judge
from .kinds import ODD, RIGHT, UNKNOWN, WRONG, Given, Maker, vector
from .words import BACKEND, BATCHES, EPS, FLAG, HUGE, JUNK, MOMENTUM, THREADS, Words, axis_of, scalar

ARRAYS = ("gamma", "beta", "running_mean", "running_var")
KEYS = dict(zip(ARRAYS, ("weight", "bias", "running_mean", "running_var"), strict=True))
WORDS = {
    "eps": EPS, "momentum": MOMENTUM, "backend": BACKEND, "num_threads": THREADS, "training": FLAG,
    "track_running_stats": FLAG,
    "unbiased_running_var": FLAG, "num_batches_tracked": BATCHES,
}  # fmt: skip
SCALARS = (*WORDS, "axis")
UNWRITABLE = ("read-only", "mapped", "broadcast", "tuple")
SETTERS = (*DOCUMENTED, AttributeError)  # an attribute may be one that can't be set


class Model:
    """A layer, what each of its attributes means, and whether it should be there."""

    def __init__(
        self,
        judge: Judge,
        make: Maker,
        bn: Any,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        axis: int,
        words: list[Given],
    ) -> None:
        self.judge, self.make, self.rng, self.bn, self.dtype, self.shape, self.axis = (
            judge,
            make,
            make.rng,
            bn,
            dtype,
            shape,
            axis,
        )
        self.C = shape[axis]
        self.kind = np.dtype("f8" if dtype.itemsize == 8 else "f4")
        self.is_: dict[str, Given] = {one.name: one for one in words if one.name in SCALARS}
        self.saved: Any = None
        self.learn()
        judge.extra = self.state

    def learn(self) -> None:
        """Read from the layer what it holds."""
        for name in ARRAYS:
            value = getattr(self.bn, name)
            kept = self.is_.get(name, Given(name, value))
            if value is not kept.value:  # a copy by now, or new
                whole = (
                    isinstance(value, np.ndarray)
                    and value.dtype == self.kind
                    and value.shape == (self.C,)
                    and value.flags.carray
                )
                if value is None or (whole and type(value) is np.ndarray):
                    kept = Given(name, value)
                elif whole and kept.status in (RIGHT, ODD):  # of a subclass, which its copy is too
                    kept = kept._replace(kind=f"a {type(value).__name__}", status=ODD)
                else:
                    kept = kept._replace(status=UNKNOWN)
            with np.errstate(all="ignore"):
                wide = None if value is None or kept.status not in (RIGHT, ODD) else np.array(value, np.float64)
            self.is_[name] = kept._replace(value=value, wide=wide)

    def state(self) -> Any:
        """What an error must leave as it is."""
        found = {name: getattr(self.bn, name, None) for name in (*ARRAYS, *SCALARS, "dgamma", "dbeta")}
        return {
            name: value.tobytes() if type(value) is np.ndarray and value.ndim else meaning(value)
            for name, value in found.items()
        }

    def given(self, *names: str) -> list[Given]:
        """Attributes that a call uses, as arguments of it."""
        return [self.is_[name] for name in names if name in self.is_ and (self.is_[name].kind or self.is_[name].status)]

    def written(self) -> list[Given]:
        """Running statistics for a call that writes them: what can't be written must not be taken."""
        found = self.given("running_mean", "running_var")
        return [one._replace(status=WRONG) if one.kind in UNWRITABLE and self.C > 1 else one for one in found]

    def wide(self, name: str) -> Any:
        return self.is_[name].wide if name in self.is_ else None

    @property
    def tracked(self) -> bool:
        return self.bn.running_mean is not None and self.bn.running_var is not None

    def halves(self, absent: int = RIGHT) -> list[Given]:
        """Running statistics of which one is missing, as an argument; both, with this status."""
        bn, says = self.bn, ("running", "mean", "var", "folded_affine", "recalibrate")
        if (bn.running_mean is None) != (bn.running_var is None):
            return [Given("running", None, kind="one of two", status=UNKNOWN, says=says)]
        return (
            [Given("running", None, kind="none", status=absent, says=says)]
            if bn.running_mean is None and absent
            else []
        )

    # What happens to it

    def assign(self) -> None:
        """An array of any kind as a parameter or statistic; or all four as columns of one table."""
        rng = self.rng
        if rng.random() < 0.15:
            self._columns()
            return
        name = rng.choice(ARRAYS)
        found = draw(rng, (self.C,), 1.0, 0.25)
        one = vector(self.make, name, np.abs(found) + 0.125, self.kind, rng.random() < 0.7, ("own memory",))
        if one.kind in ("None", "Nones") or (one.value is None):
            one = Given(name, None, None, "None", UNKNOWN if "running" in name else RIGHT, ("mean", "var", "running"))
        self.put(name, one._replace(says=("state_dict", KEYS[name], "bn")))

    def _columns(self) -> None:
        step = 4 * self.kind.itemsize
        table = self.make.put(np.abs(draw(self.rng, (self.C, 4), 1.0, 0.25)) + 0.125, self.kind)
        for column, name in enumerate(ARRAYS):
            value = table[:, column]
            assert self.C == 1 or value.strides == (step,)
            self.put(name, Given(name, value, value.astype(np.float64), "a column", RIGHT if self.C == 1 else ODD))

    def put(self, name: str, one: Given) -> None:
        """Set an attribute, which may be refused."""

        def run() -> bool:
            setattr(self.bn, name, one.value)
            return True

        status = min(one.status, UNKNOWN)  # most is looked at when it is used
        if name == "track_running_stats":
            status = max(ODD, status)  # which may be one that can't be set
        if self.judge.call(f"BatchNorm.{name} =", [one._replace(status=status)], run, allowed=SETTERS):
            self.is_[name] = one
        elif getattr(self.bn, name, None) is one.value:
            self.is_[name] = one._replace(status=max(UNKNOWN, one.status))

    def scalar(self) -> None:
        """A number or word of any kind."""
        rng = self.rng
        name = rng.choice(SCALARS)
        odd = rng.random() < 0.6
        if name == "axis":
            one = axis_of(self.make, self.axis, len(self.shape), odd)
        else:
            one = scalar(self.make, name, WORDS[name], odd)
        if name in ("num_batches_tracked", "track_running_stats") and one.status == WRONG:
            one = one._replace(status=UNKNOWN)  # used by some calls only
        self.put(name, one)

    def usable(self, *names: str) -> list[Given]:
        """Words that a call uses."""
        return [one for name in names if (one := self.is_.get(name)) is not None and one.status != RIGHT]

    def judged(self, x: Given) -> str:
        return "float64" if isinstance(x.value, np.ndarray) and x.value.dtype == np.float64 else "float32"

    def flag(self, name: str) -> Any:
        """A flag's meaning; True or False where it has none."""
        one = self.is_.get(name)
        found = getattr(self.bn, name) if one is None else one.wide
        return bool(found) if isinstance(found, (bool, int, np.bool_)) else True

    def number(self, name: str, usual: Any) -> Any:
        return self.is_[name].wide if name in self.is_ else getattr(self.bn, name, usual)

    def beside(self, *given: Given) -> list[Given]:
        """All that is odd of it and not among these arguments: a call may look at it, and refuse, or not."""
        names = {one.name for one in given}
        return [one._replace(status=ODD) for one in self.is_.values() if one.status != RIGHT and one.name not in names]


def meaning(value: Any) -> Any:
    """A number, whatever its type: a call may make a plain one of it; of all else the identity."""
    if value is not np.ma.masked and (
        isinstance(value, (int, float, str, np.generic, decimal.Decimal, fractions.Fraction))
        or getattr(value, "shape", None) == ()
    ):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return repr(float(value))  # of NaN too
    return id(value)


def constructed(judge: Judge, make: Maker, C: int, axis: int, dtype: np.dtype[Any]) -> tuple[Any, list[Given]]:
    """A new layer, or None, and how it was asked for."""
    rng = make.rng
    kind = "float64" if dtype.itemsize == 8 else "float32"
    kinds: dict[str, tuple[Words, Any]] = {
        "num_features": (Words(((C, C),), ((np.int64(C), C),), (0, -1, HUGE, -HUGE, 1.5, str(C), True, *JUNK)), C),
        "eps": (EPS, None),
        "momentum": (MOMENTUM, None),
        "axis": (Words(((axis, axis),), ((np.int64(axis), axis),)), axis),
        "dtype": (
            Words(
                ((kind, kind), (np.dtype(kind), kind)),
                (),
                ("int32", "float16", 5, "x", ">f4", [], {}, object(), 1j, np.zeros(0)),
            ),
            kind,
        ),
        "backend": (BACKEND._replace(wrong=()), None),
        "num_threads": (THREADS, None),
        "affine": (FLAG, None),
        "track_running_stats": (FLAG, None),
        "unbiased_running_var": (FLAG, None),
        "comm": (Words(((None, None),), (), (5, "world", object(), [])), None),
    }
    odd = rng.choice(list(kinds)) if rng.random() < 0.15 else ""
    given = []
    for name, (words, usual) in kinds.items():
        if name == odd:
            given.append(scalar(make, name, words, True))
        elif name in ("num_features", "axis", "dtype") or rng.random() < 0.2:
            given.append(scalar(make, name, words, False, usual))
    if odd in ("axis", "backend"):
        given = [one._replace(status=min(UNKNOWN, one.status)) for one in given]
    allowed = (*DOCUMENTED, MemoryError)  # of 10**400 channels
    options = {one.name: one.value for one in given}
    bn = judge.call("BatchNorm", given, lambda: fastbn.BatchNorm(**options), lambda _: (), (), RIGHT, allowed)
    return (bn if odd not in ("axis", "num_features") else None), [one for one in given if one.status != RIGHT]
