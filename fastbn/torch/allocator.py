"""Memory for large results, taken again from results that are gone.

What is held is the system's to take whenever it runs short of memory (MADV_FREE), so that no process ends for it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbn.arguments import config

# Fresh pages cost more than a norm: 33 MB take 16 ms from malloc, 3.6 in huge pages, nothing where they are held
# already; to normalize them takes 1.6.
HUGE = 2**21  # bytes of a huge page


class Block(NamedTuple):
    """A mapping, larger by a huge page than its size, and its bytes from the first boundary of a huge page on."""

    size: int
    mapped: mmap.mmap
    bytes: Any


# No locks: a tensor may go at any bytecode of any thread, and a fork may come while one is held. Each step below is one
# operation of a dict or a deque.
_free: deque[Block] = deque()  # the longest unused first
_lent: dict[int, tuple[weakref.ref[Any], Block]] = {}  # by the identity of the reference


def like(x: Tensor) -> Tensor:
    """Memory in the order of dense x on the CPU, on a boundary of a huge page.

    It can't be resized. Other results' values are in it.
    """
    memory = torch.from_numpy(_bytes(x.nbytes)).view(x.dtype)
    return torch.empty(0, dtype=x.dtype, device="cpu").set_(memory.untyped_storage(), 0, x.shape, x.stride())


def empty_cache() -> None:
    """Give the memory of large results that are gone back to the system, as `torch.cuda.empty_cache` does on a GPU.

    Results of 4 MiB and more leave theirs to the next ones of the same size, up to ``FASTBN_KEEP_BYTES`` in all. The
    system takes it by itself where memory is short; tools that show a process's memory count it until then.
    """
    _free.clear()


# A child would share the pages, and both would copy them when they write: 4 KiB at a time, for huge pages are split for
# it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=empty_cache)


def kept() -> int:
    """Bytes of memory that is held for the next results."""
    return sum(block.size for block in list(_free))


def _bytes(nbytes: int) -> Any:
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    block = _reused(size) or _allocated(size)
    view = block.bytes[:nbytes]  # an array of its own, which goes with the tensor
    reference = weakref.ref(view, _release)
    _lent[id(reference)] = reference, block
    return view


def _reused(size: int) -> Block | None:
    """The block of that size that was used last, taken."""
    for block in list(_free)[::-1]:
        if block.size == size:
            with suppress(ValueError):  # another thread was first
                _free.remove(block)
                return block
    return None


def _allocated(size: int) -> Block:
    try:
        mapped = _mapped(size)
    except OSError:
        empty_cache()
        try:
            mapped = _mapped(size)
        except OSError as error:
            raise MemoryError(f"result: {size} bytes can't be allocated; want a smaller batch") from error
    memory = np.frombuffer(mapped, np.uint8)
    start = -memory.ctypes.data % HUGE
    _advise(mapped, "MADV_HUGEPAGE", start, size // HUGE * HUGE)  # whole ones: no result takes more memory for it
    return Block(size, mapped, memory[start : start + size])


def _mapped(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size + HUGE)
    return mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _advise(mapped: mmap.mmap, name: str, *span: int) -> bool:
    """Whether the system took the advice: it may not know it, or have locked the pages."""
    try:
        mapped.madvise(getattr(mmap, name), *span)
    except (AttributeError, OSError):
        return False
    return True


def _release(reference: weakref.ref[Any]) -> None:
    """Keep the block of a result that is gone, if the system can take it; the longest unused ones go for it."""
    block = _lent.pop(id(reference))[1]
    if block.size <= config.KEEP_BYTES and _advise(block.mapped, "MADV_FREE"):
        _free.append(block)
        excess = kept() - config.KEEP_BYTES
        with suppress(IndexError):  # another thread was first
            while excess > 0:
                excess -= _free.popleft().size
