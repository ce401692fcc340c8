"""The number of threads of the parallel kernels, for each Python thread by itself."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class _Limit(threading.local):
    count: int | None = None


_limit = _Limit()
_UNLIMITED = nullcontext()


def _most() -> int:
    from numba import config

    return int(config.NUMBA_NUM_THREADS)


def _checked(num_threads: int) -> int:
    try:
        wanted = operator.index(num_threads)
    except TypeError:
        wanted = None
    if wanted is None or isinstance(num_threads, bool):
        raise TypeError(f"num_threads: given {num_threads!r}, want a whole number, or None for numba's own")
    if not 1 <= wanted <= _most():
        raise ValueError(f"num_threads: given {wanted}, want 1 to {_most()}, the threads of numba's pool (NUMBA_NUM_THREADS)")
    return wanted


def set_num_threads(num_threads: int | None) -> None:
    """Set the number of threads of fastbn's parallel kernels in the calling Python thread; None for numba's own number."""
    _limit.count = None if num_threads is None else _checked(num_threads)


def get_num_threads() -> int:
    """Number of threads of fastbn's parallel kernels in the calling Python thread."""
    return _most() if _limit.count is None else _limit.count


@contextmanager
def _limited(wanted: int) -> Iterator[None]:
    before = _limit.count
    _limit.count = wanted
    try:
        yield
    finally:
        _limit.count = before


def limited(num_threads: int | None) -> AbstractContextManager[None]:
    """Set the number of threads within a `with` block, in the calling Python thread; None changes nothing."""
    return _UNLIMITED if num_threads is None else _limited(_checked(num_threads))
