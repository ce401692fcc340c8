"""set_num_threads and limits of a call: for one Python thread, restored, the same bits, numba's own number untouched."""

import threading
import time

import limits  # noqa: F401 # the scenes of four threads
import numba
import numpy as np
import pytest
from processes import Run, compiled, play

import fastbn
from fastbn.threads import limited

MOST = numba.config.NUMBA_NUM_THREADS


@pytest.fixture(autouse=True)
def unlimited():
    yield
    fastbn.set_num_threads(None)


@pytest.mark.parametrize("given", [0, -1, MOST + 1, np.int64(MOST + 5)])
def test_out_of_range(given: int) -> None:
    for call in (fastbn.set_num_threads, limited):
        with pytest.raises(ValueError, match=rf"^num_threads: given {given}, want 1 to {MOST}, .*NUMBA_NUM_THREADS"):
            call(given)


@pytest.mark.parametrize("given", [True, False, np.bool_(True), 1.0, "2", b"1", [1], np.ones(1), object])
def test_not_a_number(given: object) -> None:
    for call in (fastbn.set_num_threads, limited):
        with pytest.raises(TypeError, match=r"^num_threads: given .*, want a whole number, or None"):
            call(given)
    assert fastbn.get_num_threads() == numba.get_num_threads()


@pytest.mark.parametrize("given", [1, MOST, np.int32(1), np.uint8(MOST)])
def test_set_and_get(given: int) -> None:
    fastbn.set_num_threads(given)
    assert fastbn.get_num_threads() == given
    assert type(fastbn.get_num_threads()) is int
    fastbn.set_num_threads(None)
    assert fastbn.get_num_threads() == numba.get_num_threads()


def test_limited_is_restored_also_after_an_error() -> None:
    fastbn.set_num_threads(MOST)
    with limited(1):
        assert fastbn.get_num_threads() == 1
        with limited(None):
            assert fastbn.get_num_threads() == 1
        with limited(MOST):
            assert fastbn.get_num_threads() == MOST
        assert fastbn.get_num_threads() == 1
    assert fastbn.get_num_threads() == MOST
    fastbn.set_num_threads(1)
    with pytest.raises(KeyError), limited(MOST):
        raise KeyError
    assert fastbn.get_num_threads() == 1


def test_each_python_thread_has_its_own() -> None:
    seen = []

    def other() -> None:
        seen.append(fastbn.get_num_threads())
        fastbn.set_num_threads(1)
        seen.append(fastbn.get_num_threads())

    fastbn.set_num_threads(1 if MOST > 1 else None)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [MOST, 1]
    fastbn.set_num_threads(MOST)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert fastbn.get_num_threads() == MOST


@compiled
@pytest.mark.process
@pytest.mark.parametrize("layer", ["tbb"], indirect=True)
def test_limits_of_four_threads(run: Run, layer: str) -> None:
    """They take effect, and leave numba's own number as it was."""
    play(run, "four threads", layer, NUMBA_NUM_THREADS="4")


@pytest.mark.alone
def test_asking_is_cheap() -> None:
    """Below half a microsecond by far, of a parallel call's ten: what is bounded here is a wrong order of magnitude."""
    from fastbn import threads

    def seconds(call, *arguments) -> float:
        def once() -> float:
            start = time.perf_counter()
            for _ in range(2000):
                call(*arguments)
            return (time.perf_counter() - start) / 2000

        return min(once() for _ in range(10))

    threads.count()  # which decides
    assert seconds(threads.count) < 5e-6
    assert seconds(limited, None) < 5e-6
