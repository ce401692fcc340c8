"""Moments, RunningMoments, `fold` and what looks at no array, for the fuzz test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastbn
from fastbn import fold as folding

from .arrays import draw
from .calls import COMMON, Arguments
from .judge import DOCUMENTED, Judge, Truth, Wrong, near
from .kinds import ODD, RIGHT, UNKNOWN, WRONG, Given, Maker, data, dtype_of, vector
from .words import BACKEND, HUGE, JUNK, THREADS, Words, axis_of, scalar

GROUPS = Words(((1, 1),), ((True, 1), (np.int64(1), 1)), (0, -1, 7, HUGE, 1.5, "1", *JUNK))
DDOF = Words(((0, 0), (1, 1)), ((0.5, 0.5), (True, 1), (np.int64(1), 1)), ("1", math.nan, *JUNK))
COUNT = Words(
    ((8, 8), (np.int64(8), 8)),
    ((np.int32(2**30), 2**30), (np.uint8(200), 200), (8.0, 8)),
    (-1, 0.5, "8", math.nan, *JUNK),
)
SHAPE = Words(
    (((2, 3, 4), 0), ([2, 3], 0)),
    ((np.array([2, 3]), 0), ((2, HUGE), 0)),
    ((), (3,), (2, -1), (2, 0), 5, "23", *(junk for junk in JUNK if type(junk) is not list)),
)
DTYPE = Words((("float32", 0), ("float16", 0), (np.float64, 0)), (), ("int8", 5, "x", [], ">f4", object(), 1j))


def fold(judge: Judge, make: Maker) -> None:
    rng, C = make.rng, make.rng.choice((1, 3, 8))
    bn = fastbn.BatchNorm(C, dtype=rng.choice(("float32", "float64")))
    bn.running_mean[:], bn.gamma[:] = draw(rng, (C,)), draw(rng, (C,), 1.0)
    odd = rng.choice(("", "bn", "weight", "bias", "groups", "transposed"))
    shape = rng.choice(((C, 5), (C, 2, 3, 3), (C, 4, 3)))
    dtype = dtype_of(make, judge.dtypes)
    layer = (
        Given("bn", bn) if odd != "bn" else Given("bn", value := rng.choice(JUNK), None, type(value).__name__, WRONG)
    )
    weight = data(make, "weight", draw(rng, shape), dtype, 0, odd == "weight")
    bias = (
        vector(make, "bias", draw(rng, (C,)), dtype, odd == "bias")
        if rng.random() < 0.6 or odd == "bias"
        else Given("bias", None)
    )
    groups = scalar(make, "groups", GROUPS, odd == "groups")
    transposed = Given("transposed", False)
    if odd == "transposed":
        transposed = Given("transposed", value := rng.choice(JUNK[1:]), None, type(value).__name__, UNKNOWN)

    def right(result: Any) -> Iterator[Wrong | None]:
        scale = bn.gamma.astype(float) / np.sqrt(1.0 + bn.eps)
        shift = ((0.0 if bias.wide is None else bias.wide) - bn.running_mean.astype(float)) * scale
        along = (C, *(1,) * (len(shape) - 1))
        for name, got, want in (("weight", result[0], weight.wide * scale.reshape(along)), ("bias", result[1], shift)):
            bad = near(
                "y", dtype, got if isinstance(got, np.ndarray) else np.asarray(got), want, np.maximum(1.0, np.abs(want))
            )
            yield bad and bad._replace(outcome=bad.outcome.replace("y", name, 1))

    given = [layer, weight, bias, transposed, groups]
    judge.call("fold", given, lambda: folding.fold(*(one.value for one in given)), right)


def running_moments(judge: Judge, make: Maker) -> None:
    """Two chunks, a merge, and what is asked of them."""
    rng = make.rng
    a = Arguments(judge, make, COMMON[:-1])
    x, axis = a.x(), a.axis_()
    options = a.options()
    options.pop("stream", None)
    a.given = [one for one in a.given if one.name != "stream"]
    wrong = rng.random() < 0.1
    features = Given("num_features", a.channels)
    if wrong:
        words = Words((), ((float(a.channels), None), (True, None)), (0, -1, HUGE, "3", a.channels + 1, *JUNK))
        features = scalar(make, "num_features", words, True)
        if (type(features.value) is int and features.value > 0) or features.status == ODD:
            features = features._replace(status=UNKNOWN)
    made: list[Any] = []

    def make_one() -> Any:
        made.append(fastbn.RunningMoments(features.value, axis.value, **options))
        return made[-1]

    late = [
        one._replace(status=UNKNOWN) if one.name in ("axis", "backend") and one.status != RIGHT else one
        for one in a.given[1:]
    ]
    # of 10**400 channels
    if judge.call("RunningMoments", [features, *late], make_one, allowed=(*DOCUMENTED, MemoryError)) is None:
        return
    seen = made[-1]
    truth = Truth(a.wide, a.axis) if a.known else None
    judge.extra = lambda: (seen.count, seen.mean.tobytes(), seen.moments.m2.tobytes())
    given = [features._replace(says=("channels",)), *a.given]
    done = judge.call(
        "RunningMoments.update",
        given,
        lambda: seen.update(x.value),
        lambda found: truth.moments(a.judged, found.moments) if truth else (),
    )
    if done is not None and truth is not None:
        _ask(judge, make, seen, a.judged, truth)


def _ask(judge: Judge, make: Maker, seen: Any, dtype: Any, truth: Truth) -> None:
    """merge, var, std, rstd of Moments, and merge of RunningMoments with what it should not."""
    rng, count = make.rng, truth.batch.count
    value = rng.choice((seen, seen.moments, *JUNK))
    good = value is seen or value is seen.moments
    other = Given("other", value, None, "" if good else type(value).__name__, RIGHT if good else WRONG, ("merge",))
    same = truth.batch._replace(count=2 * count)
    twice = Truth(truth.x, truth.axis)
    twice.batch = same
    judge.call(
        "RunningMoments.merge",
        [other],
        lambda: seen.merge(other.value),
        lambda found: twice.moments(dtype, found.moments),
    )
    ddof = scalar(make, "ddof", DDOF, rng.random() < 0.5)
    name = rng.choice(("var", "std"))
    judge.call(f"Moments.{name}", [ddof], lambda: getattr(seen, name)(ddof.value))


def by_hand(judge: Judge, make: Maker) -> None:
    """A Moments of numbers that somebody kept."""
    rng, C = make.rng, 3
    odd = rng.choice(("", "count", "mean", "m2"))
    legal = ("read-only", "own memory")  # the others: as they are used
    mean = vector(make, "mean", draw(rng, (C,)), "f8", odd == "mean", legal, False)
    m2 = vector(make, "m2", np.abs(draw(rng, (C,))), "f8", odd == "m2", legal, False)
    count = scalar(make, "count", COUNT, odd == "count")
    # a value, looked at when used
    given = [one._replace(status=UNKNOWN) if one.status == WRONG else one for one in (count, mean, m2)]
    m = judge.call("Moments", given, lambda: fastbn.Moments(count.value, mean.value, m2.value))
    if m is None:
        return
    again = [one._replace(says=("merge", "moments", "count", "mean", "m2")) for one in (count, mean, m2)]

    def right(found: Any) -> Iterator[Wrong | None]:
        total = 2 * count.wide
        yield None if found.count == total else Wrong("count is wrong", f"{found.count!r}, want {total}")
        yield near("mean", np.float64, np.asarray(found.mean), mean.wide, np.abs(mean.wide) + 1.0)
        yield near("var", np.float64, np.asarray(found.m2), 2.0 * m2.wide, np.abs(m2.wide) + 1.0)

    judge.call("Moments.merge", again, lambda: m.merge(m), right)
    judge.call(
        "Moments.var",
        again,
        lambda: m.var(),
        lambda var: [near("var", np.float64, np.asarray(var), m2.wide / count.wide, m2.wide + 1.0)],
    )


def explain(judge: Judge, make: Maker) -> None:
    rng = make.rng
    odd = rng.choice(("", "shape", "dtype", "axis", "backend"))
    shape = scalar(make, "shape", SHAPE, odd == "shape", says=("x",))
    dtype = scalar(make, "dtype", DTYPE, odd == "dtype")
    axis = axis_of(make, 1, len(shape.value) if shape.status == RIGHT else 2, odd == "axis")
    words = Words(((None, 0), ("cpu", 0), ("cuda", 0)), BACKEND.strange, BACKEND.wrong[1:])
    backend = scalar(make, "backend", words, odd == "backend")
    given = [shape, dtype, axis, backend]
    judge.call(
        "explain", given, lambda: fastbn.explain(shape.value, dtype.value, axis.value, backend=backend.value).text
    )


def set_num_threads(judge: Judge, make: Maker) -> None:
    number = scalar(make, "num_threads", THREADS, make.rng.random() < 0.7)
    judge.extra = fastbn.get_num_threads
    try:
        judge.call("set_num_threads", [number], lambda: fastbn.set_num_threads(number.value))
    finally:
        fastbn.set_num_threads(None)


CALLS: dict[Callable[[Judge, Maker], None], int] = {
    fold: 4,
    running_moments: 5,
    by_hand: 4,
    explain: 2,
    set_num_threads: 1,
}
