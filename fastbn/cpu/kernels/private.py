"""Every private name of numba and llvmlite that the CPU kernels rest on, and what for.

Neither library promises them to the next release: tests/cpu/test_private.py has a canary for each, which says what
broke. Nothing else in `fastbn.cpu` names them.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import llvmlite
import numba
from llvmlite import ir

__all__ = [
    "PARALLEL_FOR",
    "AppDirs",
    "CompileResultCacheImpl",
    "FunctionCache",
    "cgutils",
    "entry_point",
    "global_compiler_lock",
    "has_pool",
    "keep",
    "make_array",
    "masks",
    "renew_locks",
    "target",
    "volatile",
]

PARALLEL_FOR = "numba_parallel_for"  # team: the symbol that parallel functions call, set to a layer's function
# What is asked for by name: which file rests on it, and for what.
RESTS = {
    "numba.core.cgutils": "vector.py: LLVM's pointers, tuples and functions of a module",
    "numba.core.caching.CompileResultCacheImpl": "cache.py: the names of a function's files",
    "numba.core.caching.FunctionCache": "cache.py: loads and saves a function's files",
    "numba.core.compiler_lock.global_compiler_lock": "private.py, for cpu/team.py: nobody else links meanwhile",
    "numba.misc.appdirs.AppDirs": "cache.py: the user's directory, as numba finds it",
    "numba.np.arrayobj.make_array": "vector.py: an array's data and strides in LLVM",
    "Dispatcher._cache": "jit.py: a cache that sees edits of leaves",
    "CompileResult.entry_point": "jit.py: a call without the dispatcher",
    "codegen().magic_tuple": "half.py: which processor code is made for",
}


def gone(name: str) -> str:
    """The words for an interface that is not there any more, or not what it was."""
    versions = f"numba {numba.__version__} and llvmlite {llvmlite.__version__}"
    return (
        f"{name}: gone or changed in {versions}; fastbn/cpu/kernels/{RESTS[name]}. Take an older numba, and report it"
    )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """ImportError in these words where what happens within finds no such thing."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ImportError(gone(name)) from error


def _interface(name: str) -> Any:
    with _named(name):
        return pkgutil.resolve_name(name)


cgutils: Any = _interface("numba.core.cgutils")
CompileResultCacheImpl: Any = _interface("numba.core.caching.CompileResultCacheImpl")
FunctionCache: Any = _interface("numba.core.caching.FunctionCache")
global_compiler_lock: Any = _interface("numba.core.compiler_lock.global_compiler_lock")
AppDirs: Any = _interface("numba.misc.appdirs.AppDirs")
make_array: Any = _interface("numba.np.arrayobj.make_array")

_POOLS = {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}  # modules of layers, in numba.np.ufunc


def keep(dispatcher: Any, cache: Any) -> None:
    """Let a dispatcher load from and save to a cache, as its `enable_caching` does with numba's own."""
    with _named("Dispatcher._cache"):
        dispatcher._cache = cache


def entry_point(dispatcher: Any) -> Callable[..., Any]:
    """The function that a dispatcher with one signature calls, once it has looked at the types of all arguments."""
    with _named("CompileResult.entry_point"):
        (compiled,) = dispatcher.overloads.values()
        return cast(Callable[..., Any], compiled.entry_point)


def target(context: Any) -> tuple[str, str, str]:
    """(triple, processor, features) that code is made for: half."""
    with _named("codegen().magic_tuple"):
        return cast("tuple[str, str, str]", context.codegen().magic_tuple())


class _Volatile(ir.LoadInstr):  # type: ignore[misc]  # llvmlite is untyped
    def descr(self, buf: list[str]) -> None:
        text: list[str] = []
        super().descr(text)
        buf.append(text[0].replace("load", "load volatile", 1))


def volatile(load: Any) -> Any:
    """A load that LLVM does not join with the next one, which llvmlite can't ask for: vectors."""
    load.__class__ = _Volatile
    return load


def has_pool(layer: str) -> bool:
    """Whether numba has a threading layer, and the layer its library: pool."""
    try:
        importlib.import_module(f"numba.np.ufunc.{_POOLS[layer]}")
    except (ImportError, KeyError):
        return False
    return True


def masks() -> tuple[Callable[[], int], Callable[[int], None]]:
    """Getter and setter of the calling thread's number of threads, once the pool runs: threads."""
    # The public ones take a lock that all forked processes share, which a child killed at that moment keeps for ever.
    from numba.np.ufunc import parallel

    return (
        getattr(parallel, "_get_num_threads", numba.get_num_threads),
        getattr(parallel, "_set_num_threads", numba.set_num_threads),
    )


def renew_locks() -> None:
    """New locks, in a child forked while another thread compiled: numba's, its type inference's and LLVM's."""
    registry, llvm = sys.modules.get("numba.core.registry"), sys.modules.get("llvmlite.binding.ffi")
    for holder, name, new in (
        (global_compiler_lock, "_lock", threading.RLock),
        # with the calls that were being inferred
        (getattr(getattr(registry, "cpu_target", None), "typing_context", None), "callstack", None),
        (getattr(getattr(llvm, "lib", None), "_lock", None), "_lock", threading.RLock),
    ):
        if hasattr(holder, name):
            setattr(holder, name, (new or type(getattr(holder, name)))())
