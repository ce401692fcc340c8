"""What instructions are made of: types, registers and constants as bits, bits as numbers."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .memory import UNSIGNED, Bools
from .parser import Instruction, Kernel

SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}

Lanes = np.ndarray | None  # indices of the threads that run an instruction; None for all
Run = Callable[[Any, Lanes], None]  # of a machine and lanes


class Kind(NamedTuple):
    """A type of PTX: b, s, u, f, or p for predicates; bf16, and pairs of 16 bits."""

    letter: str
    bits: int

    @property
    def numpy(self) -> Any:
        return {"s": SIGNED, "f": FLOAT}.get(self.letter, UNSIGNED)[self.bits]


SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {"%laneid"}
PREDICATE = Kind("p", 1)
B32, U32, U64 = Kind("b", 32), Kind("u", 32), Kind("u", 64)


def kind(part: str) -> Kind:
    """The type that a part of an opcode names."""
    if part == "pred":
        return PREDICATE
    if part in ("bf16", "f16x2", "bf16x2"):
        return Kind(part, 16 if part == "bf16" else 32)
    return Kind(part[0], int(part[1:]))


class Operand(NamedTuple):
    register: str | None = None
    special: str | None = None  # a register that the hardware sets
    constant: Any = None  # bits


def operand(kernel: Kernel, text: str, width: int) -> Operand:
    """What an argument stands for, in so many bits."""
    if text in kernel.registers:
        return Operand(register=text)
    if text in SPECIAL:
        return Operand(special=text)
    if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
        single = np.uint32(int(text[2:], 16)).view(np.float32)
        return Operand(constant=single.view(np.uint32) if width == 32 else np.float64(single).view(np.uint64))
    if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
        return Operand(constant=np.uint64(int(text[2:], 16)))
    if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
        number = int(text.rstrip("U"), 0)
        return Operand(constant=np.bool_(number) if width == 1 else UNSIGNED[width](number & ((1 << width) - 1)))
    if text in kernel.shared:
        return Operand(constant=UNSIGNED[width](kernel.shared[text][0]))
    raise NotImplementedError(f"an operand: {text}")


def numbers(found: Any, of: Kind) -> Any:
    """Bits as numbers of a type; a wider register may hold them."""
    if of.letter == "p":
        return found
    return (found if found.dtype.itemsize * 8 == of.bits else found.astype(UNSIGNED[of.bits])).view(of.numpy)


def bits(values: Any, of: Kind, width: int) -> Any:
    """Numbers of a type as the bits of a register, sign or zero extended."""
    values = np.asarray(values)
    if of.letter == "p":
        return values.astype(np.bool_)
    values = values.astype(of.numpy, copy=False)
    if width == of.bits:
        return values.view(UNSIGNED[width])
    return (
        values.astype(SIGNED[width]).view(UNSIGNED[width])
        if of.letter == "s"
        else values.view(UNSIGNED[of.bits]).astype(UNSIGNED[width])
    )


def either(*undefined: Bools) -> Bools:
    """The lanes that are undefined in one of them."""
    found: Bools = None
    for each in undefined:
        if each is not None:
            found = each if found is None else found | each
    return found


def lanewise(
    kernel: Kernel,
    instruction: Instruction,
    of: Sequence[Kind],
    to: Kind,
    function: Callable[..., Any],
    arguments: Sequence[str] = (),
) -> Run:
    """An instruction whose result is a function of its operands in each lane, undefined where one of them is."""
    target, *texts = arguments or instruction.arguments
    operands = [operand(kernel, text, each.bits) for text, each in zip(texts, of, strict=True)]
    width = kernel.registers[target]

    def run(machine: Any, lanes: Lanes) -> None:
        values = [numbers(machine.read(each, lanes), which) for each, which in zip(operands, of, strict=True)]
        machine.write(target, lanes, bits(function(*values), to, width), machine.undefined_of(operands, lanes))

    return run
