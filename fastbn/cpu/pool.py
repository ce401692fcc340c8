"""numba's thread pool: which layer drives it, and whether kernels may use it in this process.

Imports numba only when asked. TBB survives forks and any number of Python threads. numba's other layers end the
process: GNU OpenMP when a forked child uses the pool of its parent, workqueue when two Python threads use it at once. A
lock around fastbn's calls would not hold back the user's own parallel functions, so the serial kernels run there: the
same bits, and one warning.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import NamedTuple

__all__ = ["Serial", "functions", "guard_forks", "launch", "layer", "lock", "mask", "ready", "running", "serial"]

# held while a kernel is compiled and the pool launched; a fork waits: the child would find numba's locks held
lock = threading.RLock()
_PATIENCE = 30.0  # seconds that a fork waits: a kernel compiles in two

_SPECIAL = {
    "safe": ["tbb"],
    "threadsafe": ["tbb", "omp"],
    "forksafe": ["tbb", "workqueue"] if sys.platform == "linux" else ["tbb", "omp", "workqueue"],
}
_DANGER = {
    "omp": "numba's OpenMP threads end a forked child that uses them",
    "workqueue": "numba's workqueue threads end a process where two Python threads use them at once",
    "none": "numba has none of the threading layers that NUMBA_THREADING_LAYER allows",
}


class Serial(NamedTuple):
    """Why the serial kernels run, and what to do about it: nothing where nothing is wrong."""

    why: str
    remedy: str = ""


_safe = False  # decided, at the first parallel call: the parallel kernels run
_serial: Serial | None = None  # or decided: the serial ones, and why
_warned = False
_launcher: int | None = None  # the thread that launched the pool, where that was here
_fork = threading.local()  # `held`: at a fork, the lock, by the thread that forks
_whole = False  # at a fork: the child's copy of TBB is whole
_broken = False  # this is such a child, and its copy of the pool is not


def _load(path: Path) -> bool:
    try:
        return path.is_file() and bool(ctypes.CDLL(str(path)))
    except OSError:
        return False


_TBB = {"linux": "libtbb.so.12", "darwin": "libtbb.12.dylib", "win32": "tbb12.dll"}.get(sys.platform, "")
# where pip puts the wheel's files, and numba does not look
_PLACE = ("Library", "bin") if sys.platform == "win32" else ("lib",)
# at import: numba picks its layer at the first parallel function, also one of the user's
_loaded = _load(Path(sys.prefix, *_PLACE, _TBB))


def _load_from_elsewhere() -> bool:
    """Load TBB from its distribution's own list of files: other installation schemes put them beside other prefixes."""
    global _loaded
    if not _loaded:
        from importlib import metadata  # 25 ms

        try:
            _loaded = any(_load(Path(str(file.locate()))) for file in metadata.files("tbb") or () if file.name == _TBB)
        except metadata.PackageNotFoundError:
            return False
    return _loaded


def _importable(name: str) -> bool:
    from fastbn.cpu.kernels import private

    return private.has_pool(name)


def _asked() -> str:
    from numba import config

    return str(config.THREADING_LAYER).lower()


def running() -> str | None:
    """The layer of the pool that numba launched; None before the first parallel function of anyone."""
    ask = getattr(sys.modules.get("numba"), "threading_layer", None)
    try:
        return None if ask is None else str(ask())
    except ValueError:
        return None


def layer() -> str:
    """The layer that runs parallel functions, or would: 'tbb', 'omp', 'workqueue', or 'none'. Launches nothing."""
    from numba import config

    now = running()
    if now is not None:
        return now
    _load_from_elsewhere()
    asked = _asked()
    allowed = list(config.THREADING_LAYER_PRIORITY) if asked == "default" else _SPECIAL.get(asked, [asked])
    return next(filter(_importable, allowed), "none")


def _remedy(name: str) -> str:
    from numba import __version__, config

    steps = []
    if not _importable("tbb"):
        steps = ["install TBB (pip install tbb; where pip has no wheel: conda install tbb)"]
        if _load_from_elsewhere():  # TBB is there
            steps = [
                f"install a numba with its TBB layer, which this {__version__} lacks (pip install -U numba, or conda "
                f"install numba tbb)"
            ]
    if name == "omp" and steps and _asked() == "default":
        steps[0] += ", or, in a program that does not fork, set NUMBA_THREADING_LAYER=omp"
    if _asked() != "default" or config.THREADING_LAYER_PRIORITY[0] != "tbb":
        steps.append("set NUMBA_THREADING_LAYER=tbb")
    elif not steps:
        steps.append("import fastbn before the first parallel function runs")
    return " and ".join(steps)


def serial() -> Serial | None:
    """Why parallel calls run the serial kernels here, or would; None where they do not. Launches nothing."""
    if _safe or _serial is not None:
        return _serial
    from numba import config

    if config.DISABLE_JIT:
        return Serial("NUMBA_DISABLE_JIT is set")
    if config.NUMBA_NUM_THREADS == 1:
        return Serial("numba has only one")
    name = layer()
    if name == "tbb":
        return (
            Serial("this process was forked beside other threads, or by another thread than TBB's") if _broken else None
        )
    # Asked for by name, OpenMP runs where no parent of this process can have launched it.
    if name == _asked() == "omp" and not _broken and (_launcher is not None or running() is None):
        return None
    return Serial(_DANGER.get(name, f"numba knows no threading layer {name!r}"), _remedy(name))


def launch() -> None:
    """Launch numba's pool, as loading a parallel kernel would."""
    global _launcher
    import numba

    with lock:
        if running() is not None:
            return
        # numba fixes the start method by asking for it: the user's own set_start_method would be refused from then on.
        free = multiprocessing.get_start_method(allow_none=True) is None
        numba.get_num_threads()
        if free:
            multiprocessing.set_start_method(None, force=True)
        _launcher = threading.get_ident()


def _decide() -> None:
    global _safe, _serial
    with lock:
        if _safe or _serial is not None:
            return
        _serial = serial()
        if _serial is None:
            launch()
            _serial = serial()  # numba refuses a TBB that is too old, and takes the next layer
        _safe = _serial is None


def ready() -> bool:
    """Whether parallel kernels run in this process, at the moment of the first parallel call.

    Decides, launches the pool, warns once.
    """
    global _warned
    if _safe:
        return True
    _decide()
    if _serial is not None and _serial.remedy:
        with lock:
            first, _warned = not _warned, True
        if first:
            message = f"fastbn runs on one thread: {_serial.why}. To use them all, {_serial.remedy}."
            warnings.warn(message, RuntimeWarning, stacklevel=_users_level())
    return _safe


_OURS = str(Path(__file__).parents[1]) + os.sep


def _users_level() -> int:
    """The `stacklevel` that points a warning of the caller at the user's line.

    Past fastbn's files, PyTorch's, and code without a file.
    Such code is what torch.compile makes, and runpy; but at a prompt, and with `python -c`, it is the user's, by the
    name of __main__.
    """
    frame: FrameType | None = sys._getframe(1)
    level, last = 0, 1
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    others = (_OURS, os.path.dirname(torch) + os.sep) if torch else (_OURS,)
    while frame is not None:
        file, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__"))
        level += 1
        if file.startswith("<"):
            if module == "__main__":
                return level
        elif not (file.startswith(others) or module.startswith("torch.")):  # the second: TorchInductor's, in its cache
            return level
        else:
            last = level
        frame = frame.f_back
    return last


def mask() -> int:
    """Threads of numba's parallel functions in the calling Python thread. Launches nothing."""
    if _safe or running() is not None:
        return int(functions()[0]())
    from numba import config

    return int(config.NUMBA_NUM_THREADS)


@lru_cache(maxsize=1)
def functions() -> tuple[Callable[[], int], Callable[[int], None]]:
    """numba's getter and setter of the calling thread's mask, once the pool runs."""
    from fastbn.cpu.kernels import private

    return private.masks()


def _before_fork() -> None:
    global _whole
    # numba shuts TBB down in the thread that launched it only, and fails to where other threads have used it: the child
    # would then find its locks as they were, and wait for them in one of ten forks beside busy threads.
    _whole = running() == "tbb" and _launcher == threading.get_ident() and threading.active_count() == 1


def _after_fork_in_child() -> None:
    global _safe, _broken
    if running() is not None and not _whole:
        _safe, _broken = False, True


def _hold() -> None:
    _fork.held = lock.acquire(timeout=_PATIENCE)


def _let_go() -> None:
    if _fork.held:
        lock.release()


def _let_go_in_child() -> None:
    if _fork.held:
        lock.release()
    else:
        _renew()


def _renew() -> None:
    """New locks in a child of a fork that gave up waiting: a thread that is not here, and was compiling, holds them."""
    global lock
    from fastbn.cpu import team
    from fastbn.cpu.kernels import private

    lock, team._lock = threading.RLock(), threading.Lock()
    private.renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def guard_forks() -> None:
    """Let forks wait for compilations from now on.

    What is registered last holds first, and a compilation needs logging's lock.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go_in_child)
