"""One array and all that goes with it, the passes over it, and fastbn's own calls of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.typing import NDArray

import fastbn
from bench.suite import cases
from fastbn.arguments import checks, config
from fastbn.cli import explain

Array = NDArray[Any]

PASSES = ("forward", "backward", "inference", "moments")
EPS = config.EPS
OWN = "own"  # the group of what is not in the table


def case(name: str) -> cases.Case:
    """What a name of the table stands for, or one like it."""
    if name in cases.CASES:
        return cases.CASES[name]
    shape, last = explain.parsed(name)
    return cases.Case(shape, OWN, last)


def named(text: str) -> str:
    """The name of a shape, however it is typed: that of the table where it is there.

    Raises
    ------
    ValueError
        It is no shape, has fewer than two axes, or fewer than two values a channel.
    """
    shape, last = explain.parsed(text, "--shapes", f"; or {', '.join(cases.GROUPS)}, of the table")
    checks.check_axis(shape, 1, f"--shapes {text!r}")
    if math.prod(shape) < 2 * shape[1]:
        raise ValueError(f"--shapes: given {text!r}, want two values or more a channel: a variance needs two")
    return cases.name_of(shape) + (" last" if last and len(shape) > 2 else "")  # rows of channels have them last anyway


class Refused(Exception):
    """A peer has no such pass, or not on such an array; the message is reported."""


class Call(NamedTuple):
    """What is timed, and how to read its result."""

    run: Callable[[], Any]
    read: Callable[[Any], tuple[Array, ...]]  # the result of run as arrays of x's shape and of shape (C,)


Maker = Callable[[], Call]  # may raise: the peer is then reported, not timed


class Problem:
    """One array and all that goes with it: the same memory for every contestant, results too."""

    def __init__(self, name: str, dtype: str) -> None:
        self.name, self.dtype, self.case = name, dtype, case(name)
        self.x, self.dy = cases.array(self.case, dtype), cases.array(self.case, dtype, seed=1)
        self.gamma, self.beta = cases.parameters(self.case, dtype)
        self.moments = fastbn.moments(self.x)
        self.mean, self.var = (a.astype(self.gamma.dtype) for a in (self.moments.mean, self.moments.var()))
        self.rstd = self.moments.rstd(EPS).astype(self.gamma.dtype)
        self.out = cases.empty(self.case, dtype)
        self.out[...] = 0  # its pages exist before anybody is timed

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes of x but the channels'."""
        return (0, *range(2, self.x.ndim))

    @property
    def count(self) -> int:
        """Values per channel."""
        return self.x.size // self.gamma.size

    def shaped(self, values: Array) -> Array:
        """Per-channel values, shape (C,), to go beside x."""
        return values.reshape(1, -1, *(1 for _ in self.x.shape[2:]))

    def rows(self, array: Array) -> Array:
        """The same memory in its own order, C-contiguous: channels are the last axis of channels-last data."""
        view: Array = array.transpose(self.case.memory)
        return view


def first(result: Any) -> tuple[Array, ...]:
    """Reader of calls that return arrays, the first of which is wanted."""
    return (result[0],)


def own(p: Problem, what: str) -> Call:
    """fastbn's public function, with ``out=``."""
    if what == "forward":
        return Call(lambda: fastbn.batch_norm(p.x, p.gamma, p.beta, eps=EPS, out=p.out), first)
    if what == "backward":
        return Call(lambda: fastbn.batch_norm_backward(p.dy, p.x, p.moments, p.gamma, eps=EPS, out=p.out), tuple)
    if what == "inference":
        return Call(
            lambda: fastbn.batch_norm_inference(p.x, p.mean, p.var, p.gamma, p.beta, eps=EPS, out=p.out), lambda y: (y,)
        )
    return Call(lambda: fastbn.moments(p.x), lambda m: (m.mean, m.var()))
