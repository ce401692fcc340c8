"""What a layer holds: its arrays, on the host or on a GPU, and PyTorch's state_dict of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbn import checks, residence

Array = NDArray[Any]
Layer = TypeVar("Layer", bound="State")


KEPT = {"gamma": "weight", "beta": "bias", "running_mean": "running_mean", "running_var": "running_var"}  # PyTorch's names


class State:
    """Parameters, gradients and running statistics, each (C,) or None; what `BatchNorm` inherits."""

    gamma: Array | None
    beta: Array | None
    dgamma: Array | None
    dbeta: Array | None
    running_mean: Array | None
    running_var: Array | None
    num_batches_tracked: int
    num_features: int
    dtype: np.dtype[Any]
    _saved: Any  # of the last forward: None where there is none

    def __getstate__(self) -> dict[str, Any]:
        """All but the last forward, whose x is a call's: pickles and copies of a layer would carry a batch of data."""
        return self.__dict__ | {"_saved": None}

    def _kept(self, written: bool = False) -> dict[str, Any]:
        """Parameters and running statistics, those that there are; TypeError or ValueError for one that no call would take."""
        checks.check_running(self.running_mean, self.running_var)
        found = {name: array for name in KEPT if (array := getattr(self, name)) is not None}
        residence.check_kept(found, self.num_features, self.dtype, written)
        return found

    def to(self: Layer, device: str, kind: str | None = None) -> Layer:
        """Move parameters, their gradients and running statistics to a GPU or back; returns self. Forgets the last forward.

        Parameters
        ----------
        device : str
            "cuda", "cuda:1" or "cpu".
        kind : str, optional
            "torch", "cupy" or "numba", the library of the arrays on a GPU; default the first of them that is imported and reaches one.

        Raises
        ------
        ValueError
            No such device or kind.
        BackendUnavailable
            No CUDA here.
        """
        index, library = residence.parsed(device), residence.chosen(kind)
        self._kept()
        names = ("gamma", "beta", "dgamma", "dbeta", "running_mean", "running_var")
        moved = {name: residence.to_host(array) for name in names if (array := getattr(self, name)) is not None}
        if index is not None:
            moved = {name: residence.to_device(array, index, library) for name, array in moved.items()}
        for name, array in moved.items():
            setattr(self, name, array)
        self._saved = None
        return self

    def state_dict(self) -> dict[str, Array]:
        """Copies on the host under PyTorch's keys: weight, bias, running_mean, running_var, num_batches_tracked."""
        found = {KEPT[name]: residence.to_host(array) for name, array in self._kept().items()}
        if self.running_mean is not None:
            found["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over parameters and statistics, all or none of them.

        Parameters
        ----------
        state : mapping of str to array_like
            As `state_dict` gives it, or PyTorch's, whose tensors convert by themselves; num_batches_tracked may be absent.

        Raises
        ------
        ValueError
            Missing or unexpected keys, other shapes, running_mean without running_var; an array of this layer that can't be written.
        TypeError
            Values that are not numbers; an array of this layer of another dtype than its own.
        """
        targets, own = self._kept(written=True), self.state_dict()
        checked = checks.check_state(state, own)
        for key, value in checked.items():
            own[key][...] = value
        for name, target in targets.items():
            residence.overwrite(target, own[KEPT[name]])
        if "num_batches_tracked" in own:
            self.num_batches_tracked = int(own["num_batches_tracked"])
