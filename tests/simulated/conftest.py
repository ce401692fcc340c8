"""Tests in a process of their own, in numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1): `tests/test_simulator.py` runs them."""

import threading
from typing import Any

import numpy as np
import pytest
from numba.cuda.simulator import kernel as simulator

from fastbn.backends import grids, views
from fastbn.kernels.cuda import _gpu, _simulated

THREADS, WARP = 8, 4  # each thread of the simulator is one of Python's


def _run(manager: Any, grid_point: Any, *arguments: Any) -> None:
    """A block: all threads at once, a barrier where they wait for each other; numba's own polls them, and takes thirty times as long."""
    manager.barrier = threading.Barrier(int(np.prod(manager._block_dim)))
    points = np.ndindex(*manager._block_dim)
    threads = [simulator.BlockThread(lambda: manager._f(*arguments), manager, grid_point, point, manager._debug) for point in points]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [thread.exception for thread in threads if thread.exception]
    found.sort(key=lambda exception: isinstance(exception[0], threading.BrokenBarrierError))  # who broke it first
    if found:
        raise found[0][0].with_traceback(found[0][1])


def _wait(thread: Any) -> None:
    thread._manager.barrier.wait(60)


_plain = simulator.BlockThread.run


def _guarded(thread: Any) -> None:
    _plain(thread)
    if thread.exception:
        thread._manager.barrier.abort()


simulator.BlockManager.run = _run
simulator.BlockThread.syncthreads = _wait
simulator.BlockThread.run = _guarded


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and warps of a few threads and parts of a few values, so that small arrays take every branch."""
    views._sized.cache_clear()
    views._sized_for.cache_clear()
    views._flat.cache_clear()
    for module in (grids, _simulated, _gpu):
        monkeypatch.setattr(module, "WARP", WARP)
    for name, value in {"THREADS": THREADS, "DEEP": 1, "FULL": 6, "SHORT": 16, "SMALL": 40}.items():
        monkeypatch.setattr(grids, name, value)
