"""What stands where CUDA's driver would: memory, and launches that the machine runs. `replaced` lists all that it
replaces of fastbn's.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from fastbn.cuda import buffers, grids, launches, streams, views
from fastbn.cuda.kernels import gpu, jit

from . import compiler
from .arrays import BOUNDARY, ITEMSIZE, Array, Ints, laid
from .machine import Machine
from .memory import GRANULE, READ, WRITE, Fault, Memory, Space
from .parser import GAP, parse


class Launch(NamedTuple):
    """One launch: the kernel as compiled, and its grid."""

    kernel: str
    stored: str
    statistic: str  # "" where none are taken
    blocks: int
    threads: int


class Device:
    """A GPU of the machine's, on which fastbn's own functions run within `with device:`.

    Parameters
    ----------
    architecture : str
        What kernels are compiled for.
    lto : bool
        Whether behind link-time optimization.
    dry : bool
        Note launches, and don't run them: results are undefined.
    altered : mapping
        Changes to the PTX of kernels, by name.
    """

    def __init__(
        self,
        architecture: str,
        lto: bool = False,
        dry: bool = False,
        altered: Mapping[str, Callable[[str], str]] | None = None,
    ) -> None:
        self.architecture, self.lto, self.dry, self.altered = architecture, lto, dry, altered or {}
        self.space = Space()
        self.launches: list[Launch] = []
        self.machines: dict[tuple[str, str, str], Machine] = {}

    def replaced(self) -> list[tuple[Any, str, Any]]:
        """(where, name, what is there meanwhile)."""
        take, run = launches.Call.take, launches.Queue.run

        def take_apart(call: Any, count: int, dtype: np.dtype[Any]) -> Any:
            """A piece of workspace with a gap behind it."""
            place = take(call, count, dtype)
            call.work += GAP
            return place

        def run_noted(queue: Any, program: Any, *given: Any) -> None:
            pieces = [place.span for step in program.steps for place in step.memory if place.number == launches.WORK]
            with mock.patch.object(streams, "workspace", lambda nbytes, *_: self._workspace(nbytes, pieces)):
                run(queue, program, *given)

        def launch(
            kernel: Any, dtype: Any, statistic: Any, blocks: int, threads: int, stream: int, device: int, arguments: Any
        ) -> None:
            self._launch(kernel, dtype.name, statistic.name, blocks, threads, arguments)

        return [
            (buffers, "declines", lambda: None),
            (buffers, "empty", self._result),
            (jit, "current", lambda: 0),
            (jit, "device_of", lambda address: 0),
            (jit.Kernel, "launch", launch),
            (launches.Call, "take", take_apart),
            (launches.Queue, "run", run_noted),
        ]

    def __enter__(self) -> "Device":
        assert not gpu.SIMULATED
        self._stack = ExitStack()
        for where, name, value in self.replaced():
            self._stack.enter_context(mock.patch.object(where, name, value))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self.space.keep([])

    def allocate(self, nbytes: int, name: str, allowed: int = READ | WRITE) -> Memory:
        """Fresh memory on a boundary, undefined; behind `nbytes` nothing may be touched."""
        size = max(16, -(-nbytes // 16) * 16)
        raw = np.full(size + 2 * BOUNDARY, 0xFF, np.uint8)
        start = -raw.ctypes.data % BOUNDARY
        content = raw[start : start + size]  # which keeps all of it
        memory = self.space.add(Memory(content, content.ctypes.data, name, allowed))
        memory.allowed[nbytes // 2 :] = 0
        return memory

    def empty(
        self, shape: Ints, dtype: str, name: str, layout: str = "first", shift: int = 0, allowed: int = READ | WRITE
    ) -> Array:
        """An array of undefined elements."""
        size, offset, strides = laid(shape, layout, ITEMSIZE[dtype], shift)
        return Array(self.allocate(size, name, allowed=0), offset, shape, strides, dtype).allow(allowed)

    def array(
        self, values: Any, dtype: str, name: str, layout: str = "first", shift: int = 0, allowed: int = READ
    ) -> Array:
        """An array of these values, rounded; kernels may read it."""
        values = np.asarray(values)
        found = self.empty(values.shape, dtype, name, layout, shift, allowed)
        found.put(values)
        return found

    def _workspace(self, nbytes: int, pieces: list[tuple[int, int]]) -> tuple[Any, int]:
        """Undefined at every call; between the pieces of it lies nobody's memory, and so it is given back."""
        memory = self.allocate(nbytes, "workspace", allowed=0)
        for low, high in pieces:
            memory.allowed[low // GRANULE : high // GRANULE] = READ | WRITE
        return SimpleNamespace(close=lambda: memory.allowed.fill(0)), memory.base

    def _result(self, shape: Ints, order: Ints, dtype: str, like: Any, *_: Any) -> Array:
        steps = [0] * len(shape)
        step = ITEMSIZE[dtype]
        for axis in reversed(order):
            steps[axis], step = step, step * shape[axis]
        return Array(self.allocate(step, f"result {shape}"), 0, tuple(shape), tuple(steps), dtype)

    def machine(self, name: str, stored: str, statistic: str) -> Machine:
        """The machine for a kernel as compiled for memory of a dtype and statistics of another."""
        key = name, stored, statistic
        if key not in self.machines:
            text = compiler.ptx(name, stored, statistic, self.architecture, self.lto)
            kernel = parse(self.altered.get(name, str)(text))
            kernel.name = f"{name} {stored} {statistic}".strip()
            self.machines[key] = Machine(kernel, self.space)
        return self.machines[key]

    def _launch(
        self, kernel: Any, stored: str, statistic: str, blocks: int, threads: int, arguments: Sequence[Any]
    ) -> None:
        name = next(name for name, known in compiler.kernels().items() if known is kernel)
        known = statistic if compiler.takes_statistics(kernel) else ""
        self.launches.append(Launch(name, stored, known, blocks, threads))
        if not 0 < blocks < 2**31:
            raise Fault(f"{name}: {blocks} blocks")
        if self.dry:
            return
        machine = self.machine(name, stored, statistic if known else "float64")
        machine.launch(blocks, threads, _packed(machine, arguments))


def _packed(machine: Machine, arguments: Sequence[Any]) -> bytes:
    """Arguments as a kernel finds them.

    Raises
    ------
    Fault
        Another number of them, one of another size than its parameter's.
    """
    parameters, name = machine.kernel.parameters, machine.kernel.name
    if len(arguments) != len(parameters):
        raise Fault(f"{name}: {len(arguments)} arguments for {len(parameters)} parameters")
    found = bytearray(machine.kernel.parameter_bytes)
    for parameter, value in zip(parameters, arguments, strict=True):
        content = value.tobytes() if isinstance(value, np.generic) else int(value).to_bytes(8, "little")  # an address
        if len(content) != parameter.size:
            raise Fault(f"{name}: parameter {parameter.name} takes {parameter.size} bytes, given {len(content)}")
        found[parameter.at : parameter.at + parameter.size] = content
    return bytes(found)


def plans_forgotten() -> None:
    """What fastbn plans for arrays that lie so is planned anew: `grids` was changed, or workspaces are laid out
    otherwise.
    """
    for module in (views, grids, launches):
        for value in vars(module).values():
            if callable(getattr(value, "cache_clear", None)):
                value.cache_clear()


@cache
def device(architecture: str, lto: bool = False) -> Device:
    """The device of an architecture: kernels are read once."""
    return Device(architecture, lto)
