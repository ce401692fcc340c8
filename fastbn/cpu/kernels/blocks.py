"""How a channel's slab is cut into blocks.

Plain arithmetic, for the schedule and, jitted, for kernels that are called without one.
"""

from __future__ import annotations

from typing import Any

BLOCK = 256  # vectors of 64 bytes: half a first-level cache
FAR = 2**22  # bytes: larger arrays lie beyond the cores' own caches, and are walked as one stream of memory
LINEAR = 128  # columns: narrower rows are one stream of memory, which several rows at a time break up
PANELS = 256  # columns: wider rows, read panel by panel, would be runs too short for the prefetcher
WORK = 12  # rows of a task's workspace in the kernels on columns


def cut(N: Any, S: Any, lanes: Any, block: Any) -> Any:
    """(rows of a block where it is whole rows, else pieces of a row, blocks) of N rows of S values."""
    vectors = -(-S // lanes)
    if vectors > block:
        splits = -(-vectors // block)
        return 1, splits, N * splits
    rows = min(N, block // vectors)
    return rows, 1, -(-N // rows)
