"""Which opcodes the machine knows, each with its modifiers, and accesses to memory. Anything else is refused with its
line.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic, bits
from .arithmetic import simple
from .memory import UNSIGNED, Fault
from .operands import Lanes, Operand, Run, kind, numbers, operand
from .operands import bits as as_bits
from .parser import Instruction, Kernel


def _place(kernel: Kernel, text: str) -> tuple[Operand, int]:
    """(base, bytes from it) of an address."""
    found = re.match(r"\[\s*([%$\w.#]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
    if found is None:
        raise NotImplementedError(f"an address: {text}")
    return operand(kernel, found[1], kernel.registers.get(found[1], 64)), int(found[2] or "0", 0)


def _addresses(machine: Any, base: Operand, offset: int, lanes: Lanes) -> np.ndarray:
    if machine.undefined_of([base], lanes) is not None:
        raise Fault("an undefined address")
    return np.broadcast_to(machine.read(base, lanes), machine.many(lanes)).astype(np.int64) + offset


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{}").split(",")]


def parameter(kernel: Kernel, instruction: Instruction) -> Run:
    """ld.param: alike in every thread."""
    of, (target, place) = kind(instruction.parts[-1]), instruction.arguments
    name, _, offset = place.strip("[]").partition("+")
    begin = next(p.at for p in kernel.parameters if p.name == name.strip()) + int(offset or "0")
    width = kernel.registers[target]

    def run(machine: Any, lanes: Lanes) -> None:
        value = np.frombuffer(machine.parameters[begin : begin + of.bits // 8], UNSIGNED[of.bits])[0]
        machine.write(target, lanes, as_bits(numbers(value, of), of, width))

    return run


def load(kernel: Kernel, instruction: Instruction) -> Run:
    """ld from global or shared memory, of one value or several."""
    of, space = kind(instruction.parts[-1]), instruction.parts[1]
    names, constant = _names(instruction.arguments[0]), "nc" in instruction.parts
    base, offset = _place(kernel, instruction.arguments[1])

    def run(machine: Any, lanes: Lanes) -> None:
        found = machine.load(space, _addresses(machine, base, offset, lanes), of.bits // 8, len(names), lanes, constant)
        for name, value, undefined in zip(names, *found, strict=True):
            if name != "_":
                machine.write(name, lanes, as_bits(numbers(value, of), of, kernel.registers[name]), undefined)

    return run


def store(kernel: Kernel, instruction: Instruction) -> Run:
    """st to global or shared memory, of one value or several."""
    of, space = kind(instruction.parts[-1]), instruction.parts[1]
    base, offset = _place(kernel, instruction.arguments[0])
    operands = [operand(kernel, name, of.bits) for name in _names(instruction.arguments[1])]

    def run(machine: Any, lanes: Lanes) -> None:
        many = machine.many(lanes)
        values = [np.broadcast_to(machine.read(each, lanes), many).astype(UNSIGNED[of.bits]) for each in operands]
        undefined = [machine.undefined_of([each], lanes) for each in operands]
        machine.store(space, _addresses(machine, base, offset, lanes), of.bits // 8, values, undefined, lanes)

    return run


def _barrier(kernel: Kernel, instruction: Instruction) -> None:
    """Of all threads of the block: the machine waits for them."""
    if instruction.arguments != ["0"]:
        raise NotImplementedError(instruction.line)


def _by_itself(kernel: Kernel, instruction: Instruction) -> None:
    """What the machine runs without a function: branches, ends and shuffles."""


Maker = Callable[[Kernel, Instruction], "Run | None"]
INTEGER, REAL, BITS = r"[su](16|32|64)", r"f(32|64)", r"(pred|b16|b32|b64)"
ORDERS = "|".join(arithmetic.ORDER)
# Opcodes are matched whole: .ftz, .sat and other roundings compute something else, and are refused.
OPCODES: list[tuple[str, Maker]] = [
    (r"bra(\.uni)?|ret|exit", _by_itself),
    (r"bar\.sync|barrier\.sync(\.aligned)?", _barrier),
    (r"shfl\.sync\.(down|up|bfly|idx)\.b32", _by_itself),
    (r"ld\.param\.[bsuf](8|16|32|64)", parameter),
    (r"ld\.(global(\.nc)?|shared)(\.v[24])?\.[bsuf](16|32|64)", load),
    (r"st\.(global|shared)(\.v[24])?\.[bsuf](16|32|64)", store),
    (r"mov\.(pred|[bsuf](16|32|64))|cvta\.to\.global\.u64", bits.move),
    (rf"add\.({INTEGER}|(rn\.)?{REAL})", simple(lambda a, b: a + b)),
    (rf"sub\.({INTEGER}|(rn\.)?{REAL})", simple(lambda a, b: a - b)),
    (rf"mul\.(rn\.)?{REAL}", simple(lambda a, b: a * b)),
    (rf"fma\.rn\.{REAL}", simple(arithmetic.fma)),
    (rf"(mul|mad)\.(lo\.{INTEGER}|hi\.[su](32|64)|wide\.[su](16|32))", arithmetic.product),
    (rf"(div|rem)\.{INTEGER}", arithmetic.division),
    (r"div\.(rn|full|approx)\.f32|div\.rn\.f64", simple(lambda a, b: a / b)),
    (rf"neg\.(s(16|32|64)|{REAL})", simple(lambda a: -a)),
    (rf"abs\.(s(16|32|64)|{REAL})", simple(np.abs)),
    (rf"min\.({INTEGER})", simple(np.minimum)),
    (rf"max\.({INTEGER})", simple(np.maximum)),
    (rf"min\.{REAL}", simple(np.fmin)),  # of a number and a NaN, the number
    (rf"max\.{REAL}", simple(np.fmax)),
    (r"rcp\.(rn|approx)\.f32|rcp\.rn\.f64", simple(lambda a: a.dtype.type(1) / a)),
    (r"sqrt\.(rn|approx)\.f32|sqrt\.rn\.f64", simple(np.sqrt)),
    (r"rsqrt\.approx\.f(32|64)", simple(lambda a: a.dtype.type(1) / np.sqrt(a))),
    (rf"setp\.((eq|ne)\.((and|or|xor)\.)?b(16|32|64)|({ORDERS})\.((and|or|xor)\.)?{INTEGER})", arithmetic.predicate),
    (rf"setp\.((eq|ne|lt|le|gt|ge)u?|num|nan)\.((and|or|xor)\.)?{REAL}", arithmetic.predicate),
    (r"selp\.[bsuf](16|32|64)", arithmetic.selection),
    (r"cvt\.([su](8|16|32|64)\.[su](8|16|32|64)|f32\.f16|f64\.f(16|32))", arithmetic.conversion),
    (
        r"cvt\.rn\.(f16\.f(32|64)|f32\.f64|bf16\.f32|(bf16x2|f16x2)\.f32|f(32|64)\.[su](8|16|32|64))",
        arithmetic.conversion,
    ),
    (r"cvt\.r[nzmp]i\.([su](16|32|64)\.f(32|64)|f32\.f32|f64\.f64)", arithmetic.conversion),
    (rf"and\.{BITS}", bits.logic(np.bitwise_and)),
    (rf"or\.{BITS}", bits.logic(np.bitwise_or)),
    (rf"xor\.{BITS}", bits.logic(np.bitwise_xor)),
    (rf"not\.{BITS}", bits.logic(np.invert)),
    (r"shl\.b(16|32|64)|shr\.[bsu](16|32|64)", bits.shift),
    (r"bfi\.b(32|64)", bits.insert),
    (r"bfe\.[su](32|64)", bits.extract),
    (r"prmt\.b32", bits.permute),
    (r"shf\.[lr]\.(wrap|clamp)\.b32", bits.funnel),
    (r"lop3\.b32", bits.lookup),
]
KNOWN = [(re.compile(pattern), make) for pattern, make in OPCODES]


def made(kernel: Kernel, instruction: Instruction) -> Run | None:
    """What an instruction does, as a function of a machine and lanes.

    Raises
    ------
    NotImplementedError
        It is not known, or one of its arguments is not.
    """
    for pattern, make in KNOWN:
        if pattern.fullmatch(instruction.opcode):
            try:
                return make(kernel, instruction)
            except (NotImplementedError, KeyError, ValueError) as error:
                raise NotImplementedError(f"{instruction.line}: {error}") from error
    raise NotImplementedError(f"{kernel.name}: {instruction.line}: add it to OPCODES, and a test of it")
