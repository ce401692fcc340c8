"""Where the result of a call goes, and who serves arrays on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import layout
from fastbn.backends import select_device

Array = NDArray[Any]

HOST = "stream: given one for an array on the host, want an array on a GPU, or no stream"


def target(plan: layout.Plan, dtype: np.dtype[Any], out: Array | None) -> tuple[Array, Array, bool]:
    """Where a result goes: what the caller gets, the canonical view that is written, and whether to copy it over."""
    if out is None:
        return *plan.empty(dtype), False
    view = plan.view(out)
    if view is None:  # another memory order than x: compute beside it, then copy
        return out, plan.empty(dtype)[1], True
    return out, view, False


def finish(plan: layout.Plan, result: Array, target: Array) -> Array:
    """Copy a kernel's result to the caller's array."""
    result[...] = plan.restore(target)
    return result


def on_gpu(backend: str | None) -> Any:
    """The functions for arrays on a GPU; BackendUnavailable where they can't be."""
    select_device(backend)
    from fastbn.cuda import backend as device

    return device


def gradients_on_gpu(backend: str | None) -> Any:
    """The same of their gradients."""
    select_device(backend)
    from fastbn.cuda import gradients

    return gradients


def empty(x: Array, out: Array | None) -> Array:
    """The result for an empty x."""
    return np.empty(x.shape, x.dtype.newbyteorder("=")) if out is None else out
