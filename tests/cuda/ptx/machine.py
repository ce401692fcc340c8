"""A machine for a kernel's PTX: all threads of some blocks at once, as NumPy vectors.

Of the threads that may go on, those at the lowest instruction do; barriers and shuffles wait for all whom they name. It
is written for checking: a `Fault` for what a GPU would do wrong or without a word.
"""

from collections import Counter
from typing import Any

import numpy as np

from . import instructions
from .memory import UNSIGNED, Access, Bools, Fault, Memory, Space
from .memory import Lanes as Threads
from .operands import Lanes, Operand, operand
from .parser import Instruction, Kernel

WARP = 32
EVERY = np.uint32(0xFFFFFFFF)  # lanes of a warp
GONE = 1 << 40  # where threads are that have ended
BATCH = 64  # blocks that run at once


class Machine:
    """Runs a kernel on grids of one-dimensional blocks."""

    def __init__(self, kernel: Kernel, space: Space) -> None:
        self.kernel, self.space = kernel, space
        self.entered: set[int] = set()  # basic blocks, by their first instruction
        self.executed: Counter[str] = Counter()  # thread instructions by the first part of their name
        for instruction in kernel.code:
            instruction.run = instructions.made(kernel, instruction)

    def launch(self, blocks: int, threads: int, parameters: bytes) -> None:
        """Run all blocks, some at a time.

        Raises
        ------
        Fault
            With the kernel, what it did, which thread of which block, and the line.
        """
        if self.kernel.most_threads and threads > self.kernel.most_threads:
            raise Fault(f"{self.kernel.name}: {threads} threads, compiled for {self.kernel.most_threads}")
        if threads % WARP:
            raise Fault(f"{self.kernel.name}: {threads} threads are no whole warps")
        self.space.forget()
        self.threads, self.parameters = threads, parameters
        with np.errstate(all="ignore"):
            for first in range(0, blocks, BATCH):
                self._begin(first, min(BATCH, blocks - first), blocks)
                self._run()

    def _begin(self, first: int, many: int, blocks: int) -> None:
        self.first, self.all = first, many * self.threads
        self.thread = np.arange(first * self.threads, (first + many) * self.threads, dtype=np.int64)
        self.special: dict[str, Any] = {f"%{name}.{axis}": np.uint32(0) for name in ("tid", "ctaid") for axis in "yz"}
        self.special |= {f"%{name}.{axis}": np.uint32(1) for name in ("ntid", "nctaid") for axis in "yz"}
        self.special |= {"%ntid.x": np.uint32(self.threads), "%nctaid.x": np.uint32(blocks)}
        self.special["%tid.x"] = (self.thread % self.threads).astype(np.uint32)
        self.special["%ctaid.x"] = (self.thread // self.threads).astype(np.uint32)
        self.special["%laneid"] = (self.thread % WARP).astype(np.uint32)
        self.registers: dict[str, np.ndarray] = {}
        self.undefined: dict[str, np.ndarray] = {}
        self.epoch = np.zeros(many, np.int64)
        self.shared = self._shared(many)

    def _shared(self, many: int) -> Memory:
        """One block's shared memory behind the other's, each array with a gap behind it that is nobody's."""
        size = self.kernel.shared_bytes
        found = Memory(np.full(max(1, many * size), 0xFF, np.uint8), 0, "shared memory", allowed=0)
        for begin, length in self.kernel.shared.values():
            found.allowed[: many * size // 2].reshape(many, -1)[:, begin // 2 : (begin + length) // 2] = 3
        return found

    # Threads.

    def _run(self) -> None:
        at = np.zeros(self.all, np.int64)
        while (place := int(at.min())) < GONE:
            ready = self._ready(at, place)
            if not ready.any():
                place, ready = self._next(at)
            self._block(place, None if ready.all() else np.flatnonzero(ready), at)

    def _next(self, at: np.ndarray) -> tuple[int, np.ndarray]:
        """The lowest instruction at which threads may go on."""
        here = [int(place) for place in np.unique(at[at < GONE])]
        for place in here:
            if (ready := self._ready(at, place)).any():
                return place, ready
        stuck = ", ".join(f"{(at == place).sum()} at {self.kernel.code[place].line}" for place in here)
        raise Fault(f"{self.kernel.name}: deadlock, threads wait: {stuck}")

    def _ready(self, at: np.ndarray, place: int) -> np.ndarray:
        """The threads at an instruction that may go on."""
        if place >= len(self.kernel.code):
            raise Fault(f"{self.kernel.name}: ran off the end")
        here, kind = at == place, self.kernel.code[place].kind
        if kind not in ("barrier", "shuffle"):
            return here
        size = self.threads if kind == "barrier" else WARP
        arrived = here.reshape(-1, size).sum(1)
        if kind == "barrier" and ((at >= GONE).reshape(-1, size).any(1) & (arrived > 0)).any():
            raise Fault(
                f"{self.kernel.name}: part of a block waits at a barrier, and others have ended: "
                f"{self.kernel.code[place].line}"
            )
        return np.repeat(arrived == size, size)

    def _block(self, first: int, lanes: Lanes, at: np.ndarray) -> None:
        """Run a basic block, and say where each of these threads goes on."""
        self.entered.add(first)
        behind = self.kernel.after[first]
        for k in range(first, behind):
            instruction = self.kernel.code[k]
            self.executed[instruction.parts[0]] += self.many(lanes)
            try:
                there = self._step(instruction, k, lanes)
            except Fault as fault:
                raise Fault(f"{self.kernel.name}: {fault}: {instruction.line}") from None
            if there is not None:
                at[slice(None) if lanes is None else lanes] = there
                return
        at[slice(None) if lanes is None else lanes] = behind

    def _step(self, instruction: Instruction, k: int, lanes: Lanes) -> Any:
        """Run one instruction; where its threads go on, for those that end a block."""
        kind, chosen = instruction.kind, None
        if instruction.predicate is not None:
            decides = Operand(register=instruction.predicate)
            if self.undefined_of([decides], lanes) is not None:
                raise Fault("an undefined value decides")
            chosen = self.read(decides, lanes) ^ instruction.negated
        if kind in ("branch", "end"):
            there = instruction.target if kind == "branch" else GONE
            return there if chosen is None else np.where(chosen, there, k + 1)
        if kind != "operation":
            if chosen is not None:
                raise NotImplementedError(instruction.line)
            if kind == "barrier":
                thread = self.thread if lanes is None else self.thread[lanes]
                self.epoch[np.unique(thread // self.threads) - self.first] += 1
            else:
                self._shuffle(instruction, lanes)
            return None
        if chosen is not None and not chosen.all():
            lanes = np.flatnonzero(chosen) if lanes is None else lanes[chosen]
        if lanes is None or lanes.size:
            instruction.run(self, lanes)
        return None

    def many(self, lanes: Lanes) -> int:
        """How many threads."""
        return self.all if lanes is None else lanes.size

    # Registers, as bits.

    def _register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            self.registers[name] = np.zeros(self.all, UNSIGNED[self.kernel.registers[name]])
            self.undefined[name] = np.ones(self.all, np.bool_)
        return self.registers[name]

    def read(self, which: Operand, lanes: Lanes) -> Any:
        """Bits of an operand: of each lane, or one for all."""
        if which.constant is not None:
            return which.constant
        found = self.special[which.special] if which.special else self._register(str(which.register))
        return found if lanes is None or found.ndim == 0 else found[lanes]

    def undefined_of(self, operands: list[Operand], lanes: Lanes) -> Bools:
        """The lanes in which one of them was never written, or comes of what was not."""
        found: Bools = None
        for which in operands:
            if which.register is None:
                continue
            self._register(which.register)
            each = self.undefined.get(which.register)
            if each is not None and (each := each if lanes is None else each[lanes]).any():
                found = each if found is None else found | each
        return found

    def write(self, name: str, lanes: Lanes, value: Any, undefined: Bools = None) -> None:
        """Set a register's bits."""
        if name == "_":
            return
        if lanes is None:
            kept = np.empty(self.all, UNSIGNED[self.kernel.registers[name]])
            kept[:] = value
            self.registers[name] = kept
            self.undefined.pop(name, None)
            if undefined is not None:
                self.undefined[name] = np.broadcast_to(undefined, self.all).copy()
            return
        self._register(name)[lanes] = value
        if name in self.undefined or undefined is not None:
            marks = self.undefined.setdefault(name, np.zeros(self.all, np.bool_))
            marks[lanes] = False if undefined is None else undefined
            if not marks.any():
                del self.undefined[name]

    # Memory.

    def load(
        self, space: str, addresses: np.ndarray, width: int, count: int, lanes: Lanes, constant: bool
    ) -> tuple[list[Any], list[Bools]]:
        """(values, undefined) of each of `count` components of `width` bytes."""
        values: list[Any] = [np.empty(addresses.size, UNSIGNED[width * 8]) for _ in range(count)]
        undefined: list[Bools] = [None] * count
        for access, which in self._accesses(space, addresses, width, count, lanes):
            found, missing = access.load(constant)
            for c in range(count):
                values[c][which] = found[c]
                if missing[c] is not None:
                    marks = undefined[c] = np.zeros(addresses.size, np.bool_) if undefined[c] is None else undefined[c]
                    marks[which] = missing[c]
        return values, undefined

    def store(
        self, space: str, addresses: np.ndarray, width: int, values: list[Any], undefined: list[Bools], lanes: Lanes
    ) -> None:
        for access, which in self._accesses(space, addresses, width, len(values), lanes):
            access.store(
                [value[which] for value in values], [None if marks is None else marks[which] for marks in undefined]
            )

    def _accesses(
        self, space: str, addresses: np.ndarray, width: int, count: int, lanes: Lanes
    ) -> list[tuple[Access, Any]]:
        """The same by allocation, with the lanes that go there."""
        size, thread = width * count, self.thread if lanes is None else self.thread[lanes]
        block = thread // self.threads
        threads = Threads(thread, block, self.epoch[block - self.first], self.threads)
        if (off := addresses % size != 0).any():
            k = int(np.argmax(off))
            raise Fault(f"address {addresses[k]:#x} off its boundary of {size} bytes, {threads.name(k)}")
        if space == "shared":
            if ((addresses < 0) | (addresses + size > self.kernel.shared_bytes)).any():
                raise Fault("outside of shared memory")
            places = addresses + (block - self.first) * self.kernel.shared_bytes
            return [(Access(self.shared, places, width, count, threads), slice(None))]
        found = []
        which = np.searchsorted(self.space.bases, addresses.astype(np.uint64), side="right") - 1
        for w in np.unique(which):
            mine = np.flatnonzero(which == w)
            memory, some = self.space.every[w], threads.some(mine)
            places = addresses[mine] - memory.base
            if w < 0 or (places + size > memory.size).any():
                k = 0 if w < 0 else int(np.argmax(places + size > memory.size))
                raise Fault(
                    f"address {addresses[mine][k]:#x} lies "
                    f"nowhere{'' if w < 0 else f', behind {memory.name}'}, {some.name(k)}"
                )
            found.append(
                (Access(memory, places, width, count, some), slice(None) if mine.size == addresses.size else mine)
            )
        return found

    # Warps.

    def _shuffle(self, instruction: Instruction, lanes: Lanes) -> None:
        """shfl.sync: values of other lanes of the warp, all of which are here."""
        targets, *texts = instruction.arguments
        value, step, limit, mask = (operand(self.kernel, text, 32) for text in texts)
        if (np.asarray(self.read(mask, lanes)) != EVERY).any():
            raise Fault("a shuffle of part of a warp")
        many, lane = self.many(lanes), np.arange(WARP)
        moved, by, bound = (
            np.broadcast_to(self.read(each, lanes), many).reshape(-1, WARP) for each in (value, step, limit)
        )
        by, bound = by.astype(np.int64) & 31, bound.astype(np.int64)
        segment, clamp = bound >> 8 & 31, bound & 31
        last = (lane & segment) | (clamp & ~segment & 31)
        way = instruction.parts[2]
        source = {
            "down": lane + by,
            "up": lane - by,
            "bfly": lane ^ by,
            "idx": (lane & segment) | (by & ~segment & 31),
        }[way]
        inside = source >= last if way == "up" else source <= last
        source = np.where(inside, source, lane)
        undefined = self.undefined_of([value], lanes)
        if undefined is not None:
            undefined = np.take_along_axis(undefined.reshape(-1, WARP), source, 1).reshape(-1)
        first, *second = targets.split("|")
        self.write(first, lanes, np.take_along_axis(moved, source, 1).reshape(-1), undefined)
        for name in second:
            self.write(name, lanes, np.broadcast_to(inside, moved.shape).reshape(-1))


def uncovered(machine: Machine) -> list[str]:
    """The first lines of the basic blocks that never ran."""
    return [machine.kernel.code[k].line for k in machine.kernel.after if k not in machine.entered]
