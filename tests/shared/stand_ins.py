"""PyTorch, CuPy and two GPUs as far as fastbn asks them: what is allocated, waited for and launched is noted, and
nothing computed.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastbn.cuda import buffers
from fastbn.cuda.kernels import jit

LEGACY, OWN, OTHER, THIRD = 1, 0x100, 0x200, 0x300


class Machine:
    """GPUs and libraries as far as fastbn asks them: what was allocated, waited for, launched, and where."""

    def __init__(self) -> None:
        self.device, self.current = 0, {"torch": OWN, "cupy": OWN}
        self.allocated: list[tuple[str, int, int]] = []  # what, device, stream
        self.waited: list[tuple[int, int]] = []
        self.launched: list[tuple[int, int, int]] = []  # device, stream, the current device
        self.recorded: list[tuple[int, int]] = []  # address, stream
        self.memory: dict[int, np.ndarray] = {}
        self.given_back = 0

    def take(self, what: str, shape: tuple[int, ...], dtype: Any, device: int, stream: int) -> np.ndarray:
        self.allocated.append((what, device, stream))
        return np.empty(shape, dtype)

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def under(self, library: str, stream: int) -> Iterator[None]:
        before, self.current[library] = self.current[library], stream
        try:
            yield
        finally:
            self.current[library] = before


class Within:
    """A library's stream or device: current as long as it is entered, also again."""

    def __init__(self, enter: Callable[[], Any], **says: int) -> None:
        self._enter = enter
        self.__dict__.update(says)

    def __enter__(self) -> None:
        self._entered = self._enter()
        self._entered.__enter__()

    def __exit__(self, *reason: Any) -> None:
        self._entered.__exit__(*reason)


class Array:
    """An array of a library on a GPU, in host memory."""

    def __init__(self, machine: Machine, array: np.ndarray, device: int, stream: int | None = None) -> None:
        self.machine, self.array, self.home, self.said = machine, array, device, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__ | {"version": 3, "stream": self.said}

    def __getitem__(self, k: int) -> Any:
        return type(self)(self.machine, self.array[k], self.home, self.said)


class Numba(Array):
    """As anything with the interface."""


class Cupy(Array):
    """CuPy's."""

    @property
    def device(self) -> Any:
        return Within(lambda: self.machine.on(self.home), id=self.home)


class Torch(Array):
    """PyTorch's."""

    is_cuda, requires_grad = True, False

    @property
    def device(self) -> Any:
        return SimpleNamespace(index=self.home)

    @property
    def dtype(self) -> str:
        return f"torch.{self.array.dtype}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def numel(self) -> int:
        return self.array.size

    def is_neg(self) -> bool:
        return False

    def record_stream(self, stream: Any) -> None:
        self.machine.recorded.append((self.data_ptr(), stream.value))


Cupy.__module__, Torch.__module__ = "cupy", "torch"
KINDS: dict[str, type[Array]] = {"torch": Torch, "cupy": Cupy, "numba": Numba}


def installed(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two GPUs, of which 0 is the current one, and libraries whose current stream is OWN."""
    found = Machine()

    def stream(library: str) -> Any:
        return lambda value, device: Within(lambda: found.under(library, value), value=value, device=device)

    def torch_empty(sizes: Any, dtype: Any, device: Any) -> Torch:
        shape = (sizes,) if isinstance(sizes, int) else tuple(sizes)
        return Torch(found, found.take("array", shape, dtype, device.index, found.current["torch"]), device.index)

    def cupy_empty(sizes: Any, dtype: Any) -> Cupy:
        return Cupy(found, found.take("array", sizes, dtype, found.device, found.current["cupy"]), found.device)

    def current(library: str, attribute: str) -> Any:
        # x is on GPU 1
        return lambda device: SimpleNamespace(**{attribute: found.current[library] if device == 1 else THIRD})

    torch = SimpleNamespace(
        empty=torch_empty,
        uint8=np.uint8,
        float32=np.float32,
        float64=np.float64,
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda device: found.current["torch"] if device == 1 else THIRD),
        cuda=SimpleNamespace(
            ExternalStream=stream("torch"),
            default_stream=lambda device: stream("torch")(LEGACY, device),
            stream=lambda given: given,
        ),
    )
    cupy = SimpleNamespace(
        empty=cupy_empty,
        cuda=SimpleNamespace(
            ExternalStream=stream("cupy"),
            get_current_stream=current("cupy", "ptr"),
            Stream=SimpleNamespace(null=stream("cupy")(LEGACY, 1)),
        ),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(buffers, "declines", lambda: None)

    def raw(nbytes: int, stream: int, device: int) -> tuple[Any, int]:
        memory = found.take("pool", (nbytes + 256,), np.uint8, found.device, stream)
        found.given_back -= 1
        return SimpleNamespace(
            memory=memory, close=lambda: setattr(found, "given_back", found.given_back + 1)
        ), memory.ctypes.data & -256

    def launch(
        kernel: Any, dtype: Any, statistic: Any, blocks: int, threads: int, stream: int, device: int, arguments: Any
    ) -> None:
        found.launched.append((device, stream, found.device))

    def empty(sizes: Any, strides: Any, dtype: Any) -> Numba:
        return Numba(found, found.take("array", sizes, dtype, found.device, 0), found.device)

    for name, fake in {
        "raw": raw,
        "empty": empty,
        "wait": lambda stream, other: found.waited.append((stream, other)),
        "current": lambda: found.device,
        "on": found.on,
        "device_of": lambda address: 1,
    }.items():
        monkeypatch.setattr(jit, name, fake)
    monkeypatch.setattr(jit.Kernel, "launch", launch)
    return found
