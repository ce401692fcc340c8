"""fastbn as the contract's tests call it, with every array handed over as one of the simulated GPU, in its own memory
and strides.
"""

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
        return on_host(
            getattr(fastbn, name)(*arguments, backend=backend, **{key: on_gpu(value) for key, value in options.items()})
        )

    return call


moments = _handed_over("moments")
batch_norm = _handed_over("batch_norm")
batch_norm_inference = _handed_over("batch_norm_inference")
batch_norm_backward = _handed_over("batch_norm_backward")
batch_norm_inference_backward = _handed_over("batch_norm_inference_backward")
batch_norm_backward_reduce = _handed_over("batch_norm_backward_reduce")
batch_norm_backward_input = _handed_over("batch_norm_backward_input")


class RunningMoments:
    """Running statistics of chunks on the GPU, read on the host."""

    def __init__(self, num_features: int, axis: int, backend: str) -> None:
        self.seen = fastbn.RunningMoments(num_features, axis, backend)

    def update(self, chunk: np.ndarray) -> "RunningMoments":
        self.seen.update(on_gpu(chunk))
        return self

    @property
    def mean(self) -> np.ndarray:
        return on_host(self.seen.mean)

    def var(self) -> np.ndarray:
        return on_host(self.seen.var())


class BatchNorm:
    """A layer on the GPU, whose arrays are given and read on the host."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.__dict__["layer"] = fastbn.BatchNorm(*arguments, **options).to("cuda", "numba")

    def train(self, mode: bool = True) -> "BatchNorm":
        self.layer.train(mode)
        return self

    def eval(self, *, backward: bool) -> "BatchNorm":
        self.layer.eval(backward=backward)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.layer, name, on_gpu(value))

    def __getattr__(self, name: str) -> Any:
        return on_host(getattr(self.layer, name))

    def __call__(self, x: Any) -> Any:
        return on_host(self.layer(on_gpu(x)))

    def backward(self, dy: Any, out: Any = None) -> Any:
        return on_host(self.layer.backward(on_gpu(dy), on_gpu(out)))
