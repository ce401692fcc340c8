"""Blocked Welford: how a channel is cut into blocks, and the scalar arithmetic that merges them.

Plain functions, shared by `Moments`, the schedule and the CPU and CUDA kernels; each target jits its own.
"""

from __future__ import annotations

from typing import Any

__all__ = ["BLOCK", "FAR", "LINEAR", "PANELS", "WORK", "block", "cut", "merge"]

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


def merge(count_a: Any, mean_a: Any, m2_a: Any, count_b: Any, mean_b: Any, m2_b: Any) -> Any:
    """Merge two groups' (count, mean, m2); scalars or arrays alike, and jitted by the kernels.

    The pairwise update of Chan, Golub & LeVeque (1979). At least one count is positive. Written in the shift from a to
    b, so that equal means leave the mean untouched to the last bit.
    """
    count = count_a + count_b
    delta = mean_b - mean_a
    weight = count_b / count
    return count, mean_a + delta * weight, m2_a + m2_b + delta * delta * (count_a * weight)


def block(count: Any, shift: Any, total: Any, squares: Any) -> Any:
    """(mean, m2) of a block from the sums of x - shift and of (x - shift)^2.

    The corrected two-pass algorithm (Chan, Golub & LeVeque 1983): exact in the shift, so that a shift near the mean
    loses nothing. Rounding may leave m2 a little below zero; NaN stays NaN.
    """
    offset = total / count
    m2 = squares - offset * total
    return shift + offset, 0.0 if m2 < 0.0 else m2
