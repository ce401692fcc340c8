"""What a script of `processes.run` begins with, in the process that it tests and in that process's children."""

import hashlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import hidden  # noqa: F401 # before fastbn
import numpy as np
from launch import at_once

import fastbn
from fastbn.cpu import pool, threads

SHAPES = ((4, 16, 64, 64), (6000, 70))  # 1 MB and 1.6 MB: over config.SERIAL_BYTES by far, both layouts
_drawn = [np.random.default_rng(0).normal(5, 2, shape).astype(np.float32) for shape in SHAPES]
_dy = [np.random.default_rng(1).normal(size=shape).astype(np.float32) for shape in SHAPES]


def call() -> str:
    """A digest of all that a forward and a backward give."""
    digest = hashlib.sha256()
    for x, dy in zip(_drawn, _dy, strict=True):
        y, m = fastbn.batch_norm(x)
        for array in (y, m.mean, m.m2, *fastbn.batch_norm_backward(dy, x, m)):
            digest.update(array.tobytes())
    return digest.hexdigest()


WANT = os.environ.get("WANT", "")


def right(times: int = 3, threads: int = 0) -> bool:
    """Whether calls give the parent's bits, from so many Python threads at once, or from this one."""
    results: list[bool] = []

    def work() -> None:
        results.extend(call() == WANT for _ in range(times))

    if threads:
        at_once([work] * threads)
    else:
        work()
    return all(results) and len(results) == times * max(1, threads)


def how() -> str:
    """The layer, and which kernels run."""
    return f"{pool.layer()} {'parallel' if threads.parallel() else 'serial'}"


@contextmanager
def beside(work: Callable[[], object], threads: int = 1) -> Iterator[None]:
    """Within it, other threads do some work again and again."""
    ended = threading.Event()

    def busy() -> None:
        while not ended.is_set():
            work()

    workers = [threading.Thread(target=busy) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        ended.set()
        for worker in workers:
            worker.join()


def in_child(work: Callable[[], object]) -> str:
    """What a forked child's `work` returns, as text, or how it ended; it has 100 s."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(100)
        try:
            os.write(writing, str(work()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        answer = said.read()
    status = os.waitpid(child, 0)[1]
    return answer if os.WIFEXITED(status) else f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
