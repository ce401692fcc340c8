"""How a call is timed beside libraries that keep threads of their own, and whether other processes were in the way."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

REST_SECONDS = 5e-3  # a library's threads spin for up to 10 ms after a call and take a processor from the next one's
RESTS = 40  # enough for any of them; a thread that never rests is not waited for
# a library's own threads take a while to wake: its first calls after a rest cost up to three times the later ones
WARM_SECONDS = 20e-3
SAMPLE_SECONDS = 1e-3  # calls shorter than this are timed several at a time
TURN_SECONDS = 10e-3  # of timed calls
SAMPLES = 5
# processors short, from which on PyTorch's spinning threads wait for each other 10 to 1000 times as long as they work
CROWD = 0.5


def rest() -> None:
    """Sleep until no thread of this process computes."""
    for _ in range(RESTS):
        before = time.process_time()
        time.sleep(REST_SECONDS)
        if time.process_time() - before < REST_SECONDS / 10:
            return


def _warm(call: Callable[[], object]) -> float:
    """Call for a while; seconds per call."""
    start, number = time.perf_counter(), 0
    while number == 0 or time.perf_counter() < start + WARM_SECONDS:
        call()
        number += 1
    return (time.perf_counter() - start) / number


def turn(call: Callable[[], object]) -> float:
    """Seconds per call, after a rest and a warm-up: the median of up to five samples."""
    rest()
    each = _warm(call)
    batch = math.ceil(SAMPLE_SECONDS / each)
    samples = []
    for _ in range(max(1, min(SAMPLES, int(TURN_SECONDS / (batch * each))))):
        start = time.perf_counter()
        for _ in range(batch):
            call()
        samples.append((time.perf_counter() - start) / batch)
    return statistics.median(samples)


def others() -> float | None:
    """Processor seconds that all processes but this one have used since the start of the system.

    None where it does not tell.
    """
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    own = os.times()
    # all but idle and iowait
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def crowded(before: float | None, seconds: float, threads: int) -> str | None:
    """Say by how much the processors fell short since `before`.

    None where there were enough, or the system does not tell.
    """
    after = others()
    if before is None or after is None:
        return None
    used, there = (after - before) / seconds, os.cpu_count() or 1
    if used + threads <= there + CROWD:
        return None
    return (
        f"other processes used {used:.1f} of {there} processors meanwhile: these timings mean little, repeat them on a "
        "quiet machine"
    )
