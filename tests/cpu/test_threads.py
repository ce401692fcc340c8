"""set_num_threads, and num_threads= for the length of one call: for one Python thread, restored, the same bits, numba's
own number untouched, at no cost where it is not given.
"""

import inspect
import os
import sys
import threading
import time
import types
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numba
import numpy as np
import pytest
from processes import Run, compiled, play

import fastbn
from fastbn import reference
from fastbn.cpu import pool, threads
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


# num_threads= of every public function

X = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
MEAN, VAR = np.zeros(3), np.ones(3)
M = fastbn.Moments(8, MEAN, VAR)


def _layer(training: bool, **options: Any) -> list[np.ndarray]:
    bn = fastbn.BatchNorm(3, **options)
    bn = bn if training else bn.eval(backward=True)
    return [bn(X), bn.backward(X)]


CALLS: dict[str, Callable[..., Any]] = {
    "moments": lambda **options: fastbn.moments(X, **options),
    "RunningMoments": lambda **options: fastbn.RunningMoments(3, **options).update(X),
    "batch_norm": lambda **options: fastbn.batch_norm(X, **options),
    "batch_norm_inference": lambda **options: fastbn.batch_norm_inference(X, MEAN, VAR, **options),
    "batch_norm_backward": lambda **options: fastbn.batch_norm_backward(X, X, M, **options),
    "batch_norm_inference_backward": lambda **options: fastbn.batch_norm_inference_backward(X, X, MEAN, VAR, **options),
    "BatchNorm": lambda **options: _layer(True, **options),
    "BatchNorm.eval": lambda **options: _layer(False, **options),
}
every_call = pytest.mark.parametrize("call", CALLS)
KERNELS = ("moments", "normalize", "forward", "backward")


@pytest.fixture
def seen(serve: Callable[..., None]) -> list[int]:
    """The number of threads in each call of the CPU backend, which is the reference here."""
    numbers: list[int] = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            numbers.append(threads.get_num_threads())
            return function(*arguments)

        return run

    # others work on (C,) arrays: one thread, whatever is asked
    serve(**{name: spy(getattr(reference, name)) for name in KERNELS})
    return numbers


@every_call
def test_it_holds_in_the_call_and_no_longer(call: str, seen: list[int]) -> None:
    default = threads.get_num_threads()
    for number in {1, MOST}:
        CALLS[call](num_threads=number, backend="cpu")
        assert set(seen) == {number}
        assert threads.get_num_threads() == default
        seen.clear()
    CALLS[call](backend="cpu")
    assert set(seen) == {default}


@every_call
def test_it_ends_with_an_error_too(call: str, serve: Callable[..., None]) -> None:
    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError(threads.get_num_threads())

    default = threads.get_num_threads()
    serve(**dict.fromkeys(KERNELS, fail))
    with pytest.raises(ZeroDivisionError, match=r"^1$"):
        CALLS[call](num_threads=1)
    assert threads.get_num_threads() == default


@pytest.mark.parametrize(
    ("given", "error"),
    [(0, ValueError), (-1, ValueError), (MOST + 1, ValueError), (1.0, TypeError), (True, TypeError), ("2", TypeError)],
)
@every_call
def test_a_number_that_cannot_be_is_refused_before_any_work(
    call: str, given: Any, error: type[Exception], seen: list[int]
) -> None:
    default = threads.get_num_threads()
    with pytest.raises(error, match=r"^num_threads: given "):
        CALLS[call](num_threads=given, backend="cpu")
    assert seen == []
    assert threads.get_num_threads() == default


@every_call
def test_without_it_nothing_is_asked(call: str, monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    """Calls as short as these feel a context manager. The constructors alone may ask."""
    made = {"BatchNorm": fastbn.BatchNorm(3), "RunningMoments": fastbn.RunningMoments(3)}
    monkeypatch.setattr(threads, "limited", lambda number: pytest.fail("asked for a limit"))
    if call == "RunningMoments":
        made[call].update(X)
    elif call.startswith("BatchNorm"):
        bn = made["BatchNorm"] if call == "BatchNorm" else made["BatchNorm"].eval(backward=True)
        bn(X)
        bn.backward(X)
    else:
        CALLS[call]()
    assert seen


@pytest.mark.parametrize("name", [name for name in CALLS if "." not in name])
def test_it_is_a_keyword_everywhere(name: str) -> None:
    found = inspect.signature(getattr(fastbn, name)).parameters["num_threads"]
    assert (found.kind, found.default) == (inspect.Parameter.KEYWORD_ONLY, None)


def test_a_layer_may_change_it_later(seen: list[int]) -> None:
    bn = fastbn.BatchNorm(3)
    bn.num_threads = 1
    bn(X)
    bn.backward(X)
    assert seen == [1, 1]


@pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="plain Python takes minutes for arrays large enough for several threads"
)
def test_the_bits_are_the_same() -> None:
    x = np.random.default_rng(0).standard_normal((8, 16, 64, 64)).astype(np.float32)  # 2 MB: parallel kernels
    y, m = fastbn.batch_norm(x)
    for number in {1, MOST}:
        got, n = fastbn.batch_norm(x, num_threads=number)
        assert (got.tobytes(), n.mean.tobytes(), n.m2.tobytes()) == (y.tobytes(), m.mean.tobytes(), m.m2.tobytes())
        dx = fastbn.batch_norm_backward(x, x, m, num_threads=number)[0]
        assert dx.tobytes() == fastbn.batch_norm_backward(x, x, m)[0].tobytes()
