"""How `bench.gpu` times: tensors that outgrow the cache, everyone's calls on them, CUDA events around several by turns.

And what Python takes of a call, without a GPU: its launches faked, their arguments packed for the driver and no more.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import fastbn
from bench.suite.cases import CASES, Case, name_of
from fastbn.cuda import buffers, cost

EPS = 1e-5
CACHED_BYTES = 256 * 2**20  # of all sets of x: several times the cache of any GPU
SETS = 512  # at most: smaller arrays are bound by the host, wherever they lie
LARGE: tuple[tuple[int, ...], ...] = (
    (256, 64, 112, 112),
    (256, 256, 56, 56),
    (64, 64, 224, 224),
    (16, 32, 64, 128, 128),
)
SHAPES: dict[str, Case] = {
    **CASES,
    **{name_of(shape): Case(shape, "first") for shape in LARGE},
    **{f"{name_of(shape)} last": Case(shape, "last", True) for shape in LARGE},
}
Call = Callable[[int], Any]

ROUNDS = 5
BATCH_SECONDS = 2e-3  # of calls between two events

PEERS = ("PyTorch cuDNN", "PyTorch native", "torch.compile")
HOST_SHAPES = (32, 64), (32, 64, 56, 56)  # in one launch, and in three
HOST_ROUNDS, HOST_CALLS = 25, 100


def dims(case: Case) -> tuple[int, ...]:
    """(N, C, S) or (R, C) of a case, as the backend sees it."""
    N, C, *rest = case.shape
    S = math.prod(rest)
    return (N * S, C) if case.last or not rest else (N, C, S)


class Problem:
    """Tensors of a case and dtype, in as many sets as outgrow the cache, and the calls on a set."""

    def __init__(self, name: str, dtype: str, sets: int = SETS) -> None:
        import torch

        self.torch, self.case, self.dtype = torch, SHAPES[name], dtype
        shape, stored = self.case.shape, getattr(torch, dtype)
        self.bytes = math.prod(shape) * stored.itemsize
        self.sets = max(2, min(sets, -(-CACHED_BYTES // self.bytes)))
        self.parameter = torch.float64 if dtype == "float64" else torch.float32
        self.x, self.dy, self.y = (
            [self._drawn(shape, stored, seed + i) for i in range(self.sets)] for seed in (0, 1000, 2000)
        )
        C = shape[1]
        self.gamma = torch.linspace(0.5, 2, C, dtype=self.parameter, device="cuda")
        self.beta = torch.linspace(-1, 1, C, dtype=self.parameter, device="cuda")
        self.mean, self.var = torch.full_like(self.beta, 3.0), torch.full_like(self.beta, 4.0)

    def _drawn(self, shape: tuple[int, ...], stored: Any, seed: int) -> Any:
        """Normal values, mean 3 and standard deviation 2, in the case's memory order."""
        torch = self.torch
        memory = self.case.memory
        generator = torch.Generator("cuda").manual_seed(seed)
        made = torch.empty([shape[a] for a in memory], dtype=stored, device="cuda").normal_(3, 2, generator=generator)
        return made.permute([memory.index(a) for a in range(len(shape))])

    def moved(self, what: str) -> int:
        """Bytes that a pass must move by the schedule."""
        return cost.moved(what, dims(self.case), self.dtype)

    def copy(self, k: int) -> Any:
        """The device's own copy of x."""
        return self.y[k].copy_(self.x[k])

    def fastbn(self, what: str) -> Call:
        """fastbn's pass."""
        moments = [fastbn.moments(x) for x in self.x] if what == "backward" else []
        return {
            "forward": lambda k: fastbn.batch_norm(self.x[k], self.gamma, self.beta, out=self.y[k]),
            "backward": lambda k: fastbn.batch_norm_backward(
                self.dy[k], self.x[k], moments[k], self.gamma, out=self.y[k]
            ),
            "inference": lambda k: fastbn.batch_norm_inference(
                self.x[k], self.mean, self.var, self.gamma, self.beta, out=self.y[k]
            ),
            "moments": lambda k: fastbn.moments(self.x[k]),
        }[what]

    def pytorch(self, what: str, function: Callable[..., Any]) -> Call:
        """PyTorch's pass, by F.batch_norm or a compiled one."""
        torch = self.torch
        if what == "moments":
            axes = [a for a in range(len(self.case.shape)) if a != 1]
            return lambda k: torch.var_mean(self.x[k], axes)
        if what == "inference":
            return lambda k: function(self.x[k], self.mean, self.var, self.gamma, self.beta, False, 0.1, EPS)
        if what == "forward":
            return lambda k: function(self.x[k], None, None, self.gamma, self.beta, True, 0.1, EPS)
        leaves = [x.detach().requires_grad_() for x in self.x]
        gamma, beta = self.gamma.detach().requires_grad_(), self.beta.detach().requires_grad_()
        with torch.enable_grad():
            results = [function(x, None, None, gamma, beta, True, 0.1, EPS) for x in leaves]
        return lambda k: torch.autograd.grad(results[k], (leaves[k], gamma, beta), self.dy[k], retain_graph=True)


def contestants(problem: Problem, what: str, compiled: bool) -> dict[str, Callable[[], Call]]:
    """Who takes part in a pass, fastbn first, and how each call is made, which may raise.

    PyTorch's backward runs a forward for it.
    """
    torch = problem.torch
    found: dict[str, Callable[[], Call]] = {"fastbn": lambda: problem.fastbn(what)}
    plain = torch.nn.functional.batch_norm
    if what == "moments":
        return {**found, "PyTorch native": lambda: problem.pytorch(what, plain)}
    found["PyTorch cuDNN"] = lambda: problem.pytorch(what, plain)
    found["PyTorch native"] = lambda: _without_cudnn(torch, lambda: problem.pytorch(what, plain))
    if compiled:
        found["torch.compile"] = lambda: problem.pytorch(what, torch.compile(plain, dynamic=False))
    return found


def _without_cudnn(torch: Any, build: Callable[[], Call]) -> Call:
    def run(k: int) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return call(k)

    with torch.backends.cudnn.flags(enabled=False):
        call = build()
    return run


def _batch(torch: Any, call: Call, sets: int, number: int) -> float:
    """Seconds per call of so many, on rotating sets."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(number):
        call(i % sets)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / number


def said(error: Exception) -> str:
    """An error in a record: its type and the beginning of its words, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def released(torch: Any) -> None:
    """What is done, or failed, gives its memory back; a device that is gone refuses that too."""
    gc.collect()
    with suppress(Exception):
        torch.cuda.empty_cache()


def ready(torch: Any, builds: Mapping[str, Callable[[], Call]]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls that run, and why each of the others can't be timed."""
    calls: dict[str, Call] = {}
    refused: dict[str, str] = {}
    for who, build in builds.items():
        if isinstance(found := _tried(torch, build), str):
            refused[who] = found
            released(torch)
        else:
            calls[who] = found
    return calls, refused


def _tried(torch: Any, build: Callable[[], Call]) -> Call | str:
    """A call that runs, or why it does not."""
    try:
        call = build()
        for k in range(2):
            call(k)
        torch.cuda.synchronize()
    except Exception as error:
        return said(error)
    return call


def record(name: str, what: str, problem: Problem, compiled: bool) -> dict[str, Any]:
    """Everyone's time for a pass, as ratios paired within a round, and fastbn's bandwidth beside the copy's."""
    torch = problem.torch
    calls, refused = ready(torch, contestants(problem, what, compiled))
    if "fastbn" in refused:
        raise RuntimeError(f"fastbn fails at {name} {problem.dtype} {what}: {refused['fastbn']}")
    calls["copy"] = problem.copy
    try:
        each = _by_turns(torch, calls, refused, problem.sets, dict.fromkeys(calls, 3))
        number = {who: max(3, int(BATCH_SECONDS / seconds)) for who, seconds in each.items()}
        rounds = [_by_turns(torch, calls, refused, problem.sets, number) for _ in range(ROUNDS)]
    except Exception as error:
        raise RuntimeError(
            f"fastbn or the copy fails at {name} {problem.dtype} {what}, timed: {said(error)}"
        ) from error
    return summed_up(name, what, problem, [{who: seconds[who] for who in calls} for seconds in rounds], refused)


def _by_turns(
    torch: Any, calls: dict[str, Call], refused: dict[str, str], sets: int, number: Mapping[str, int]
) -> dict[str, float]:
    """Seconds per call of each. A peer that raises is left out from then on.

    What fastbn raises, or the copy, goes to the caller.
    """
    found = {}
    for who in list(calls):
        try:
            found[who] = _batch(torch, calls[who], sets, number[who])
        except Exception as error:
            if who not in PEERS:
                raise
            refused[who] = said(error)
        if who in refused:
            del calls[who]
            released(torch)
    return found


def summed_up(
    name: str, what: str, problem: Any, rounds: list[Mapping[str, float]], refused: Mapping[str, str]
) -> dict[str, Any]:
    """The record of a pass from the seconds of each round."""

    def ratio(of: Callable[[Mapping[str, float]], float]) -> float:
        return statistics.median(of(seconds) for seconds in rounds)

    peers = {who: ratio(lambda s, w=who: s[w] / s["fastbn"]) for who in rounds[0] if who not in ("fastbn", "copy")}
    fastest = min(peers, key=lambda who: peers[who], default=None)
    moved = problem.moved(what)
    bandwidth = ratio(lambda s: (moved / s["fastbn"]) / (2 * problem.bytes / s["copy"]))
    return {
        "shape": name,
        "group": problem.case.group,
        "dtype": problem.dtype,
        "pass": what,
        "bytes": problem.bytes,
        "moved": moved,
        "seconds": {who: statistics.median(s[who] for s in rounds) for who in rounds[0]},
        "ratios": peers,
        "fastest": fastest,
        "ratio": None if fastest is None else peers[fastest],
        "of_copy": bandwidth,
        "refused": dict(refused),
    }


def host_microseconds(call: Call, torch: Any) -> float:
    """What a call takes of the host, the GPU's work left in its queue."""
    for k in range(20):
        call(k % 2)
    torch.cuda.synchronize()
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for k in range(HOST_CALLS):
            call(k % 2)
        samples.append((time.perf_counter() - start) / HOST_CALLS)
        torch.cuda.synchronize()
    return statistics.median(samples) * 1e6


class _Array:
    """An array with the interface of a GPU's, in memory of the host."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.__cuda_array_interface__ = array.__array_interface__ | {"version": 3, "stream": None}
        self._rows = [_Array(row) for row in array] if array.ndim == 2 and len(array) == 2 else []

    def __getitem__(self, k: int) -> _Array:
        return self._rows[k]


class _Driver:
    """In the place of the driver: counts launches, and has the results at hand, as a pool of memory would."""

    def __init__(self) -> None:
        from cuda.core._kernel_arg_handler import ParamHolder

        self.launches, self._pack = 0, ParamHolder
        self._made: dict[Any, _Array] = {}
        self._work = np.empty(2**24, np.uint8)
        self._place = self._work, -(-self._work.ctypes.data // 256) * 256

    def launch(self, stream: Any, config: Any, kernel: Any, *arguments: Any) -> None:
        """Pack the arguments."""
        self.launches += 1
        self._pack(arguments)

    def empty(self, sizes: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> _Array:
        """A result."""
        if (sizes, strides, dtype) not in self._made:
            self._made[sizes, strides, dtype] = _Array(np.empty(sizes, dtype))
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


def _faked(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Each pass on arrays of a shape."""
    x, dy, out = (_Array(np.ones(shape, np.float32)) for _ in range(3))
    gamma, beta, mean, var = (_Array(np.ones(shape[1], np.float32)) for _ in range(4))
    moments = fastbn.moments(x)
    return {
        "forward": lambda: fastbn.batch_norm(x, gamma, beta, out=out),
        "backward": lambda: fastbn.batch_norm_backward(dy, x, moments, gamma, out=out),
        "inference": lambda: fastbn.batch_norm_inference(x, mean, var, gamma, beta, out=out),
        "moments": lambda: fastbn.moments(x),
    }


def _microseconds(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """(least, median) of the rounds: the least is what the call takes, the median what else the machine was at."""
    call()
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        samples.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    return min(samples), statistics.median(samples)


def host_report(rounds: int = HOST_ROUNDS) -> list[str]:
    """A line for each call: its launches, what it takes, and what of that a launch takes."""
    from fastbn.cuda.kernels import apply

    lines, driver = [], _Driver()
    with driver.within():
        for shape in HOST_SHAPES:
            for what, call in _faked(shape).items():
                call()
                driver.launches = 0
                call()
                number, (least, median) = driver.launches, _microseconds(call, rounds)
                lines.append(f"{name_of(shape)} {what}: {number} launches, {least:.1f} us (median {median:.1f})")
        kernel, kinds = apply.normalize, (np.dtype(np.float32), np.dtype(np.float64))
        arguments = kernel.prepared([1] * len(kernel.arguments))
        least, median = _microseconds(lambda: kernel.launch(*kinds, 100, 256, 1, 0, arguments), rounds)
        lines.append(f"a launch with {len(arguments)} arguments: {least:.1f} us (median {median:.1f})")
    return lines
