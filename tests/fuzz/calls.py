"""The functions of fastbn for the fuzz test: what each takes, and what it then gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastbn

from .arrays import draw
from .judge import Judge, Truth, Wrong, near, result_is
from .kinds import ODD, RIGHT, UNKNOWN, WRONG, Given, Maker, data, dtype_of, out, values, vector
from .words import BACKEND, EPS, HUGE, JUNK, STREAM, THREADS, Words, axis_of, scalar

SHAPES = (
    *(
        (2, 1),
        (9, 5),
        (33, 70),
        (3, 4, 5),
        (2, 3, 7, 7),
        (1, 6, 33),
        (7, 6, 1, 1),
        (4, 1, 6, 6),
        (1, 1, 1, 40),
        (2, 2, 130),
        (2, 2, 3, 2, 3),
    ),
    *(
        (40, 3),
        (130, 4),
        (2, 8, 17),
        (3, 16, 16),
        (2, 64, 3),
        (1, 20, 64),
        (70, 2, 5),
        (5, 1, 33),
        (2, 24, 40),
        (5, 130),
    ),
)
LARGE = ((2, 5, 600), (300, 9, 8), (2300, 3), (6, 17, 70))
ODD_SHAPES = ((0, 3), (0, 3, 4), (2, 3, 0), (1, 3), (1, 4, 1), (2, 0), (0, 0), (3, 0, 2), (5,), (), (1, 1), (4, 1))


def arrangement(make: Maker) -> tuple[tuple[int, ...], int]:
    """A shape and its channel axis; now and then of many axes, or of none or too few values."""
    rng = make.rng
    if rng.random() < 0.06:
        shape = rng.choice(ODD_SHAPES)
        return shape, rng.choice((0, 1, 1)) % max(1, len(shape))
    if rng.random() < 0.05:  # numba and NumPy have their limits at 16, 32 and 64
        rank = rng.choice(
            (15, 16, 17, 18, 31, 32, 33, 63, 64)
            if np.lib.NumpyVersion(np.__version__) >= "2.0.0"
            else (15, 16, 17, 31, 32)
        )
        shape = [1] * rank
        for a in rng.sample(range(rank), 3):
            shape[a] = rng.choice((2, 3, 5))
        return tuple(shape), rng.randrange(rank)
    shape = rng.choice(LARGE if rng.random() < 0.05 else SHAPES)
    return shape, (1 if rng.random() < 0.6 else rng.randrange(len(shape)))


class Arguments:
    """What most functions take, drawn in an order that `odd` decides: which of them are not as usual."""

    def __init__(self, judge: Judge, make: Maker, names: tuple[str, ...]) -> None:
        self.make, self.rng = make, make.rng
        usual = make.rng.random()
        count = 0 if usual < 0.4 else 1 if usual < 0.93 else 2
        weighted = [name for name in names for _ in range(HEAVY.get(name, 1))]
        self.odd = {make.rng.choice(weighted) for _ in range(count)}
        self.shape, self.axis = arrangement(make)
        self.dtype = dtype_of(make, judge.dtypes)
        self.given: list[Given] = []

    def add(self, one: Given) -> Given:
        self.given.append(one)
        return one

    def x(self) -> Given:
        self.known = len(self.shape) > 1 and self.shape[self.axis] > 0
        self.channels = self.shape[self.axis] if self.known else 3
        self.count = math.prod(self.shape) // self.channels if self.known else 0
        found = self.add(data(self.make, "x", values(self.make, self.shape), self.dtype, self.axis, "x" in self.odd))
        if not self.known:
            self.given[-1] = found = found._replace(kind=f"of shape {self.shape}", status=WRONG)
        self.wide = found.wide if found.wide is not None else np.ones(self.shape)
        self.kind = np.dtype("f8" if self.dtype.itemsize == 8 else "f4")
        # another than the one drawn, where x is odd
        given = found.value.dtype if isinstance(found.value, np.ndarray) else None
        self.judged = "float64" if given == np.float64 else "float32"
        return found

    def dy(self, x: Given) -> Given:
        return self.add(
            data(self.make, "dy", draw(self.rng, self.shape), self.dtype, self.axis, "dy" in self.odd, like=x)
        )

    def parameter(self, name: str) -> Given:
        if name not in self.odd and self.rng.random() < 0.3:
            return self.add(Given(name, None))
        found = draw(self.rng, (self.channels,), 1.0, 0.5)
        return self.add(vector(self.make, name, found, self.kind, name in self.odd))

    def statistic(self, name: str, found: np.ndarray) -> Given:
        dtype = self.rng.choice(("f4", "f8"))
        return self.add(vector(self.make, name, found, dtype, name in self.odd, optional=False))

    def axis_(self) -> Given:
        one = axis_of(self.make, self.axis, max(2, len(self.shape)), "axis" in self.odd)
        return self.add(one)

    def eps(self, training: bool) -> Given:
        zero = EPS._replace(wrong=(0.0, *EPS.wrong)) if training else EPS._replace(right=(*EPS.right, (0, 0.0)))
        return self.add(scalar(self.make, "eps", zero, "eps" in self.odd))

    def out(self, x: Given, *others: Given, beside: tuple[str, ...] = ("x",)) -> Given:
        return self.add(out(self.make, x, self.axis, "out" in self.odd, list(others), beside))

    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, words in OPTIONS.items():
            if name in self.odd or self.rng.random() < 0.3:
                found[name] = self.add(scalar(self.make, name, words, name in self.odd)).value
        return found

    @property
    def status(self) -> int:
        """What joins that of the arguments: shapes that only some calls take."""
        return RIGHT if self.known else WRONG


OPTIONS = {"backend": BACKEND, "num_threads": THREADS, "stream": STREAM}
HEAVY = {"x": 3, "dy": 3, "out": 5, "gamma": 3, "beta": 3, "mean": 3, "var": 3}  # arrays, of which there are more kinds
COMMON = ("x", "axis", "backend", "num_threads", "stream")


def moments(judge: Judge, make: Maker) -> None:
    a = Arguments(judge, make, COMMON)
    x, axis = a.x(), a.axis_()
    options = a.options()
    truth = Truth(a.wide, a.axis) if a.known else None
    judge.call(
        "moments",
        a.given,
        lambda: fastbn.moments(x.value, axis.value, **options),
        lambda m: truth.moments(a.judged, m) if truth else (),
    )


def one_value(a: Arguments) -> None:
    """Training refuses a batch of one value per channel."""
    if a.known and a.count == 1:
        a.given.append(Given("x", None, kind="of one value per channel", status=WRONG, says=("input", "channel")))


def batch_norm(judge: Judge, make: Maker) -> None:
    a = Arguments(judge, make, (*COMMON, "gamma", "beta", "eps", "out"))
    x, gamma, beta, axis, eps = a.x(), a.parameter("gamma"), a.parameter("beta"), a.axis_(), a.eps(True)
    to = a.out(x, gamma, beta)
    options = a.options()
    one_value(a)

    def right(result: Any) -> Iterator[Wrong | None]:
        y, m = result
        truth = Truth(a.wide, a.axis, eps.wide, None, gamma.wide, beta.wide)
        yield result_is(y, x.value, to.value)
        yield truth.y(a.judged, y)
        yield from truth.moments(a.judged, m)

    judge.call(
        "batch_norm",
        a.given,
        lambda: fastbn.batch_norm(x.value, gamma.value, beta.value, axis.value, eps.value, to.value, **options),
        right,
        [to.value],
    )


def constants(a: Arguments) -> tuple[Given, Given]:
    """mean and var of inference."""
    mean = a.statistic("mean", draw(a.rng, (a.channels,), 1.0))
    return mean, a.statistic("var", np.abs(draw(a.rng, (a.channels,), 1.0)) + 0.25)


def both(a: Arguments, mean: Given, var: Given) -> None:
    """None is said of the two together."""
    for one in (mean, var):
        if one.kind == "None":
            a.given[a.given.index(one)] = one._replace(says=("mean", "var"))


def batch_norm_inference(judge: Judge, make: Maker) -> None:
    a = Arguments(judge, make, (*COMMON, "mean", "var", "gamma", "beta", "eps", "out"))
    x, (mean, var) = a.x(), constants(a)
    gamma, beta, axis, eps = a.parameter("gamma"), a.parameter("beta"), a.axis_(), a.eps(False)
    to = a.out(x, mean, var, gamma, beta)
    options = a.options()
    both(a, mean, var)

    def right(y: Any) -> Iterator[Wrong | None]:
        yield result_is(y, x.value, to.value)
        yield Truth(a.wide, a.axis, eps.wide, None, gamma.wide, beta.wide).y(a.judged, y, mean.wide, var.wide)

    judge.call(
        "batch_norm_inference",
        a.given,
        lambda: fastbn.batch_norm_inference(
            x.value, mean.value, var.value, gamma.value, beta.value, axis.value, eps.value, to.value, **options
        ),
        right,
        [to.value],
    )


def statistics(a: Arguments, name: str = "moments") -> Given:
    """The Moments of x, of which a part may be odd."""
    truth = Truth(a.wide, a.axis) if a.known else None
    count, mean, var = truth.batch if truth else (2, np.zeros(3), np.ones(3))
    mean, var = np.nan_to_num(mean), np.nan_to_num(var)
    if name not in a.odd:
        return a.add(Given(name, fastbn.Moments(count, mean, var * count)))
    part = a.rng.choice(("mean", "m2", "count", "whole"))
    says = (name, part, "mean", "m2", "count")
    if part == "whole":
        value = a.rng.choice((None, 5, "x", (count, mean, var), {}, np.zeros(3), object(), fastbn.Moments))
        return a.add(Given(name, value, None, f"a {type(value).__name__}", WRONG, says))
    if part == "count":
        strange = ((float(count), count), *(((np.uint8(count), count),) if count < 256 else ()))
        one = scalar(a.make, "count", Words(((count, count),), strange, (count + 1, -1, "2", HUGE, *JUNK)), True)
    else:
        one = vector(a.make, part, mean if part == "mean" else var * count, "f8", True, optional=False)
    parts = {"count": count, "mean": mean, "m2": var * count, part: one.value}
    try:
        value = fastbn.Moments(parts["count"], parts["mean"], parts["m2"])
    except (TypeError, ValueError):  # where Moments looks at what it is given
        return a.add(Given(name, fastbn.Moments(count, mean, var * count)))
    wide = (
        None
        if one.wide is None
        else (mean if part != "mean" else one.wide, var if part != "m2" else one.wide / max(1, count))
    )
    return a.add(Given(name, value, wide, f"{part} {one.kind}", max(ODD, one.status), says))


def batch_norm_backward(judge: Judge, make: Maker) -> None:
    a = Arguments(judge, make, (*COMMON, "dy", "moments", "gamma", "eps", "out"))
    x = a.x()
    dy, m, gamma, axis, eps = a.dy(x), statistics(a), a.parameter("gamma"), a.axis_(), a.eps(True)
    to = a.out(x, dy, gamma, beside=("x", "dy"))
    options = a.options()
    one_value(a)

    def right(result: Any) -> Iterator[Wrong | None]:
        dx, dgamma, dbeta = result
        yield result_is(dx, x.value, to.value)
        truth = Truth(a.wide, a.axis, eps.wide, dy.wide, gamma.wide)
        if m.wide is not None:
            truth.batch = truth.batch._replace(mean=m.wide[0], var=m.wide[1])
        yield from truth.gradients(a.judged, dx, dgamma, dbeta)

    status = RIGHT if np.isfinite(a.wide).all() else UNKNOWN
    judge.call(
        "batch_norm_backward",
        a.given,
        lambda: fastbn.batch_norm_backward(
            dy.value, x.value, m.value, gamma.value, axis.value, eps.value, to.value, **options
        ),
        right,
        [to.value],
        status,
    )


def batch_norm_inference_backward(judge: Judge, make: Maker) -> None:
    a = Arguments(judge, make, (*COMMON, "dy", "mean", "var", "gamma", "eps", "out"))
    x = a.x()
    dy, (mean, var), gamma, axis, eps = a.dy(x), constants(a), a.parameter("gamma"), a.axis_(), a.eps(False)
    to = a.out(x, dy, mean, var, gamma, beside=("x", "dy"))
    options = a.options()
    both(a, mean, var)

    def right(result: Any) -> Iterator[Wrong | None]:
        yield result_is(result[0], x.value, to.value)
        yield from Truth(a.wide, a.axis, eps.wide, dy.wide, gamma.wide).gradients(
            a.judged, *result, mean.wide, var.wide
        )

    judge.call(
        "batch_norm_inference_backward",
        a.given,
        lambda: fastbn.batch_norm_inference_backward(
            dy.value, x.value, mean.value, var.value, gamma.value, axis.value, eps.value, to.value, **options
        ),
        right,
        [to.value],
    )


def batch_norm_backward_reduce(judge: Judge, make: Maker) -> None:
    a = Arguments(judge, make, (*COMMON, "dy", "mean", "var", "eps"))
    x = a.x()
    dy, (mean, var), axis, eps = a.dy(x), constants(a), a.axis_(), a.eps(True)
    options = a.options()
    both(a, mean, var)
    judge.call(
        "batch_norm_backward_reduce",
        a.given,
        lambda: fastbn.batch_norm_backward_reduce(
            dy.value, x.value, mean.value, var.value, axis.value, eps.value, **options
        ),
        lambda sums: Truth(a.wide, a.axis, eps.wide, dy.wide).gradients(
            a.judged, None, sums[1], sums[0], mean.wide, var.wide
        ),
    )


def batch_norm_backward_input(judge: Judge, make: Maker) -> None:
    names = ("dy", "mean", "var", "sum_dy", "sum_dy_xhat", "count", "gamma", "eps", "out")
    a = Arguments(judge, make, (*COMMON, *names))
    x = a.x()
    dy, (mean, var), axis, eps = a.dy(x), constants(a), a.axis_(), a.eps(True)
    sums = [a.statistic(name, draw(a.rng, (a.channels,), 0.0, 4.0)) for name in names[3:5]]
    whole = a.rng.choice((2, 5, 100)) if a.count < 2 else a.count
    odd_counts = ((float(whole), whole), (np.float64(whole), whole), (HUGE, math.inf), (np.array(whole), whole))
    wrong = (a.count - 1, -1, -HUGE, "9", math.nan, 0.5, math.inf, *JUNK)
    count = a.add(
        scalar(make, "count", Words(((whole, whole), (np.int64(whole), whole)), odd_counts, wrong), "count" in a.odd)
    )
    gamma = a.parameter("gamma")
    to = a.out(x, dy, mean, var, gamma, *sums, beside=("x", "dy"))
    options = a.options()
    both(a, mean, var)

    def right(dx: Any) -> Iterator[Wrong | None]:
        yield result_is(dx, x.value, to.value)
        along = [1] * a.wide.ndim
        along[a.axis] = a.channels
        m, v, g, s, t = (np.reshape(n, along) for n in (mean.wide, var.wide,
        np.ones(a.channels) if gamma.wide is None else gamma.wide,
                                                        sums[0].wide, sums[1].wide))  # fmt: skip
        rstd = 1.0 / np.sqrt(v + eps.wide)
        hat = (a.wide - m) * rstd
        terms = dy.wide, s / count.wide, hat * t / count.wide
        scale = (
            np.abs(g)
            * rstd
            * (np.abs(terms[0]) + np.abs(terms[1]) + np.maximum(1.0, np.abs(hat)) * np.abs(t) / count.wide)
        )
        yield near("dx", a.judged, dx, g * rstd * (terms[0] - terms[1] - terms[2]), scale)

    judge.call(
        "batch_norm_backward_input",
        a.given,
        lambda: fastbn.batch_norm_backward_input(
            dy.value, x.value, mean.value, var.value, sums[0].value, sums[1].value, count.value, gamma.value,
            axis.value, eps.value,
            to.value, **options
        ),
        right,
        [to.value],
    )  # fmt: skip


CALLS: dict[Callable[[Judge, Maker], None], int] = {
    moments: 6, batch_norm: 14, batch_norm_inference: 14, batch_norm_backward: 14, batch_norm_inference_backward: 10,
    batch_norm_backward_reduce: 6, batch_norm_backward_input: 8,
}  # fmt: skip
