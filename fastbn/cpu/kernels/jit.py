"""The only place with numba options and kernel signatures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import config, prange, types

from fastbn.cpu import interrupts, pool, threads
from fastbn.cpu import team as _team
from fastbn.cpu.kernels import cache

__all__ = ["DISABLED", "KERNELS", "Kernel", "kernel", "leaf", "prange", "routine"]

DISABLED = bool(config.DISABLE_JIT)

pool.guard_forks()


def _njit(function: Callable[..., Any], parallel: bool = False, inline: bool = False) -> Any:
    # No fastmath: vectors are explicit, and NaN and Inf must propagate.
    return numba.njit(parallel=parallel, forceinline=inline, nogil=True, error_model="numpy")(function)


def leaf(function: Callable[..., Any]) -> Any:
    """A serial function that kernels call; compiled with the kernel, for its types.

    Inlined: an array argument takes ten words on the stack, and a call 15 ns. Short rows gain 5 to 15 %, a first call
    loses 0.7 s.
    """
    return _njit(function, inline=True)


def routine(function: Callable[..., Any]) -> Any:
    """The same, called and not inlined: for work on whole blocks, compiled once for all kernels that call it."""
    return _njit(function)


def _plainly(body: Callable[..., Any]) -> Callable[..., Any]:
    """The body as plain Python, as silent about NaN and Inf as the compiled one."""

    def run(*arguments: Any) -> None:
        with np.errstate(all="ignore"):
            body(*arguments)

    return run


def _argument(token: str, dtype: Any) -> Any:
    kind, rank = token[0], int(token[1:] or 1)
    computed = dtype if isinstance(dtype, types.Float) else types.float32
    if kind == "x":  # an input: any strides, read-only, unaligned
        return types.Array(dtype, rank, "A", readonly=True, aligned=False)
    if kind == "y":  # an output
        return types.Array(dtype, rank, "A", aligned=False)
    if kind == "w":  # workspace in the arithmetic of x
        return types.Array(computed, rank, "C")
    if kind == "p":  # a parameter in the arithmetic of x, read
        return types.Array(computed, rank, "C", readonly=True, aligned=False)
    if kind == "m":  # float64 statistics, read
        return types.Array(types.float64, rank, "C", readonly=True, aligned=False)
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
        A token per argument: x3 an input of rank 3, y3 an output; p1 a parameter and w2 a workspace in the arithmetic
        of x (float32 for half precision); m1 float64 to read, s1 to write; i f b scalars.
    parallel : bool
        Whether there is a parallel form.
    """

    def __init__(self, body: Callable[..., Any], arguments: str, parallel: bool = True) -> None:
        self.parallel = parallel
        self.name = f"{body.__module__.rpartition('.')[2]}.{body.__name__}"
        self._body: Any = body
        self._arguments = arguments.split()
        self._compiled: dict[tuple[Any, bool | _team.Runtime], Callable[..., Any]] = {}

    def form(self, dtype: np.dtype[Any], parallel: bool, team: _team.Runtime | None = None) -> Callable[..., Any]:
        """The function for arrays of `dtype` that runs here and now.

        The serial one where threads are unsafe or limited to one.
        `team`: whose threads it runs on, where `threads.on_team` would take too long.
        """
        count = threads.count() if parallel and not DISABLED else 1
        run = self.compiled(dtype, count != 1 and (team or threads.team() or True))
        return threads.masked(run, count) if count > 1 else run

    def compiled(self, dtype: np.dtype[Any], parallel: bool | _team.Runtime) -> Callable[..., Any]:
        """The compiled function for arrays of `dtype`, whatever the threads of this process.

        Serial, on numba's threads, or on a team.
        """
        found = self._compiled.get((dtype, parallel))
        return found if found is not None else self._compile(dtype, parallel)

    def _compile(self, dtype: np.dtype[Any], parallel: bool | _team.Runtime) -> Callable[..., Any]:
        if DISABLED:
            return _plainly(self._body)
        with pool.lock, interrupts.deferred():  # it can leave a lock of llvmlite's held, and the next call hangs
            if (dtype, parallel) not in self._compiled:
                self._compiled[dtype, parallel] = self._specialize(dtype, parallel)
            return self._compiled[dtype, parallel]

    def _specialize(self, dtype: np.dtype[Any], parallel: bool | _team.Runtime) -> Callable[..., Any]:
        # numba's disk cache tells functions apart by name and line, not by options: each form gets a name of its own.
        # So does the same code linked to a team: LLVM takes a name for the first that has it.
        team = parallel if isinstance(parallel, _team.Runtime) else None
        name = f"{self._body.__name__}_{'serial' if not parallel else 'parallel' if team is None else 'team'}"
        function = FunctionType(
            self._body.__code__, self._body.__globals__, name, self._body.__defaults__, self._body.__closure__
        )
        function.__qualname__, function.__module__ = name, self._body.__module__
        if parallel:
            pool.launch()
        compiled = _njit(function, bool(parallel))
        compiled._cache = cache.Cache(function)  # as enable_caching would, with numba's own
        with nullcontext() if team is None else _team.linked(team):
            compiled.compile(tuple(_argument(token, numba.from_dtype(dtype)) for token in self._arguments))
        # Called without the dispatcher, which would look at the types of all arguments first: 32 x 64 in 1.0 us instead
        # of 1.7.
        (made,) = compiled.overloads.values()
        specialized: Callable[..., Any] = made.entry_point
        return specialized


KERNELS: list[Kernel] = []


def kernel(arguments: str, parallel: bool = True) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a kernel body; see `Kernel` for the argument tokens."""

    def decorate(body: Callable[..., Any]) -> Kernel:
        made = Kernel(body, arguments, parallel)
        KERNELS.append(made)
        return made

    return decorate
