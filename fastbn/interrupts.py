"""Ctrl-C, put off where it would leave a library half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["deferred"]


@contextmanager
def deferred() -> Iterator[None]:
    """Put off Ctrl-C for a moment, whatever else is raised in it. Not where the program takes it in its own way, nor in other threads."""
    interrupts: list[int] = []

    def later(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)

    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if mine:
        signal.signal(signal.SIGINT, later)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupts:
            raise KeyboardInterrupt  # what the body raised is its context
