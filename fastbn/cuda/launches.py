"""Launches on a GPU: what a call launches, written down once for arrays that lie alike, and run with each call's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastbn.arguments import layout
from fastbn.cuda import buffers, grids, streams
from fastbn.cuda.buffers import STORAGE, Buffer, Geometry
from fastbn.cuda.kernels import copying, finish, gpu, jit

ALIGNED = 256  # bytes
PROGRAMS = 1024  # kept; of the arrays of a network there are some hundred
WORK = 0  # the number of the workspace among what a program is given


class Place(NamedTuple):
    """What a program learns at each call: where memory is, bytes from the 16-byte boundary below the array of a number.

    Or a value.
    """

    number: int
    offset: int = 0
    span: tuple[int, int] = (0, 0)  # of the memory, from the same boundary
    dtype: np.dtype[Any] | None = None  # None of a value


class Step(NamedTuple):
    """A launch, but for where its memory is."""

    kernel: jit.Kernel
    dtype: np.dtype[Any]
    statistic: np.dtype[Any]
    blocks: int
    arguments: list[Any]  # as the driver takes them
    # arguments that are filled in: which, by what has this number, bytes behind that
    places: list[tuple[int, int, int]]
    memory: list[Place]  # the same, as the simulator has to know them


class Program(NamedTuple):
    """What a call launches."""

    steps: list[Step]
    work: int  # bytes of workspace
    plan: layout.Plan  # of x


class Call:
    """Writes a program: takes the launches of a call, and lays its workspace out."""

    def __init__(self, arrays: int) -> None:
        self.steps: list[Step] = []
        self.work = 0
        self._arrays = arrays

    def value(self, k: int) -> Place:
        """The k-th of the numbers that vary from call to call."""
        return Place(1 + self._arrays + k)

    def take(self, count: int, dtype: np.dtype[Any]) -> Place:
        """So many elements of the workspace."""
        low, nbytes = self.work, count * dtype.itemsize
        self.work += -(-nbytes // ALIGNED) * ALIGNED
        return Place(WORK, low, (low, low + nbytes), dtype)

    def take_like(self, buffer: Buffer, dtype: str, strides: tuple[int, ...]) -> Buffer:
        """Room in the workspace for the values of an array."""
        place = self.take(buffer.size, STORAGE[dtype])
        return buffer._replace(address=place.offset, strides=strides, dtype=dtype, owner=WORK)

    def launch(
        self,
        kernel: jit.Kernel,
        dtype: np.dtype[Any],
        blocks: int,
        given: Mapping[str, Any],
        statistic: str = "float64",
    ) -> None:
        """Launch a kernel for memory of a dtype, and statistics of another, with what it takes of `given`, by name.

        Raises
        ------
        ValueError
            A number that the kernel has no room for.
        """
        arguments = [given[name] for name in kernel.names]
        places = [(k, value.number, value.offset) for k, value in enumerate(arguments) if isinstance(value, Place)]
        memory = [value for value in arguments if isinstance(value, Place)]
        prepared = kernel.prepared(arguments)
        self.steps.append(Step(kernel, dtype, STORAGE[statistic], blocks, prepared, places, memory))


def pointer(buffer: Buffer) -> Place:
    """What a kernel takes for a buffer."""
    return Place(buffer.owner, buffer.address, buffer.span(), buffer.storage)


@lru_cache(maxsize=PROGRAMS)
def program(write: Callable[..., Any], arrays: tuple[Geometry | None, ...], *options: Hashable) -> Program:
    """What `write` launches for arrays that lie so, each None where it is absent.

    It gets buffers, whose owner is their number.
    """
    call = Call(len(arrays))
    given = (None if geometry is None else buffers.stand_in(geometry, k) for k, geometry in enumerate(arrays, 1))
    plan = write(call, *given, *options)
    return Program(call.steps, call.work, plan)


def fresh(number: int, shape: tuple[int, ...], dtype: str) -> Place:
    """Where a compact result is that each call makes."""
    buffer = Buffer(0, shape, layout.compact(shape), dtype, False, None, number)
    return pointer(buffer)


class Queue:
    """One call on a stream of x's device, within which results are allocated: what is allocated belongs to that stream.

    Parameters
    ----------
    x : Buffer
        Whose library's memory and current stream are taken.
    stream : int or stream, optional
        Another stream.
    **arrays : Buffer, optional
        The other arrays of the call.

    Raises
    ------
    TypeError, ValueError
        What is no stream; an array on another GPU than x.
    """

    __slots__ = ("_arrays", "_inside", "_lent", "_x", "apart", "device", "stream")

    def __init__(self, x: Buffer, stream: Any, **arrays: Buffer | None) -> None:
        self.device = buffers.device_of(x)
        own = streams.current_stream(x, self.device)
        self.stream = own if stream is None else streams.handle(stream)
        self.apart = self.stream != own
        self._x, self._arrays = x, [x, *(buffer for buffer in arrays.values() if buffer is not None)]
        for name, buffer in arrays.items():
            if (
                buffer is not None
                and buffer is not x
                and buffer.size
                and (there := buffers.device_of(buffer)) != self.device
            ):
                raise ValueError(f"{name}: given an array on GPU {there}, want GPU {self.device}, where x is")
        self._lent = streams.lent(self._arrays, self.stream, self.device)

    def __enter__(self) -> Queue:
        self._inside: ExitStack | None = None
        others = [
            buffer.stream for buffer in self._arrays if buffer.stream is not None and buffer.stream != self.stream
        ]
        current = jit.current()
        if self.apart or others or self._lent or current != self.device:
            with ExitStack() as stack:
                if current != self.device:
                    stack.enter_context(jit.on(self.device))
                if self.apart:
                    stack.enter_context(streams.allocating(self._x, self.stream, self.device))
                for other in dict.fromkeys(others):
                    jit.wait(self.stream, other)
                for buffer in self._lent:
                    stack.callback(streams.used, buffer, self.stream, self.device)
                self._inside = stack.pop_all()
        return self

    def __exit__(self, *reason: Any) -> None:
        if self._inside is not None:
            self._inside.__exit__(*reason)

    def run(self, program: Program, arrays: tuple[Any, ...], *values: float) -> None:
        """Launch a program on its arrays, each a buffer, an address, or None where it is absent, and its values.

        Raises
        ------
        RuntimeError
            CUDA refuses a launch, or reports what went wrong before.
        """
        if not program.steps:
            return
        owner, work = streams.workspace(program.work, self._x, self.stream, self.device) if program.work else (None, 0)
        try:
            bases = [0 if a is None else (a if type(a) is int else a.address) & -16 for a in arrays]
            self._launch(program, [work, *bases, *map(np.float64, values)])
        finally:
            streams.give_back(owner)

    def _launch(self, program: Program, given: list[Any]) -> None:
        stream, device = self.stream, self.device
        for kernel, dtype, statistic, blocks, prepared, places, memory in program.steps:
            arguments = prepared.copy()
            for k, number, offset in places:
                arguments[k] = given[number] + offset
            if gpu.SIMULATED:
                for (k, number, _), (_, _, (low, high), pointed) in zip(places, memory, strict=True):
                    if pointed is not None:
                        arguments[k] = jit.pointer(arguments[k], given[number] + low, given[number] + high, pointed)
            try:
                kernel.launch(dtype, statistic, blocks, grids.THREADS, stream, device, arguments)
            except Exception as error:
                about = f"x {self._x.shape} {self._x.dtype}, stream {stream:#x}"
                where = f"kernel {kernel.name}, {blocks} blocks of {grids.THREADS} threads, {about}"
                raise RuntimeError(f"CUDA failed at {where}: {error}") from error


def clear(call: Call, rows: Place, C: int, dtype: str) -> None:
    """Zeros in (2, C)."""
    call.launch(finish.clear, STORAGE[dtype], grids.blocks(2 * C), {"result": rows, "size": 2 * C})


def copy(call: Call, source: Buffer, target: Buffer) -> None:
    """target = source, whatever the strides of both.

    Raises
    ------
    ValueError
        More axes than the kernel takes, once those are joined that lie alike in both.
    """
    axes = [a for a in range(len(source.shape)) if source.shape[a] != 1]
    axes.sort(key=lambda a: -abs(target.strides[a]))
    joined: list[tuple[int, int, int]] = []
    for a in axes:
        n, s, t = source.shape[a], source.strides[a], target.strides[a]
        if joined and joined[-1][1] == s * n and joined[-1][2] == t * n:
            joined[-1] = (joined[-1][0] * n, s, t)
        else:
            joined.append((n, s, t))
    if len(joined) > copying.RANK:
        raise ValueError(
            f"x: given strides {source.strides} for shape {source.shape}: copy it to contiguous memory first"
        )
    joined = [(1, 0, 0)] * (copying.RANK - len(joined)) + joined
    given: dict[str, Any] = {"x": pointer(source), "y": pointer(target)}
    for axis, (size, x_stride, y_stride) in zip("abcdef", joined, strict=True):
        given |= {axis: size, f"x{axis}": x_stride, f"y{axis}": y_stride}
    call.launch(copying.move, source.storage, grids.blocks(source.size), given)
