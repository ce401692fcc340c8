"""Batches that are spread over ranks, and what a rank notes and expects: shared by the checks that ranks.py runs."""

import copy
import hashlib
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from shapes import COMPACT, parameter_dtype

import fastbn

SECONDS = 100  # an engine that waits longer has been left hanging
EPS = 1e-5


class Case(NamedTuple):
    shares: tuple[int, ...]  # of the batch axis, by rank; of as many ranks as there are
    rest: tuple[int, ...]  # the shape behind it, channels first
    dtype: str = "float32"
    offset: float = 0.0
    axis: int = 1
    layout: str = "C"


CASES = {
    "uneven": Case((3, 1, 5, 2), (5, 7)),
    "offset 1e2": Case((3, 1, 5, 2), (5, 7), offset=1e2),
    "offset 1e4": Case((3, 1, 5, 2), (5, 7), offset=1e4),
    "offset 1e6": Case((3, 1, 5, 2), (5, 7), offset=1e6),
    "an empty rank": Case((3, 0, 5, 2), (5, 7), offset=1e2),
    "rank 0 empty": Case((0, 2, 3, 1), (5, 7), offset=1e2),
    "one value per channel per rank": Case((1, 1, 1, 1), (6,), offset=1e2),
    "one value, and none": Case((1, 0, 1, 0), (6,), offset=1e2),
    "all on one rank": Case((0, 0, 9, 0), (6,)),
    "channels last": Case((3, 1, 5, 2), (6, 4, 4), offset=1e2, layout="channels_last"),
    "axis 0": Case((3, 1, 5, 2), (6, 4), offset=1e2, axis=0),
    "axis -1": Case((3, 1, 5, 2), (4, 6), offset=1e2, axis=-1),
    "one channel": Case((3, 1, 5, 2), (1, 9), offset=1e2),
    "float64": Case((3, 0, 5, 2), (5, 7), "float64", 1e4),
    "float16": Case((3, 0, 5, 2), (5, 7), "float16", 8.0),
    "bfloat16": Case((3, 1, 5, 2), (5, 7), "bfloat16", 8.0),
}


class Batch(NamedTuple):
    x: np.ndarray  # of all ranks
    dy: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    parts: list[tuple[slice, ...]]
    axis: int

    def part(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """One rank's x and dy, in the memory order of the whole."""
        # of two
        return tuple(copy.copy(array[self.parts[rank]]) for array in (self.x, self.dy))  # type: ignore[return-value]


def batch(case: Case, ranks: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    shares = case.shares[:ranks]
    shape = [sum(shares), *case.rest]
    if case.axis == 0:
        shape[:2] = shape[1::-1]
    channels, along = shape[case.axis], 1 if case.axis == 0 else 0
    kind = parameter_dtype(case.dtype)
    x, dy = (COMPACT[case.layout](rng.normal(at, 2, shape).astype(case.dtype), case.axis) for at in (case.offset, 0))
    gamma, beta = rng.normal(1, 0.3, channels).astype(kind), rng.normal(0, 0.3, channels).astype(kind)
    ends = np.cumsum([0, *shares])
    parts = [(slice(None),) * along + (slice(a, b),) for a, b in itertools.pairwise(ends)]
    return Batch(x, dy, gamma, beta, parts, case.axis)


def layer(given: Batch, comm: Any, **options: Any) -> fastbn.BatchNorm:
    bn = fastbn.BatchNorm(given.gamma.size, axis=given.axis, dtype=given.gamma.dtype, comm=comm, **options)
    bn.gamma, bn.beta = given.gamma.copy(), given.beta.copy()
    return bn


def warm(ranks: int) -> None:
    """Compile what the ranks will need, once for all of them: as they do it, in one process without a communicator."""
    for case in CASES.values():
        given = batch(case, ranks)
        m = fastbn.moments(given.x, given.axis)
        bn = layer(given, None)
        bn(given.x), bn.backward(given.dy)
        for x, dy in map(given.part, range(ranks)):
            mean, var = fastbn.moments(x, given.axis).mean, m.var()
            fastbn.batch_norm_inference(x, mean, var, given.gamma, given.beta, given.axis)
            sums = fastbn.batch_norm_backward_reduce(dy, x, mean, var, given.axis)
            fastbn.batch_norm_backward_input(dy, x, mean, var, *sums, m.count, given.gamma, given.axis)


class Ranks:
    """One rank, its communicator, and what it has done so far."""

    def __init__(self, comm: Any, rank: int, size: int) -> None:
        self.comm, self.rank, self.size = comm, rank, size
        self.bits: dict[str, str] = {}
        self.did: list[str] = []

    def same(self, name: str, *arrays: Any) -> None:
        """Note arrays that must be the same bits on every rank."""
        assert name not in self.bits
        self.bits[name] = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()

    @contextmanager
    def fails(self, kind: type[Exception], *words: str, on: int | None = None) -> Iterator[None]:
        """An error, at once, on every rank; with `on`, of this kind on that rank and a RuntimeError that names the rank
        on all others.
        """
        start = time.monotonic()
        if on is not None and on != self.rank:
            kind, words = RuntimeError, (f"rank {on} of {self.size} raised",)
        try:
            yield
        except kind as error:
            for word in words:
                assert word in str(error), f"{word!r} is not in {error!r}"
        else:
            raise AssertionError(f"no error, want {kind.__name__} with {words}, on rank {on}")
        assert time.monotonic() - start < SECONDS / 2
