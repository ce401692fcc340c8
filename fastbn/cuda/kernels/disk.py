"""Compiled kernels of CUDA on disk, beside those of the CPU.

A forward's three take seconds in every process that compiles them.
"""

from __future__ import annotations

import hashlib
import os
import pkgutil
import uuid
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from numba.cuda import config

from fastbn.cpu.kernels import cache

__all__ = ["load", "save", "stamp"]

_COMPILERS = ("numba-cuda", "cuda-core", "cuda-bindings", "nvidia-nvjitlink", "nvidia-nvjitlink-cu12")
_SETTINGS = ("OPT", "FORCE_CUDA_CC", "CUDA_DEBUGINFO_DEFAULT")


@lru_cache(maxsize=1)
def stamp() -> str:
    """A digest of what kernels are compiled from and by. Empty where that can't be read: nothing is kept then."""
    found = hashlib.sha256(cache.stamp().encode())
    for module in sorted(
        pkgutil.iter_modules([str(Path(__file__).parent)], f"{__package__}."), key=lambda module: module.name
    ):
        spec: Any = module.module_finder.find_spec(module.name, None)
        try:
            found.update(spec.loader.get_data(spec.origin))
        except (AttributeError, OSError):  # of a frozen program
            return ""
    for name in _COMPILERS:
        with suppress(metadata.PackageNotFoundError):
            found.update(f"{name} {metadata.version(name)}".encode())
    settings = {name: getattr(config, name, None) for name in _SETTINGS}
    found.update(f"{_compiler()} {settings}".encode())
    return found.hexdigest() if cache.stamp() else ""


def _compiler() -> str:
    """Which libNVVM it is, for it may be a toolkit's and has no version of its own: where, of what size and day."""
    from cuda import pathfinder

    try:
        path = str(pathfinder.load_nvidia_dynamic_lib("nvvm").abs_path)
        seen = os.stat(path)
    except Exception:  # none here: what is kept may still run
        return ""
    return f"{path} {seen.st_size} {seen.st_mtime_ns}"


def load(name: str) -> tuple[str, bytes] | None:
    """(entry, code) as they were saved; None where they weren't, are of other sources, or damaged."""
    for path in _paths(name):
        with suppress(OSError, MemoryError, ValueError):  # whoever wrote it: it is compiled anew
            digest, entry, code = path.read_bytes().split(b"\n", 2)
            if digest == _digest(name, entry, code):
                return entry.decode(), code
    return None


def save(name: str, entry: str, code: bytes) -> None:
    """Keep a kernel, where anything can be kept: a file is there whole or not at all."""
    whole = b"\n".join((_digest(name, entry.encode(), code), entry.encode(), code))
    for path in _paths(name):
        if cache.writable(path.parent):
            with suppress(OSError):  # a full disk: what was compiled serves without a file
                beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")  # not tempfile's, which others may not read
                try:
                    beside.write_bytes(whole)
                    os.replace(beside, path)
                finally:
                    beside.unlink(missing_ok=True)
                return


def _digest(name: str, entry: bytes, code: bytes) -> bytes:
    """Of all that a kernel is taken by; neither of the first two has a line break."""
    return hashlib.sha256(b"\n".join((f"{stamp()} {name}".encode(), entry, code))).hexdigest().encode()


def _paths(name: str) -> list[Path]:
    return [directory / f"cuda-{name}.cubin" for directory in cache.directories()] if stamp() else []
