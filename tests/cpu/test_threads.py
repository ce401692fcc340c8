"""set_num_threads and limits of a call: for one Python thread, restored, the same bits, numba's own number
untouched.
"""

import os
import sys
import threading
import time
import types
from importlib import metadata

import limits  # noqa: F401 # the scenes of four threads
import numba
import numpy as np
import pytest
from processes import Run, compiled, play

import fastbn
from fastbn.cpu import pool
from fastbn.cpu.threads import limited

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


def test_a_warning_points_past_fastbns_files_and_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of fastbn's, of PyTorch's that call a module, and of code that torch.compile made, and then the user's:
    this one.
    """
    call = pool._users_level
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__file__="/site/torch/__init__.py"))
    ours = f"{pool._OURS}torch{os.sep}modules.py"
    theirs = "/site/torch/nn/modules/module.py"
    made = [("<eval_with_key>.5", None), ("torchinductor/ab/cab.py", "torch._inductor.runtime.compile_tasks.cab")]
    frames = [
        (ours, "fastbn.torch.modules"),
        (ours, None),
        (theirs, "torch.nn"),
        *made,
        (theirs, "torch.nn"),
        ("<frozen runpy>", "runpy"),
    ]
    for level, (file, module) in enumerate(frames, 2):
        names = {"call": call, "__name__": module}
        exec(compile("def outer(): return call()", file, "exec"), names)
        call = names["outer"]
        assert call() == level
    assert pool._users_level() == 1
    names = {"call": call, "__name__": "__main__"}
    exec(compile("def outer(): return call()", "<stdin>", "exec"), names)  # at a prompt
    assert names["outer"]() == len(frames) + 1


@pytest.mark.parametrize(
    ("found", "remedy"),
    [(False, "install TBB (pip install tbb; "), (True, "install a numba with its TBB layer, which ")],
)
def test_the_remedy_tells_a_missing_tbb_from_a_numba_without_it(
    found: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_importable", lambda name: False)
    monkeypatch.setattr(pool, "_loaded", False)
    monkeypatch.setattr(pool, "_load", lambda path: found)
    monkeypatch.setattr(metadata, "files", lambda name: [metadata.PackagePath(f"lib/{pool._TBB}")])
    monkeypatch.setattr(metadata.PackagePath, "locate", lambda self: "/lib/here", raising=False)
    assert pool._remedy("workqueue").startswith(remedy)


@compiled
@pytest.mark.process
@pytest.mark.parametrize("layer", ["tbb"], indirect=True)
def test_limits_of_four_threads(run: Run, layer: str) -> None:
    """They take effect, and leave numba's own number as it was."""
    play(run, "four threads", layer, NUMBA_NUM_THREADS="4")


@pytest.mark.alone
def test_asking_is_cheap() -> None:
    """Below half a microsecond by far, of a parallel call's ten: what is bounded here is a wrong order of magnitude."""
    from fastbn.cpu import threads

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
