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
from fastbn.cpu.kernels import cache, private

__all__ = ["DISABLED", "KERNELS", "SHARED", "Kernel", "kernel", "leaf", "prange", "routine"]

DISABLED = bool(config.DISABLE_JIT)

pool.guard_forks()


def _njit(function: Callable[..., Any], parallel: bool = False, inline: bool = False) -> Any:
    # No fastmath: vectors are explicit, and NaN and Inf must propagate.
    return numba.njit(parallel=parallel, forceinline=inline, nogil=True, error_model="numpy")(function)


def leaf(function: Callable[..., Any]) -> Any:
    """A serial function that kernels call; compiled with the kernel, for its types, and inlined."""
    # An array argument takes ten words on the stack, and a call 15 ns: short rows gain 5 to 15 %, a first call loses
    # 0.7 s.
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


# Arguments that are the same in every kernel. The first word is the type: a letter of `_argument` and the rank. (A
# schedule's numbers come one by one. As a NamedTuple of seven they would cost the same, 0.10 us a call, and spare the
# caller 0.08 us of reading its attributes.)
SHARED = {
    "mean": "m1 (C,)",
    "rstd": "m1 (C,): 1 / sqrt(var + eps)",
    "gamma": "p1 (C,), or empty: 1",
    "beta": "p1 (C,), or empty: 0",
    "eps": "f",
    "count": "f values per channel",
    "training": "b whether mean and rstd are the batch's own; else constants",
    "tasks": "i that share the units of work",
    "stream": "b whether the result goes past the cache",
    "stats": "s2 (2, C): mean and m2",
    "sums": "s2 (2, C): sum of dy, sum of dy * xhat",
    "grads": "w2 (2, C): sums in the dtype of parameters",
}


def _argument(word: str, dtype: Any) -> Any:
    """The numba type of an argument, beside x of `dtype`."""
    letter, rank = word[0], int(word[1:] or 1)
    computed = dtype if isinstance(dtype, types.Float) else types.float32
    if letter == "x":  # an input: any strides, read-only, unaligned
        return types.Array(dtype, rank, "A", readonly=True, aligned=False)
    if letter == "y":  # an output
        return types.Array(dtype, rank, "A", aligned=False)
    if letter == "w":  # a workspace, or parameters written, in the arithmetic of x: float32 for half precision
        return types.Array(computed, rank, "C")
    if letter == "p":  # a parameter in the arithmetic of x, read
        return types.Array(computed, rank, "C", readonly=True, aligned=False)
    if letter == "m":  # float64 statistics, read
        return types.Array(types.float64, rank, "C", readonly=True, aligned=False)
    if letter == "s":  # float64 statistics, written
        return types.Array(types.float64, rank, "C")
    return {"i": types.intp, "f": types.float64, "b": types.boolean}[letter]


class Kernel:
    """One body, compiled for (dtype, parallel or serial) at its first use and cached on disk.

    Parameters
    ----------
    body : function
        The kernel, written with one `prange`; the serial form runs it as a plain range.
    lines : dict
        What each argument is, by name, as in `SHARED`; names that the body does not have are left out.
    parallel : bool
        Whether there is a parallel form.

    Attributes
    ----------
    arguments : dict
        The line of each argument, in order: the signature, and with `print(kernel)` its documentation.
    """

    def __init__(self, body: Callable[..., Any], lines: dict[str, str], parallel: bool = True) -> None:
        self.parallel = parallel
        self.name = f"{body.__module__.rpartition('.')[2]}.{body.__name__}"
        self._body: Any = body
        names = self._body.__code__.co_varnames[: self._body.__code__.co_argcount]
        if missing := [name for name in names if name not in lines]:
            raise TypeError(f"{self.name}: no line says what {', '.join(missing)} is")
        self.arguments = {name: lines[name] for name in names}
        self._compiled: dict[tuple[Any, bool | _team.Runtime], Callable[..., Any]] = {}

    def __str__(self) -> str:
        lines = [f"    {name:18}{line}" for name, line in self.arguments.items()]
        return "\n".join([f"{self.name}: {self._body.__doc__}", *lines])

    def form(self, dtype: np.dtype[Any], parallel: bool, team: _team.Runtime | None = None) -> Callable[..., Any]:
        """The function for arrays of `dtype` that runs here and now: serial where threads are unsafe or limited to one.

        `team`: whose threads it runs on, where `threads.on_team` would take too long.
        """
        count = threads.count() if parallel and not DISABLED else 1
        run = self.compiled(dtype, count != 1 and (team or threads.team() or True))
        return threads.masked(run, count) if count > 1 else run

    def compiled(self, dtype: np.dtype[Any], parallel: bool | _team.Runtime) -> Callable[..., Any]:
        """The compiled function for arrays of `dtype`: serial, on numba's threads or on a team's."""
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
        private.keep(compiled, cache.Cache(function))
        with nullcontext() if team is None else _team.linked(team):
            compiled.compile(
                tuple(_argument(line.split()[0], numba.from_dtype(dtype)) for line in self.arguments.values())
            )
        # Without the dispatcher, which would look at the types of all arguments first, 32 x 64 takes 1.0 us instead of
        # 1.7.
        return private.entry_point(compiled)


KERNELS: list[Kernel] = []


def kernel(lines: dict[str, str], parallel: bool = True, **own: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a kernel body; `own`: arguments of its own, or other than in `lines`. See `Kernel`."""

    def decorate(body: Callable[..., Any]) -> Kernel:
        made = Kernel(body, lines | own, parallel)
        if idle := own.keys() - made.arguments.keys():
            raise TypeError(f"{made.name}: no argument {', '.join(sorted(idle))}")
        KERNELS.append(made)
        return made

    return decorate
