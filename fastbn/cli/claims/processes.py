"""Runs in processes of their own, each on one thread."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from typing import Any

from fastbn.cli.claims import noise, serving, shift, sweeps
from fastbn.cli.claims.runs import Measure, Result, Run
from fastbn.cli.train import training
from fastbn.cli.train.data import Dataset

PROCESSES = 2
REPORT_SECONDS = 0.2

MEASURES: dict[str, Measure] = {
    "accuracy": sweeps.measure,
    "shift": shift.measure,
    "noise": noise.measure_noise,
    "gap": noise.measure_gap,
    "test": serving.measure,
}


def results(runs: Sequence[Run], data: Dataset, report: Callable[[int], object]) -> Iterator[tuple[Run, Result]]:
    """Each run with its result, in the order in which they end; `report(steps of all so far)`.

    Leaving the loop, by an interrupt too, ends the processes.
    """
    # the longest first, so that none is left alone at the end
    waiting = sorted(runs, key=lambda run: run.steps * run.hidden * run.batch * (1 + run.batch_norm))
    done, going = 0, dict[Any, tuple[Run, int]]()  # by pipe, with the steps so far
    with ExitStack() as stack:
        for _ in range(min(PROCESSES, len(waiting))):
            pipe = stack.enter_context(_process(data))
            going[pipe] = (waiting.pop(), 0)
            pipe.send(going[pipe][0])
        while going:
            ready: list[Any] = connection.wait(list(going))
            for pipe in ready:
                run, _ = going[pipe]
                message = _receive(pipe)
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, int):
                    going[pipe] = (run, message)
                else:
                    done += run.steps
                    del going[pipe]
                    if waiting:
                        going[pipe] = (waiting.pop(), 0)
                        pipe.send(going[pipe][0])
                    yield run, message
                report(done + sum(steps for _, steps in going.values()))


def _receive(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise OSError(
            "a process that trains was ended from outside (by the system, where memory ran out); the same command goes "
            "on with what is not done yet"
        ) from None


@contextmanager
def _process(data: Dataset) -> Iterator[Any]:
    """A pipe to a new process: runs go in, steps and results come out."""
    context = multiprocessing.get_context("spawn")  # nothing of this process's threads may be copied
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, data), name="fastbn-claims", daemon=True)
    with _without_interrupts():
        process.start()
    there.close()
    try:
        yield here
    finally:
        process.terminate()
        process.join()
        here.close()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of a terminal, and a new one takes over that it is ignored: this one ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    way = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, way)


def _work(pipe: Any, data: Dataset) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where that isn't taken over
    said = time.monotonic()

    def report(step: int) -> None:
        nonlocal said
        if time.monotonic() - said > REPORT_SECONDS:
            said = time.monotonic()
            pipe.send(step)

    try:
        with training.one_blas_thread():
            inputs = training.Inputs(data)
            while True:
                pipe.send(measured(pipe.recv(), inputs, report))
    except (EOFError, ConnectionError):  # the other end is gone
        pass
    except Exception as error:
        pipe.send(error)


def measured(run: Run, inputs: training.Inputs, report: Callable[[int], object]) -> Result:
    """The result of a run, with the seconds of processor time that it took."""
    start = time.thread_time()
    found = MEASURES[run.measure](run, inputs, report)
    return {**found, "seconds": round(time.thread_time() - start, 2)}
