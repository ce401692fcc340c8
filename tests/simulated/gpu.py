"""fastbn as the contract's tests call it, with every array handed over as one of the simulated GPU, in its own memory and strides."""

from typing import Any

import numpy as np
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

import fastbn


def on_gpu(value: Any) -> Any:
    """A host array seen as one of the GPU; anything else as it is."""
    return FakeCUDAArray(value) if isinstance(value, np.ndarray) else value


def on_host(value: Any) -> Any:
    """The inverse, through tuples and moments."""
    if isinstance(value, tuple):
        return tuple(map(on_host, value))
    if isinstance(value, fastbn.Moments):
        return Returned(value)
    return value._ary if isinstance(value, FakeCUDAArray) else value


class Returned:
    """Moments of the GPU, read on the host."""

    def __init__(self, moments: fastbn.Moments) -> None:
        self.moments, self.count = moments, moments.count
        self.mean, self.m2 = on_host(moments.mean), on_host(moments.m2)

    def var(self, ddof: int = 0) -> np.ndarray:
        return on_host(self.moments.var(ddof))


def _handed_over(name: str) -> Any:
    def call(*arguments: Any, backend: str, **options: Any) -> Any:
        arguments = tuple(a.moments if isinstance(a, Returned) else on_gpu(a) for a in arguments)
        return on_host(getattr(fastbn, name)(*arguments, backend=backend, **{key: on_gpu(value) for key, value in options.items()}))

    return call


moments = _handed_over("moments")
batch_norm = _handed_over("batch_norm")
batch_norm_inference = _handed_over("batch_norm_inference")
batch_norm_backward = _handed_over("batch_norm_backward")
batch_norm_inference_backward = _handed_over("batch_norm_inference_backward")
