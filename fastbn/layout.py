"""Any array and channel axis -> a canonical view; and all validation of arguments.

Canonical views are (N, C, S) with S contiguous ("channels first") or (R, C) with C contiguous ("channels last"). Batch normalization
does not care in which order a channel's values come, so the other axes are ordered by their strides: C and Fortran order, transposed
and strided arrays become canonical without a copy wherever two strides describe them; the rest is copied, once, here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]
Kind = Literal["channels_first", "channels_last"]

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
ALIGNMENT = 64
ALIGNED_BYTES = 64 * 1024  # from here on the alignment gains more than the 2 us that it costs


class Plan:
    """How arrays of one shape and memory order become canonical.

    `kind` tells which kernels run, `dims` is (N, C, S) or (R, C), `order` the transposition before the reshape to `dims` (None where the
    plain reshape does), `count` the values per channel of `channels`.
    """

    __slots__ = ("_own", "channels", "count", "dims", "kind", "order", "shape")

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], axis: int, outer: Sequence[int], inner: Sequence[int], last: bool
    ) -> None:
        self.shape = shape
        self.channels = shape[axis]
        n, s = (math.prod(shape[a] for a in axes) for axes in (outer, inner))
        self.kind: Kind = "channels_last" if last else "channels_first"
        self.dims = (n, self.channels) if last else (n, self.channels, s)
        self.count = n * s
        ones = [a for a in range(len(shape)) if shape[a] == 1 and a != axis]
        order = (*ones, *outer, axis, *inner)
        significant = [a for a in order if shape[a] != 1]
        self.order = None if significant == sorted(significant) else order
        # Memory order of a result: as the planned array has it, also where its channels are the outermost axis.
        outermost = not last and all(abs(strides[axis]) > abs(strides[a]) for a in outer)
        own = (*ones, axis, *outer, *inner) if outermost else order
        self._own = None if own == tuple(range(len(shape))) else own

    def view(self, array: Array) -> Array | None:
        """The canonical view of an array of this plan's shape, or None where that would take a copy."""
        moved = array if self.order is None else array.transpose(self.order)
        view = moved.reshape(self.dims)
        if view.size == 0 or (self.order is None and array.flags.c_contiguous):
            return view
        if self.dims[-1] == 1:  # rows of one value would waste a vector each
            return view if self.count == 1 else None
        return view if view.strides[-1] == array.itemsize and np.may_share_memory(view, array) else None

    def empty(self, dtype: DTypeLike) -> tuple[Array, Array]:
        """Fresh memory in this memory order: (array of `shape`, its canonical view), on a 64-byte boundary where it is large."""
        dtype = np.dtype(dtype)
        own = self._own or range(len(self.shape))
        shape = tuple(self.shape[a] for a in own)
        size = math.prod(shape) * dtype.itemsize
        if size < ALIGNED_BYTES:
            whole = np.empty(shape, dtype)
        else:  # np.empty aligns to 16 bytes, streaming stores want 64
            raw = np.empty(size + ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            whole = raw[start : start + size].view(dtype).reshape(shape)
        if self._own is not None:
            whole = whole.transpose(np.argsort(own))
        return whole, cast(Array, self.view(whole))  # a compact array in this order always has one

    def restore(self, canonical: Array) -> Array:
        """The inverse of `view`: a canonical array in this plan's shape."""
        if self.order is None:
            return canonical.reshape(self.shape)
        moved: Array = canonical.reshape([self.shape[a] for a in self.order]).transpose(np.argsort(self.order))
        return moved


@lru_cache(maxsize=1024)
def _plan(shape: tuple[int, ...], strides: tuple[int, ...], axis: int, itemsize: int) -> Plan:
    others = [a for a in range(len(shape)) if a != axis and shape[a] != 1]
    others.sort(key=lambda a: -abs(strides[a]))
    if shape[axis] > 1 and strides[axis] == itemsize and not any(strides[a] == itemsize for a in others):
        return Plan(shape, strides, axis, others, (), last=True)
    inner: list[int] = []
    step = itemsize
    while others and strides[others[-1]] == step:
        inner.insert(0, others.pop())
        step *= shape[inner[0]]
    return Plan(shape, strides, axis, others, inner, last=False)


def plan_of(x: Array, axis: int) -> tuple[Plan, Array]:
    """The plan of a checked array, and its canonical view (a copy only where two strides can't describe it)."""
    plan = _plan(x.shape, x.strides, axis, x.itemsize)
    if x.dtype.isnative and (view := plan.view(x)) is not None:
        return plan, view
    compact = np.empty_like(x, dtype=x.dtype.newbyteorder("="), subok=False)
    compact[...] = x
    plan = _plan(compact.shape, compact.strides, axis, compact.itemsize)
    view = plan.view(compact)
    assert view is not None  # a compact array always has one
    return plan, view


def plan_for(shape: tuple[int, ...], dtype: DTypeLike, axis: int, channels_last: bool = False) -> Plan:
    """The plan of a compact array that need not exist: C order, or channels innermost in memory."""
    dtype = np.dtype(dtype)
    axes = [a for a in range(len(shape)) if a != axis] + [axis] if channels_last else list(range(len(shape)))
    strides = [dtype.itemsize * math.prod(max(shape[b], 1) for b in axes[axes.index(a) + 1 :]) for a in range(len(shape))]
    return _plan(shape, tuple(strides), axis, dtype.itemsize)


def view_as(plan: Plan, array: Array) -> Array:
    """The canonical view of a checked input that goes beside the planned one; copied where its memory order differs."""
    view = plan.view(array) if array.dtype.isnative else None
    if view is None:
        whole, view = plan.empty(array.dtype.newbyteorder("="))
        whole[...] = array
    return view


def as_input(x: ArrayLike, name: str = "x") -> Array:
    """The array of a floating-point input; TypeError for anything else."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: given a masked array, whose mask would be ignored; want a plain array, for example {name}.filled(...)")
    if type(x) is not np.ndarray:
        if hasattr(x, "__cuda_array_interface__"):
            raise TypeError(f"{name}: given an array on a GPU ({type(x).__name__}), want a host array: copy it to the host first")
        x = _as_array(x, name)
    if x.dtype.newbyteorder("=") not in FLOATS:
        raise TypeError(f"{name}: given dtype {x.dtype}, want float32 or float64: convert it first, e.g. {name}.astype('float32')")
    return x


def _as_array(value: ArrayLike, name: str, dtype: np.dtype[Any] | None = None) -> Array:
    """The array; `dtype` for what has none of its own."""
    try:
        return np.asarray(value, None if hasattr(value, "dtype") else dtype)
    except ValueError as error:
        raise TypeError(f"{name}: given ragged or mixed data ({error}), want an array of float32 or float64") from None


def check_axis(shape: tuple[int, ...], axis: Any, name: str = "x") -> int:
    """The channel axis, counted from the front; ValueError for a rank below 2, an axis out of range or no channels."""
    rank = len(shape)
    if rank < 2:
        raise ValueError(f"{name}: given rank {rank}, shape {shape}; want rank 2 or more: a batch axis and a channel axis")
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis: given {axis!r}, want an integer from {-rank} to {rank - 1}")
    if not -rank <= axis < rank:
        raise ValueError(f"axis: given {axis}, want one from {-rank} to {rank - 1} for shape {shape}")
    if shape[axis] == 0:
        raise ValueError(f"{name}: given shape {shape}, with no channels along axis {axis}; want at least one")
    return int(axis) % rank


def check_shape(shape: Any) -> tuple[int, ...]:
    """The shape of an array that need not exist."""
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        raise TypeError(f"shape: given {shape!r}, want a tuple of integers, like (32, 64, 56, 56)") from None
    if min(sizes, default=0) < 0:
        raise ValueError(f"shape: given {sizes}, want sizes of 0 or more")
    return sizes


def check_like(array: ArrayLike, x: Array, name: str) -> Array:
    """An input that must have the shape and dtype of x (dy)."""
    array = as_input(array, name)
    if array.shape != x.shape:
        raise ValueError(f"{name}: given shape {array.shape}, want {x.shape}, the shape of x")
    if array.dtype.newbyteorder("=") != x.dtype.newbyteorder("="):
        raise TypeError(f"{name}: given dtype {array.dtype}, want {x.dtype}, the dtype of x: convert one of them")
    return array


def check_out(out: Any, x: Array, *inputs: Array) -> None:
    """An `out` that can take the result: x's shape and dtype, writeable, and each input either itself or apart from it."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: given {type(out).__name__}, want a numpy.ndarray of shape {x.shape} and dtype {x.dtype}")
    if out.dtype != x.dtype.newbyteorder("="):
        raise TypeError(f"out: given dtype {out.dtype}, want {x.dtype.newbyteorder('=')}, the dtype of x")
    if out.shape != x.shape:
        raise ValueError(f"out: given shape {out.shape}, want {x.shape}, the shape of x")
    if not out.flags.writeable:
        raise ValueError("out: given a read-only array, want one that can be written")
    if not out.flags.c_contiguous and _repeats(out):
        raise ValueError(f"out: given an array whose elements share memory (strides {out.strides}), want one of its own memory")
    for array in (x, *inputs):
        if np.may_share_memory(out, array) and not same_memory(out, array) and _overlap(out, array):
            raise ValueError("out: given an array that overlaps an input in part; want the input itself, or memory apart from it")


def _repeats(array: Array) -> bool:
    """Whether elements may share memory: an axis that steps by less than the axes within it reach."""
    reach = array.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True)):
        if n > 1 and stride < reach:
            return array.size > 0
        reach += stride * (n - 1)
    return False


def same_memory(a: Any, b: Array) -> bool:
    """Whether two arrays are element for element the same memory."""
    if a is b or not isinstance(a, np.ndarray):
        return a is b
    return a.ctypes.data == b.ctypes.data and a.strides == b.strides and a.shape == b.shape


def _overlap(a: Array, b: Array) -> bool:
    try:
        return bool(np.shares_memory(a, b, max_work=cast(Any, 100_000)))
    except np.exceptions.TooHardError:
        return True  # can't be told in reasonable time: refuse rather than corrupt


def as_parameter(value: ArrayLike | None, channels: int, dtype: np.dtype[Any], name: str) -> Array | None:
    """gamma, beta: shape (C,) in the dtype of x, or None."""
    if value is None:
        return None
    array = value if type(value) is np.ndarray else _as_array(value, name, dtype)
    dtype = dtype.newbyteorder("=")
    if array.dtype != dtype:
        raise TypeError(f"{name}: given dtype {array.dtype}, want {dtype}, as x has: convert one of them")
    if array.shape != (channels,):
        raise ValueError(f"{name}: given shape {array.shape}, want ({channels},), one value per channel of x")
    return array


def as_statistic(value: ArrayLike, channels: int, name: str) -> NDArray[np.float64]:
    """mean, var: shape (C,), float32 or float64 given, float64 returned (shared where it is that already)."""
    array = _as_array(value, name)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise TypeError(f"{name}: given dtype {array.dtype}, want float32 or float64")
    if array.shape != (channels,):
        raise ValueError(f"{name}: given shape {array.shape}, want ({channels},), one value per channel of x")
    return array.astype(np.float64, copy=False)


def check_running(mean: ArrayLike | None, var: ArrayLike | None) -> None:
    """running_mean and running_var come together or not at all."""
    if (mean is None) != (var is None):
        given, absent = ("mean", "var") if var is None else ("var", "mean")
        raise ValueError(f"given running {given} without running {absent}; want both, or neither for batch statistics")


def _number(value: Any, message: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(message.format(value)) from None


def check_eps(eps: Any, training: bool) -> float:
    """eps: positive in training, not negative at inference; in units of x squared."""
    value = _number(eps, "eps: given {!r}, want a number")
    if training and not 0 < value < math.inf:
        raise ValueError(f"eps: given {eps}, want a positive number in training, e.g. 1e-5")
    if not 0 <= value < math.inf:
        raise ValueError(f"eps: given {eps}, want a number that is not negative")
    return value


def check_count(x: Array, channels: int) -> None:
    """Training needs more than one value per channel (none at all is an empty batch, and allowed)."""
    if x.size == channels:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")


def check_moments(moments: Any, channels: int, count: int) -> None:
    """Statistics that were taken of an array like x."""
    if not (hasattr(moments, "count") and hasattr(moments, "m2")):
        raise TypeError(f"moments: given {type(moments).__name__}, want the Moments that batch_norm returned")
    if moments.mean.shape != (channels,):
        raise ValueError(f"moments: given {moments.mean.size} channels, want {channels}, as x has")
    if moments.count != count:
        raise ValueError(f"moments: given statistics of {moments.count} values per channel, want {count}, as x has")


def check_channels(num_features: Any) -> int:
    """A positive number of channels."""
    if isinstance(num_features, bool) or not isinstance(num_features, (int, np.integer)):
        raise TypeError(f"num_features: given {num_features!r}, want a positive integer")
    if num_features < 1:
        raise ValueError(f"num_features: given {num_features}, want at least 1")
    return int(num_features)


def check_momentum(momentum: Any) -> float | None:
    """The weight of the new value; None for the cumulative average. Outside 0 to 1 it extrapolates, as PyTorch lets it."""
    if momentum is None:
        return None
    value = _number(momentum, "momentum: given {!r}, want a number from 0 to 1, or None for the cumulative average")
    if not math.isfinite(value):
        raise ValueError(f"momentum: given {momentum}, want a finite number: the weight of the new value (1 - decay elsewhere)")
    return value


def check_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """float32 or float64."""
    try:
        given = np.dtype(dtype)
    except TypeError:
        given = None
    if given is None or given not in FLOATS:  # None equals float64 to NumPy
        raise TypeError(f"dtype: given {repr(dtype) if given is None else given}, want float32 or float64")
    return given


def check_features(x: Array, axis: int, channels: int, dtype: np.dtype[Any]) -> None:
    """An input that goes with a layer's parameters."""
    axis = check_axis(x.shape, axis)
    if x.shape[axis] != channels:
        raise ValueError(f"x: given {x.shape[axis]} channels along axis {axis} of shape {x.shape}, want {channels}, as this layer has")
    if x.dtype.newbyteorder("=") != dtype:
        raise TypeError(f"x: given dtype {x.dtype}, want {dtype}, this layer's: convert x, or make the layer with dtype='{x.dtype}'")


def check_state(state: Mapping[str, Any], own: Mapping[str, Array]) -> dict[str, Array]:
    """The values of a state_dict, each checked against what the layer has, before any is taken over."""
    check_running(state.get("running_mean"), state.get("running_var"))
    missing = [key for key in own if key not in state and key != "num_batches_tracked"]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise ValueError(f"state_dict: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}; want {list(own)}")
    checked = {}
    for key, value in state.items():
        array = _as_array(value, f"state_dict: {key}")
        if array.dtype.kind not in "fiu":
            raise TypeError(f"state_dict: {key} given as dtype {array.dtype}, want numbers")
        if array.shape != own[key].shape:
            raise ValueError(f"state_dict: {key} given shape {array.shape}, want {own[key].shape}")
        if key == "num_batches_tracked" and not (array >= 0 and array == np.trunc(array)):
            raise ValueError(f"state_dict: num_batches_tracked given {array}, want a whole number, 0 or more")
        checked[key] = array
    return checked
