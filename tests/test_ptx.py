"""Every CUDA kernel compiled to PTX and assembled, without a GPU: registers, spills, 16-byte accesses, no double precision by accident."""

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

numba_cuda = pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")
pytest.importorskip("nvidia", reason="needs nvidia-nvvm and nvidia-cuda-nvcc, or a CUDA toolkit")

from numba import cuda, types  # noqa: E402
from numba.cuda import dispatcher  # noqa: E402
from numba.cuda.cudadrv import nvrtc  # noqa: E402

from fastbn.kernels.cuda import _jit  # noqa: E402

pytestmark = [pytest.mark.ptx, pytest.mark.peers]

for _name in ("rows", "columns", "finish", "apply", "fused", "moving"):
    importlib.import_module(f"fastbn.kernels.cuda.{_name}")

ARCHITECTURES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
STORED = ("float32", "float64", "uint16", "int16")
# 8 s for a dtype and an architecture: all four dtypes for the one in the middle, one dtype for each of the others.
BUILT = [*((stored, "sm_90") for stored in STORED), ("float32", "sm_80"), ("uint16", "sm_100")]
STATISTICS = ("finish.",)  # kernels on (C,) numbers, whose arithmetic is double on purpose
ELEMENTS = [kernel for kernel in _jit.KERNELS if not kernel.name.startswith(STATISTICS)]
REGISTERS = {"float32": 88, "float64": 88, "uint16": 128, "int16": 128}  # 128 let two blocks of 256 threads share a multiprocessor
DOUBLE_ENDS = 80  # instructions of `fused` that finish a channel's statistics, unrolled; its passes would have hundreds
DOUBLE = re.compile(r"\b(?:add|sub|mul|fma|div|rcp|sqrt|neg|abs|setp\.\w+)\S*\.f64\b")


def _assembler() -> Path | None:
    import nvidia

    found = [path for root in nvidia.__path__ for path in Path(root).rglob("ptxas*") if path.is_file()]
    return found[0] if found else None


ASSEMBLER = _assembler()
if ASSEMBLER is None:
    pytest.skip("needs ptxas: pip install nvidia-cuda-nvcc", allow_module_level=True)


class Assembled(NamedTuple):
    ptx: str
    registers: int
    stack: int
    spilled: int


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers where the compiler would ask a driver, which a machine without a GPU lacks."""
    monkeypatch.setattr(nvrtc, "get_supported_ccs", lambda: sorted(ARCHITECTURES.values()))
    yield


def assemble(body: Any, signature: Any, architecture: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Assembled:
    capability = ARCHITECTURES[architecture]
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=capability))
    ptx, _ = cuda.compile(body, signature, cc=capability, device=False, abi="numba", **_jit.Kernel.options)
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [str(ASSEMBLER), f"-arch={architecture}", "-v", str(source), "-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    stack, stores, loads = (
        sum(map(int, re.findall(rf"(\d+) bytes {what}", log))) for what in ("stack frame", "spill stores", "spill loads")
    )
    return Assembled(ptx, max(map(int, re.findall(r"Used (\d+) registers", log))), stack, stores + loads)


@pytest.mark.parametrize(("stored", "architecture"), BUILT)
def test_kernels_assemble_without_spills(stored: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(_jit.KERNELS) > 15
    for kernel in _jit.KERNELS:
        found = assemble(kernel.body, kernel.signature(np.dtype(stored)), architecture, tmp_path, monkeypatch)
        assert (found.stack, found.spilled) == (0, 0), f"{kernel.name} {stored}"
        assert found.registers <= REGISTERS[stored], f"{kernel.name} {stored}: {found.registers} registers"
        if kernel in ELEMENTS and not kernel.name.startswith("moving"):
            wide = {"float32": r"v4\.[bf]32", "float64": r"v2\.[bf]64"}.get(stored, r"v(?:4\.[bu]32|8\.[bu]16|4\.[bu]16|2\.[bu]64)")
            assert re.search(rf"ld\.global\S*\.{wide}", found.ptx), f"{kernel.name} {stored}: no load of 16 bytes"
            if kernel.name.startswith(("apply", "fused")):
                assert re.search(rf"st\.global\S*\.{wide}", found.ptx), f"{kernel.name} {stored}: no store of 16 bytes"
        if kernel.name.startswith("fused") and stored != "float64":
            double = len(DOUBLE.findall(found.ptx))  # once per channel, by one thread
            assert 0 < double <= DOUBLE_ENDS, f"{kernel.name} {stored}: {double} instructions in double precision"
        elif kernel in ELEMENTS and stored != "float64":
            assert not DOUBLE.findall(found.ptx), f"{kernel.name} {stored}: arithmetic in double precision"


@pytest.mark.parametrize("stored", STORED)
def test_arguments_reach_the_launch(stored: str) -> None:
    """Addresses, numbers and truths become what the driver takes, as numba-cuda has it."""
    kernel = object.__new__(dispatcher._Kernel)
    kernel.extensions = []
    given: dict[str, Any] = {"x": 1 << 40, "w": 1 << 40, "s": 1 << 40, "t": 1 << 40, "i4": True, "i8": 1 << 40, "f": 0.5}
    for found in _jit.KERNELS:
        prepared: list[Any] = []
        types_of = found.signature(np.dtype(stored)).args
        for kind, token in zip(types_of, found.arguments, strict=True):
            kernel._prepare_args(kind, given[token], 0, [], prepared)
        values = [given[token] for token in found.arguments]
        for token, value, wanted in zip(found.arguments, found.prepared(values), prepared, strict=True):
            if token in ("i4", "i8", "f"):
                assert value.tobytes() == bytes(wanted), f"{found.name}: {token}"
            assert getattr(value, "value", value) == getattr(wanted, "value", wanted) == given[token], f"{found.name}: {token}"


def test_a_number_that_does_not_fit_is_refused() -> None:
    kernel = _jit.Kernel(lambda n: None, "i4")
    assert kernel.prepared([2**31 - 1])[0].dtype == np.int32
    for value in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match=rf"^x: too large for kernel .*, whose argument 0 of 32 bits would be {value}: give"):
            kernel.prepared([value])


def test_a_launch_is_handed_over_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    core = SimpleNamespace(
        **{name: getattr(_jit._core(), name) for name in ("Stream", "LaunchConfig")}, launch=lambda *given: seen.append(given)
    )
    monkeypatch.setattr(_jit, "_core", lambda: core)
    kernel = _jit.KERNELS[0]
    monkeypatch.setattr(kernel, "compiled", lambda dtype, statistic, device: "the kernel", raising=False)
    monkeypatch.setattr(kernel, "_on", {})
    kernel.launch(np.dtype(np.float32), np.dtype(np.float64), 5, 256, 7, 0, tuple(range(len(kernel.arguments))))
    ((stream, grid, what, *arguments),) = seen
    assert (int(stream.handle), grid.grid, grid.block, what) == (7, (5, 1, 1), (256, 1, 1), "the kernel")
    assert [getattr(value, "value", value) for value in arguments] == list(range(len(kernel.arguments)))


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that indexes a local array dynamically, computes in double and loads singly is seen to."""

    def careless(x: Any, n: Any) -> None:
        kept = cuda.local.array(64, types.float32)
        for i in range(n):
            kept[i % 64] = x[i] * 0.1
        for i in range(n):
            x[i] = kept[(i * i) % 64]

    found = assemble(careless, types.void(types.CPointer(types.float32), types.int32), "sm_90", tmp_path, monkeypatch)
    assert found.stack > 0
    assert DOUBLE.findall(found.ptx)
    assert not re.search(r"ld\.global\S*\.v4", found.ptx)
