"""A layer whose ranks share a batch, one of them on the simulated GPU: ranks are threads, with a communicator made for
the purpose.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from launch import at_once

import fastbn
from fastbn import distributed
from tests.cuda.simulated import gpu

X = np.random.default_rng(0).normal(1e3, 2, (6, 3, 5)).astype(np.float32)
DY = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
PARTS = (slice(0, 4), slice(4, 6))  # rank 0's, on the GPU, and rank 1's, on the host


class Threads:
    """What joins two threads."""

    def __init__(self) -> None:
        self.barrier, self.here, self.sent = threading.Barrier(2, timeout=60), threading.local(), {}

    def place(self, comm: Any) -> tuple[int, int]:
        assert comm is self
        return self.here.rank, 2

    def gathering(self, comm: Any, row: np.ndarray, rows: np.ndarray) -> Callable[[], None]:
        def gather() -> None:
            self.sent[self.here.rank] = row.copy()
            self.barrier.wait()
            rows[:] = self.sent[0], self.sent[1]
            self.barrier.wait()

        return gather

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        found: dict[int, Any] = {}

        def rank(number: int) -> None:
            self.here.rank = number
            try:
                found[number] = work(number)
            except Exception as error:
                found[number] = error

        at_once([partial(rank, number) for number in range(2)])
        return [found[0], found[1]]


@pytest.fixture
def comm(monkeypatch: pytest.MonkeyPatch) -> Threads:
    threads = Threads()
    monkeypatch.setattr(distributed, "rank_and_size", threads.place)
    monkeypatch.setattr(distributed, "gathering", threads.gathering)
    return threads


def _layer(rank: int, comm: Any) -> fastbn.BatchNorm:
    bn = fastbn.BatchNorm(3, comm=comm, backend="reference" if rank else None)
    return bn if rank else bn.to("cuda", "numba")


def _there(rank: int, array: np.ndarray) -> Any:
    return array if rank else gpu.on_gpu(array)


def test_statistics_are_those_of_both(comm: Threads) -> None:
    def work(rank: int) -> tuple[Any, ...]:
        bn = _layer(rank, comm)
        y = bn(_there(rank, X[PARTS[rank]]))
        assert type(y) is type(_there(rank, X))
        return gpu.on_host(y), bn.state_dict(), bn.num_batches_tracked

    one = fastbn.BatchNorm(3, backend="reference")
    want = one(X)
    for (y, state, tracked), part in zip(comm.run(work), PARTS, strict=True):
        np.testing.assert_allclose(y, want[part], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state["running_mean"], one.running_mean, rtol=1e-6)
        np.testing.assert_allclose(state["running_var"], one.running_var, rtol=1e-6)
        assert tracked == 1


def test_an_error_on_the_gpu_is_one_on_both(comm: Threads) -> None:
    def work(rank: int) -> Any:
        bn = _layer(rank, comm)
        return bn(
            _there(rank, X[PARTS[rank]]), **({} if rank else {"out": gpu.on_gpu(np.empty((1, 3, 5), np.float32))})
        )

    here, there = comm.run(work)
    assert "out: given shape" in str(here)
    assert isinstance(there, RuntimeError)
    assert "rank 0 of 2 raised" in str(there)


def test_running_moments_are_reduced_on_the_host(comm: Threads) -> None:
    def work(rank: int) -> fastbn.Moments:
        return (
            fastbn.RunningMoments(3, backend="reference" if rank else None)
            .update(_there(rank, X[PARTS[rank]]))
            .reduce(comm)
            .moments
        )

    found, want = comm.run(work), fastbn.moments(X, backend="reference")
    for m in found:
        assert m.count == want.count
        np.testing.assert_allclose(m.mean, want.mean, rtol=1e-6)
        np.testing.assert_allclose(m.var(), want.var(), rtol=1e-6)
        assert m.mean.tobytes() + m.m2.tobytes() == found[0].mean.tobytes() + found[0].m2.tobytes()


def test_gradients_are_those_of_both(comm: Threads) -> None:
    def work(rank: int) -> tuple[Any, ...]:
        bn = _layer(rank, comm)
        bn(_there(rank, X[PARTS[rank]]))
        dx = bn.backward(_there(rank, DY[PARTS[rank]]))
        assert type(dx) is type(bn.dgamma) is type(_there(rank, X))
        return tuple(map(gpu.on_host, (dx, bn.dgamma, bn.dbeta)))

    one = fastbn.BatchNorm(3, backend="reference")
    one(X)
    want, found = one.backward(DY), comm.run(work)
    for (dx, _, dbeta), part in zip(found, PARTS, strict=True):
        np.testing.assert_allclose(dx, want[part], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dbeta, DY[part].sum((0, 2)), rtol=1e-5, atol=1e-5)
        assert dbeta.dtype == np.float32
    np.testing.assert_allclose(found[0][1] + found[1][1], one.dgamma, rtol=1e-4, atol=1e-4)
