"""float16 to float32 and back: the machine's own conversion or, where it has none, integer arithmetic on vectors.

x86-64 converts since F16C (2012). Without, LLVM calls a function of the compiler's runtime library, which numba does
not link: the process would be aborted. So it is on old processors, on virtual machines of level x86-64-v2, and with
NUMBA_CPU_NAME=generic.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

__all__ = ["converts", "from_half", "to_half"]

I32, FLOAT = ir.IntType(32), ir.FloatType()
_CALLS = ("hfsf", "sfhf", "h2f", "f2h")  # of __extendhfsf2, __truncsfhf2, __gnu_h2f_ieee, __gnu_f2h_ieee
_BOTH = """
define void @both(ptr %half, ptr %single) {
  %h = load <16 x half>, ptr %half
  %f = load <16 x float>, ptr %single
  %wide = fpext <16 x half> %h to <16 x float>
  %narrow = fptrunc <16 x float> %f to <16 x half>
  store <16 x float> %wide, ptr %single
  store <16 x half> %narrow, ptr %half
  ret void
}"""


@lru_cache(maxsize=8)
def converts(triple: str, cpu: str, features: str) -> bool:
    """Whether a target has instructions for both ways, as LLVM's own assembly tells."""
    target = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    assembly = target.emit_assembly(llvm.parse_assembly(f'target triple = "{triple}"\n{_BOTH}'))
    return not any(name in assembly for name in _CALLS)


class _Lanes:
    """Constants and bits of vectors of so many lanes."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder = builder
        self.words, self.floats = ir.VectorType(I32, lanes), ir.VectorType(FLOAT, lanes)

    def word(self, value: int) -> Any:
        return ir.Constant(self.words, [value] * self.words.count)

    def single(self, value: float) -> Any:
        return ir.Constant(self.floats, [value] * self.floats.count)

    def masked(self, bits: Any, value: int) -> Any:
        return self.builder.and_(bits, self.word(value))

    def below(self, bits: Any, value: int) -> Any:
        return self.builder.icmp_unsigned("<", bits, self.word(value))


def from_half(builder: Any, vector: Any) -> Any:
    """Bits of float16 in a vector of 16-bit integers -> float32, exactly; a NaN comes out quiet."""
    b, v = builder, _Lanes(builder, vector.type.count)
    bits = b.zext(vector, v.words)
    magnitude = v.masked(bits, 0x7FFF)
    shifted = b.shl(magnitude, v.word(13))
    normal = b.add(shifted, v.word((127 - 15) << 23))
    special = b.or_(
        b.add(shifted, v.word((255 - 31) << 23)), b.select(v.below(magnitude, 0x7C01), v.word(0), v.word(0x400000))
    )
    tiny = b.bitcast(b.fmul(b.sitofp(magnitude, v.floats), v.single(2.0**-24)), v.words)
    found = b.select(v.below(magnitude, 0x0400), tiny, b.select(v.below(magnitude, 0x7C00), normal, special))
    return b.bitcast(b.or_(found, b.shl(v.masked(bits, 0x8000), v.word(16))), v.floats)


def to_half(builder: Any, vector: Any) -> Any:
    """float32 -> bits of float16, rounded to nearest even.

    A NaN stays one, quiet, with the first bits of its payload.
    """
    b, v = builder, _Lanes(builder, vector.type.count)
    bits = b.bitcast(vector, v.words)
    magnitude = v.masked(bits, 0x7FFFFFFF)
    odd = v.masked(b.lshr(magnitude, v.word(13)), 1)
    normal = b.lshr(b.sub(b.add(magnitude, b.add(odd, v.word(0x0FFF))), v.word((127 - 15) << 23)), v.word(13))
    # A subnormal number in units of its last place, which the machine rounds to an integer where the sum's last place
    # is 1.
    scaled = b.fmul(b.bitcast(magnitude, v.floats), v.single(2.0**24))
    tiny = b.sub(b.bitcast(b.fadd(scaled, v.single(2.0**23)), v.words), v.word(0x4B000000))
    quiet = b.or_(v.word(0x7E00), v.masked(b.lshr(magnitude, v.word(13)), 0x3FF))
    large = b.select(v.below(magnitude, 0x7F800001), v.word(0x7C00), quiet)
    found = b.select(v.below(magnitude, 0x38800000), tiny, b.select(v.below(magnitude, 0x477FF000), normal, large))
    found = b.or_(found, v.masked(b.lshr(bits, v.word(16)), 0x8000))
    return b.trunc(found, ir.VectorType(ir.IntType(16), vector.type.count))
