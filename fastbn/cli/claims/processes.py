"""Runs in processes of their own, each on one thread."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import connection
from typing import Any

from fastbn.cli.claims import noise, serving, shift, sweeps
from fastbn.cli.claims.runs import Measure, Result, Run
from fastbn.cli.train import training
from fastbn.cli.train.data import Dataset
from fastbn.cpu import interrupts

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
        processes = {}
        for _ in range(min(PROCESSES, len(waiting))):
            pipe, process = stack.enter_context(_process())
            processes[pipe] = process
        for pipe in processes:
            going[pipe] = (waiting.pop(), 0)
            with _ended(processes[pipe]):
                pipe.send(data)
                pipe.send(going[pipe][0])
        while going:
            ready: list[Any] = connection.wait(list(going))
            for pipe in ready:
                run, _ = going[pipe]
                with _ended(processes[pipe]):
                    message = pipe.recv()
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, int):
                    going[pipe] = (run, message)
                else:
                    done += run.steps
                    del going[pipe]
                    if waiting:
                        going[pipe] = (waiting.pop(), 0)
                        with _ended(processes[pipe]):
                            pipe.send(going[pipe][0])
                    yield run, message
                report(done + sum(steps for _, steps in going.values()))


@contextmanager
def _ended(process: Any) -> Iterator[None]:
    """Say why a process is no longer there."""
    try:
        yield
    except (EOFError, ConnectionError):
        process.join()
        how = f"with exit code {process.exitcode}, see above"
        if process.exitcode < 0:
            how = f"by signal {-process.exitcode}" + " (by the system, where memory ran out?)" * (
                process.exitcode == -9
            )
        raise OSError(
            f"a process that trains was ended {how}; the same command goes on with what is not done yet"
        ) from None


@contextmanager
def _process() -> Iterator[tuple[Any, Any]]:
    """A pipe to a new process, and that: the data and then runs go in, steps and results come out."""
    context = multiprocessing.get_context("spawn")  # nothing of this process's threads may be copied
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there,), name="fastbn-claims", daemon=True)
    try:
        with interrupts.deferred(), _held_back():
            process.start()
        there.close()
        yield here, process
    finally:
        if process.pid is not None:
            process.terminate()
            process.join()
        here.close()


@contextmanager
def _held_back() -> Iterator[None]:
    """Ctrl-C, which reaches every process of a terminal, for the process that is made in here.

    It takes over that this is held back, until it ignores it: its imports would end in a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # which lets go of it where it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    said = time.monotonic()

    def report(step: int) -> None:
        nonlocal said
        if time.monotonic() - said > REPORT_SECONDS:
            said = time.monotonic()
            pipe.send(step)

    try:
        with training.one_blas_thread():
            inputs = training.Inputs(pipe.recv())
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
