"""Instructions on bits."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import B32, U32, UNSIGNED, Kind, Lanes, Run, kind, lanewise, operand
from .parser import Instruction, Kernel

ONE, ALL = np.uint64(1), np.uint64(2**64 - 1)


def logic(function: Callable[..., Any]) -> Callable[[Kernel, Instruction], Run]:
    """and, or, xor, not; of predicates too."""

    def make(kernel: Kernel, instruction: Instruction) -> Run:
        of = kind(instruction.parts[-1])
        return lanewise(kernel, instruction, [of] * (len(instruction.arguments) - 1), of, function)

    return make


def shift(kernel: Kernel, instruction: Instruction) -> Run:
    """shl and shr, by as many bits as there are at most."""
    of, left = kind(instruction.parts[-1]), instruction.parts[0] == "shl"

    def shifted(value: Any, by: Any) -> Any:
        gone = by >= of.bits
        step = np.where(gone, of.bits - 1, by).astype(value.dtype)
        found = value << step if left else value >> step
        return np.where(gone & (left or of.letter != "s"), value.dtype.type(0), found)

    return lanewise(kernel, instruction, [of, U32], of, shifted)


def _mask(length: Any) -> Any:
    """So many ones."""
    return np.where(length >= 64, ALL, (ONE << np.minimum(length, np.uint64(63))) - ONE)


def _field(*values: Any) -> list[Any]:
    """Numbers as uint64, the last two a place and a length of 8 bits."""
    wide = [np.asarray(value).astype(np.uint64) for value in values]
    return [*wide[:-2], *(value & np.uint64(255) for value in wide[-2:])]


def insert(kernel: Kernel, instruction: Instruction) -> Run:
    """bfi: the low bits of a into b, at a place."""
    of = kind(instruction.parts[-1])

    def inserted(a: Any, b: Any, place: Any, length: Any) -> Any:
        a, b, place, length = _field(a, b, place, length)
        if (place + length > of.bits).any():
            raise NotImplementedError(instruction.line)
        mask = _mask(length) << np.minimum(place, np.uint64(63))
        return (b & ~mask) | ((a << np.minimum(place, np.uint64(63))) & mask)

    return lanewise(kernel, instruction, [of, of, U32, U32], of, inserted)


def extract(kernel: Kernel, instruction: Instruction) -> Run:
    """bfe: so many bits of a from a place on."""
    of = kind(instruction.parts[-1])

    def extracted(a: Any, place: Any, length: Any) -> Any:
        a, place, length = _field(a.view(UNSIGNED[of.bits]), place, length)
        if (place + length > of.bits).any():
            raise NotImplementedError(instruction.line)
        mask = _mask(length)
        found = (a >> np.minimum(place, np.uint64(63))) & mask
        if of.letter == "s":
            sign = ONE << (np.maximum(length, ONE) - ONE)
            found = np.where((found & sign) != 0, found | ~mask, found)
        return found.astype(UNSIGNED[of.bits]).view(of.numpy)

    return lanewise(kernel, instruction, [of, U32, U32], of, extracted)


def permute(kernel: Kernel, instruction: Instruction) -> Run:
    """prmt: four bytes out of eight."""

    def permuted(a: Any, b: Any, selector: Any) -> Any:
        a, b, selector = (np.asarray(value).astype(np.uint64) for value in (a, b, selector))
        both, found = a | (b << np.uint64(32)), np.uint64(0)
        for k in range(4):
            which = selector >> np.uint64(4 * k)
            byte = both >> ((which & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            found = found | (np.where((which & np.uint64(8)) != 0, sign, byte) << np.uint64(8 * k))
        return found.astype(np.uint32)

    return lanewise(kernel, instruction, [B32] * 3, B32, permuted)


def funnel(kernel: Kernel, instruction: Instruction) -> Run:
    """shf: a word out of two."""
    _, way, mode, _ = instruction.parts

    def shifted(a: Any, b: Any, by: Any) -> Any:
        a, b, by = (np.asarray(value).astype(np.uint64) for value in (a, b, by))
        by = by & np.uint64(31) if mode == "wrap" else np.minimum(by, np.uint64(32))
        both = (b << np.uint64(32)) | a
        return ((both << by >> np.uint64(32)) if way == "l" else both >> by).astype(np.uint32)

    return lanewise(kernel, instruction, [B32] * 3, B32, shifted)


def lookup(kernel: Kernel, instruction: Instruction) -> Run:
    """lop3: any function of three bits."""
    *arguments, last = instruction.arguments
    table = int(last, 0)

    def looked_up(a: Any, b: Any, c: Any) -> Any:
        found = np.uint32(0)
        for k in range(8):
            if table >> k & 1:
                found = found | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
        return found

    return lanewise(kernel, instruction, [B32] * 3, B32, looked_up, arguments)


def move(kernel: Kernel, instruction: Instruction) -> Run:
    """mov and cvta; also of several registers into one, and of one into several."""
    of = kind(instruction.parts[-1])
    to, source = instruction.arguments
    targets = [name.strip() for name in to.strip("{}").split(",")]
    if len(targets) > 1:
        each = of.bits // len(targets)
        whole = operand(kernel, source, of.bits)

        def apart(machine: Any, lanes: Lanes) -> None:
            value, undefined = machine.read(whole, lanes), machine.undefined_of([whole], lanes)
            for k, name in enumerate(targets):
                machine.write(name, lanes, (value >> UNSIGNED[of.bits](each * k)).astype(UNSIGNED[each]), undefined)

        return apart
    sources = [name.strip() for name in source.strip("{}").split(",")]
    part = Kind("b", of.bits // len(sources)) if len(sources) > 1 else of

    def together(*values: Any) -> Any:
        if len(values) == 1:
            return values[0]
        wide = UNSIGNED[of.bits]
        return np.bitwise_or.reduce(
            np.broadcast_arrays(*(value.astype(wide) << wide(part.bits * k) for k, value in enumerate(values)))
        )

    return lanewise(kernel, instruction, [part] * len(sources), of, together, [to, *sources])
