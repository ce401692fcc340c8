"""The only place with numba options, kernel signatures and the choice of the threading layer."""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import config, prange, types

from fastbn.kernels import _cache

__all__ = ["DISABLED", "KERNELS", "Kernel", "kernel", "leaf", "load_tbb", "prange", "threading_layer", "threads"]

DISABLED = bool(config.DISABLE_JIT)

_TBB = {"linux": "libtbb.so.12", "darwin": "libtbb.12.dylib", "win32": "tbb12.dll"}.get(sys.platform, "")


def _tbb_files() -> Iterator[Path]:
    yield Path(sys.prefix, "Library", "bin", _TBB) if sys.platform == "win32" else Path(sys.prefix, "lib", _TBB)
    try:
        yield from (Path(str(file.locate())) for file in importlib.metadata.files("tbb") or () if file.name == _TBB)
    except importlib.metadata.PackageNotFoundError:
        return


def load_tbb() -> bool:
    """Load TBB from its wheel, where numba does not look by itself; whether it was there.

    With the other layers numba aborts the process on fork (OpenMP) or on two Python threads at once (workqueue).
    """
    for path in _tbb_files():
        if path.is_file():
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            return True
    return False


TBB_LOADED = load_tbb()


def threading_layer() -> str:
    """The layer that runs parallel kernels, or would: 'tbb', 'omp' or 'workqueue'."""
    try:
        return str(numba.threading_layer())
    except ValueError:  # no parallel kernel has run yet
        pass
    known = ("tbb", "omp", "workqueue")
    asked = str(config.THREADING_LAYER)
    wanted = [asked] if asked in known else list(config.THREADING_LAYER_PRIORITY)
    for layer in wanted:
        try:
            __import__(f"numba.np.ufunc.{layer}pool")
        except ImportError:
            continue
        return layer
    return "none"


def threads() -> int:
    """Threads that a parallel kernel would use now."""
    return int(numba.get_num_threads())


def _njit(function: Callable[..., Any], parallel: bool = False, inline: bool = False) -> Any:
    # No fastmath: vectors are explicit, and NaN and Inf must propagate.
    return numba.njit(parallel=parallel, forceinline=inline, nogil=True, error_model="numpy")(function)


def leaf(function: Callable[..., Any]) -> Any:
    """A serial function that kernels call; compiled with the kernel, for its types.

    Inlined: an array argument takes ten words on the stack, and a call 15 ns. Short rows gain 5 to 15 %, a first call loses 0.7 s.
    """
    return _njit(function, inline=True)


def _plainly(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body as plain Python, as silent about NaN and Inf as the compiled one."""

    def run(*arguments: Any) -> None:
        with np.errstate(all="ignore"):
            body(*arguments)

    return run


def _argument(token: str, dtype: Any) -> Any:
    kind, rank = token[0], int(token[1:] or 1)
    if kind == "x":  # an input: any strides, read-only, unaligned
        return types.Array(dtype, rank, "A", readonly=True, aligned=False)
    if kind == "y":  # an output
        return types.Array(dtype, rank, "A", aligned=False)
    if kind == "w":  # workspace in the dtype of x
        return types.Array(dtype, rank, "C")
    if kind == "m":  # float64 statistics, read
        return types.Array(types.float64, rank, "A", readonly=True, aligned=False)
    if kind == "s":  # float64 statistics, written
        return types.Array(types.float64, rank, "C")
    return {"i": types.intp, "f": types.float64, "b": types.boolean}[kind]


class Kernel:
    """One body, compiled for (dtype, parallel or serial) at its first use and cached on disk.

    Parameters
    ----------
    body : function
        The kernel, written with one `prange`; the serial form runs it as a plain range.
    arguments : str
        A token per argument: x3 an input of rank 3, y3 an output, w2 a workspace of the same dtype; m1 float64
        to read, s1 to write; i f b scalars.
    """

    def __init__(self, body: Callable[..., Any], arguments: str) -> None:
        self.name = f"{body.__module__.rpartition('.')[2]}.{body.__name__}"
        self._body: Any = body
        self._arguments = arguments.split()
        self._compiled: dict[tuple[Any, bool], Callable[..., Any]] = {}
        self._lock = Lock()

    def form(self, dtype: np.dtype[Any], parallel: bool) -> Callable[..., Any]:
        """The compiled function for arrays of `dtype`."""
        found = self._compiled.get((dtype, parallel))
        return found if found is not None else self._compile(dtype, parallel)

    def _compile(self, dtype: np.dtype[Any], parallel: bool) -> Callable[..., Any]:
        if DISABLED:
            return _plainly(self._body)
        with self._lock:
            if (dtype, parallel) not in self._compiled:
                self._compiled[dtype, parallel] = self._specialize(dtype, parallel)
            return self._compiled[dtype, parallel]

    def _specialize(self, dtype: np.dtype[Any], parallel: bool) -> Callable[..., Any]:
        # numba's disk cache tells functions apart by name and line, not by options: each form gets a name of its own.
        name = f"{self._body.__name__}_{'parallel' if parallel else 'serial'}"
        function = FunctionType(self._body.__code__, self._body.__globals__, name, self._body.__defaults__, self._body.__closure__)
        function.__qualname__, function.__module__ = name, self._body.__module__
        compiled = _njit(function, parallel)
        compiled._cache = _cache.Cache(function)  # as enable_caching would, with numba's own
        compiled.compile(tuple(_argument(token, numba.from_dtype(dtype)) for token in self._arguments))
        compiled.disable_compile()
        specialized: Callable[..., Any] = compiled
        return specialized


KERNELS: list[Kernel] = []


def kernel(arguments: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a kernel body; see `Kernel` for the argument tokens."""

    def decorate(body: Callable[..., Any]) -> Kernel:
        made = Kernel(body, arguments)
        KERNELS.append(made)
        return made

    return decorate
