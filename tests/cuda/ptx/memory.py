"""Memory that knows who may read and write each of its elements, what was never written, and who touched it since which
barrier.
"""

from typing import NamedTuple

import numpy as np

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
GRANULE = 2  # bytes: the smallest element
NOBODY, SEVERAL = -1, -2
READ, WRITE = 1, 2
Bools = np.ndarray | None  # of each lane; None for none of them


class Fault(Exception):
    """What a GPU would do wrong, or without a word."""


class Memory:
    """One allocation."""

    def __init__(self, content: np.ndarray, base: int, name: str, allowed: int = READ | WRITE) -> None:
        self.content, self.base, self.size, self.name = content, base, content.size, name
        granules = -(-self.size // GRANULE)
        self.allowed = np.full(granules, allowed, np.uint8)
        self.defined = np.zeros(granules, np.bool_)
        self.forget()

    def forget(self) -> None:
        """A launch begins: what was done before it is done."""
        self.seen: tuple[np.ndarray, ...] = ()

    def touched(self) -> tuple[np.ndarray, ...]:
        """Of each granule: who wrote it, in which epoch of its block; who read it, of which block, in which epoch."""
        if not self.seen:
            self.seen = tuple(np.full(self.defined.size, value, np.int64) for value in (NOBODY, 0, NOBODY, NOBODY, 0))
        return self.seen


class Space:
    """Global memory: allocations by address."""

    def __init__(self) -> None:
        self.every: list[Memory] = []
        self.bases = np.empty(0, np.uint64)

    def keep(self, every: list[Memory]) -> None:
        """Have these allocations, and no others."""
        self.every = sorted(every, key=lambda memory: memory.base)
        self.bases = np.array([memory.base for memory in self.every], np.uint64)

    def add(self, memory: Memory) -> Memory:
        self.keep([*self.every, memory])
        return memory

    def forget(self) -> None:
        for memory in self.every:
            memory.forget()


class Lanes(NamedTuple):
    """The threads that an access is made by."""

    thread: np.ndarray  # in the grid
    block: np.ndarray
    epoch: np.ndarray  # barriers that its block has passed
    per_block: int

    def some(self, which: np.ndarray) -> "Lanes":
        return Lanes(self.thread[which], self.block[which], self.epoch[which], self.per_block)

    def name(self, k: int) -> str:
        return f"thread {self.thread[k] % self.per_block} of block {self.block[k]}"


class Access(NamedTuple):
    """Accesses of one instruction to one allocation: so many components, of a width in bytes, at an offset for each
    lane.
    """

    memory: Memory
    offsets: np.ndarray
    width: int
    count: int
    lanes: Lanes

    @property
    def granules(self) -> np.ndarray:
        """Those of each lane."""
        return (self.offsets // GRANULE)[:, None] + np.arange(max(1, self.width * self.count // GRANULE))

    def shown(self, k: int) -> str:
        return f"{self.memory.name}+{self.offsets[k]} of {self.memory.size}, {self.lanes.name(k)}"

    def load(self, constant: bool) -> tuple[list[np.ndarray], list[Bools]]:
        """(values, undefined) of each component; `constant` promises that nobody writes there during the launch."""
        memory, granules = self.memory, self.granules
        self._may(granules, READ, "reads what is not an element")
        if memory.seen or (memory.allowed & WRITE).any():
            self._reading(granules)
            if constant and (memory.touched()[0][granules] != NOBODY).any():
                raise Fault(f"reads as constant what this launch wrote: {self.shown(0)}")
        view, at = memory.content.view(UNSIGNED[self.width * 8]), self.offsets // self.width
        missing = ~memory.defined[granules].reshape(at.size, self.count, -1).all(2)
        return [view[at + c] for c in range(self.count)], [
            missing[:, c] if missing[:, c].any() else None for c in range(self.count)
        ]

    def store(self, values: list[np.ndarray], undefined: list[Bools]) -> None:
        memory, granules = self.memory, self.granules
        self._may(granules, WRITE, "writes what is not its to write")
        self._writing(granules)
        view, at = memory.content.view(UNSIGNED[self.width * 8]), self.offsets // self.width
        for c, value in enumerate(values):
            view[at + c] = value
        memory.defined[granules] = True
        each = max(1, self.width // GRANULE)
        for c, missing in enumerate(undefined):
            if missing is not None:
                memory.defined[granules[:, c * each : (c + 1) * each]] = ~missing[:, None]

    def _may(self, granules: np.ndarray, which: int, words: str) -> None:
        wrong = ((self.memory.allowed[granules] & which) == 0).any(1)
        if wrong.any():
            raise Fault(f"{words}: {self.shown(int(np.argmax(wrong)))}")

    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.lanes.thread[:, None], self.lanes.block[:, None], self.lanes.epoch[:, None]

    def _reading(self, granules: np.ndarray) -> None:
        """Nobody else wrote here since the last barrier of their block, and none of another block."""
        writer, written, reader, reader_block, read = self.memory.touched()
        thread, block, epoch = self._columns()
        who = writer[granules]
        clash = (
            (who != NOBODY) & (who != thread) & ~((who // self.lanes.per_block == block) & (written[granules] != epoch))
        )
        if clash.any():
            k = int(np.argmax(clash.any(1)))
            w = int(who[k][np.argmax(clash[k])])
            by = f"thread {w % self.lanes.per_block} of block {w // self.lanes.per_block}"
            raise Fault(f"race: reads what {by} wrote, no barrier between: {self.shown(k)}")
        thread, block, epoch = (np.broadcast_to(each, granules.shape) for each in (thread, block, epoch))
        old, old_block = reader[granules], reader_block[granules]
        fresh = (old_block == NOBODY) | ((old_block == block) & (read[granules] < epoch))
        reader[granules] = np.where(~fresh & (old != thread), SEVERAL, thread)
        reader_block[granules] = np.where(~fresh & (old_block != block), SEVERAL, block)
        read[granules] = epoch
        # Of two lanes of this instruction that read one place, the last was noted.
        several, blocks = reader[granules], reader_block[granules]
        reader[granules[(several != SEVERAL) & (several != thread)]] = SEVERAL
        reader_block[granules[(blocks != SEVERAL) & (blocks != block)]] = SEVERAL

    def _writing(self, granules: np.ndarray) -> None:
        """Nobody else wrote or read here since the last barrier of their block, nor does another lane of this
        instruction write.
        """
        writer, written, reader, reader_block, read = self.memory.touched()
        thread, block, epoch = self._columns()
        who, by, by_block = writer[granules], reader[granules], reader_block[granules]
        clash = (
            (who != NOBODY) & (who != thread) & ~((who // self.lanes.per_block == block) & (written[granules] != epoch))
        )
        clash |= (by_block != NOBODY) & (by != thread) & ~((by_block == block) & (read[granules] != epoch))
        writer[granules] = thread
        written[granules] = epoch
        clash |= writer[granules] != thread
        if clash.any():
            k = int(np.argmax(clash.any(1)))
            raise Fault(f"race: writes what another thread wrote or read, no barrier between: {self.shown(k)}")
