"""What Python takes of a call on a GPU, without one.

The launches are faked, their arguments packed for the driver and no more.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import fastbn
from bench.suite.cases import name_of
from fastbn.cuda import buffers

SHAPES = (32, 64), (32, 64, 56, 56)  # in one launch, and in three
ROUNDS, CALLS = 25, 100


class Array:
    """An array with the interface, in memory of the host."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3, "stream": None}
        self._rows = [Array(row) for row in array] if array.ndim == 2 and len(array) == 2 else []

    def __getitem__(self, k: int) -> Array:
        return self._rows[k]


class Driver:
    """In the place of the driver: counts launches, and has the results at hand, as a pool of memory would."""

    def __init__(self) -> None:
        from cuda.core._kernel_arg_handler import ParamHolder

        self.launches, self._pack = 0, ParamHolder
        self._made: dict[Any, Array] = {}
        self._work = np.empty(2**24, np.uint8)
        self._place = self._work, -(-self._work.ctypes.data // 256) * 256

    def launch(self, stream: Any, config: Any, kernel: Any, *arguments: Any) -> None:
        """Pack the arguments."""
        self.launches += 1
        self._pack(arguments)

    def empty(self, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> Array:
        """A result."""
        if (sizes, strides, dtype) not in self._made:
            self._made[sizes, strides, dtype] = Array(np.empty(sizes, dtype))
        return self._made[sizes, strides, dtype]

    def within(self) -> ExitStack:
        """A context in which fastbn asks this driver."""
        from fastbn.cuda.kernels import jit

        core = jit._core()
        fakes = {
            "_core": lambda: SimpleNamespace(Stream=core.Stream, LaunchConfig=core.LaunchConfig, launch=self.launch),
            "current": lambda: 0,
            "device_of": lambda address: 0,
            "empty": self.empty,
            "raw": lambda nbytes, stream, device: self._place,
        }
        stack = ExitStack()
        stack.enter_context(mock.patch.multiple(jit, **fakes))
        stack.enter_context(mock.patch.object(jit.Kernel, "compiled", lambda *given: "the kernel"))
        for kernel in jit.KERNELS:
            stack.enter_context(mock.patch.object(kernel, "_on", {}))
        stack.enter_context(mock.patch.object(buffers, "declines", lambda: None))
        return stack


def calls(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Each pass on arrays of a shape."""
    x, dy, out = (Array(np.ones(shape, np.float32)) for _ in range(3))
    gamma, beta, mean, var = (Array(np.ones(shape[1], np.float32)) for _ in range(4))
    moments = fastbn.moments(x)
    return {
        "forward": lambda: fastbn.batch_norm(x, gamma, beta, out=out),
        "backward": lambda: fastbn.batch_norm_backward(dy, x, moments, gamma, out=out),
        "inference": lambda: fastbn.batch_norm_inference(x, mean, var, gamma, beta, out=out),
        "moments": lambda: fastbn.moments(x),
    }


def microseconds(call: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
    """(least, median) of the rounds: the least is what the call takes, the median what else the machine was at."""
    call()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(samples), statistics.median(samples)


def report(rounds: int = ROUNDS) -> list[str]:
    """A line for each call: its launches, what it takes, and what of that a launch takes."""
    from fastbn.cuda.kernels import apply

    lines, driver = [], Driver()
    with driver.within():
        for shape in SHAPES:
            for what, call in calls(shape).items():
                call()
                driver.launches = 0
                call()
                number, (least, median) = driver.launches, microseconds(call, rounds)
                lines.append(f"{name_of(shape)} {what}: {number} launches, {least:.1f} us (median {median:.1f})")
        kernel, kinds = apply.normalize, (np.dtype(np.float32), np.dtype(np.float64))
        arguments = kernel.prepared([1] * len(kernel.arguments))
        least, median = microseconds(lambda: kernel.launch(*kinds, 100, 256, 1, 0, arguments), rounds)
        lines.append(f"a launch with {len(arguments)} arguments: {least:.1f} us (median {median:.1f})")
    return lines
