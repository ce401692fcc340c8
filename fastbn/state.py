"""What a layer holds: its arrays, on the host or on a GPU, and PyTorch's state_dict of them."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import checks, scalars
from fastbn.cpu import threads
from fastbn.cuda import placement

Array = NDArray[Any]
Layer = TypeVar("Layer", bound="State")


class IncompatibleKeys(NamedTuple):
    """What a state had not, or too much, as PyTorch's `load_state_dict` returns it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


# PyTorch's names
KEPT = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}
# What an option may be, and becomes: of the constructor, or assigned later. A call looks at those that its functions
# would not.
OPTIONS: dict[str, Callable[[Any], Any]] = {
    "num_features": checks.check_channels,
    "eps": partial(checks.check_eps, training=False),
    "momentum": checks.check_momentum,
    "axis": scalars.check_axis,
    "dtype": checks.check_parameter_dtype,
    "backend": scalars.check_backend,
    "num_threads": threads.check,
    "num_batches_tracked": partial(scalars.count, name="num_batches_tracked"),
    **{
        name: partial(scalars.flag, name=name)
        for name in ("affine", "track_running_stats", "unbiased_running_var", "training")
    },
}


class Saved(NamedTuple):
    """What backward needs of the last forward, as it was then."""

    x: Any  # not a copy
    statistics: Any  # Moments of the batch, or the constants (mean, var) of inference
    gamma: Any  # a copy: optimizers change it in place
    shifted: bool  # there was a beta
    axis: int
    eps: float
    across: Any  # the `Exchange`, where the statistics are of the batch of all ranks


class _Saved(NamedTuple):
    """The last forward in pickles of before there was `Saved`: read, and dropped."""

    x: Any
    statistics: Any
    overwritten: Any
    across: Any


class Gone(NamedTuple):
    """Why the last forward has no backward."""

    why: str
    across: Any


BEFORE = "backward before forward: call the layer on x first, y = bn(x)"
OVERWRITTEN = "backward needs the x of the forward, which was overwritten by out=x: give another out, or none"
EVALUATION = (
    "backward after a forward in evaluation, which keeps no x unless asked to: bn.eval(backward=True), then y = bn(x)"
)
FAILED = "backward after a forward that raised an error: call the layer again, y = bn(x)"


class State:
    """What `BatchNorm` holds: options, parameters, gradients and running statistics; these are (C,) or None."""

    gamma: Array | None
    beta: Array | None
    dgamma: Array | None
    dbeta: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_features: int
    eps: float
    momentum: float | None
    affine: bool
    track_running_stats: bool
    axis: int
    dtype: Any
    backend: str | None
    unbiased_running_var: bool
    num_threads: int | None
    training: bool
    num_batches_tracked: int
    _saved: Any = None  # of the last forward: None where there is none
    _backward_in_eval: bool = False  # which older pickles lack, and subclasses whose `train` does not call this one's

    def __getstate__(self) -> Any:
        """All but the last forward, whose x is a call's: pickles and copies of a layer would carry a batch of data."""
        kept = self.__dict__ | {"_saved": None}
        # of subclasses, as object.__getstate__ of Python 3.11
        names = copyreg._slotnames(type(self))  # type: ignore[attr-defined]
        slots = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return (kept, slots) if slots else kept

    def __setstate__(self, state: Any) -> None:
        kept, slots = state if isinstance(state, tuple) else (state, {})
        self.__dict__.update(kept, _saved=None)  # an older pickle has its last forward
        for name, value in slots.items():
            setattr(self, name, value)

    def _kept(self, written: bool = False) -> dict[str, Any]:
        """Parameters and running statistics, those that there are.

        TypeError or ValueError for one that no call would take.
        """
        checks.check_running(self.running_mean, self.running_var)
        found = {name: array for name in KEPT if (array := getattr(self, name)) is not None}
        placement.check_kept(found, self.num_features, self.dtype, written)
        return found

    def _settle(self, **instead: Any) -> None:
        """Make every option what it should be, or these instead.

        TypeError or ValueError, and no option changed, where one can't be.
        """
        settled = {
            name: check(instead[name] if name in instead else getattr(self, name)) for name, check in OPTIONS.items()
        }
        for name, value in settled.items():
            setattr(self, name, value)

    def to(self: Layer, device: str, kind: str | None = None) -> Layer:
        """Move parameters, their gradients and running statistics to a GPU or back.

        Returns self. Forgets the last forward.

        Parameters
        ----------
        device : str
            "cuda", "cuda:1" or "cpu".
        kind : str, optional
            "torch", "cupy" or "numba", the library of the arrays on a GPU; default the first of them that is imported
            and reaches one.

        Raises
        ------
        ValueError
            No such device or kind.
        BackendUnavailable
            No CUDA here. A layer that holds no arrays, which has nothing to move, is taken as it is, as PyTorch's.
        """
        index, library = placement.parsed(device), placement.chosen(kind)
        self._kept()
        names = ("gamma", "beta", "dgamma", "dbeta", "running_mean", "running_var")
        moved = {name: placement.to_host(array) for name in names if (array := getattr(self, name)) is not None}
        if index is not None:
            moved = {name: placement.to_device(array, index, library) for name, array in moved.items()}
        for name, array in moved.items():
            setattr(self, name, array)
        self._saved = None
        return self

    def state_dict(self) -> dict[str, Array]:
        """Copies on the host under PyTorch's keys: weight, bias, running_mean, running_var, num_batches_tracked."""
        return self._copies(self._kept(), self.num_batches_tracked)

    def _copies(self, kept: Mapping[str, Any], batches: Any) -> dict[str, Array]:
        found = {KEPT[name]: placement.to_host(array) for name, array in kept.items()}
        if self.running_mean is not None:
            found["num_batches_tracked"] = np.array(OPTIONS["num_batches_tracked"](batches), np.int64)
        return found

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Take over parameters and statistics, all or none of them.

        Parameters
        ----------
        state : mapping of str to array_like
            As `state_dict` gives it, or PyTorch's, of tensors, of bfloat16 too; num_batches_tracked may be absent.
        strict : bool
            Whether missing and unexpected keys are an error; else the values of all other keys are taken over.

        Returns
        -------
        IncompatibleKeys
            A named tuple of two lists, missing_keys and unexpected_keys.

        Raises
        ------
        ValueError
            Missing or unexpected keys and running_mean without running_var, if strict; other shapes; an array of this
            layer that can't be written.
        TypeError
            No mapping, or values that are not numbers; an array of this layer of another dtype than its own.
        """
        targets = self._kept(written=True)
        # then a bad count of this layer's is no matter
        replaced = isinstance(state, Mapping) and "num_batches_tracked" in state
        own = self._copies(targets, 0 if replaced else self.num_batches_tracked)
        checked, missing, unexpected = checks.check_state(state, own, scalars.flag(strict, "strict"))
        for key, value in checked.items():
            own[key][...] = value
        for name, target in targets.items():
            placement.overwrite(target, own[KEPT[name]])
        if "num_batches_tracked" in own:
            self.num_batches_tracked = int(own["num_batches_tracked"])
        return IncompatibleKeys(missing, unexpected)
