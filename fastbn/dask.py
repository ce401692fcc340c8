"""Statistics and normalization of dask arrays, lazily.

Data that is larger than memory, or spread over workers (the extra `dask`).
Blocks are dask's, and so are scheduler and progress bar; each block goes through fastbn's own functions, on one thread,
since dask's schedulers call from several threads or processes at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn import functional
from fastbn.arguments import checks, config, dtypes
from fastbn.arguments.errors import MissingExtra
from fastbn.statistics import Moments

try:
    import dask
    import dask.array as da
    from dask.core import flatten
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph
except ImportError as error:
    raise MissingExtra("fastbn.dask needs dask with its arrays: pip install 'fastbn[dask]'") from error

__all__ = ["moments", "normalize"]

Array = NDArray[Any]

PIECE = 2**18  # values widened at a time, 2 MB as float64: in cache when their moments are taken
TREE = 16  # moments merged by one task: fixed, not dask's `split_every`, for the order of merges decides the last bits


def moments(array: da.Array, axis: int = 1) -> Delayed:
    """Mean and variance of each channel of a dask array, lazily.

    Each block gives one Moments, of float64 arithmetic whatever its dtype, about a value of its own; these are merged,
    in a fixed order, by the formula of Chan, Golub & LeVeque (1979). So mean and variance are those of the whole array
    within 1e-12 relative (the mean: of the larger of mean and deviation), however the array is chunked, and the same
    bits on every scheduler.

    Parameters
    ----------
    array : dask.array.Array, shape (..., C, ...), float16, bfloat16, float32, float64, int8, uint8, int16 or uint16
        Of known chunk sizes, at least two axes; chunked along any of them, the channel axis too. Blocks may be empty.
    axis : int
        The channel axis.

    Returns
    -------
    dask.delayed.Delayed
        `compute()` gives a `fastbn.Moments`: count, mean (C,), m2 (C,), var(), std(). Its attributes and methods are
        lazy too: `dask.compute(m.mean, m.std())`.

    Raises
    ------
    TypeError
        Not a dask array of host memory, or of another dtype.
    ValueError
        Rank below 2, axis out of range, no channels, chunks of unknown size.
    """
    channel = _checked(array, axis, integers=True)
    others = tuple(a for a in range(array.ndim) if a != channel)
    merged = da.reduction(
        array, _of_block, _merged, axis=others, combine=_merged, concatenate=False, dtype=object, name=None,
        split_every=dict.fromkeys(others, max(2, int(TREE ** (1 / len(others))))), meta=np.empty(0, object),
    )  # fmt: skip
    # Not of merged.to_delayed(): that hides the array from dask's optimizer, which would then make each block once for
    # each use.
    name = f"moments-{merged.name.rpartition('-')[2]}"
    return Delayed(
        name, HighLevelGraph.from_collections(name, {name: (_joined, merged.__dask_keys__())}, dependencies=[merged])
    )


def normalize(
    array: da.Array,
    moments: Delayed | Moments,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    axis: int = 1,
    eps: float = config.EPS,
) -> da.Array:
    """Normalize each channel of a dask array by given statistics, then scale and shift, lazily.

    y = gamma * (x - mean) / sqrt(var + eps) + beta, by `fastbn.batch_norm_inference` on each block.

    With lazy moments one graph computes both: each block is read, or made, once, and waits in memory, the cluster's
    perhaps, for the statistics of all. An array larger than that goes through twice, a few blocks at a time: `m =
    moments(x).compute()`, then `normalize(x, m)`.

    Parameters
    ----------
    array : dask.array.Array, shape (..., C, ...), float16, bfloat16, float32 or float64
        As in `moments`, but no integers.
    moments : Delayed or Moments
        What `moments` gave, computed or not.
    gamma, beta : array_like, shape (C,), float64 beside an array of float64, else float32, optional
        Scale and shift; 1 and 0 where absent.
    axis : int
        The channel axis.
    eps : float
        Added to the variance, in units of x squared; not negative.

    Returns
    -------
    dask.array.Array, shape, chunks and dtype of the array
        y.

    Raises
    ------
    TypeError
        As in `moments`; also moments or parameters of another kind.
    ValueError
        As in `moments`; also another number of channels, statistics of no values. Of lazy moments only `compute()` can
        tell.
    NotImplementedError
        Lazy moments while dask's query planning for arrays is on, which is off by default: computed ones serve.
    """
    channel = _checked(array, axis)
    channels = array.shape[channel]
    dtype = dtypes.of_parameters(array.dtype)
    parameters = [
        checks.as_parameter(value, channels, dtype, name) for value, name in ((gamma, "gamma"), (beta, "beta"))
    ]
    eps = checks.check_eps(eps, training=False)
    if isinstance(moments, Delayed):
        lazy = dask.delayed(_statistics, nout=2, pure=True)(moments, channels, array.size > 0)
        try:
            statistics = [da.from_delayed(part, (channels,), np.float64) for part in lazy]
        except NotImplementedError:  # of dask 2026.8
            raise NotImplementedError(
                "moments: given lazy ones, which dask can't join to arrays while its query planning is on; compute "
                "them first, normalize(array, moments.compute()), or turn it off, DASK_ARRAY__QUERY_PLANNING=False"
            ) from None
    else:
        statistics = list(_statistics(moments, channels, array.size > 0))
    indices = tuple(range(array.ndim))
    arguments: list[Any] = [array, indices]
    for values in (*statistics, *parameters):
        arguments += (
            (None, None) if values is None else (da.asarray(values).rechunk((array.chunks[channel],)), (channel,))
        )
    dtype = array.dtype.newbyteorder("=")
    normalized: da.Array = da.blockwise(
        _normalized,
        indices,
        *arguments,
        axis=channel,
        eps=eps,
        align_arrays=False,
        dtype=dtype,
        meta=np.empty((0,) * array.ndim, dtype),
    )
    return normalized


def _checked(array: Any, axis: Any, integers: bool = False) -> int:
    """The channel axis, counted from the front, of an array that can be worked on."""
    if not isinstance(array, da.Array):
        if isinstance(getattr(array, "data", None), da.Array):  # xarray's
            raise TypeError(f"array: given {type(array).__name__}, want a dask array: its .data is one")
        raise TypeError(
            f"array: given {type(array).__name__}, want a dask array, e.g. dask.array.from_array(x, chunks); "
            "fastbn.moments and fastbn.batch_norm_inference take arrays in memory"
        )
    _check_plain(array._meta)
    checks.as_input(array._meta, "array", integers)
    unknown = [a for a, n in enumerate(array.shape) if math.isnan(n)]
    if unknown:
        raise ValueError(
            f"array: given chunks of unknown size along axis {unknown[0]}; call array.compute_chunk_sizes() first"
        )
    return checks.check_axis(array.shape, axis, "array")


def _check_plain(block: Any) -> None:
    """Of an array's meta, and of each block: a function that is mapped over them may mask what their meta does not."""
    if isinstance(block, np.ma.MaskedArray):
        raise TypeError(
            "array: given a masked array, whose mask would be ignored; want a plain one, for example "
            "dask.array.ma.filled(array, 0)"
        )


class _Part(NamedTuple):
    """Moments of x - shift: a shift near the mean leaves differences between the means of blocks all their digits."""

    shift: Array  # (C,)
    moments: Moments


@np.errstate(all="ignore")  # NaN and Inf propagate without a warning
def _of_block(block: Array, axis: tuple[int, ...], keepdims: bool, computing_meta: bool = False) -> Any:
    """Moments of one block; `axis` are all axes but the channels', as dask.array.reduction has it."""
    if computing_meta:  # dask asks for the kind of array that comes out, without a block: never used
        return np.empty((0,) * block.ndim, object)
    _check_plain(block)
    channel = next(a for a in range(block.ndim) if a not in axis)
    if not block.size:  # also of no channels, where chunks along that axis are empty
        count, zeros = math.prod(block.shape[a] for a in axis), np.zeros(block.shape[channel])
        return _Part(zeros, Moments(count, zeros, zeros))
    first = block[tuple(slice(None) if a == channel else slice(1) for a in range(block.ndim))].astype(np.float64)
    shift = np.where(np.isfinite(first), first, 0.0)
    split = max(axis, key=lambda a: block.shape[a])
    step = max(1, PIECE * block.shape[split] // block.size)
    pieces = (
        block[(slice(None),) * split + (slice(start, start + step),)] for start in range(0, block.shape[split], step)
    )
    parts = (functional.moments(_shifted(piece, shift), channel, num_threads=1) for piece in pieces)
    return _Part(shift.ravel(), functools.reduce(Moments.merge, parts))


def _shifted(x: Array, shift: Array) -> Array:
    wide = x.astype(np.float64)  # float32 would differ by 1e-8 from one chunking to the next
    wide -= shift  # np.subtract(dtype=) in one step takes 3 times as long
    return wide


@np.errstate(all="ignore")
def _merge(a: _Part, b: _Part) -> _Part:
    """Moments of both groups of values, about the shift of the first that has any."""
    if not a.moments.count:
        return b
    return _Part(a.shift, a.moments.merge(Moments(b.moments.count, b.moments.mean + (b.shift - a.shift), b.moments.m2)))


def _merged(parts: Any, axis: tuple[int, ...], keepdims: bool) -> _Part:
    """Merge the moments of neighbouring blocks, in their order: nested lists, as deep as there are axes."""
    whole: _Part = functools.reduce(_merge, flatten([parts]))
    return whole


def _joined(parts: list[_Part]) -> Moments:
    """Blocks of different channels side by side."""
    mean = np.concatenate([part.shift + part.moments.mean for part in parts])
    return Moments(parts[0].moments.count, mean, np.concatenate([part.moments.m2 for part in parts]))


def _statistics(moments: Any, channels: int, with_values: bool) -> tuple[Array, Array]:
    """(mean, var) of moments that go with an array."""
    if not isinstance(moments, Moments) or not isinstance(moments.mean, np.ndarray):
        given = type(moments).__name__
        raise TypeError(f"moments: given {given}, want what fastbn.dask.moments gives, or a fastbn.Moments of the host")
    if moments.mean.shape != (channels,):
        raise ValueError(f"moments: given {moments.mean.size} channels, want {channels}, as the array has")
    if with_values and not moments.count:
        raise ValueError("moments: given statistics of no values, want those of some")
    return moments.mean, moments.var()


def _normalized(block: Array, *statistics: Array | None, axis: int, eps: float) -> Array:
    """y of one block, with the statistics and parameters of its channels."""
    _check_plain(block)
    if not block.size:
        return np.empty(block.shape, block.dtype.newbyteorder("="))
    mean, var, gamma, beta = statistics
    assert mean is not None  # parameters may be absent, statistics never
    assert var is not None
    return functional.batch_norm_inference(block, mean, var, gamma, beta, axis, eps, num_threads=1)
