"""Compiled kernels on disk: numba's cache files, in directories of fastbn's choice.

numba passes over a directory that it can't write, even one that holds all it wants, and does not see an edit, or an upgrade, of a leaf in
another file than the kernel's.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import config
from numba.core import caching
from numba.misc.appdirs import AppDirs

__all__ = ["Cache", "directories", "stamp", "writable"]

_HERE = Path(__file__).parent


@lru_cache(maxsize=1)
def stamp() -> str:
    """A digest of what kernels are compiled from and by: every file of this directory, numba and llvmlite. Empty where no file can be read.

    A kernel is compiled together with leaves of other files, all of which lie here (a rule that tests/test_layering.py holds).
    """
    sources = [path.read_bytes() for path in sorted(_HERE.glob("*.py"))]
    versions = f"numba {numba.__version__}, llvmlite {llvmlite.__version__}"
    return hashlib.sha256(b"".join([*sources, versions.encode()])).hexdigest() if sources else ""


def directories() -> list[Path]:
    """Where compiled kernels are looked for, in order; the first that can be written keeps new ones. None in a zip or a frozen program."""
    if not stamp():
        return []
    name = f"fastbn-{stamp()[:16]}"
    if config.CACHE_DIR:
        return [Path(config.CACHE_DIR, name)]
    return [_HERE / "__pycache__", Path(AppDirs(appname="numba", appauthor=False).user_cache_dir, name)]


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

    directory: Path

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _Locator:
        """Of whatever function: its name tells its files apart."""
        return cls()

    def ensure_cache_path(self) -> None:
        """Nothing: `Cache` has seen to it."""

    def get_cache_path(self) -> str:
        """The directory."""
        return str(self.directory)

    def get_source_stamp(self) -> str:
        """What the files were compiled from."""
        return stamp()

    def get_disambiguator(self) -> str:
        """Nothing to tell apart."""
        return "0"


@lru_cache(maxsize=8)
def _kind(directory: Path) -> Callable[[Callable[..., Any]], Any]:
    """numba's cache, of functions kept in one directory."""
    locator = type("Locator", (_Locator,), {"directory": directory})
    files = type("Files", (caching.CompileResultCacheImpl,), {"_locator_classes": [locator]})
    kind: Callable[[Callable[..., Any]], Any] = type("FunctionCache", (caching.FunctionCache,), {"_impl_class": files})
    return kind


class Cache:
    """The cache of one function, as numba's dispatchers use it: loads from the first directory that has it, saves to the first it can."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._caches = {directory: _kind(directory)(function) for directory in directories()}
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
                if found is not None and found.signature.args != tuple(signature):  # numba's index is of two processes that saved at once
                    raise ValueError("another function's code")
            except Exception:  # a damaged file, whatever pickle says of it, or one that may not be read: it is compiled anew
                self._damaged.add(directory)
                continue
            if found is not None:
                return found
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep a compiled function, where anything can be kept: a read-only system compiles in memory, and so does a full one."""
        for directory, cache in self._caches.items():
            if writable(directory):
                try:
                    if directory in self._damaged:
                        cache.flush()
                    cache.save_overload(signature, compiled)
                except OSError:
                    continue
                return
