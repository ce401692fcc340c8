"""Tests in a process of their own, in numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1): `tests/cuda/test_simulator.py`
runs them.
"""

from typing import Any

import greenlet
import numpy as np
import pytest
from numba.cuda.simulator import kernel as simulator

from fastbn.cuda import grids, launches
from fastbn.cuda.kernels import simulated
from tests import test_contract as contract
from tests.cuda.simulated import gpu

THREADS, WARP = 8, 4

contract.fastbn = gpu  # its calls are the same, on arrays of the GPU


class Thread:
    """What a kernel asks of its thread; barriers hand the turn on."""

    def __init__(self, manager: Any, grid_point: Any, point: Any) -> None:
        self._manager, self.blockIdx, self.threadIdx = manager, simulator.Dim3(*grid_point), simulator.Dim3(*point)
        self.block = greenlet.getcurrent()

    def syncthreads(self) -> None:
        self.block.switch(True)


def _run(manager: Any, grid_point: Any, *arguments: Any) -> None:
    """A block, its threads one after the other from barrier to barrier: numba's own poll each other, and take a hundred
    times as long.

    Behind each barrier they go in the other order, so that no result depends on it.
    """
    threads = []
    for point in np.ndindex(*manager._block_dim):
        threads.append(greenlet.greenlet(lambda: manager._f(*arguments)))
        threads[-1].kernel_thread = Thread(manager, grid_point, point)
    waiting = [True]
    while any(waiting):
        waiting = [bool(thread.switch()) for thread in threads]
        assert len(set(waiting)) == 1, "some threads of the block wait at a barrier, and others have ended"
        threads.reverse()


simulator.BlockManager.run = _run
simulated._mine = lambda: greenlet.getcurrent().kernel_thread


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and warps of a few threads and parts of a few values, so that small arrays take every branch."""
    launches.program.cache_clear()
    small = {
        "THREADS": THREADS,
        "WARP": WARP,
        "WAVE": 12,
        "DEEP": 1,
        "FULL": 6,
        "ENOUGH": 5,
        "SHORT": 8,
        "SMALL": 40,
        "TABLES": 40,
    }
    for name, value in small.items():
        monkeypatch.setattr(grids, name, value)
