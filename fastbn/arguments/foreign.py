"""Objects that are not NumPy's arrays: the array of one where it has one on the host, else what to do, in words."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import dtypes
from fastbn.arguments.scalars import shown

Array = NDArray[Any]

# DLPack's numbers of devices whose memory the host reads: its own, pinned for CUDA or ROCm, managed
ON_HOST = (1, 3, 11, 13)


def on_device(value: Any) -> bool:
    """Whether a value is an array on a GPU, without a look at its memory."""
    if isinstance(value, np.ndarray):
        return False
    if type(value).__module__.partition(".")[0] == "torch":
        return bool(getattr(value, "is_cuda", False))
    try:  # the instance: JAX's class has the property, which raises for its arrays on the host
        return hasattr(value, "__cuda_array_interface__") or is_simulated(value)
    except Exception:  # of older JAX another error than AttributeError
        return False


def is_simulated(value: Any) -> bool:
    """Whether a value is an array of numba's simulator, which has no interface."""
    return type(value).__name__ == "FakeCUDAArray"


def as_array(value: Any, name: str, dtype: dtypes.Dtype | None = None) -> Array:
    """The array of whatever has one on the host, NumPy's own and without a subclass.

    `dtype` for what has none of its own.

    Raises
    ------
    TypeError
        What is no array, with the way to one; a masked array, also within a list; one on a GPU.
    MissingExtra
        bfloat16 of PyTorch without `ml_dtypes`.
    """
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return np.asarray(value)
    own = name.rpartition(": ")[2]  # the name that the user's expression has: of a value of a state_dict its key
    if (reason := _refused(value, own)) is not None:
        raise TypeError(f"{name}: {reason}")
    try:
        # which NumPy has not: its bits
        if "torch" in sys.modules and str(getattr(value, "dtype", "")) == "torch.bfloat16":
            bits: Array = value.view(sys.modules["torch"].int16).numpy()
            return bits.view(dtypes.bfloat16())
        if _speaks_dlpack_only(value):
            return np.from_dlpack(value)
        array = np.asarray(value)
    except ValueError as error:
        raise TypeError(f"{name}: given ragged or mixed data ({error}), want an array of float32 or float64") from None
    except (TypeError, RuntimeError, BufferError) as error:  # as libraries refuse
        raise TypeError(
            f"{name}: given {type(value).__name__}, which does not become an array of NumPy ({error})"
        ) from error
    if array.dtype == object:
        raise TypeError(f"{name}: given {type(value).__name__}, {_of_objects(value, own)}")
    # not of words, of which NumPy would read numbers
    if dtype is not None and array.dtype.kind in "iuf" and not hasattr(value, "dtype"):
        return array.astype(dtype, copy=False)
    return array


def _refused(value: Any, name: str) -> str | None:
    """Why an object is no array of the host, and what to do; None where it may be one."""
    given = f"given {type(value).__name__}"
    if value is None:
        return "given None, want an array"
    if isinstance(value, str | bytes | os.PathLike):
        return f"given {shown(value)}, want an array: numpy.load(...) reads a file"
    if isinstance(value, np.ma.MaskedArray):
        return f"given a masked array, whose mask would be ignored; want a plain array, for example {name}.filled(...)"
    if _holds_masked(value):
        return (
            f"{given} with a masked array in it, whose mask would be ignored; want plain arrays, for example "
            f"array.filled(...)"
        )
    if on_device(value):
        return f"given an array on a GPU ({type(value).__name__}), want a host array: copy it to the host first"
    if isinstance(value, Mapping):
        return f"{given}, want an array: one of its values, {name}[...]"
    if isinstance(value, Set | Iterator):
        return f"{given}, want an array: numpy.stack(list({name})), or a call for each of its arrays"
    if getattr(value, "requires_grad", False) is True:
        instead = "or a module of fastbn.torch, such as BatchNorm2d"
        return f"{given} that requires a gradient, which NumPy does not record: {name}.detach(), {instead}"
    if str(getattr(value, "layout", "")).startswith("torch.sparse"):
        return f"{given}, a sparse one, want a dense array: {name}.to_dense()"
    for method in ("toarray", "todense"):  # SciPy's, PyData's
        if hasattr(value, method):
            return f"{given}, a sparse one, want a dense array: {name}.{method}()"
    return _undelivered(value) if _speaks_dlpack_only(value) else None


def _holds_masked(value: Any) -> bool:
    return isinstance(value, np.ma.MaskedArray) or (isinstance(value, list | tuple) and any(map(_holds_masked, value)))


def _speaks_dlpack_only(value: Any) -> bool:
    return hasattr(value, "__dlpack__") and not hasattr(value, "__array__")


def _undelivered(value: Any) -> str | None:
    """Why NumPy can't take what a producer of DLPack offers; None where it can."""
    try:
        device = int(value.__dlpack_device__()[0])
    except Exception as error:
        return f"given {type(value).__name__}, whose __dlpack_device__ fails ({error}): make it an array of NumPy first"
    if device in ON_HOST:
        return None
    return (
        f"given an array on a GPU or another device ({type(value).__name__}, device {device} of DLPack): copy it "
        f"to the host first"
    )


def _of_objects(value: Any, name: str) -> str:
    """What to do where NumPy made an array of objects."""
    if hasattr(value, "to_numpy"):  # pandas: a column that may lack values, or columns of several dtypes
        return f"of which NumPy makes an array of objects: {name}.to_numpy('float32')"
    if isinstance(value, list | tuple):
        return "of mixed data, want numbers: numpy.stack of arrays of one shape, of float32 or float64"
    return "want an array of float32 or float64"
