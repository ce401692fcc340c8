"""num_threads=: for the length of one call, in every public function, at no cost where it is not given."""

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

import fastbn
from fastbn import reference
from fastbn.cpu import threads

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
MOST = numba.config.NUMBA_NUM_THREADS


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
