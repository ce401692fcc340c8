"""Contestants by turns: rounds over all of them, ratios paired within a round."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from fastbn.cli import timing

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
