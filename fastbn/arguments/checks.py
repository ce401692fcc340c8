"""All validation of arguments: what was given, what is wanted, what to do.

Almost every call is right: each check of an array first asks, in the fewest steps, whether it is what it should be.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastbn.arguments import dtypes, overlap, scalars
from fastbn.arguments.foreign import as_array as _as_array
from fastbn.arguments.scalars import check_eps as check_eps
from fastbn.arguments.scalars import check_momentum as check_momentum

Array = NDArray[Any]


def as_input(x: ArrayLike, name: str = "x", integers: bool = False) -> Array:
    """The array of a floating-point input, or also of one of small integers; TypeError for anything else."""
    if type(x) is np.ndarray and x.dtype in dtypes.NATIVE:
        return x
    array = x if type(x) is np.ndarray else _as_array(x, name)
    if not (dtypes.supported(array.dtype) or (integers and dtypes.small(array.dtype))):
        wanted = f"{dtypes.WANTED}, or integers of 8 or 16 bits" if integers else dtypes.WANTED
        to = "float64" if integers and array.dtype.kind in "iu" else "float32"  # which would round those of 32 bits
        how = f"{name}.astype('{to}')" if hasattr(x, "astype") else f"numpy.asarray({name}, '{to}')"
        raise TypeError(f"{name}: given dtype {array.dtype}, want {wanted}: convert it first, e.g. {how}")
    return array


def check_axis(shape: tuple[int, ...], axis: Any, name: str = "x") -> int:
    """The channel axis, counted from the front; ValueError for a rank below 2, an axis out of range or no channels."""
    rank = len(shape)
    if type(axis) is int and -rank <= axis < rank and rank > 1 and shape[axis]:
        return axis % rank
    if rank < 2:
        raise ValueError(
            f"{name}: given rank {rank}, shape {shape}; want rank 2 or more: a batch axis and a channel axis"
        )
    channel = scalars.whole(axis, "axis", f"an integer from {-rank} to {rank - 1}")
    if not -rank <= channel < rank:
        raise ValueError(f"axis: given {scalars.shown(channel)}, want one from {-rank} to {rank - 1} for shape {shape}")
    if shape[channel] == 0:
        raise ValueError(f"{name}: given shape {shape}, with no channels along axis {channel}; want at least one")
    return channel % rank


def check_shape(shape: Any) -> tuple[int, ...]:
    """The shape of an array that need not exist."""
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except Exception:  # of iterating whatever it is, too
        raise TypeError(
            f"shape: given {scalars.shown(shape)}, want a tuple of integers, like (32, 64, 56, 56)"
        ) from None
    if min(sizes, default=0) < 0 or math.prod(n for n in sizes if n) >= scalars.WHOLE // 16:
        raise ValueError(
            f"shape: given {scalars.shown(sizes)}, want sizes of 0 or more, of an array that an address space holds"
        )
    return sizes


def check_like(array: ArrayLike, x: Array, name: str) -> Array:
    """An input that must have the shape and dtype of x (dy)."""
    if type(array) is np.ndarray and array.dtype is x.dtype and array.shape == x.shape:
        return array
    array = as_input(array, name)
    if array.shape != x.shape:
        raise ValueError(f"{name}: given shape {array.shape}, want {x.shape}, the shape of x")
    if array.dtype.newbyteorder("=") != x.dtype.newbyteorder("="):
        raise TypeError(f"{name}: given dtype {array.dtype}, want {x.dtype}, the dtype of x: convert one of them")
    return array


def check_out(out: Any, x: Array, *inputs: Array, **others: Any) -> None:
    """An `out` that can take the result.

    x's shape and dtype, writeable, each input either itself or apart from it, the others apart.
    """
    if not (type(out) is np.ndarray and out.dtype is x.dtype and out.dtype.isnative and out.shape == x.shape):
        _check_kind(out, x)
    flags = out.flags
    if not flags.writeable:
        raise ValueError("out: given a read-only array, want one that can be written")
    owned = flags.c_contiguous and flags.owndata
    if not (owned and _no_views(out, (x, *inputs), itself=True) and _no_views(out, others.values(), itself=False)):
        check_place(out, x, *inputs)
        check_apart(out, **others)


def _no_views(owner: Array, arrays: Iterable[Any], itself: bool) -> bool:
    """Whether arrays are seen not to share an owner's memory by whose views they are.

    In a third of the time that bounds of memory take.
    """
    for array in arrays:
        if array is None or (itself and array is owner):
            continue
        if type(array) is not np.ndarray or array is owner:
            return False
        base = array.base
        if base is not None and (base is owner or type(base) is not np.ndarray or base.base is not None):
            return False
    return True


def check_place(out: Array, *inputs: Array) -> None:
    """Memory that a result may take.

    Its elements apart from each other, and each input either itself or apart from it.
    """
    flags = out.flags
    if not flags.c_contiguous and overlap.repeats(out):
        raise ValueError(
            f"out: given an array whose elements share memory (strides {out.strides}), want one of its own memory"
        )
    for array in inputs:
        # the second in a third of the time that bounds of memory take
        if out is array or (flags.owndata and array.flags.owndata):
            continue
        if overlap.shared(out, array) and not overlap.same_memory(out, array):
            raise ValueError(
                "out: given an array that overlaps an input in part; want the input itself, or memory apart from it"
            )


def check_apart(out: Array, **others: Any) -> None:
    """Memory that a result may take beside parameters and statistics as they were given.

    Those of a channel are read after another's y.
    """
    owned = out.flags.owndata
    for name, value in others.items():
        if value is None or (owned and type(value) is np.ndarray and value.flags.owndata):
            continue
        if overlap.shared(out, value if isinstance(value, np.ndarray) else _as_array(value, name)):
            raise ValueError(f"out: given an array that overlaps {name}; want memory apart from it")


def _check_kind(out: Any, x: Array) -> None:
    """TypeError or ValueError for an `out` unlike x."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: given {type(out).__name__}, want a numpy.ndarray of shape {x.shape} and dtype {x.dtype}")
    if isinstance(out, np.ma.MaskedArray):
        raise TypeError(
            "out: given a masked array, whose mask would stay as it is; want a plain array, for example out.data"
        )
    if out.dtype != (wanted := x.dtype.newbyteorder("=")):
        order = "" if out.dtype.isnative else " in swapped byte order"  # of which bfloat16's name says nothing
        raise TypeError(f"out: given dtype {out.dtype}{order}, want {wanted}, the dtype of x")
    if out.shape != x.shape:
        raise ValueError(f"out: given shape {out.shape}, want {x.shape}, the shape of x")


def as_parameter(value: ArrayLike | None, channels: int, dtype: dtypes.Dtype, name: str) -> Array | None:
    """gamma, beta: shape (C,) in `dtype`, that of parameters beside x, without gaps as kernels want them; or None."""
    if value is None:
        return None
    if type(value) is np.ndarray and value.dtype is dtype and value.shape == (channels,) and value.flags.c_contiguous:
        return value
    array = value if type(value) is np.ndarray else _as_array(value, name, dtype)
    if array.dtype is not dtype and array.dtype != dtype:
        raise TypeError(
            f"{name}: given dtype {array.dtype}, want {dtype} beside this x: convert it, e.g. {name}.astype('{dtype}')"
        )
    if array.shape != (channels,):
        raise ValueError(f"{name}: given shape {array.shape}, want ({channels},), one value per channel of x")
    return array if array.flags.c_contiguous else array.copy()


def as_statistic(value: ArrayLike, channels: int, name: str) -> NDArray[np.float64]:
    """mean, var: shape (C,), float32 or float64 given, float64 without gaps returned, shared where it is that."""
    if (
        type(value) is np.ndarray
        and value.dtype is dtypes.FLOAT64
        and value.shape == (channels,)
        and value.flags.c_contiguous
    ):
        return value
    if type(value) is np.ndarray and value.dtype is dtypes.FLOAT32 and value.shape == (channels,):
        return value.astype(np.float64)
    array = _as_array(value, name)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise TypeError(f"{name}: given dtype {array.dtype}, want float32 or float64")
    if array.shape != (channels,):
        raise ValueError(f"{name}: given shape {array.shape}, want ({channels},), one value per channel of x")
    return np.ascontiguousarray(array, np.float64)


def well_kept(mean: Any, var: Any, gamma: Any, beta: Any, channels: int, dtype: dtypes.Dtype, written: bool) -> bool:
    """Whether a layer's running statistics are as almost all are, so that `check_kept` need not look at them.

    In 0.3 us.
    """
    if mean is None and var is None:
        return True
    if not (type(mean) is type(var) is np.ndarray and mean.shape == var.shape == (channels,)):
        return False
    # a pickle's is another
    if (mean.dtype is not dtype and mean.dtype != dtype) or (var.dtype is not dtype and var.dtype != dtype):
        return False
    if not written:
        return True
    if not (mean.flags.carray and var.flags.carray and mean.base is None and var.base is None and mean is not var):
        return False  # an array without a base shares memory with its views alone
    if gamma is not None and not (
        type(gamma) is np.ndarray and gamma.base is None and gamma is not mean and gamma is not var
    ):
        return False
    return beta is None or (type(beta) is np.ndarray and beta.base is None and beta is not mean and beta is not var)


def check_kept(arrays: Mapping[str, Any], channels: int, dtype: dtypes.Dtype, written: bool, **beside: Any) -> None:
    """Arrays that a layer keeps: (C,) of float32 or float64.

    Where they will be written of its dtype, and apart, from those beside too.
    """
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(
                f"{name}: given {type(array).__name__}, want a numpy.ndarray of shape ({channels},) and dtype {dtype}"
            )
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(
                f"{name}: given a masked array, whose mask would be ignored; want a plain array: bn.{name}.filled(...)"
            )
        if array.dtype != dtype and (written or array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8)):
            order = "" if array.dtype.isnative else " in swapped byte order"
            raise TypeError(
                f"{name}: given dtype {array.dtype}{order}, want {dtype}, this layer's: bn.{name} = "
                f"bn.{name}.astype('{dtype}')"
            )
        if array.shape != (channels,):
            raise ValueError(
                f"{name}: given shape {array.shape}, want ({channels},), one value per channel of this layer"
            )
        if written and not array.flags.writeable:
            raise ValueError(f"{name}: given a read-only array, want one that can be written: give it a copy")
        if written and overlap.repeats(array):
            raise ValueError(
                f"{name}: given an array whose elements share memory (strides {array.strides}): give it a copy"
            )
    if written:
        check_disjoint(arrays, **beside)


def check_disjoint(arrays: Mapping[str, Array], **beside: Any) -> None:
    """Arrays that will be written, in memory apart from each other and from those beside."""
    for name, array in arrays.items():
        for other, value in (*arrays.items(), *beside.items()):
            if other != name and isinstance(value, np.ndarray) and overlap.shared(array, value):
                raise ValueError(
                    f"{name}: given an array that overlaps {other}, want memory apart from it: give it a copy"
                )


def check_running(mean: ArrayLike | None, var: ArrayLike | None) -> None:
    """running_mean and running_var come together or not at all."""
    if (mean is None) != (var is None):
        given, absent = ("mean", "var") if var is None else ("var", "mean")
        raise ValueError(f"given running {given} without running {absent}; want both, or neither for batch statistics")


def check_count(x: Any, count: int) -> None:
    """Training needs more than one value per channel (none at all is an empty batch, and allowed)."""
    if count == 1:
        how = (
            "give more, or take running statistics: batch_norm_inference, bn.eval() of a layer that keeps them (else "
            "it is as in training)"
        )
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}: {how}")


def check_whole(count: Any, values: int) -> int:
    """The count of a whole batch, of which a part has so many values per channel."""
    whole = scalars.whole(count, "count", "a whole number: the values per channel of all parts together")
    if not values <= whole < scalars.WHOLE:
        wanted = (
            f"at least {values}, the values per channel of this part: count those of all parts"
            if whole < values
            else "one below 2**63"
        )
        raise ValueError(f"count: given {scalars.shown(whole)}, want {wanted}")
    return whole


def check_channels(num_features: Any) -> int:
    """A positive number of channels."""
    channels = scalars.whole(num_features, "num_features", "a positive integer")
    if not 1 <= channels < scalars.WHOLE // 16:  # an array of more has no size in bytes
        raise ValueError(
            f"num_features: given {scalars.shown(channels)}, want at least 1" + (" and fewer" if channels > 1 else "")
        )
    return channels


def check_dtype(dtype: DTypeLike) -> dtypes.Dtype:
    """What x may be of; the name "bfloat16" where `ml_dtypes` is installed."""
    given = dtypes.bfloat16() if isinstance(dtype, str) and dtype == "bfloat16" else dtypes.find(dtype)
    if given is None or not (given.isnative and dtypes.supported(given)):
        raise TypeError(f"dtype: given {scalars.shown(dtype) if given is None else given}, want {dtypes.WANTED}")
    return given


def check_parameter_dtype(dtype: DTypeLike) -> dtypes.Dtype:
    """float32 or float64: what a layer's parameters may be of."""
    given = dtypes.find(dtype)
    if given is None or given not in (dtypes.FLOAT32, dtypes.FLOAT64):  # None equals float64 to NumPy
        raise TypeError(
            f"dtype: given {scalars.shown(dtype) if given is None else given}, want float32 or float64, the dtype of "
            f"parameters and "
            "running statistics: x of float16 or bfloat16 goes with float32"
        )
    return given


def check_features(x: Array, axis: int, channels: int, dtype: dtypes.Dtype) -> None:
    """An input that goes with a layer's parameters."""
    axis = check_axis(x.shape, axis)
    if x.shape[axis] != (channels if type(channels) is int else check_channels(channels)):
        raise ValueError(
            f"x: given {x.shape[axis]} channels along axis {axis} of shape {x.shape}, want "
            f"{check_channels(channels)}, as this layer has"
        )
    wanted = dtypes.of_parameters(x.dtype)
    if wanted is not dtype and wanted != (dtype := check_parameter_dtype(dtype)):
        raise TypeError(
            f"x: given dtype {x.dtype}, want {dtype}, this layer's: convert x, or make the layer with dtype='{wanted}'"
        )


def check_state(state: Any, own: Mapping[str, Array], strict: bool) -> tuple[dict[str, Array], list[str], list[str]]:
    """The values of a state_dict, each checked against what the layer has, before any is taken over.

    Keys missing, keys unexpected.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state_dict: given {type(state).__name__}, want a mapping of {list(own)} to arrays, as "
            f"state_dict() gives it"
        )
    missing = [key for key in own if key not in state and key != "num_batches_tracked"]
    unexpected = [key for key in state if key not in own]
    if strict:
        check_running(state.get("running_mean"), state.get("running_var"))
        if missing or unexpected:
            raise ValueError(
                f"state_dict: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}; want {list(own)}"
            )
    checked = {}
    for key in (key for key in own if key in state):
        value = state[key]
        if key == "num_batches_tracked" and type(value) is int:  # of any size, where NumPy's integers end
            value = scalars.count(value, "state_dict: num_batches_tracked")
        array = _of_state(value, f"state_dict: {key}")
        if array.shape != own[key].shape:
            raise ValueError(f"state_dict: {key} given shape {array.shape}, want {own[key].shape}")
        if key == "num_batches_tracked":
            array = np.array(scalars.count(array.item(), "state_dict: num_batches_tracked"))
        checked[key] = array
    return checked, missing, unexpected


def _of_state(value: Any, name: str) -> Array:
    """Numbers, of tensors that require a gradient too: values are taken over, nothing is computed."""
    if hasattr(value, "detach"):
        value = value.detach()
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # exactly, and without ml_dtypes
        value = value.float()
    array = _as_array(value, name)
    if array.dtype.kind not in "fiu" and not dtypes.supported(array.dtype):  # bfloat16 is of a kind with raw bytes
        raise TypeError(f"{name} given as dtype {array.dtype}, want numbers")
    return array
