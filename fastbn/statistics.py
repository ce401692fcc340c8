"""Mean and variance as a value that can be merged: what every backend returns and every collective exchanges."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import dtypes, scalars
from fastbn.arguments.foreign import as_array, on_device
from fastbn.cpu.kernels.welford import merge

sys.modules["fastbn.moments"] = sys.modules[__name__]  # where older pickles look for `Moments`

Array = NDArray[Any]
Statistics = NDArray[np.float64]
Kind = TypeVar("Kind", bound="Moments")


def inverse_deviation(var: Statistics, eps: float) -> Statistics:
    """1 / sqrt(var + eps); infinite or NaN where the variance says so, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1.0 / np.sqrt(var + eps))


@np.errstate(all="ignore")  # NaN and Inf propagate without a warning
def affine_of(
    mean: Array, var: Array, gamma: Array | None, beta: Array | None, eps: float, bias: Array | None = None
) -> tuple[Statistics, Statistics]:
    """(scale, shift), each (C,): gamma * (x + bias - mean) / sqrt(var + eps) + beta = scale * x + shift."""
    mean, var = (np.asarray(values, np.float64) for values in (mean, var))
    scale = inverse_deviation(var, eps)
    if gamma is not None:
        scale = scale * gamma
    shift = ((0.0 if bias is None else bias) - mean) * scale  # the difference first: a bias may be near the mean
    return scale, shift if beta is None else shift + beta


def _statistic(value: Any, name: str) -> Statistics:
    """(C,) of float64."""
    if type(value) is np.ndarray and value.dtype is dtypes.FLOAT64 and value.ndim == 1:
        return value
    array = as_array(value, name, dtypes.FLOAT64)
    if not (array.dtype.kind in "fiu" or dtypes.supported(array.dtype)):  # bfloat16 is of a kind with raw bytes
        raise TypeError(f"{name}: given dtype {array.dtype}, want numbers, of float64 or what becomes that")
    if array.ndim != 1:
        raise ValueError(f"{name}: given shape {array.shape}, want (C,), one value per channel")
    return array.astype(np.float64, copy=False)


class Moments:
    """Count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    count : int
        Values per channel: a whole number, 0 or more, of any type.
    mean : array_like, shape (C,)
        Mean of each channel. Becomes float64, an array that is that already without a copy; where both are on a GPU,
        they stay as they are.
    m2 : array_like, shape (C,)
        Sum of squared deviations from the mean, of each channel: as mean.

    Attributes
    ----------
    count : int
    mean, m2 : ndarray, shape (C,), float64

    Raises
    ------
    TypeError, ValueError
        What can't become that; mean and m2 of two shapes.
    """

    __slots__ = ("count", "m2", "mean")

    def __init__(self, count: int, mean: Any, m2: Any) -> None:
        self.count = scalars.count(count)
        if on_device(mean) and on_device(m2):
            self.mean: Statistics = mean
            self.m2: Statistics = m2
            return
        self.mean = _statistic(mean, "mean")
        self.m2 = _statistic(m2, "m2")
        if self.mean.shape != self.m2.shape:
            raise ValueError(f"m2: given shape {self.m2.shape}, want {self.mean.shape}, that of mean")

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean!r}, m2={self.m2!r})"

    def var(self, ddof: float = 0) -> Statistics:
        """Variance of each channel.

        Parameters
        ----------
        ddof : number
            0 for the biased variance that normalizes, 1 for the unbiased one.

        Returns
        -------
        ndarray, shape (C,), float64
            m2 / (count - ddof); NaN where count does not exceed ddof.

        Raises
        ------
        TypeError, ValueError
            ddof is no number.
        """
        ddof = scalars.check_ddof(ddof)
        m = settled(self)
        if m.count <= ddof:
            return np.full_like(m.m2, np.nan)
        return m.m2 / (m.count - ddof)

    def std(self, ddof: float = 0) -> Statistics:
        """Standard deviation of each channel: the root of `var`.

        Parameters
        ----------
        ddof : number
            0 for the biased variance, 1 for the unbiased one.

        Returns
        -------
        ndarray, shape (C,), float64
            NaN where count does not exceed ddof.

        Raises
        ------
        TypeError, ValueError
            ddof is no number.
        """
        return np.sqrt(self.var(ddof))

    def rstd(self, eps: float) -> Statistics:
        """1 / sqrt(var + eps) of each channel, with the biased variance.

        Parameters
        ----------
        eps : float
            In units of x squared; not negative.

        Returns
        -------
        ndarray, shape (C,), float64

        Raises
        ------
        TypeError, ValueError
            eps is no number, or negative.
        """
        return inverse_deviation(self.var(), scalars.check_eps(eps, training=False))

    @np.errstate(all="ignore")  # NaN and Inf propagate without a warning
    def merge(self, other: Moments) -> Moments:
        """Moments of both groups of values together; neither is changed.

        Raises
        ------
        TypeError
            `other` is not a Moments, or on a GPU; what was assigned to an attribute can't be one.
        ValueError
            `other` has another number of channels; as above.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"merge: given {type(other).__name__}, want Moments")
        left, right = settled(self), settled(other)
        if on_device(right.mean) or on_device(left.mean):
            raise TypeError(
                "merge: given moments that are on a GPU, want some of the host: copy mean and m2 there first"
            )
        if left.mean.shape != right.mean.shape:
            raise ValueError(f"merge: given {right.mean.size} channels, want {left.mean.size}, as many as on the left")
        if right.count == 0:
            return made(left.count, left.mean.copy(), left.m2.copy())
        if left.count == 0:
            return made(right.count, right.mean.copy(), right.m2.copy())
        count, mean, m2 = merge(left.count, left.mean, left.m2, right.count, right.mean, right.m2)
        return made(count, mean, m2)


def settled(m: Moments) -> Moments:
    """These, or, where an attribute was assigned what none is, what that becomes.

    TypeError or ValueError where it can't.
    """
    mean, m2 = m.mean, m.m2
    if (
        type(m.count) is int
        and type(mean) is type(m2) is np.ndarray
        and mean.dtype == m2.dtype == dtypes.FLOAT64
        and mean.shape == m2.shape
        and mean.ndim == 1
    ):
        return m
    return Moments(m.count, mean, m2) if type(m) is Moments or not on_device(mean) else m


_new = object.__new__


def made(count: int, mean: Any, m2: Any, kind: type[Kind] = Moments) -> Kind:  # type: ignore[assignment]
    """Moments of what is known to be an int and arrays that are right: 90 ns, where looking at them takes 390."""
    m = _new(kind)
    m.count = count
    m.mean = mean
    m.m2 = m2
    return m


def check_moments(moments: Any, channels: int, count: int) -> None:
    """Statistics that were taken of an array like x."""
    if type(moments) is not Moments and not isinstance(moments, Moments):
        raise TypeError(f"moments: given {type(moments).__name__}, want the Moments that batch_norm returned")
    if getattr(moments.mean, "shape", None) not in (None, (channels,)):  # what has none is looked at as a statistic
        raise ValueError(f"moments: given {moments.mean.size} channels, want {channels}, as x has")
    if moments.count != count:
        raise ValueError(f"moments: given statistics of {moments.count} values per channel, want {count}, as x has")
