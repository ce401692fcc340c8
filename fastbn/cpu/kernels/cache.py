"""Compiled kernels on disk: numba's cache files, in directories of fastbn's choice.

numba passes over a directory that it can't write, even one that holds all it wants, and does not see an edit, or an
upgrade, of a leaf in another file than the kernel's.
"""

from __future__ import annotations

import hashlib
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

import llvmlite
import numba
from numba import config

from fastbn.cpu.kernels.private import AppDirs, CompileResultCacheImpl, FunctionCache

__all__ = ["Cache", "directories", "stamp", "writable"]

_HERE = Path(__file__).parent

# What changes compiled code and is not in the key of numba's files, which has the processor and its features.
_SETTINGS = (
    "OPT",
    "BOUNDSCHECK",
    "DEBUGINFO_DEFAULT",
    "EXTEND_VARIABLE_LIFETIMES",
    "LOOP_VECTORIZE",
    "SLP_VECTORIZE",
    "USING_SVML",
    "LLVM_REFPRUNE_PASS",
    "LLVM_REFPRUNE_FLAGS",
)


def _modules() -> Iterator[bytes]:
    """What each module of this directory is made from.

    Its file, in a zip too, or its code where a frozen program has no file of it.
    """
    for module in sorted(pkgutil.iter_modules([str(_HERE)], "fastbn.cpu.kernels."), key=lambda module: module.name):
        spec = None if module.ispkg else module.module_finder.find_spec(module.name, None)
        if spec is None:
            continue
        loader: Any = spec.loader
        try:
            yield loader.get_data(spec.origin)
        except (AttributeError, OSError):
            yield _text(loader.get_code(module.name)).encode()


def _text(value: Any) -> str:
    """A constant, or all that a function is made of but its lines: the same text in every process."""
    if isinstance(value, CodeType):
        return (
            f"{value.co_code!r} {value.co_names} {value.co_varnames} {value.co_freevars} {value.co_cellvars} "
            f"{_text(value.co_consts)}"
        )
    if isinstance(value, tuple | frozenset):
        found = map(_text, value)
        return f"({', '.join(found if isinstance(value, tuple) else sorted(found))})"
    return repr(value)


@lru_cache(maxsize=1)
def _sources() -> str:
    """A digest of what kernels are compiled from. Empty where that can't be read.

    A kernel is compiled together with leaves of other files, all of which lie here (a rule that tests/test_layering.py
    holds).
    """
    modules = list(_modules())
    return hashlib.sha256(b"".join(modules)).hexdigest() if modules else ""


def stamp() -> str:
    """A digest of what kernels are compiled from and by.

    Modules of this directory, numba, llvmlite, settings. Empty without modules.
    """
    settings = {name: getattr(config, name, None) for name in _SETTINGS}
    made = f"{_sources()}, numba {numba.__version__}, llvmlite {llvmlite.__version__}, {settings}"
    return hashlib.sha256(made.encode()).hexdigest() if _sources() else ""


def directories() -> list[Path]:
    """Where compiled kernels are looked for, in order; the first that can be written keeps new ones.

    None where a program is frozen in such a way that stale ones could not be told.
    """
    if not stamp():
        return []
    name = f"fastbn-{stamp()[:16]}"
    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR, name)]
    # else in a zip, or unpacked for this process alone
    installed = os.path.exists(__file__) and not getattr(sys, "frozen", False)
    return [
        *([_HERE / "__pycache__"] if installed else []),
        Path(AppDirs(appname="numba", appauthor=False).user_cache_dir, name),
    ]


def writable(directory: Path) -> bool:
    """Whether files can be made in a directory, which is made where it is not there."""
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        return False
    return True


class _Locator:
    """What numba asks about the place of a function's files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def ensure_cache_path(self) -> None:
        """Nothing: `Cache` has seen to it."""

    def get_cache_path(self) -> str:
        """The directory."""
        return str(self._directory)

    def get_source_stamp(self) -> str:
        """What the files were compiled from."""
        return stamp()

    def get_disambiguator(self) -> str:
        """Nothing to tell apart."""
        return "0"


class _Files(CompileResultCacheImpl):  # type: ignore[misc] # numba's is untyped
    """The names of a function's files, and what goes into them."""

    directory: Path

    def __init__(self, function: Callable[..., Any]) -> None:
        # numba's own would ask NUMBA_CACHE_LOCATOR_CLASSES, whose directories know nothing of a leaf's edit.
        self._lineno = function.__code__.co_firstlineno
        self._locator = _Locator(self.directory)
        module = os.path.splitext(os.path.basename(function.__code__.co_filename))[0]
        self._filename_base = self.get_filename_base(f"{module}.{function.__qualname__}", getattr(sys, "abiflags", ""))

    def check_cachable(self, compiled: Any) -> bool:
        """Not where the code holds addresses of this process, as some of it does with NUMBA_OPT=0.

        numba's own warns then.
        """
        return not compiled.library.has_dynamic_globals


@lru_cache(maxsize=8)
def _class_for(directory: Path) -> Callable[[Callable[..., Any]], Any]:
    """numba's cache, of functions kept in one directory."""
    files = type("Files", (_Files,), {"directory": directory})
    return type("FunctionCache", (FunctionCache,), {"_impl_class": files})


class Cache:
    """The cache of one function, as numba's dispatchers use it.

    Loads from the first directory that has it, saves to the first it can.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._caches = {directory: _class_for(directory)(function) for directory in directories()}
        self._damaged: set[Path] = set()

    @property
    def cache_path(self) -> str:
        """The first directory: for numba's statistics."""
        return str(next(iter(self._caches), ""))

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled function, or None."""
        for directory, cache in self._caches.items():
            try:
                found = cache.load_overload(signature, context)
                # numba's index is of two processes that saved at once
                if found is not None and found.signature.args != tuple(signature):
                    raise ValueError("another function's code")
            except Exception:
                # a damaged file, whatever pickle says of it, or one that may not be read: it is compiled anew
                self._damaged.add(directory)
                continue
            if found is not None:
                return found
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled function, where anything can be kept.

        A read-only system compiles in memory, and so does a full one.
        """
        for directory, cache in self._caches.items():
            if writable(directory):
                try:
                    if directory in self._damaged:
                        cache.flush()
                    cache.save_overload(signature, compiled)
                except Exception:  # as above: what was compiled serves without a file
                    continue
                return
