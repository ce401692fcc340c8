"""CUDA kernels on disk between processes: kept whole, of these sources and this compiler alone, and never a reason to
fail.
"""

import importlib
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")
pytest.importorskip("nvidia", reason="needs nvidia-nvvm and nvidia-nvjitlink, or a CUDA toolkit")

from numba.cuda import dispatcher

from fastbn.cpu.kernels import cache
from fastbn.cuda.kernels import disk, finish, jit

pytestmark = [pytest.mark.ptx, pytest.mark.peers]

FLOAT, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
TARGET = (9, 0, "a")
COUNT = re.compile(r"B\d+v\d+")
NAME = "cuda-finish.clear-0676f0dc-float32-float64-sm_90a.cubin"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where kernels are kept; a GPU for which they are compiled, though there is none."""
    monkeypatch.setattr(cache, "directories", lambda: [tmp_path / "kernels"])
    monkeypatch.setattr(jit, "target_of", lambda device: TARGET)
    monkeypatch.setattr(jit, "_loaded", lambda entry, code: (entry, code))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=TARGET[:2]))
    return tmp_path / "kernels"


def compiled(device: int = 0) -> tuple[str, bytes]:
    """A kernel, in what stands for a new process."""
    kernel = jit.Kernel(finish.clear.body, "w i4")
    found: tuple[str, bytes] = kernel.compiled(FLOAT, DOUBLE, device)
    # another device of the kind, and statistics that it takes none of
    assert kernel.compiled(FLOAT, FLOAT, device + 1) is found
    return found


def alike(made: tuple[str, bytes], other: tuple[str, bytes]) -> bool:
    """Whether both are the same kernel: numba counts in its name how many were compiled before."""
    return COUNT.sub("", made[0]) == COUNT.sub("", other[0]) and made[1][:4] == other[1][:4] == b"\x7fELF"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were compiled, from now on."""
    seen: list[str] = []
    ptx = jit.Kernel.ptx
    monkeypatch.setattr(jit.Kernel, "ptx", lambda kernel, *given: seen.append(kernel.name) or ptx(kernel, *given))
    return seen


def test_a_kernel_is_compiled_once_for_all_processes(folder: Path, compilations: list[str]) -> None:
    entry, code = compiled()
    assert entry.encode() in code
    assert os.listdir(folder) == [NAME]
    os.umask(mask := os.umask(0))
    # as any file: who installs may be another than who runs
    assert (folder / NAME).stat().st_mode & 0o777 == 0o666 & ~mask
    assert compiled() == (entry, code)
    assert compilations == ["finish.clear"]


def test_what_runs_is_the_ptx_that_the_tests_assemble(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx = finish.clear.ptx(FLOAT, DOUBLE, TARGET)
    assert ".target sm_90a" in ptx
    monkeypatch.setattr(jit.Kernel, "ptx", lambda kernel, *given: ptx)
    assert compiled() == jit.assembled(ptx, jit.architecture(TARGET))


def test_a_file_that_is_not_this_kernel_is_compiled_anew(folder: Path, compilations: list[str]) -> None:
    made = compiled()
    path = folder / NAME
    whole = path.read_bytes()
    digest, entry, code = whole.split(b"\n", 2)
    first = digest + b"\n" + entry
    for damaged in (
        b"",
        whole[:-1],
        whole[: len(first)],
        first + b"\n",
        whole[:-1] + bytes([whole[-1] ^ 1]),
        b"[1]\n" + code,
        b"{}\n" + code,
        b"\xff\xfe\n" + code,
        b"[" * 200_000 + b"\n" + code,
        digest + b"\nnull\n" + code,
        digest + b"\n" + code,
    ):
        path.write_bytes(damaged)
        compilations.clear()
        assert alike(compiled(), made)
        assert compilations == ["finish.clear"]
        assert compiled()[1] == path.read_bytes().split(b"\n", 2)[2]
        assert compilations == ["finish.clear"]
    assert os.listdir(folder) == [NAME]


def test_no_bit_of_a_file_its_name_or_its_stamp_may_be_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, made = "finish.clear", ("entry", b"\x7fELF\n\ncode\n")
    disk.save(name, *made)
    path = folder / f"cuda-{name}.cubin"
    whole = path.read_bytes()
    assert disk.load(name) == made
    for bit in range(8 * len(whole)):
        other = bytearray(whole)
        other[bit // 8] ^= 1 << bit % 8
        path.write_bytes(other)
        assert disk.load(name) is None, (bit, bytes(other))
    path.write_bytes(whole)
    path.with_name("cuda-rows.moments_rows.cubin").write_bytes(whole)
    assert disk.load("rows.moments_rows") is None  # what another kernel left under this one's name
    with monkeypatch.context() as patch:
        patch.setattr(disk, "stamp", lambda: "0" * 64)
        assert disk.load(name) is None
    assert disk.load(name) == made


def test_what_can_not_be_kept_serves_all_the_same(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        made = compiled()
        assert os.listdir(folder) == []
    with monkeypatch.context() as patch:
        patch.setattr(cache, "writable", lambda directory: False)
        assert alike(compiled(), made)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "stamp", lambda: "")  # of a frozen program, whose sources can't be read
        assert alike(compiled(), made)
    assert os.listdir(folder) == []
    folder.rmdir()
    folder.write_text("no directory")
    assert alike(compiled(), made)
    assert len(compilations) == 4


def test_the_stamp_sees_sources_compiler_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    def stamp() -> str:
        disk.stamp.cache_clear()
        return disk.stamp()

    before = stamp()
    assert stamp() == before
    found = {before}
    modules = list(disk.pkgutil.iter_modules([str(Path(disk.__file__).parent)], "fastbn.cuda.kernels."))
    assert {"fastbn.cuda.kernels.device", "fastbn.cuda.kernels.finish"} <= {module.name for module in modules}
    edited = SimpleNamespace(
        find_spec=lambda name, path: SimpleNamespace(loader=SimpleNamespace(get_data=lambda origin: b""), origin="")
    )
    for what, name, value in (
        (disk.pkgutil, "iter_modules", lambda *given: [module._replace(module_finder=edited) for module in modules]),
        (disk.metadata, "version", lambda name: "0"),
        (disk, "_compiler", lambda: "another"),
        (disk.config, "OPT", 1),
        (cache, "stamp", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(what, name, value)
            found.add(stamp())
    assert len(found) == 6
    with monkeypatch.context() as patch:
        patch.setattr(cache, "stamp", lambda: "")
        assert stamp() == ""
    assert stamp() == before
    assert "nvvm" in disk._compiler()


def test_no_two_kernels_share_a_file() -> None:
    for name in ("rows", "columns", "apply", "fused", "copying"):
        importlib.import_module(f"fastbn.cuda.kernels.{name}")
    keys = [(kernel.name, tuple(kernel.arguments)) for kernel in jit.KERNELS]
    assert len(set(keys)) == len(keys) > 15
