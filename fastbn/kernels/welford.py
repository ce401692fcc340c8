"""The scalar arithmetic of blocked Welford, shared by the CPU and CUDA kernels. Plain functions: each target jits them for itself."""

from __future__ import annotations

from typing import Any

from fastbn.moments import merge

__all__ = ["block", "merge"]


def block(count: Any, shift: Any, total: Any, squares: Any) -> Any:
    """(mean, m2) of a block from the sums of x - shift and of (x - shift)^2.

    The corrected two-pass algorithm (Chan, Golub & LeVeque 1983): exact in the shift, so that a shift near the mean loses nothing.
    Rounding may leave m2 a little below zero; NaN stays NaN.
    """
    offset = total / count
    m2 = squares - offset * total
    return shift + offset, 0.0 if m2 < 0.0 else m2
