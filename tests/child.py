"""What a script of `processes.run` begins with, in the process that it tests and in that process's children."""

import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable

import hidden  # noqa: F401 # before fastbn
import numpy as np

import fastbn
from fastbn import pool, threads

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

    if not threads:
        work()
        return all(results)
    barrier = threading.Barrier(threads)
    workers = [threading.Thread(target=lambda: (barrier.wait(), work())) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return all(results) and len(results) == threads * times


def in_child(work: Callable[[], object]) -> str:
    """What a forked child's `work` returns, or how it ended; it has 20 s."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(20)
        try:
            os.write(writing, str(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        answer = said.read()
    status = os.waitpid(child, 0)[1]
    return answer if os.WIFEXITED(status) else f"killed by {signal.Signals(os.WTERMSIG(status)).name}"


def how() -> str:
    """The layer, and which kernels run."""
    return f"{pool.layer()} {'parallel' if threads.parallel() else 'serial'}"
