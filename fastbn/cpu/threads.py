"""The number of threads of the parallel kernels, for each Python thread by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import TracebackType
from typing import Any

from fastbn.arguments import scalars
from fastbn.cpu import pool

__all__ = [
    "check",
    "count",
    "describe",
    "get_num_threads",
    "limited",
    "masked",
    "most",
    "on_team",
    "parallel",
    "set_num_threads",
    "team",
    "usable",
]


class _Limit(threading.local):
    count: int | None = None
    team: Any = None  # the runtime of another library, whose threads run parallel kernels


_limit = _Limit()


@lru_cache(maxsize=1)
def most() -> int:
    """Threads of numba's pool: no call takes more."""
    from numba import config

    return int(config.NUMBA_NUM_THREADS)


def check(num_threads: Any) -> int | None:
    """A number of threads that there can be, or None for numba's own."""
    if num_threads is None:
        return None
    wanted = scalars.whole(num_threads, "num_threads", "a whole number, or None for numba's own")
    if not 1 <= wanted <= most():
        limit = f"{most()}, the threads of numba's pool (NUMBA_NUM_THREADS, read when numba is imported, sets them)"
        raise ValueError(f"num_threads: given {scalars.shown(wanted)}, want 1 to {limit}")
    return wanted


def set_num_threads(num_threads: int | None) -> None:
    """Set the number of threads of fastbn's parallel kernels in the calling Python thread.

    Results are the same bits on any number. numba's own number, `numba.set_num_threads`, is left as it is.

    Parameters
    ----------
    num_threads : int or None
        From 1 to NUMBA_NUM_THREADS; None for numba's own number.

    Raises
    ------
    TypeError, ValueError
        Not a whole number, or not from 1 to NUMBA_NUM_THREADS.
    """
    _limit.count = check(num_threads)


def get_num_threads() -> int:
    """Number of threads of fastbn's parallel kernels in the calling Python thread.

    Returns
    -------
    int
        What `set_num_threads` set, else numba's own number: NUMBA_NUM_THREADS, unless `numba.set_num_threads` lowered
        it. Arrays under 256 KiB always take one thread, and so do all where `explain` says so.
    """
    return pool.mask() if _limit.count is None else _limit.count


class _Limited:
    def __init__(self, num_threads: int | None) -> None:
        self._count = num_threads

    def __enter__(self) -> None:
        self._before = _limit.count
        _limit.count = self._count

    def __exit__(
        self, exception: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _limit.count = self._before


_UNLIMITED = nullcontext()


def limited(num_threads: int | None) -> AbstractContextManager[None]:
    """Set the number of threads within a `with` block, in the calling Python thread; None changes nothing."""
    return _UNLIMITED if num_threads is None else _Limited(check(num_threads))


class on_team:  # a context, entered at every call: a generator's would take 1 us
    """Within it, parallel kernels of the calling Python thread run on another library's threads: a `team.Runtime`'s."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __enter__(self) -> None:
        self._before = _limit.team
        _limit.team = self._runtime

    def __exit__(
        self, exception: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _limit.team = self._before


def team() -> Any:
    """Whose threads run parallel kernels of the calling Python thread: None for numba's."""
    return _limit.team


def count() -> int:
    """Threads of a parallel call in the calling Python thread.

    1 for the serial kernel, 0 for as many as numba's mask says.
    """
    wanted = _limit.count
    if wanted == 1 or not pool.ready():
        return 1
    mask = pool.functions()[0]()
    return int(mask == 1) if wanted is None or wanted == mask else wanted


def masked(run: Callable[..., Any], num_threads: int) -> Callable[..., None]:
    """`run` on so many threads; numba's own number is restored after it."""
    get, put = pool.functions()

    def call(*arguments: Any) -> None:
        before = get()
        try:
            put(num_threads)
            run(*arguments)
        finally:
            put(before)

    return call


def parallel() -> bool:
    """Whether a parallel call in the calling Python thread would run the parallel kernel. Launches nothing."""
    return get_num_threads() > 1 and pool.serial() is None


def usable() -> bool:
    """Whether parallel kernels would run on such a machine, with more processors perhaps. Launches nothing."""
    reason = pool.serial()
    return reason is None or not reason.remedy


def describe() -> str:
    """How a parallel call would run in the calling Python thread, for a person to read. Launches nothing."""
    reason = pool.serial()
    if reason is not None:
        return f"one thread: {reason.why}" + (f"; {reason.remedy}" if reason.remedy else "")
    kept = pool.layer() if _limit.team is None else "of an OpenMP team"
    return f"{get_num_threads()} threads ({kept})" if parallel() else "one thread: set_num_threads said so"
