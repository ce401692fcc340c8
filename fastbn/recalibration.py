"""Running statistics of a layer as those of all its inputs, not an average that forgets: `BatchNorm.recalibrate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from fastbn import progress as screen
from fastbn import results
from fastbn.arguments import checks, scalars
from fastbn.cuda import buffers, placement
from fastbn.running import RunningMoments


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
    seen = RunningMoments(layer.num_features, layer.axis, layer.backend, num_threads=layer.num_threads)
    tracked = 0
    with screen.tracked(batches, "recalibrate") if progress else nullcontext(batches) as shown:
        for n, batch in enumerate(shown):
            before = seen.count
            try:
                seen.update(_checked(layer, _input(batch)))
            except (TypeError, ValueError) as error:
                raise (TypeError if isinstance(error, TypeError) else ValueError)(
                    f"batches: batch {n}: {error}"
                ) from error
            tracked += seen.count > before
    freedom = seen.count - 1 if layer.unbiased_running_var else seen.count
    if not seen.count:
        raise ValueError(
            "batches: given no values, want at least one batch that has some (an iterator gives its batches only once)"
        )
    if not freedom:
        raise ValueError("batches: given one value per channel in all, want two or more: one has no unbiased variance")
    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 it is infinite, as in training
        mean = placement.to_host(seen.moments.mean).astype(layer.dtype)
        var = (placement.to_host(seen.moments.m2) / freedom).astype(layer.dtype)
    placement.overwrite(running_mean, mean)
    placement.overwrite(running_var, var)
    layer.num_batches_tracked = tracked


def _input(batch: Any) -> Any:
    """The array of a batch: the first of a loader's (input, target), which is no list of rows to be stacked."""
    first = batch
    while isinstance(first, tuple | list) and first:
        if isinstance(first, list) and len(first) > 2 and _alike(first):
            raise TypeError(
                f"given a list of {len(first)} arrays of shape {tuple(first[0].shape)}, which forward would join to "
                f"one, want an array: "
                "numpy.stack(batch), or batch[0] for the first alone"
            )
        first = first[0]
    if isinstance(first, Mapping):
        raise TypeError(
            f"given {_keys(first)}, want arrays: (batch[key] for batch in loader), with the key of the input"
        )
    # nested lists of numbers are an array
    return first if getattr(first, "ndim", 0) or buffers.on_device(first) else batch


def _alike(given: list[Any]) -> bool:
    """Whether they may be samples: arrays of one shape and dtype."""
    kinds = [(tuple(getattr(item, "shape", ())), str(getattr(item, "dtype", ""))) for item in given]
    return kinds[0][0] != () and kinds.count(kinds[0]) == len(kinds)


def _keys(given: Mapping[Any, Any]) -> str:
    return f"{type(given).__name__} with keys {', '.join(map(repr, list(given)[:5]))}"


def _checked(layer: Any, x: Any) -> Any:
    """A batch that goes with the layer, as its forward has it."""
    gpu = results.on_gpu(layer.backend) if type(x) is not np.ndarray and buffers.on_device(x) else None
    if gpu is None:
        x = checks.as_input(x)
        checks.check_features(x, layer.axis, layer.num_features, layer.dtype)
    else:
        gpu.check_features(x, layer.axis, layer.num_features, layer.dtype.name)
    placement.check(gpu is not None, running_mean=layer.running_mean, running_var=layer.running_var)
    return x
