"""Every CUDA kernel compiled to PTX and assembled, without a GPU: registers, spills, 16-byte accesses, no double
precision by accident.

What the PTX computes, `cuda/ptx` shows by executing it.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

numba_cuda = pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")
pytest.importorskip("nvidia", reason="needs nvidia-nvvm and nvidia-cuda-nvcc, or a CUDA toolkit")

from numba import cuda, types  # noqa: E402
from numba.cuda import dispatcher  # noqa: E402

from fastbn.cuda.kernels import jit  # noqa: E402
from tests.cuda.ptx import compiler  # noqa: E402

pytestmark = [pytest.mark.ptx, pytest.mark.peers]

STORED = ("float32", "float64", "uint16", "int16")
KERNELS = compiler.kernels()
FORMS = [
    (name, statistic)
    for name, kernel in KERNELS.items()
    for statistic in compiler.STATISTICS[not compiler.takes_statistics(kernel) :]
]
# which are on a channel's numbers, and double on purpose
ELEMENTS = [name for name in KERNELS if not name.startswith("finish.")]
REGISTERS = 128  # with which two blocks of 256 threads share a multiprocessor
DOUBLE_FEW = 4  # additions of the parts of a mean, once per channel, unrolled; a pass would have dozens
DOUBLE_ENDS = 96  # instructions of `fused` that finish a channel's statistics, unrolled; its passes would have hundreds
DOUBLE = re.compile(r"\b(?:add|sub|mul|fma|div|rcp|sqrt|neg|abs|setp\.\w+)\S*\.f64\b")
CONSTANT = re.compile(r"\b0(?:[fF]([0-9a-fA-F]{8})|[dD]([0-9a-fA-F]{16}))\b")
SHARED = re.compile(r"\.shared\s[^;]*?\bfastbn_([a-z]+)_")
WIDE = r"(?:v4\.[bfu]32|v2\.[bfu]64)"  # 16 bytes at once; of 16-bit elements libNVVM makes 8
HALVES = re.compile(r"(?:ld|st)\.global\S*\.v\d\.[bsu]16\b")
RAW = re.compile(r"ld\.global\S*[bsu]16\s+\{?%f\d")  # bits of half precision in a register of float32


def _assembler() -> Path | None:
    import nvidia

    found = [path for root in nvidia.__path__ for path in Path(root).rglob("ptxas*") if path.is_file()]
    return found[0] if found else None


ASSEMBLER = _assembler()
if ASSEMBLER is None:
    pytest.skip("needs ptxas: pip install nvidia-cuda-nvcc", allow_module_level=True)


class Assembled(NamedTuple):
    registers: int
    stack: int
    spilled: int


def assemble(ptx: str, architecture: str, folder: Path) -> Assembled:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [str(ASSEMBLER), f"-arch={architecture}", "-v", str(source), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    stack, stores, loads = (
        sum(map(int, re.findall(rf"(\d+) bytes {what}", log)))
        for what in ("stack frame", "spill stores", "spill loads")
    )
    return Assembled(max(map(int, re.findall(r"Used (\d+) registers", log))), stack, stores + loads)


def nans(ptx: str) -> list[str]:
    """Constants that are NaN: what LLVM makes of memory that nobody writes."""
    singles = (np.uint32(int(found[1], 16)).view(np.float32) for found in CONSTANT.finditer(ptx) if found[1])
    doubles = (np.uint64(int(found[2], 16)).view(np.float64) for found in CONSTANT.finditer(ptx) if found[2])
    return [str(value) for value in (*singles, *doubles) if np.isnan(value)]


def loaded(ptx: str) -> int:
    """Elements of half precision that global loads bring; tables of coefficients are float32."""
    return 8 * len(re.findall(r"ld\.global\S*\.v4\.[bu]32\b", ptx)) + len(
        re.findall(r"ld\.global(?:\.nc)?\.[bu]16\b", ptx)
    )


def complaints(ptx: str, name: str, stored: str) -> list[str]:
    """What is wrong with a kernel's PTX, by the words of the checks."""
    shared, double, memory = SHARED.findall(ptx), len(DOUBLE.findall(ptx)), name in ELEMENTS
    groups = memory and not name.startswith("copying")
    finishes = name.startswith("fused") and stored != "float64"  # once per channel, by one thread
    converted = len(re.findall(r"\bcvt\.f(?:32|64)\.f16\b", ptx))
    found = {
        "NaN constants": nans(ptx),
        "shared memory of one name twice": len(shared) != len(set(shared)),
        "accesses of 16-bit elements": HALVES.findall(ptx),
        "raw bits in float32": RAW.findall(ptx),
        "lanes that are not converted": stored == "uint16" and memory and converted != loaded(ptx),
        "no load of 16 bytes": groups and not re.search(rf"ld\.global\S*\.{WIDE}", ptx),
        "no store of 16 bytes": name.startswith(("apply", "fused")) and not re.search(rf"st\.global\S*\.{WIDE}", ptx),
        "no end in double precision": finishes and not double,
        "double precision": memory and stored != "float64" and double > (DOUBLE_ENDS if finishes else DOUBLE_FEW),
    }
    return [words for words, wrong in found.items() if wrong]


@pytest.mark.parametrize("architecture", compiler.ARCHITECTURES)
@pytest.mark.parametrize("stored", STORED)
def test_what_kernels_are_compiled_to(stored: str, architecture: str) -> None:
    """For every target that numba-cuda compiles for, with given statistics of both dtypes."""
    assert len(KERNELS) > 20
    assert len(FORMS) > len(KERNELS)
    wrong = {form: complaints(compiler.ptx(form[0], stored, form[1], architecture), form[0], stored) for form in FORMS}
    assert not {form: found for form, found in wrong.items() if found}


@pytest.mark.parametrize(
    ("stored", "architecture"),
    [*((stored, "sm_90a") for stored in STORED), ("float32", "sm_80"), ("uint16", "sm_100a")],
)
def test_kernels_assemble_without_spills(stored: str, architecture: str, tmp_path: Path) -> None:
    """All dtypes for the target in the middle, one dtype for each of the others: 8 s for a dtype and a target."""
    for name, statistic in FORMS:
        found = assemble(compiler.ptx(name, stored, statistic, architecture), architecture, tmp_path)
        assert (found.stack, found.spilled) == (0, 0), f"{name} {stored} {statistic}"
        assert found.registers <= REGISTERS, f"{name} {stored} {statistic}: {found.registers} registers"


@pytest.mark.parametrize("stored", STORED)
def test_arguments_reach_the_launch(stored: str) -> None:
    """Addresses, numbers and truths become what the driver takes, as numba-cuda has it."""
    kernel = object.__new__(dispatcher._Kernel)
    kernel.extensions = []
    given: dict[str, Any] = {
        "x": 1 << 40,
        "w": 1 << 40,
        "s": 1 << 40,
        "t": 1 << 40,
        "i4": True,
        "i8": 1 << 40,
        "f": 0.5,
    }
    for found in jit.KERNELS:
        prepared: list[Any] = []
        types_of = found.signature(np.dtype(stored)).args
        for kind, token in zip(types_of, found.arguments, strict=True):
            kernel._prepare_args(kind, given[token], 0, [], prepared)
        values = [given[token] for token in found.arguments]
        for token, value, wanted in zip(found.arguments, found.prepared(values), prepared, strict=True):
            if token in ("i4", "i8", "f"):
                assert value.tobytes() == bytes(wanted), f"{found.name}: {token}"
            assert getattr(value, "value", value) == getattr(wanted, "value", wanted) == given[token], (
                f"{found.name}: {token}"
            )


def test_a_number_that_does_not_fit_is_refused() -> None:
    kernel = jit.Kernel(lambda n: None, "i4")
    assert kernel.prepared([2**31 - 1])[0].dtype == np.int32
    for value in (2**31, -(2**31) - 1):
        with pytest.raises(
            ValueError, match=rf"^x: too large for kernel .*, whose argument 0 of 32 bits would be {value}: give"
        ):
            kernel.prepared([value])


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint64, np.float32, np.float64, np.bool_])
def test_a_number_of_numpy_becomes_as_wide_as_its_argument(kind: Any) -> None:
    kernel = jit.Kernel(lambda *given: None, "x i4 i8 f")
    address, *numbers = kernel.prepared([kind(1)] * 4)
    assert type(address) in (int, float, bool)  # no number of NumPy, which the driver would take by its own width
    assert [number.dtype for number in numbers] == [np.int32, np.int64, np.float64]
    if np.dtype(kind).itemsize == 8:
        with pytest.raises(ValueError, match=rf"whose argument 1 of 32 bits would be {kind(2**31)}: give"):
            kernel.prepared([0, kind(2**31), 0, 0.0])


def test_a_launch_is_handed_over_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    core = SimpleNamespace(
        **{name: getattr(jit._core(), name) for name in ("Stream", "LaunchConfig")},
        launch=lambda *given: seen.append(given),
    )
    monkeypatch.setattr(jit, "_core", lambda: core)
    kernel = jit.KERNELS[0]
    monkeypatch.setattr(kernel, "compiled", lambda dtype, statistic, device: "the kernel", raising=False)
    monkeypatch.setattr(kernel, "_on", {})
    kernel.launch(np.dtype(np.float32), np.dtype(np.float64), 5, 256, 7, 0, tuple(range(len(kernel.arguments))))
    ((stream, grid, what, *arguments),) = seen
    assert (int(stream.handle), grid.grid, grid.block, what) == (7, (5, 1, 1), (256, 1, 1), "the kernel")
    assert [getattr(value, "value", value) for value in arguments] == list(range(len(kernel.arguments)))


# As the compiler made it before it was mended, and what else the checks are for: a kernel, what memory holds, and a
# change of its PTX.
PLANTED: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "NaN constants": (
        "fused.forward_rows",
        "float32",
        lambda ptx: re.sub(r"(add\.f32\s+%f\d+, )%f\d+", r"\1 0f7FC00000", ptx, count=1),
    ),
    "shared memory of one name twice": (
        "fused.forward_rows",
        "float32",
        lambda ptx: ptx.replace(
            ".visible .entry", ".shared .align 4 .b8 fastbn_few_256_float_1[1024];\n.visible .entry"
        ),
    ),
    "accesses of 16-bit elements": (
        "apply.normalize",
        "int16",
        lambda ptx: re.sub(r"(ld\.global\S*v4)\.[bu]32", r"\1.u16", ptx),
    ),
    "raw bits in float32": (
        "apply.normalize",
        "uint16",
        lambda ptx: re.sub(r"ld\.global\S*\s+\{%r", "ld.global.v4.b16 {%f", ptx),
    ),
    "lanes that are not converted": (
        "rows.moments_rows",
        "uint16",
        lambda ptx: re.sub(r"cvt\.f32\.f16[^;]*;", "", ptx, count=1),
    ),
    "no load of 16 bytes": ("columns.sums_columns", "float64", lambda ptx: ptx.replace("v2.f64", "f64")),
    "no store of 16 bytes": ("fused.backward_rows", "float32", lambda ptx: ptx.replace("v4.f32", "v2.f32")),
    "no end in double precision": ("fused.forward_columns", "int16", lambda ptx: ptx.replace(".f64", ".f32")),
    "double precision": ("rows.sums_rows", "uint16", lambda ptx: ptx.replace("add.f32", "add.f64")),
}


@pytest.mark.parametrize("words", PLANTED)
def test_the_checks_can_fail(words: str) -> None:
    name, stored, change = PLANTED[words]
    sound = compiler.ptx(name, stored, "float64", "sm_90a")
    altered = change(sound)
    assert complaints(sound, name, stored) == []
    assert altered != sound
    assert words in complaints(altered, name, stored)


def test_the_assembler_tells_of_memory_that_is_no_register(tmp_path: Path) -> None:
    """A kernel that indexes a local array dynamically."""

    def careless(x: Any, n: Any) -> None:
        kept = cuda.local.array(64, types.float32)
        for i in range(n):
            kept[i % 64] = x[i]
        for i in range(n):
            x[i] = kept[(i * i) % 64]

    ptx = compiler.compiled(careless, types.void(types.CPointer(types.float32), types.int32), "sm_90a")
    assert assemble(ptx, "sm_90a", tmp_path).stack > 0
