"""PyTorch's own threads, for fastbn's kernels beside PyTorch's: two pools would take the processors from each other."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

import torch

from fastbn.cpu import threads
from fastbn.cpu.team import Runtime

__all__ = ["of_pytorch", "runtime"]

_process = os.getpid()  # a forked child's copy of the threads is not whole, and it would wait for them for ever


@lru_cache(maxsize=1)
def _runtime() -> Runtime | None:
    """The GNU OpenMP that PyTorch is linked with; None where it has another, or none."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        # loaded already; its names, and those it needs
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return Runtime(*(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in Runtime._fields))
    except (OSError, AttributeError):
        return None


def runtime() -> Runtime | None:
    """PyTorch's threads, where these are known and this process may use them."""
    return _runtime() if os.getpid() == _process else None


def of_pytorch() -> threads.on_team:
    """A context in which the calling thread's kernels run on PyTorch's threads."""
    return threads.on_team(runtime())
