"""Which calls the fuzz test makes, and under which schedules: small arrays take every route of the kernels."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from . import calls, layer, values
from .judge import Judge
from .kinds import Maker

SEGMENT = 1024  # calls under one profile
# Constants of the schedule, as tests/cpu/test_kernels.py has them; whether NumPy's own memory is guarded too.
PROFILES: tuple[tuple[dict[str, int], bool], ...] = (
    ({}, False),
    ({}, True),
    ({"SERIAL_BYTES": 0, "SLAB_BYTES": 0, "PART_BYTES": 256, "TASKS": 4, "BLOCK": 4}, False),
    ({"SERIAL_BYTES": 0, "STREAM_BYTES": 0, "TASKS": 1, "BLOCK": 8}, True),
    ({"SERIAL_BYTES": 0, "PART_BYTES": 256, "BLOCK_BYTES": 0, "ALONG_BYTES": 0, "LINEAR": 0}, False),
    ({"STREAM_BYTES": 0}, False),
    ({"SERIAL_BYTES": 0, "SLAB_BYTES": 2**30, "PART_BYTES": 2048, "TASKS": 1, "BLOCK": 4}, True),
)


def load(torch: bool) -> None:
    """Import what processes share, before they begin."""
    names = ["fastbn.cpu.passes", "fastbn.reference", "fastbn.fold"]
    for name in names:
        importlib.import_module(name)
    if torch:
        try:
            importlib.import_module("tests.fuzz.tensors")
        except ImportError as error:
            print(f"fuzz: without PyTorch ({error})")


class Profiles:
    """The calls, and constants of the schedule that change every few of them."""

    def __init__(self, torch: bool) -> None:
        every = calls.CALLS | values.CALLS | layer.CALLS
        if torch and "fastbn.torch" in sys.modules:
            every |= importlib.import_module("tests.fuzz.tensors").CALLS
        self._calls, self._weights = list(every), list(every.values())
        self._now = -1
        self._usual: list[tuple[Any, str, int]] = []
        self._guarded: Any = None

    def choose(self, rng: random.Random) -> Callable[[Judge, Maker], None]:
        return rng.choices(self._calls, self._weights)[0]

    def of(self, number: int) -> AbstractContextManager[None]:
        """What the call of this number runs under."""
        which = number // SEGMENT % len(PROFILES)
        if which != self._now:
            self._patch(PROFILES[which][0])
            self._now = which
        if not PROFILES[which][1]:
            return nullcontext()
        if self._guarded is None:
            self._guarded = importlib.import_module("tests.fuzz.memory").Guarded()  # which compiles for a second
        found: AbstractContextManager[None] = self._guarded
        return found

    def _patch(self, constants: dict[str, int]) -> None:
        from fastbn import backends
        from fastbn.arguments import config
        from fastbn.cpu import schedule

        for module, name, value in self._usual:
            setattr(module, name, value)
        self._usual = []
        for name, value in constants.items():
            module = next((module for module in (config, schedule) if hasattr(module, name)), None)
            if module is not None:
                self._usual.append((module, name, getattr(module, name)))
                setattr(module, name, value)
        places = ("fastbn.backends", "fastbn.cpu", "fastbn.torch")
        for module in [module for name, module in sys.modules.items() if name.startswith(places)]:
            for value in vars(module).values():  # what was planned with other constants
                getattr(value, "cache_clear", int)()
        for host in backends._loaded.values():
            host._plan.cache_clear()
