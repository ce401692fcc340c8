"""Signals that end a process.

Taken so that files half written are removed, and Ctrl-C put off where it would leave a library half done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["ENDING", "deferred", "terminable"]

# What users, terminals and batch systems end a job with. (SIGXFSZ and SIGPIPE are OSErrors in Python.)
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGXCPU", "SIGBREAK")
ENDING = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class _Stop:
    """A handler of all that are left to Python's ways.

    The first one raises, and those that follow must not end the tidying up.
    """

    def __init__(self) -> None:
        ways = {number: signal.getsignal(number) for number in ENDING}
        self.before = {
            number: way for number, way in ways.items() if way in (signal.SIG_DFL, signal.default_int_handler)
        }

    def __call__(self, number: int, frame: FrameType | None) -> None:
        for other in self.before:
            signal.signal(other, lambda *_: None)  # of SIG_IGN Python complains where that one has come already
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


@contextmanager
def terminable() -> Iterator[None]:
    """Let the signals that end a process raise SystemExit, and Ctrl-C KeyboardInterrupt, but only the first of them.

    In main threads.
    Where one is ignored, as under nohup, or taken in the program's own way, it stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _Stop()
    for number in stop.before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, way in stop.before.items():
            signal.signal(number, way)


@contextmanager
def deferred() -> Iterator[None]:
    """Put off Ctrl-C for a moment, whatever else is raised in it.

    Not where the program takes it in its own way, nor in other threads.
    """
    interrupts: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)

    before = signal.getsignal(signal.SIGINT)
    mine = threading.current_thread() is threading.main_thread() and (
        before is signal.default_int_handler or isinstance(before, _Stop)
    )
    if mine:
        signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        if mine and signal.getsignal(signal.SIGINT) is later:  # else another signal is ending the process
            signal.signal(signal.SIGINT, before)
        if interrupts and callable(before):
            before(signal.SIGINT, None)  # KeyboardInterrupt: what the body raised is its context
