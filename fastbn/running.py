"""Statistics of data that never fits in memory, in chunks: from any number of places, and of all inputs of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastbn import distributed, functional
from fastbn import progress as screen
from fastbn.arguments import checks, scalars
from fastbn.backends import backend_for
from fastbn.cpu import threads
from fastbn.cuda import buffers, placement
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
        m = functional.moments(chunk, self.axis, backend=self.backend, num_threads=self.num_threads)
        return self._take(m, "chunk")

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

    def _take(self, m: Moments, name: str) -> RunningMoments:
        if isinstance(m, Moments):  # else merge refuses it
            m = settled(m)
            if m.mean.size != checks.check_channels(self.num_features):
                raise ValueError(
                    f"{name}: given {m.mean.size} channels along axis {self.axis}, want {self.num_features}"
                )
            if not self.count and buffers.on_device(m.mean):
                self.moments = m  # the first that is seen lies on a GPU: the rest is merged there
                return self
        self.moments = self.moments.merge(m)
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
        """Variance of each channel, as `Moments` gives it: NaN where count does not exceed ddof."""
        return self.moments.var(ddof)

    def std(self, ddof: float = 0) -> Statistics:
        """Standard deviation of each channel: the root of `var`."""
        return self.moments.std(ddof)


def recalibrate(layer: Any, batches: Any, progress: bool) -> None:
    """Set a BatchNorm's running statistics to those of all batches together; after any error they are as they were."""
    layer._settle()
    progress = scalars.flag(progress, "progress")
    running_mean, running_var = layer.running_mean, layer.running_var
    checks.check_running(running_mean, running_var)
    if running_mean is None:
        raise ValueError("recalibrate: this layer keeps no running statistics; make it with track_running_stats=True")
    kept = {"running_mean": running_mean, "running_var": running_var}
    placement.check_kept(kept, layer.num_features, layer.dtype, True, gamma=layer.gamma, beta=layer.beta)
    if hasattr(batches, "dtype") or buffers.on_device(batches):  # iterating would take its first axis away
        raise TypeError(
            f"batches: given one {type(batches).__name__}, want an iterable of arrays: [x] for a single batch"
        )
    if isinstance(batches, Mapping):
        raise TypeError(f"batches: given {_keys(batches)}, want an iterable of arrays: its values()?")
    if isinstance(batches, tuple):  # of which input and target would be two batches
        raise TypeError("batches: given a tuple, one (input, target) of a loader? want the loader, or [batch]")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches: given {type(batches).__name__}, want an iterable of arrays")
    total = RunningMoments(layer.num_features, layer.axis, layer.backend, num_threads=layer.num_threads)
    num_batches = 0
    with screen.tracked(batches, "recalibrate") if progress else nullcontext(batches) as shown:
        for n, batch in enumerate(shown):
            before = total.count
            try:
                total.update(_checked(layer, _input(batch)))
            except (TypeError, ValueError) as error:
                raise (TypeError if isinstance(error, TypeError) else ValueError)(
                    f"batches: batch {n}: {error}"
                ) from error
            num_batches += total.count > before
    freedom = total.count - 1 if layer.unbiased_running_var else total.count
    if not total.count:
        raise ValueError(
            "batches: given no values, want at least one batch that has some (an iterator gives its batches only once)"
        )
    if not freedom:
        raise ValueError("batches: given one value per channel in all, want two or more: one has no unbiased variance")
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 it is infinite, as in training
        mean = placement.to_host(total.moments.mean).astype(layer.dtype)
        var = (placement.to_host(total.moments.m2) / freedom).astype(layer.dtype)
    placement.overwrite(running_mean, mean)
    placement.overwrite(running_var, var)
    layer.num_batches_tracked = num_batches


def _input(batch: Any) -> Any:
    """The array of a batch: the first of a loader's (input, target), which is no list of rows to be stacked."""
    first = batch
    while isinstance(first, tuple | list) and first:
        if isinstance(first, list) and len(first) > 2 and _alike(first):
            raise TypeError(
                f"given a list of {len(first)} arrays of shape {tuple(first[0].shape)}, which forward would join to "
                "one, want an array: numpy.stack(batch), or batch[0] for the first alone"
            )
        first = first[0]
    if isinstance(first, Mapping):
        raise TypeError(
            f"given {_keys(first)}, want arrays: (batch[key] for batch in loader), with the key of the input"
        )
    # nested lists of numbers are an array
    return first if getattr(first, "ndim", 0) or buffers.on_device(first) else batch


def _alike(arrays: list[Any]) -> bool:
    """Whether they may be samples: arrays of one shape and dtype."""
    forms = [(tuple(getattr(array, "shape", ())), str(getattr(array, "dtype", ""))) for array in arrays]
    return forms[0][0] != () and forms.count(forms[0]) == len(forms)


def _keys(mapping: Mapping[Any, Any]) -> str:
    return f"{type(mapping).__name__} with keys {', '.join(map(repr, list(mapping)[:5]))}"


def _checked(layer: Any, x: Any) -> Any:
    """A batch that goes with the layer, as its forward has it."""
    x = backend_for(x, layer.backend).check_features(x, layer.axis, layer.num_features, layer.dtype)
    placement.check(not isinstance(x, np.ndarray), running_mean=layer.running_mean, running_var=layer.running_var)
    return x
