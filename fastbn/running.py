"""Statistics of data that never fits in memory: chunk by chunk, in any split, from any number of places."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastbn import distributed, functional
from fastbn.arguments import checks, scalars
from fastbn.cpu import threads
from fastbn.cuda import buffers
from fastbn.statistics import Moments, Statistics, settled


class RunningMoments:
    """Mean and variance per channel of everything seen so far.

    Parameters
    ----------
    num_features : int
        Channels, C.
    axis : int
        The channel axis of the chunks.
    backend : str, optional
        "cpu" or "reference"; default where the array lives.
    num_threads : int, optional
        Of the kernels in each call, from 1 to NUMBA_NUM_THREADS; changes speed, never a bit. Default as
        `set_num_threads` says.

    Raises
    ------
    TypeError, ValueError
        num_features is not a positive integer, axis no integer, backend no name; num_threads out of range.
    """

    def __init__(
        self, num_features: int, axis: int = 1, backend: str | None = None, *, num_threads: int | None = None
    ) -> None:
        self.num_threads = threads.check(num_threads)
        self.num_features = checks.check_channels(num_features)
        self.axis = scalars.check_axis(axis)
        self.backend = scalars.check_backend(backend)
        self.moments = Moments(0, np.zeros(self.num_features), np.zeros(self.num_features))

    def __repr__(self) -> str:
        return f"RunningMoments({self.num_features}, axis={self.axis}, count={self.count})"

    def update(self, chunk: ArrayLike) -> RunningMoments:
        """Take in a chunk, shape (..., C, ...), of any dtype that `fastbn.moments` takes.

        An empty one changes nothing. Returns self.

        Raises
        ------
        TypeError, ValueError
            As `fastbn.moments`; also another number of channels.
        """
        found = functional.moments(chunk, self.axis, backend=self.backend, num_threads=self.num_threads)
        return self._take(found, "chunk")

    def merge(self, other: RunningMoments | Moments) -> RunningMoments:
        """Take in what another one, or a Moments, has seen; the other is left as it is. Returns self.

        Raises
        ------
        TypeError
            `other` is neither.
        ValueError
            Another number of channels.
        """
        return self._take(other.moments if isinstance(other, RunningMoments) else other, "other")

    def reduce(self, comm: Any) -> RunningMoments:
        """What all ranks of a communicator have seen together.

        A new RunningMoments on each, the same bits on all. This one stays as it is.
        Every rank calls it. Merged in rank order in float64, on the host (also where this rank's statistics are on a
        GPU).

        Parameters
        ----------
        comm : mpi4py.MPI.Intracomm or torch.distributed.ProcessGroup
            What joins the ranks.

        Raises
        ------
        TypeError
            `comm` is neither.
        ValueError
            Another number of channels on another rank: then on all of them.
        """
        whole = RunningMoments(self.num_features, self.axis, self.backend, num_threads=self.num_threads)
        whole.moments = distributed.Exchange(comm, self.num_features).merged("reduce", self.moments)
        return whole

    def _take(self, found: Moments, name: str) -> RunningMoments:
        found = settled(found) if isinstance(found, Moments) else found
        if isinstance(found, Moments) and found.mean.size != checks.check_channels(self.num_features):
            raise ValueError(
                f"{name}: given {found.mean.size} channels along axis {self.axis}, want {self.num_features}"
            )
        if isinstance(found, Moments) and not self.count and buffers.on_device(found.mean):
            self.moments = found  # the first that is seen lies on a GPU: the rest is merged there
        else:
            self.moments = self.moments.merge(found)
        return self

    @property
    def count(self) -> int:
        """Values per channel so far."""
        return self.moments.count

    @property
    def mean(self) -> Statistics:
        """Mean of each channel, shape (C,); zeros before the first chunk."""
        return self.moments.mean

    def var(self, ddof: float = 0) -> Statistics:
        """Variance of each channel.

        Parameters
        ----------
        ddof : number
            0 for the biased variance, 1 for the unbiased one.

        Returns
        -------
        ndarray, shape (C,), float64
            NaN where count does not exceed ddof.
        """
        return self.moments.var(ddof)

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
        """
        return self.moments.std(ddof)
