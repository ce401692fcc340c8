"""Arithmetic, comparisons and conversions."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import Fault
from .operands import FLOAT, SIGNED, UNSIGNED, Kind, Lanes, Run, either, kind, lanewise, numbers, operand
from .parser import Instruction, Kernel


def simple(function: Callable[..., Any]) -> Callable[[Kernel, Instruction], Run]:
    """An instruction whose operands and result are of one type, the last part of its name."""

    def make(kernel: Kernel, instruction: Instruction) -> Run:
        of = kind(instruction.parts[-1])
        return lanewise(kernel, instruction, [of] * (len(instruction.arguments) - 1), of, function)

    return make


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in the next wider type, then rounded."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def product(kernel: Kernel, instruction: Instruction) -> Run:
    """mul and mad of integers: .lo, .hi and .wide."""
    root, mode, name = instruction.parts
    of = kind(name)
    to = Kind(of.letter, 2 * of.bits) if mode == "wide" else of
    by = {"wide": lambda a, b: a.astype(to.numpy) * b.astype(to.numpy), "lo": lambda a, b: a * b, "hi": _high}[mode]
    if root == "mul":
        return lanewise(kernel, instruction, [of, of], to, by)
    return lanewise(kernel, instruction, [of, of, to], to, lambda a, b, c: by(a, b) + c)


def _high(a: Any, b: Any) -> Any:
    """The upper half of a product."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype == np.int32 else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    p, q = a.astype(np.uint64), b.astype(np.uint64)
    p0, p1, q0, q1 = p & low, p >> half, q & low, q >> half
    middle = p1 * q0 + (p0 * q0 >> half)
    found = p1 * q1 + (middle >> half) + ((p0 * q1 + (middle & low)) >> half)
    if a.dtype == np.int64:
        found = found - np.where(a < 0, q, np.uint64(0)) - np.where(b < 0, p, np.uint64(0))
    return found.view(a.dtype)


def division(kernel: Kernel, instruction: Instruction) -> Run:
    """div and rem of integers; div of floats is `simple`."""
    of = kind(instruction.parts[-1])
    divisor = operand(kernel, instruction.arguments[2], of.bits)
    remainder = instruction.parts[0] == "rem"

    def divided(a: Any, b: Any) -> Any:
        if (np.asarray(b) == 0).any():
            raise Fault("division by zero")
        if of.letter == "u":
            return a % b if remainder else a // b
        quotient = np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)  # towards zero
        return a - quotient * b if remainder else quotient

    run = lanewise(kernel, instruction, [of, of], of, divided)

    def checked(machine: Any, lanes: Lanes) -> None:
        if machine.undefined_of([divisor], lanes) is not None:
            raise Fault("an undefined divisor")
        run(machine, lanes)

    return checked


ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compared(how: str, of: Kind, a: Any, b: Any) -> Any:
    """Of floats, comparisons with a NaN are false, and true where their name ends in u."""
    if of.letter != "f":
        return ORDER[how](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    return ORDER[how[:-1]](a, b) | unordered if how[-1] == "u" else ORDER[how](a, b) & ~unordered


LOGIC: dict[str, Callable[[Any, Any], Any]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def predicate(kernel: Kernel, instruction: Instruction) -> Run:
    """setp, also of two predicates, and joined with a third."""
    _, how, *logic, name = instruction.parts
    of = kind(name)
    both = instruction.arguments[0].split("|")
    operands = [operand(kernel, text, of.bits) for text in instruction.arguments[1:3]]
    third = operand(kernel, instruction.arguments[3].lstrip("!"), 1) if logic else None

    def run(machine: Any, lanes: Lanes) -> None:
        found = np.asarray(compared(how, of, *(numbers(machine.read(each, lanes), of) for each in operands)))
        undefined = machine.undefined_of(operands, lanes)
        pair = [found, ~found]
        if third is not None:
            value = machine.read(third, lanes)
            value = ~value if instruction.arguments[3].startswith("!") else value
            pair = [LOGIC[logic[0]](each, value) for each in pair]
            undefined = either(undefined, machine.undefined_of([third], lanes))
        for target, value in zip(both, pair, strict=False):
            machine.write(target, lanes, np.asarray(value), undefined)

    return run


def selection(kernel: Kernel, instruction: Instruction) -> Run:
    """selp: one of two, of which the other may be undefined."""
    of = kind(instruction.parts[-1])
    target, *texts = instruction.arguments
    a, b, choice = (operand(kernel, text, width) for text, width in zip(texts, (of.bits, of.bits, 1), strict=True))

    def run(machine: Any, lanes: Lanes) -> None:
        chosen = np.broadcast_to(machine.read(choice, lanes), machine.many(lanes))
        one, other = (machine.undefined_of([each], lanes) for each in (a, b))
        undefined = None
        if one is not None or other is not None:
            undefined = np.where(chosen, False if one is None else one, False if other is None else other)
            undefined = undefined if undefined.any() else None
        undefined = either(undefined, machine.undefined_of([choice], lanes))
        found = np.where(chosen, machine.read(a, lanes), machine.read(b, lanes))
        machine.write(target, lanes, found, undefined)

    return run


def to_bfloat16(values: Any) -> Any:
    """The bits of float32 values rounded to bfloat16, to nearest even."""
    found = np.asarray(values, np.float32).view(np.uint32)
    rounded = (found + np.uint32(0x7FFF) + ((found >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


TOWARDS: dict[str, Callable[[Any], Any]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def conversion(kernel: Kernel, instruction: Instruction) -> Run:
    """cvt: two types, the result's first, behind the rounding."""
    *modes, first, second = instruction.parts[1:]
    to, of = kind(first), kind(second)
    towards = TOWARDS.get(modes[0], np.trunc) if modes else np.trunc

    def converted(*values: Any) -> Any:
        if to.letter.endswith("x2"):
            high, low = (
                to_bfloat16(v) if to.letter == "bf16x2" else v.astype(np.float16).view(np.uint16) for v in values
            )
            return (high.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)
        (value,) = values
        if to.letter == "bf16":
            return to_bfloat16(value)
        if to.letter == "f":
            return (towards(value) if modes and modes[0] in TOWARDS else value).astype(FLOAT[to.bits])
        into = (SIGNED if to.letter == "s" else UNSIGNED)[to.bits]
        if of.letter == "f":  # saturates; NaN becomes 0
            limits = np.iinfo(into)
            value = np.nan_to_num(towards(value.astype(np.float64)), nan=0.0)
            low, high = value <= float(limits.min), value >= float(limits.max)
            return np.where(low, limits.min, np.where(high, limits.max, np.where(low | high, 0.0, value).astype(into)))
        return value.astype((SIGNED if of.letter == "s" else UNSIGNED)[64]).astype(into)

    return lanewise(kernel, instruction, [of] * (len(instruction.arguments) - 1), to, converted)
