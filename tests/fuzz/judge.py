"""What the fuzz test asks of each call: that it computes what it should or refuses in fastbn's words, and touches
nothing else.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import published
import tolerances

from fastbn.arguments.errors import BackendUnavailable, MissingExtra

from .arrays import World
from .kinds import ODD, RIGHT, UNKNOWN, WRONG, Given, Maker

# The accuracy tests hold fastbn to its limits; here an error is a wrong number.
SLACK = 16
DOCUMENTED = (TypeError, ValueError, RuntimeError, BackendUnavailable, MissingExtra)


class Finding(NamedTuple):
    """What should not be."""

    seed: int
    number: int  # of the call
    api: str
    odd: str  # arguments that are not as usual, with their kinds
    outcome: str
    detail: str = ""

    @property
    def same(self) -> str:
        """Findings with one of these are one."""
        return f"{self.api}({self.odd}): {self.outcome}"


class Wrong(NamedTuple):
    """A result as it should not be."""

    outcome: str
    detail: str = ""


class Judge:
    """Calls, one at a time: `call` runs one and judges it."""

    def __init__(
        self, seed: int, dtypes: Iterable[str], note: Callable[[str], None], report: Callable[[Finding], None]
    ) -> None:
        self.seed, self.dtypes, self.note, self.report = seed, tuple(dtypes), note, report
        self.world, self.counts = World(), Counter[str]()
        self.fatal: set[str] = set()  # calls that end the process, by their text
        self.number = -1
        self.rng = random.Random()
        self.extra: Callable[[], Any] = lambda: None  # what must not change where a call is refused
        self.guard: AbstractContextManager[None] = nullcontext()

    def begin(self, number: int) -> Maker:
        """The next call, which its number alone decides."""
        self.world.end()
        self.number, self.rng = number, random.Random(f"{self.seed} {number}")
        self.extra = lambda: None
        return Maker(self.world, self.rng)

    def found(self, api: str, odd: str, outcome: str, detail: str = "") -> None:
        self.counts["findings"] += 1
        self.report(Finding(self.seed, self.number, api, odd, outcome, detail[:400]))

    def call(
        self,
        api: str,
        given: list[Given],
        run: Callable[[], Any],
        right: Callable[[Any], Iterable[Wrong | None]] = lambda result: (),
        written: Iterable[Any] = (),
        status: int = RIGHT,
        allowed: tuple[type[Exception], ...] = DOCUMENTED,
        own: bool = True,
    ) -> Any:
        """Run and judge; the result, None where it was refused or wrong.

        `right` looks at the result; `written` are arrays whose elements may change; `status` joins those of the
        arguments; `own` says that errors are fastbn's, in its words and with nothing changed.
        """
        strange = [one for one in given if one.status != RIGHT]
        odd = ", ".join(map(str, strange))
        status = max([status, *(one.status for one in given)])
        kinds = ", ".join(str(one) for one in given if one.kind)
        if f"{api}({odd})" in self.fatal:
            self.counts["skipped"] += 1
            return None
        self.note(json.dumps([self.number, api, odd, kinds]))
        written = [array for array in written if isinstance(array, np.ndarray) and array.flags.writeable]
        homes = [self.world.home(array) for array in written]
        if self.rng.random() < 0.5:
            for one in given:
                if type(one.value) is np.ndarray and self.world.home(one.value) not in homes:
                    self.world.freeze(one.value)
        self.world.look()
        before = self.extra()
        self.counts["calls"] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error" if own else "ignore")
                with self.guard:
                    result = run()
        except Exception as error:
            self.counts[f"refused by {type(error).__name__}"] += 1
            self._refused(api, odd, kinds, given, strange, status, error, allowed, own)
            if self.world.changed(*([] if own else written)):
                self.found(api, odd, "an error, but memory was changed", kinds)
            if self.extra() != before:
                after = self.extra()
                names = (
                    [name for name in before if before[name] != after[name]]
                    if isinstance(before, dict)
                    else f"{before} -> {after}"
                )
                self.found(api, odd, "an error, but state was changed", f"{kinds}: {names}")
            return None
        if status == WRONG:
            self.found(api, odd, "was accepted", f"{kinds}: {show(result)}")
            self.world.thaw()
            return None
        self.counts["computed"] += 1
        self.counts["computed from odd arguments"] += status == ODD
        with np.errstate(all="ignore"):
            bad = [] if status == UNKNOWN else [wrong for wrong in right(result) if wrong is not None]
        for wrong in bad:
            self.found(api, odd, wrong.outcome, f"{kinds}: {wrong.detail}")
        if self.world.changed(*written):
            self.found(api, odd, "wrote where it should not", kinds)
        return None if bad else result

    def _refused(
        self,
        api: str,
        odd: str,
        kinds: str,
        given: list[Given],
        strange: list[Given],
        status: int,
        error: Exception,
        allowed: tuple[type[Exception], ...],
        own: bool,
    ) -> None:
        said = f"{type(error).__name__}: {error}"
        if status == RIGHT:
            self.found(api, odd, f"refused what is right ({type(error).__name__})", f"{kinds}: {said}")
        elif type(error) not in allowed:
            self.found(api, odd, f"raised {type(error).__name__}", f"{kinds}: {said}")
        elif own and not any(names(str(error), word) for one in (strange or given) for word in (one.name, *one.says)):
            self.found(api, odd, f"{type(error).__name__} that names no argument", f"{kinds}: {said}")


def names(message: str, word: str) -> bool:
    """Whether a message has a word, or for running_mean its last part."""
    return any(
        re.search(rf"(?<![A-Za-z]){re.escape(part)}(?![a-z])", message)
        for part in (word, word.removeprefix("running_"))
    )


def show(result: Any) -> str:
    return repr(result).replace("\n", " ")[:200]


# Numbers


def near(
    quantity: str, dtype: Any, got: Any, want: np.ndarray, scale: Any = 1.0, floor: Any = 0.0, coarse: bool = False
) -> Wrong | None:
    """Whether a result is what it should be; where that is no finite number, whether it is none either."""
    if not isinstance(got, np.ndarray):
        return Wrong(f"{quantity} is a {type(got).__name__}")
    if got.shape != want.shape:
        return Wrong(f"{quantity} has another shape", f"{got.shape}, want {want.shape}")
    if got.dtype.kind not in "fV":
        return Wrong(f"{quantity} is of {got.dtype}")
    if not got.size:
        return None
    native = got.astype(got.dtype.newbyteorder("="))
    rounded = tolerances.rounding(quantity, native)
    limit = tolerances.tolerance(quantity, dtype).relative * SLACK
    limit = max(limit, 4 * float(np.finfo(np.float32).eps)) if coarse or native.dtype.itemsize == 4 else limit
    most = 65000.0 if native.dtype == np.float16 else 3e38
    values = native.astype(np.float64)
    known = np.isfinite(want) & (np.abs(want) < most)
    error = np.abs(np.where(known, values - want, 0.0))
    scale = np.where(np.isfinite(scale), scale, 0.0)
    bad = known & ~(error <= limit * scale + rounded + floor)
    bad |= ~np.isfinite(want) & np.isfinite(values)
    if not bad.any():
        return None
    at = tuple(int(n) for n in np.argwhere(bad)[0])
    return Wrong(
        f"{quantity} is wrong", f"at {at} {values[at]!r}, want {want[at]!r}; {int(bad.sum())} of {bad.size} wrong"
    )


class Truth:
    """What formulas in float64 say of one batch."""

    def __init__(
        self,
        x: np.ndarray,
        axis: int,
        eps: float = 1e-5,
        dy: np.ndarray | None = None,
        gamma: Any = None,
        beta: Any = None,
    ) -> None:
        self.x, self.axis, self.eps, self.gamma, self.beta = x, axis % x.ndim, eps, gamma, beta
        self.slack = 1.0  # more where others compute
        self.dy = np.zeros_like(x) if dy is None else dy
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty batch
            self.batch = published.statistics(x, self.axis)

    def moments(self, dtype: Any, m: Any) -> list[Wrong | None]:
        """Of a Moments."""
        count, mean, var = self.batch
        if m.count != count or type(m.count) is not int:
            return [Wrong("count is wrong", f"{m.count!r}, want {count}")]
        if not count:
            return [near(name, dtype, found, np.zeros(mean.shape)) for name, found in (("mean", m.mean), ("var", m.m2))]
        floor = np.abs(mean) * 1e-12 + 1e-30
        scale = np.maximum(np.abs(mean), np.sqrt(var))
        return [
            near("mean", dtype, m.mean, mean, scale, floor),
            near("var", dtype, np.asarray(m.m2 / count), var, var, np.square(floor)),
        ]

    def y(self, dtype: Any, got: Any, mean: Any = None, var: Any = None) -> Wrong | None:
        """With the statistics of the batch, or constant ones."""
        constant = mean is not None
        mean, var = (mean, var) if constant else self.batch[1:]
        with np.errstate(all="ignore"):
            scales = tolerances.scales(
                self.dy, self.x, mean, var, self.gamma, self.beta, self.axis, self.eps, not constant
            )
            want = published.normalized(self.x, mean, var, self.gamma, self.beta, self.axis, self.eps)
        return near("y", dtype, got, want, self.slack * scales.y)

    def gradients(
        self, dtype: Any, dx: Any, dgamma: Any, dbeta: Any, mean: Any = None, var: Any = None
    ) -> list[Wrong | None]:
        """Of the same; None is not looked at."""
        constant = mean is not None
        mean, var = (mean, var) if constant else self.batch[1:]
        with np.errstate(all="ignore"):
            scales = tolerances.scales(self.dy, self.x, mean, var, self.gamma, None, self.axis, self.eps, not constant)
            want = published.gradients(self.dy, self.x, mean, var, self.gamma, self.axis, self.eps, not constant)
        floor = np.nan_to_num(scales.dbeta) * 1e-9
        found = (
            ("dx", dx, want.dx, self.slack * scales.dx),
            ("dgamma", dgamma, want.dgamma, scales.dgamma),
            ("dbeta", dbeta, want.dbeta, scales.dbeta),
        )
        return [
            near(name, dtype, got, value, scale, 0.0 if name == "dx" else floor)
            for name, got, value, scale in found
            if got is not None
        ]


def result_is(got: Any, x: Any, out: Any) -> Wrong | None:
    """Whether an array is the one given, or plain, of the dtype of x."""
    if out is not None:
        return None if got is out else Wrong("another array than out was returned", show(got))
    if type(got) is not np.ndarray:
        return Wrong(f"a {type(got).__name__} was returned")
    dtype = getattr(x, "dtype", None)
    if (
        isinstance(dtype, np.dtype)
        and dtype.kind in "fV"
        and dtype.itemsize in (2, 4, 8)
        and got.dtype != dtype.newbyteorder("=")
    ):
        return Wrong("another dtype than that of x", str(got.dtype))
    return None
