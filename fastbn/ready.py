"""What a call on arrays of one shape, dtype and memory order needs to know, found once.

A small call is over in the time that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from numpy.typing import NDArray

from fastbn.arguments import checks, config, dtypes, layout, scalars
from fastbn.backends import Backend, select

Array = NDArray[Any]
Ints = tuple[int, ...]


class Ready(NamedTuple):
    """A planned array, and who serves it."""

    plan: layout.Plan
    channels: int
    values: int  # per channel
    kind: dtypes.Dtype  # of parameters
    integers: bool  # which only statistics are taken of
    served: Backend
    # for arrays that are all C-contiguous, where the backend has a shorter way for these
    forward: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    normalize: Callable[..., Any] | None


def ready(x: Array, axis: int, backend: str | None) -> Ready:
    """Of a checked array; TypeError, ValueError or BackendUnavailable where its axis or the backend can't be."""
    if type(axis) is not int:  # to the cache, 1.0 and True would be 1
        axis = checks.check_axis(x.shape, axis)
    if backend is not None and type(backend) is not str:  # the cache would want to hash it
        backend = scalars.check_backend(backend)
    return _ready(x.shape, x.strides, x.dtype, axis, backend, config.BACKEND)


@lru_cache(maxsize=1024)
def _ready(
    shape: Ints, strides: Ints, dtype: dtypes.Dtype, axis: int, backend: str | None, default: str | None
) -> Ready:
    plan, served = layout.planned(shape, strides, axis, dtype.itemsize), select(backend)
    forward = backward = normalize = None
    integers = dtypes.small(dtype)
    if (
        plan.count
        and not integers
        and plan.order is None
        and dtype.isnative
        and strides == layout.compact(shape, dtype.itemsize)
    ):
        forward = served.compact("forward", shape, plan.dims, dtype)
        backward = served.compact("backward", shape, plan.dims, dtype)
        normalize = served.compact("normalize", shape, plan.dims, dtype)
    return Ready(
        plan, plan.channels, plan.count, dtypes.of_parameters(dtype), integers, served, forward, backward, normalize
    )
