"""Mean and variance as a value that can be merged: what every backend returns and every collective exchanges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastbn.kernels.welford import merge

Statistics = NDArray[np.float64]


def inverse_deviation(var: Statistics, eps: float) -> Statistics:
    """1 / sqrt(var + eps); infinite or NaN where the variance says so, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1.0 / np.sqrt(var + eps))


class Moments:
    """Count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    count : int
        Values per channel.
    mean : ndarray, shape (C,), float64
        Mean of each channel.
    m2 : ndarray, shape (C,), float64
        Sum of squared deviations from the mean, of each channel.
    """

    __slots__ = ("count", "m2", "mean")

    def __init__(self, count: int, mean: Statistics, m2: Statistics) -> None:
        self.count = count
        self.mean = mean
        self.m2 = m2

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, mean={self.mean!r}, m2={self.m2!r})"

    def var(self, ddof: int = 0) -> Statistics:
        """Variance of each channel.

        Parameters
        ----------
        ddof : int
            0 for the biased variance that normalizes, 1 for the unbiased one.

        Returns
        -------
        ndarray, shape (C,), float64
            m2 / (count - ddof); NaN where count does not exceed ddof.
        """
        if self.count <= ddof:
            return np.full_like(self.m2, np.nan)
        return self.m2 / (self.count - ddof)

    def std(self, ddof: int = 0) -> Statistics:
        """Standard deviation of each channel: the root of `var`.

        Parameters
        ----------
        ddof : int
            0 for the biased variance, 1 for the unbiased one.

        Returns
        -------
        ndarray, shape (C,), float64
            NaN where count does not exceed ddof.
        """
        return np.sqrt(self.var(ddof))

    def rstd(self, eps: float) -> Statistics:
        """1 / sqrt(var + eps) of each channel, with the biased variance.

        Parameters
        ----------
        eps : float
            In units of x squared; positive.

        Returns
        -------
        ndarray, shape (C,), float64
        """
        return inverse_deviation(self.var(), eps)

    @np.errstate(all="ignore")  # NaN and Inf propagate without a warning
    def merge(self, other: Moments) -> Moments:
        """Moments of both groups of values together; neither is changed.

        Raises
        ------
        TypeError
            `other` is not a Moments, or on a GPU.
        ValueError
            `other` has another number of channels.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"merge: given {type(other).__name__}, want Moments")
        if not isinstance(other.mean, np.ndarray):
            raise TypeError("merge: given moments that are on a GPU, want some of the host: copy mean and m2 there first")
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"merge: given {other.mean.size} channels, want {self.mean.size}, as many as on the left")
        if other.count == 0:
            return Moments(self.count, self.mean.copy(), self.m2.copy())
        if self.count == 0:
            return Moments(other.count, other.mean.copy(), other.m2.copy())
        return Moments(*merge(self.count, self.mean, self.m2, other.count, other.mean, other.m2))
