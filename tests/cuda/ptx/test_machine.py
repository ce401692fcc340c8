"""The machine by itself: what each instruction computes, and that it refuses what it doesn't know. It needs NumPy
only.
"""

from typing import Any

import numpy as np
import pytest

from tests.cuda.ptx.machine import Machine
from tests.cuda.ptx.memory import Fault, Memory, Space
from tests.cuda.ptx.parser import parse

TEXT = """
.version 9.0
.target sm_90a
.weak .shared .align 16 .b8 few[64];
.visible .entry k(.param .u64 k_param_0, .param .u32 k_param_1)
.maxntid 64, 1, 1
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<9>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    .reg .f64 %fd<9>;
    {body}
    ret;
}}
"""


def run(body: str, threads: int = 32, memory: Memory | None = None) -> Machine:
    space = Space()
    address = space.add(memory).base if memory else 0
    machine = Machine(parse(TEXT.format(body=body)), space)
    machine.launch(1, threads, address.to_bytes(8, "little") + (7).to_bytes(4, "little"))
    return machine


def single(value: float) -> str:
    return f"0f{int(np.float32(value).view(np.uint32)):08X}"


def double(value: float) -> str:
    return f"0d{int(np.float64(value).view(np.uint64)):016X}"


NAN, WORD, LONG = 0x7FC00000, 2**32, 2**64
# Instruction, what its first register holds then: bits, or a float.
TABLE: list[tuple[str, Any]] = [
    ("add.s32 %r1, 4294967295, 3", 2),
    ("sub.s64 %rd1, 3, 5", LONG - 2),
    ("mul.lo.s32 %r1, 65537, 65537", 65537**2 % WORD),
    ("mul.hi.s32 %r1, -2147483648, 6", -3 % WORD),
    ("mul.hi.u32 %r1, 4294967295, 4294967295", (WORD - 1) ** 2 >> 32),
    ("mul.hi.u64 %rd1, 18446744073709551615, 18446744073709551557", (LONG - 1) * (LONG - 59) >> 64),
    ("mul.hi.s64 %rd1, -9223372036854775807, 1000000007", (-(2**63) + 1) * 1000000007 >> 64 & LONG - 1),
    ("mul.wide.s32 %rd1, -3, 2147483647", -3 * (2**31 - 1) % LONG),
    ("mul.wide.u32 %rd1, 4294967295, 4294967295", (WORD - 1) ** 2),
    ("mad.lo.s64 %rd1, -3, 5, 1", -14 % LONG),
    ("div.s32 %r1, -7, 2", -3 % WORD),
    ("rem.s32 %r1, -7, 2", -1 % WORD),
    ("div.u64 %rd1, 18446744073709551615, 10", (LONG - 1) // 10),
    ("rem.u32 %r1, 4294967295, 10", (WORD - 1) % 10),
    ("min.s64 %rd1, -3, 5", -3 % LONG),
    ("max.u64 %rd1, -3, 5", -3 % LONG),
    ("neg.s64 %rd1, 5", -5 % LONG),
    ("abs.s32 %r1, -5", 5),
    ("shl.b32 %r1, 3, 31", 2**31),
    ("shl.b64 %rd1, 3, 64", 0),
    ("shr.s32 %r1, -8, 40", WORD - 1),
    ("shr.u32 %r1, -8, 1", (WORD - 8) // 2),
    ("and.b32 %r1, 12, 10", 8),
    ("or.b64 %rd1, 12, 10", 14),
    ("xor.b32 %r1, 12, 10", 6),
    ("not.b32 %r1, 0", WORD - 1),
    ("bfe.u32 %r1, 0xABCD1234, 8, 12", 0xABCD1234 >> 8 & 0xFFF),
    ("bfe.s32 %r1, 0x0000F000, 12, 4", WORD - 1),
    ("bfi.b32 %r1, 0xFF, 0, 4, 8", 0xFF0),
    ("bfi.b64 %rd1, 0xFFFFFFFF, 1, 32, 32", 0xFFFFFFFF00000001),
    ("prmt.b32 %r1, 0x33221100, 0x77665544, 0x7531", 0x77553311),
    ("prmt.b32 %r1, 0x00008000, 0, 0x9999", 0xFFFFFFFF),
    ("shf.l.wrap.b32 %r1, 0x80000000, 1, 33", 3),
    ("shf.r.clamp.b32 %r1, 1, 0x80000000, 33", 0x80000000),
    ("lop3.b32 %r1, 12, 10, 6, 0x96", 12 ^ 10 ^ 6),
    ("lop3.b32 %r1, 12, 10, 6, 0xCA", (12 & 10) | (~12 & 6)),
    (f"add.f32 %f1, {single(1)}, {single(2**-24)}", 1.0),
    (f"fma.rn.f32 %f1, {single(1 + 2**-23)}, {single(1 + 2**-23)}, {single(-1)}", 2**-22 + 2**-46),
    (f"mul.f64 %fd1, {double(3)}, {double(0.5)}", 1.5),
    (f"div.rn.f32 %f1, {single(1)}, {single(3)}", np.float32(1) / np.float32(3)),
    (f"rcp.rn.f64 %fd1, {double(3)}", 1 / 3),
    (f"sqrt.rn.f64 %fd1, {double(2)}", 2**0.5),
    (f"min.f32 %f1, {single(np.nan)}, {single(5)}", 5.0),
    (f"max.f32 %f1, {single(-5)}, {single(5)}", 5.0),
    (f"neg.f64 %fd1, {double(5)}", -5.0),
    (f"abs.f32 %f1, {single(-5)}", 5.0),
    ("cvt.s64.s32 %rd1, -5", -5 % LONG),
    ("cvt.u64.u32 %rd1, -5", WORD - 5),
    ("cvt.u32.u64 %r1, 4294967301", 5),
    (f"cvt.rn.f32.f64 %f1, {double(1 / 3)}", np.float32(1 / 3)),
    (f"cvt.f64.f32 %fd1, {single(0.1)}", float(np.float32(0.1))),
    ("cvt.rn.f64.s64 %fd1, -3", -3.0),
    (f"cvt.rzi.s32.f32 %r1, {single(-2.75)}", -2 % WORD),
    (f"cvt.rni.s32.f64 %r1, {double(2.5)}", 2),
    (f"cvt.rzi.u32.f32 %r1, {single(-1)}", 0),
    (f"cvt.rzi.s32.f32 %r1, {single(3e9)}", 2**31 - 1),
    (f"cvt.rzi.s32.f32 %r1, {single(np.nan)}", 0),
    (f"cvt.rmi.f32.f32 %f1, {single(-0.5)}", -1.0),
    (f"cvt.rn.f16x2.f32 %r1, {single(1)}, {single(-2)}", 0x3C00C000),
    (f"cvt.rn.bf16x2.f32 %r1, {single(1)}, {single(1 + 2**-8)}", 0x3F803F80),
    (f"cvt.rn.bf16.f32 %h1, {single(1 + 3 * 2**-8)}", 0x3F82),
    (f"cvt.rn.f16.f32 %h1, {single(65520)}", 0x7C00),
    ("mov.u32 %r1, %laneid", 0),
    ("mov.u32 %r1, %ntid.x", 32),
    ("mov.b32 {%h1, %h2}, 0x12345678", 0x5678),
    ("mov.b64 %rd1, {5, 6}", 6 << 32 | 5),
    (f"mov.b32 %r1, {single(1)}", 0x3F800000),
    ("ld.param.u32 %r1, [k_param_1]", 7),
    ("selp.b32 %r1, 5, 6, 0", 6),
    (f"setp.lt.f32 %p1, {single(np.nan)}, {single(1)}", False),
    (f"setp.ltu.f32 %p1, {single(np.nan)}, {single(1)}", True),
    (f"setp.nan.f64 %p1, {double(np.nan)}, {double(1)}", True),
    ("setp.lt.s32 %p1, -1, 1", True),
    ("setp.lt.u32 %p1, -1, 1", False),
    ("setp.eq.and.s32 %p1, 1, 1, !1", False),
    ("setp.ne.s64 %p2|%p1, 1, 2", True),
]


@pytest.mark.parametrize(("line", "want"), TABLE, ids=[line for line, _ in TABLE])
def test_an_instruction(line: str, want: Any) -> None:
    name = line.replace("|", ",").split()[1].strip("{,").split(",")[0]
    found = run(f"{line};").registers[name][0]
    if isinstance(want, float | np.floating):
        found = found.view(np.float32 if found.dtype == np.uint32 else np.float64)
        want = found.dtype.type(want)  # NumPy 1 compares in float64
    assert found == want


def test_half_precision_from_memory() -> None:
    memory = Memory(np.array([1.0, -2.5, 65504.0, 2.0**-24], np.float16).view(np.uint8), 0x10000, "x")
    memory.defined[:] = True
    lines = (
        "ld.param.u64 %rd1, [k_param_0]; ld.global.v4.b16 {%h1, %h2, %h3, %h4}, [%rd1]; ld.global.nc.b32 %r1, [%rd1+4];"
    )
    machine = run(lines + "".join(f"cvt.f32.f16 %f{k}, %h{k};" for k in range(1, 5)), memory=memory)
    assert [machine.registers[f"%f{k}"].view(np.float32)[0] for k in range(1, 5)] == [1.0, -2.5, 65504.0, 2.0**-24]
    assert machine.registers["%r1"][0] == 0x7BFF | 1 << 16


@pytest.mark.parametrize(
    ("way", "step", "limit", "lane", "source"),
    [("down", 1, 31, 30, 31), ("down", 1, 31, 31, 31), ("up", 2, 0, 5, 3), ("up", 2, 0, 1, 1), ("bfly", 16, 31, 3, 19),
     ("idx", 7, 31, 20, 7), ("down", 4, 0x181F, 6, 6), ("idx", 9, 0x181F, 20, 17)],
)  # fmt: skip
def test_a_shuffle(way: str, step: int, limit: int, lane: int, source: int) -> None:
    machine = run(f"mov.u32 %r1, %laneid; shfl.sync.{way}.b32 %r2|%p1, %r1, {step}, {limit}, -1;")
    assert machine.registers["%r2"][lane] == source


def test_branches_part_and_join() -> None:
    lines = """mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 5; @%p1 bra $L1; mov.u32 %r2, 1; bra.uni $L2;
    $L1: mov.u32 %r2, 2; @!%p1 mov.u32 %r2, 3;
    $L2: bar.sync 0; @%p1 add.s32 %r2, %r2, 10; { .reg .b32 %r1; mov.u32 %r1, 9; }"""
    machine = run(lines, threads=64)
    assert machine.registers["%r2"].tolist() == [12] * 5 + [1] * 59
    assert machine.registers["%r1"].tolist() == list(range(64))  # the scope's own register is another


LOADED = "ld.param.u64 %rd1, [k_param_0]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;"
FAULTS = {
    "an undefined value decides": "setp.eq.s32 %p1, %r5, 0; @%p1 ret;",
    "an undefined divisor": "div.u32 %r1, 5, %r6;",
    "division by zero": "div.u32 %r1, 5, 0;",
    "an undefined address": "ld.global.u32 %r2, [%rd5];",
    "off its boundary": LOADED + "ld.global.u32 %r2, [%rd1+2];",
    "lies nowhere, behind x": LOADED + "ld.global.u32 %r2, [%rd3+256];",
    "reads what is not an element": LOADED + "ld.global.u32 %r2, [%rd1+252];",
    "race: writes": LOADED + "st.global.u32 [%rd1], %r1;",
    "race: reads": LOADED + "st.global.u32 [%rd3], %r1; xor.b64 %rd4, %rd2, 4; add.s64 %rd4, %rd1, %rd4; "
                            "ld.global.u32 %r2, [%rd4];",
    "reads as constant": LOADED + "st.global.u32 [%rd3], %r1; ld.global.nc.u32 %r2, [%rd3];",
    "outside of shared memory": "mov.u32 %r2, few; st.shared.u32 [%r2+512], 1;",
    "writes what is not its to write": "mov.u32 %r1, %tid.x; shl.b32 %r1, %r1, 2; st.shared.u32 [%r1], 1;",
    "part of a warp": "shfl.sync.down.b32 %r2|%p1, 1, 1, 31, 255;",
    "deadlock": "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 5; @%p1 bra $L1; bar.sync 0; $L1: bar.sync 0;",
    "others have ended": "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 5; @%p1 ret; bar.sync 0;",
    "96 threads, compiled for 64": "mov.u32 %r1, 96;",
}  # fmt: skip


@pytest.mark.parametrize("words", FAULTS)
def test_a_fault(words: str) -> None:
    memory = Memory(np.zeros(256, np.uint8), 0x10000, "x")
    memory.defined[:] = True
    memory.allowed[-2:] = 0
    with pytest.raises(Fault, match=words):
        run(FAULTS[words], threads=96 if "96" in words else 32, memory=memory)


def test_undefined_values_may_be_carried_where_they_reach_nothing() -> None:
    machine = run(
        "setp.eq.s32 %p1, 1, 1; selp.b32 %r1, 5, %r7, %p1; selp.b32 %r2, %r7, 5, %p1; add.s32 %r3, %r2, 1; "
        "mov.u32 %r2, 1;"
    )
    assert not machine.undefined.keys() & {"%r1", "%r2"}
    assert machine.undefined["%r3"].all()


@pytest.mark.parametrize(
    "line",
    ["add.sat.s32 %r1, 1, 2", "mul.ftz.f32 %f1, %f2, %f3", "cvt.rz.f32.f64 %f1, %fd1", "ex2.approx.f32 %f1, "
                                                                                       "%f2", "bar.sync 1, 32",
     "bar.warp.sync -1", "ld.local.u32 %r1, [%rd1]", "atom.global.add.u32 %r1, [%rd1], 1", "ld.volatile.global.u32 "
                                                                                           "%r1, [%rd1]",
     "mov.u32 %r1, %nothing", "min.NaN.f32 %f1, %f2, %f3", "setp.lo.f32 %p1, %f1, %f2", ".local .align 4 .b8 kept[64]"],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(NotImplementedError, match=line.replace("[", r"\[").replace("]", r"\]")):
        run(f"{line};")
