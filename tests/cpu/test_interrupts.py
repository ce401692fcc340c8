"""Ctrl-C that is put off: it comes out after all, whatever the body did."""

import signal
import threading
from typing import Any

import pytest

from fastbn.cpu import interrupts


def test_one_comes_after_the_body() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [ValueError("theirs"), SystemExit(3), StopIteration()])
def test_one_comes_with_what_the_body_raises(error: BaseException) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
        raise error
    assert caught.value.__context__ is error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(type(error)), interrupts.deferred():
        raise error


def test_within_another_one_the_outer_lets_it_out() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]


def test_the_programs_own_handler_and_other_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def own(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, own)
    try:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            assert len(seen) == 1
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)

    def elsewhere() -> None:
        with interrupts.deferred():
            seen.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.SIGINT, True]
