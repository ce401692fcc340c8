"""PyTorch's own threads, for fastbn's kernels beside PyTorch's: two pools would take the processors from each other."""

from __future__ import annotations

import os
from functools import lru_cache

from fastbn.cpu import threads
from fastbn.cpu.team import Runtime
from fastbn.torch.private import openmp_addresses

__all__ = ["of_pytorch", "runtime"]

_process = os.getpid()  # a forked child's copy of the threads is not whole, and it would wait for them for ever


@lru_cache(maxsize=1)
def _runtime() -> Runtime | None:
    addresses = openmp_addresses(Runtime._fields)
    return None if addresses is None else Runtime(*addresses)


def runtime() -> Runtime | None:
    """PyTorch's threads, where these are known and this process may use them."""
    return _runtime() if os.getpid() == _process else None


def of_pytorch() -> threads.on_team:
    """A context in which the calling thread's kernels run on PyTorch's threads."""
    return threads.on_team(runtime())
