"""Dtypes, shapes and memory arrangements as data, each with its reason, and the arrays made of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes  # tells NumPy the name "bfloat16"
import numpy as np
import pytest

BACKENDS = ("cpu", "reference")
HALF_BACKENDS = ("cpu", "reference")  # those that serve x of half precision

HALF = (np.dtype(np.float16).name, np.dtype(ml_dtypes.bfloat16).name)
DTYPES = (*HALF, "float32", "float64")
SERVED = tuple((dtype, backend) for dtype in DTYPES for backend in (HALF_BACKENDS if dtype in HALF else BACKENDS))
CPU_DTYPES = tuple(dtype for dtype, backend in SERVED if backend == "cpu")


def _served(dtypes: tuple[str, ...]) -> pytest.MarkDecorator:
    """Kernels of half precision, which compile as long again, are for a full run: test_half.py has one shape of each in
    the default run.
    """
    marked = [
        pytest.param(d, b, marks=pytest.mark.full if d in HALF and b == "cpu" else ()) for d, b in SERVED if d in dtypes
    ]
    return pytest.mark.parametrize(("dtype", "backend"), marked)


every_dtype_and_backend = _served(DTYPES)
every_half_and_backend = _served(HALF)
# its kernels take 15 s to compile
one_half = pytest.mark.parametrize("dtype", [HALF[0], pytest.param(HALF[1], marks=pytest.mark.full)])
every_half_backend = pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.full if b == "cpu" else ()) for b in HALF_BACKENDS]
)


def parameter_dtype(dtype: Any) -> str:
    """Of gamma, beta, their gradients and the running statistics beside x of this dtype."""
    return "float64" if np.dtype(dtype).name == "float64" else "float32"


class Case(NamedTuple):
    shape: tuple[int, ...]
    axis: int
    why: str

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + f"@{self.axis}"


CASES = (
    Case((2, 1), 1, "the smallest training batch"),
    Case((9, 5), 1, "rank 2: channels last as it stands, all of it one vector tail"),
    Case((5, 9), 0, "rank 2 with the channels first: one row per channel"),
    Case((33, 70), 1, "more channels than a panel of 64 columns, and rows that no tile divides"),
    Case((3, 4, 5), 1, "rank 3, nothing a multiple of anything"),
    Case((2, 3, 7, 7), 1, "S = 49: short rows of odd size, the last layers of a residual network"),
    Case((2, 3, 4, 5), -1, "channels innermost in C order"),
    Case((3, 2, 4, 5), 0, "channels outermost: one contiguous slab each"),
    Case((2, 3, 2, 3, 2), 2, "the channels in the middle, axes on both sides"),
    Case((2, 2, 3, 2, 2, 3), -4, "rank 6 and a negative axis"),
    Case((1, 6, 33), 1, "N = 1; S two vectors and one value"),
    Case((7, 6, 1, 1), 1, "S = 1 in the axes of a convolution: channels last in disguise"),
    Case((4, 1, 6, 6), 1, "C = 1"),
    Case((1, 1, 1, 40), 1, "all axes but one of length 1, whose strides mean nothing"),
    Case((2, 2, 600), 1, "S beyond any unrolled loop, with a tail"),
)

# Empty batches: no values per channel, but channels.
EMPTY = (
    Case((0, 3), 1, "N = 0, rank 2"),
    Case((0, 3, 4, 4), 1, "N = 0"),
    Case((2, 3, 0), 1, "S = 0"),
    Case((0, 3, 0, 5), 1, "N = 0 and S = 0"),
    Case((3, 2, 0), 0, "S = 0 behind outermost channels"),
    Case((0, 4, 3), -1, "N = 0 before innermost channels"),
)


def _permuted(values: np.ndarray, order: list[int]) -> np.ndarray:
    """The same array with its axes in this order in memory, the last one innermost."""
    return values.transpose(order).copy(order="C").transpose(np.argsort(order))


def _channels_last(values: np.ndarray, axis: int) -> np.ndarray:
    axis %= values.ndim
    return _permuted(values, [a for a in range(values.ndim) if a != axis] + [axis])


def _channels_outermost(values: np.ndarray, axis: int) -> np.ndarray:
    axis %= values.ndim
    return _permuted(values, [axis] + [a for a in range(values.ndim) if a != axis])


def _inside(values: np.ndarray, shape: tuple[int, ...], window: tuple[slice, ...]) -> np.ndarray:
    """The values inside a larger array of NaN, which shows in the result when a kernel reads beside them."""
    whole = np.full(shape, np.nan, values.dtype)
    whole[window] = values
    return whole[window]


def _crop(values: np.ndarray, axis: int) -> np.ndarray:
    return _inside(values, tuple(n + 3 for n in values.shape), tuple(slice(1, n + 1) for n in values.shape))


def _strided(values: np.ndarray, axis: int) -> np.ndarray:
    return _inside(values, tuple(2 * n for n in values.shape), (slice(None, None, 2),) * values.ndim)


def _reversed(values: np.ndarray, axis: int) -> np.ndarray:
    backwards = (slice(None, None, -1),) * values.ndim
    return values[backwards].copy()[backwards]


def _reversed_outer(values: np.ndarray, axis: int) -> np.ndarray:
    return values[::-1].copy()[::-1]


def _broadcast(values: np.ndarray, axis: int) -> np.ndarray:
    other = 0 if axis % values.ndim else values.ndim - 1
    return np.broadcast_to(values.take([0], other), values.shape)


def _one_channel_for_all(values: np.ndarray, axis: int) -> np.ndarray:
    return np.broadcast_to(values.take([0], axis), values.shape)


def _unaligned(values: np.ndarray, axis: int) -> np.ndarray:
    raw = np.empty(values.nbytes + 1, np.uint8)
    array = raw[1:].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


def _packed(values: np.ndarray, axis: int) -> np.ndarray:
    records = np.zeros(values.shape, [("tag", "i1"), ("value", values.dtype)])
    records["value"] = values
    return records["value"]


Arrange = Callable[[np.ndarray, int], np.ndarray]

# Compact: canonical without a copy, and the result has the same memory order.
COMPACT: dict[str, Arrange] = {
    "C": lambda values, axis: values.copy(order="C"),
    "Fortran": lambda values, axis: values.copy(order="F"),
    "channels_last": _channels_last,
    "channels_outermost": _channels_outermost,
}

# The rest: with the reason each may break something that a compact array does not.
LAYOUTS: dict[str, Arrange] = {
    **COMPACT,
    "crop": _crop,  # rows are contiguous, with gaps between them
    "strided": _strided,  # no contiguous axis at all
    "reversed": _reversed,  # negative strides in every axis: the data pointer is the last element
    "reversed_outer": _reversed_outer,  # a negative stride beside contiguous rows
    "broadcast": _broadcast,  # stride 0 along a reduced axis
    "one_channel_for_all": _one_channel_for_all,  # stride 0 along the channels
    "unaligned": _unaligned,  # contiguous, one byte off
    "packed": _packed,  # strides that are no multiple of the element
    "big_endian": lambda values, axis: values.astype(values.dtype.newbyteorder(">")),
}


def arrange(layout: str, values: np.ndarray, axis: int) -> np.ndarray:
    """An array of this shape and arrangement, read-only (broadcast ones repeat a part of the values)."""
    array = LAYOUTS[layout](values, axis)
    array.flags.writeable = False
    return array


def memory_order(array: np.ndarray) -> list[int]:
    """The axes of more than one element from outermost to innermost in memory."""
    return sorted((a for a in range(array.ndim) if array.shape[a] > 1), key=lambda a: -abs(array.strides[a]))


def draw(
    case: Case, dtype: str, seed: int = 0, offset: float = 3.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(x, dy, gamma, beta) for a case: each channel of x with a mean and a scale of its own.

    x is a multiple of 1/4096, so that the mean of equal values is exact and their variance is 0, in the oracle too.
    gamma and beta are of the dtype of parameters.
    """
    rng = np.random.default_rng(seed)
    channels = case.shape[case.axis]
    along = [1] * len(case.shape)
    along[case.axis] = channels
    centre = offset * np.cos(np.arange(channels)).reshape(along)
    scale = (1.0 + np.arange(channels) % 3).reshape(along)
    x = np.round((centre + scale * rng.standard_normal(case.shape)) * 4096) / 4096
    dy = rng.standard_normal(case.shape)
    gamma = 0.5 + rng.random(channels)
    beta = rng.standard_normal(channels)
    parameter = parameter_dtype(dtype)
    return x.astype(dtype), dy.astype(dtype), gamma.astype(parameter), beta.astype(parameter)
