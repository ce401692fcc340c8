"""How `bench.gpu` times: CUDA events around several calls, contestants by turns, medians of paired ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from bench.gpu_problem import Call, Problem

ROUNDS = 5
BATCH_SECONDS = 2e-3  # of calls between two events
HOST_CALLS = 300

PEERS = ("PyTorch cuDNN", "PyTorch native", "torch.compile")


def contestants(problem: Problem, what: str, compiled: bool) -> dict[str, Callable[[], Call]]:
    """Who takes part in a pass, fastbn first, and how each call is made, which may raise.

    PyTorch's backward runs a forward for it.
    """
    torch = problem.torch
    found: dict[str, Callable[[], Call]] = {"fastbn": lambda: problem.fastbn(what)}
    plain = torch.nn.functional.batch_norm
    if what == "moments":
        return {**found, "PyTorch native": lambda: problem.pytorch(what, plain)}
    found["PyTorch cuDNN"] = lambda: problem.pytorch(what, plain)
    found["PyTorch native"] = lambda: _without_cudnn(torch, lambda: problem.pytorch(what, plain))
    if compiled:
        found["torch.compile"] = lambda: problem.pytorch(what, torch.compile(plain, dynamic=False))
    return found


def _without_cudnn(torch: Any, build: Callable[[], Call]) -> Call:
    def run(k: int) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return call(k)

    with torch.backends.cudnn.flags(enabled=False):
        call = build()
    return run


def _batch(torch: Any, call: Call, sets: int, number: int) -> float:
    """Seconds per call of so many, on rotating sets."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(number):
        call(i % sets)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / number


def said(error: Exception) -> str:
    """An error in a record: its type and the beginning of its words, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def released(torch: Any) -> None:
    """What is done, or failed, gives its memory back; a device that is gone refuses that too."""
    gc.collect()
    with suppress(Exception):
        torch.cuda.empty_cache()


def ready(torch: Any, builds: Mapping[str, Callable[[], Call]]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that run, and why each of the others can't be timed."""
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for who, build in builds.items():
        if isinstance(found := _tried(torch, build), str):
            refused[who] = found
            released(torch)
        else:
            calls[who] = found
    return calls, refused


def _tried(torch: Any, build: Callable[[], Call]) -> Call | str:
    """A call that runs, or why it does not."""
    try:
        call = build()
        for k in range(2):
            call(k)
        torch.cuda.synchronize()
    except Exception as error:
        return said(error)
    return call


def record(name: str, what: str, problem: Problem, compiled: bool) -> dict[str, Any]:
    """Everyone's time for a pass, as ratios paired within a round, and fastbn's bandwidth beside the copy's."""
    torch = problem.torch
    calls, refused = ready(torch, contestants(problem, what, compiled))
    if "fastbn" in refused:
        raise RuntimeError(f"fastbn fails at {name} {problem.dtype} {what}: {refused['fastbn']}")
    calls["copy"] = problem.copy
    try:
        each = _by_turns(torch, calls, refused, problem.sets, dict.fromkeys(calls, 3))
        number = {who: max(3, int(BATCH_SECONDS / seconds)) for who, seconds in each.items()}
        rounds = [_by_turns(torch, calls, refused, problem.sets, number) for _ in range(ROUNDS)]
    except Exception as error:
        raise RuntimeError(
            f"fastbn or the copy fails at {name} {problem.dtype} {what}, timed: {said(error)}"
        ) from error
    return summed_up(name, what, problem, [{who: seconds[who] for who in calls} for seconds in rounds], refused)


def _by_turns(
    torch: Any, calls: dict[str, Call], refused: dict[str, str], sets: int, number: Mapping[str, int]
) -> dict[str, float]:
    """Seconds per call of each. A peer that raises is left out from then on.

    What fastbn raises, or the copy, goes to the caller.
    """
    found = {}
    for who in list(calls):
        try:
            found[who] = _batch(torch, calls[who], sets, number[who])
        except Exception as error:
            if who not in PEERS:
                raise
            refused[who] = said(error)
        if who in refused:
            del calls[who]
            released(torch)
    return found


def summed_up(
    name: str, what: str, problem: Any, rounds: list[Mapping[str, float]], refused: Mapping[str, str]
) -> dict[str, Any]:
    """The record of a pass from the seconds of each round."""

    def ratio(of: Callable[[Mapping[str, float]], float]) -> float:
        return statistics.median(of(seconds) for seconds in rounds)

    peers = {who: ratio(lambda s, w=who: s[w] / s["fastbn"]) for who in rounds[0] if who not in ("fastbn", "copy")}
    fastest = min(peers, key=lambda who: peers[who], default=None)
    moved = problem.moved(what)
    bandwidth = ratio(lambda s: (moved / s["fastbn"]) / (2 * problem.bytes / s["copy"]))
    return {
        "shape": name,
        "group": problem.case.group,
        "dtype": problem.dtype,
        "pass": what,
        "bytes": problem.bytes,
        "moved": moved,
        "seconds": {who: statistics.median(s[who] for s in rounds) for who in rounds[0]},
        "ratios": peers,
        "fastest": fastest,
        "ratio": None if fastest is None else peers[fastest],
        "of_copy": bandwidth,
        "refused": dict(refused),
    }


def host_microseconds(call: Call, torch: Any) -> float:
    """What a call takes of the host, the GPU's work left in its queue."""
    for k in range(20):
        call(k % 2)
    torch.cuda.synchronize()
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for k in range(HOST_CALLS // 5):
            call(k % 2)
        samples.append((time.perf_counter() - start) / (HOST_CALLS // 5))
        torch.cuda.synchronize()
    return statistics.median(samples) * 1e6
