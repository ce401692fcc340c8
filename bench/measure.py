"""Contestants timed by turns, and a record per shape and pass: medians, and ratios paired within a round.

Of fastbn, its peers and the limit, or of several numbers of threads.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numba

import fastbn
from bench import limit
from bench.contestants import disagreement, field
from bench.problem import Problem, own
from fastbn.cli import timing

Record = dict[str, Any]
HALF = ("float16", "bfloat16")
LEAST, MOST = 3, 15  # rounds
SLOW = 3.0  # times the fastest of its class, from which on a contestant drops out after the least number of rounds


def leave(times: Mapping[str, Sequence[float]], classes: Sequence[Collection[str]]) -> set[str]:
    """The contestants that are so much slower than the fastest of their class that more rounds would tell nothing."""
    slow = set()
    for members in classes:
        medians = {name: statistics.median(times[name]) for name in members}
        slow |= {name for name, value in medians.items() if value > SLOW * min(medians.values())}
    return slow


def rounds(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    classes: Sequence[Collection[str]] = (),
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one value per round; whoever dropped out has the first rounds only.

    Parameters
    ----------
    calls : mapping of str to callable
        The contestants; each round runs them in another order.
    seconds : float
        Time after which no further round begins.
    classes : sequence of collections of str
        Within each, a contestant much slower than the fastest drops out after three rounds.
    before : mapping of str to callable, optional
        Run before each turn of that contestant.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    live, order, number = list(calls), random.Random(0), 0
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        while number < LEAST or (number < MOST and time.perf_counter() - start < seconds):
            order.shuffle(live)
            for name in live:
                if before and name in before:
                    before[name]()
                times[name].append(timing.turn(calls[name]))
            number += 1
            if number == LEAST:
                slow = leave(times, classes)
                live = [name for name in live if name not in slow]
    finally:
        gc.enable()
    return times


def paired(times: Sequence[float], by: Sequence[float]) -> float:
    """Median over the rounds that both ran in of times / by."""
    return statistics.median(a / b for a, b in zip(times, by, strict=False))


class Crowd:
    """How busy other processes kept the processors while calls were timed."""

    def __init__(self) -> None:
        self.seconds = self.used = 0.0

    def watch(self, run: Callable[[], Any]) -> Any:
        """Run, and add what others used meanwhile."""
        before, start = timing.others(), time.perf_counter()
        result = run()
        after = timing.others()
        self.seconds += time.perf_counter() - start
        self.used += (after or 0.0) - (before or 0.0)
        return result

    def doubt(self, threads: int) -> str | None:
        """Why the timings mean little; None where they do."""
        now = timing.others()
        if now is None or not self.seconds:
            return None
        return timing.crowded(now - self.used, self.seconds, threads)


def _head(p: Problem, what: str) -> Record:
    return {"shape": p.name, "group": p.case.group, "bytes": p.x.nbytes, "pass": what}


def _medians(times: Mapping[str, Sequence[float]], members: Sequence[str]) -> dict[str, float]:
    return {name: statistics.median(times[name]) for name in members}


def beside_peers(
    name: str, dtype: str, passes: Sequence[str], peers: Sequence[str], seconds: float, threads: int, crowd: Crowd
) -> list[Record]:
    """The passes on one shape beside the peers and the limit; half precision also beside fastbn's own float32."""
    p = Problem(name, dtype)
    single = Problem(name, "float32") if dtype in HALF else None
    records = []
    for what in passes:
        calls, refused = field(p, what, peers)
        rivals = [peer for peer in calls if peer != "fastbn"]
        if single is not None:
            calls["fastbn float32"] = own(single, what)
        limits = limit.calls(p, what, threads)
        runs = {**{peer: call.run for peer, call in calls.items()}, **limits}
        times = crowd.watch(partial(rounds, runs, seconds, [members for members in (rivals, limits) if members]))
        records.append({**_head(p, what), **summary(times, rivals, list(limits)), "refused": refused})
    return records


def summary(times: Mapping[str, Sequence[float]], rivals: Sequence[str], limits: Sequence[str]) -> Record:
    """Medians, each peer's paired ratio to fastbn, the fastest peer, and fastbn's ratio to the limit."""
    ratios = {peer: paired(times[peer], times["fastbn"]) for peer in rivals}
    fastest = min(ratios, key=lambda peer: ratios[peer], default=None)
    bounds = _medians(times, limits)
    best = min(bounds, key=lambda bound: bounds[bound])
    record = {
        "seconds": _medians(times, [name for name in times if name not in limits]),
        "limits": bounds,
        "rounds": {name: len(values) for name, values in times.items()},
        "ratios": ratios,
        "fastest": fastest,
        "ratio": None if fastest is None else ratios[fastest],
        "limit": best,
        "times_limit": paired(times["fastbn"], times[best]),
    }
    if "fastbn float32" in times:
        record["float32"] = paired(times["fastbn float32"], times["fastbn"])
    return record


def scaling(
    name: str, dtype: str, passes: Sequence[str], seconds: float, counts: Sequence[int], crowd: Crowd
) -> list[Record]:
    """The passes on one shape at several numbers of threads: medians, and the ratios of one thread's time to each."""
    p = Problem(name, dtype)
    records = []
    for what in passes:
        call = own(p, what)
        expected = [a.copy() for a in call.read(call.run())]
        before = {str(count): partial(fastbn.set_num_threads, count) for count in counts}
        for prepare in before.values():
            prepare()
            wrong = disagreement(call, expected, dtype, p.count)
            if wrong:
                raise AssertionError(f"{name}, {what}: {wrong}")
        times = crowd.watch(partial(rounds, dict.fromkeys(before, call.run), seconds, before=before))
        fastbn.set_num_threads(None)
        one = times[str(counts[0])]
        speedups = {count: paired(one, values) for count, values in times.items()}
        records.append({**_head(p, what), "seconds": _medians(times, list(times)), "speedup": speedups})
    return records


def thread_counts(most: int | None = None) -> list[int]:
    """1, 2, 4, 8 and 16, as many as there are."""
    most = most or int(numba.config.NUMBA_NUM_THREADS)
    return [count for count in (1, 2, 4, 8, 16) if count <= most]
