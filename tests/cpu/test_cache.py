"""Compiled kernels on disk: found again, but only where they still fit. Between processes: test_cache_processes.py."""

import errno
import pkgutil
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
import pytest
import tiny
from numba.core import caching, codegen

import fastbn
from fastbn.arguments import dtypes
from fastbn.cli import info
from fastbn.cpu import passes as cpu
from fastbn.cpu import team, threads
from fastbn.cpu.kernels import cache, jit

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="without the JIT nothing is compiled")


KERNELS = Path(cache.__file__).parent


def files(place: Path) -> set[str]:
    return {path.name for path in place.rglob("*.nb?")}


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))  # which numba reads again when it compiles
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def test_what_was_compiled_is_found_again(kept: Path) -> None:
    assert tiny.compiled() == ["double_serial"]
    assert len(files(kept)) == 2
    assert tiny.compiled() == []


@pytest.mark.parametrize("kind", ["nbc", "nbi"])
def test_a_damaged_file_is_compiled_anew(kept: Path, kind: str) -> None:
    assert tiny.compiled()
    (path,) = kept.rglob(f"*.{kind}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert tiny.compiled()
    assert tiny.compiled() == []


def test_code_that_another_index_left_is_compiled_anew(kept: Path) -> None:
    """Two processes that save forms of one kernel at once may leave an index that gives one's code for the other's
    dtype.
    """
    assert tiny.compiled("float32")
    assert tiny.compiled("float64")
    one, other = kept.rglob("*.nbc")
    one_code, other_code = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_code), other.write_bytes(one_code)
    for dtype in ("float32", "float64"):
        assert tiny.compiled(dtype)
        assert tiny.compiled(dtype) == []


def test_a_full_disk_is_no_error(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert tiny.compiled()
    assert files(kept) == set()


SETTINGS = {"OPT": 2, "BOUNDSCHECK": 1, "DEBUGINFO_DEFAULT": 1, "LOOP_VECTORIZE": 0, "SLP_VECTORIZE": 1}


def test_every_source_setting_and_both_compilers_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory for each version of what kernels are compiled from and by; numba sees a kernel's own file only."""
    sources = shutil.copytree(KERNELS, tmp_path / "kernels")
    known = cache.directories()[-1].name
    monkeypatch.setattr(cache, "_HERE", sources)
    monkeypatch.setattr(cache, "_sources", cache._sources.__wrapped__)  # read again every time
    seen = [cache.directories()[-1].name]
    assert seen == [known]
    modules = sorted(set(sources.glob("*.py")) - {sources / "__init__.py"})
    assert sources / "welford.py" in modules
    for path in modules:
        path.write_text(f"{path.read_text()}# the next version\n")
        seen.append(cache.directories()[-1].name)
    for compiler in (numba, llvmlite):
        monkeypatch.setattr(compiler, "__version__", "0.0.0")
        seen.append(cache.directories()[-1].name)
    for name, value in SETTINGS.items():
        monkeypatch.setattr(numba.config, name, value)
        seen.append(cache.directories()[-1].name)
    assert len(set(seen)) == len(seen) == 1 + len(modules) + 2 + len(SETTINGS)


def test_settings_are_numbas() -> None:
    """A name that numba no longer has would count for nothing."""
    assert [name for name in cache._SETTINGS if not hasattr(numba.config, name)] == []


def test_a_frozen_program_without_files_counts_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same digest in every process and on every line, another one after an edit; without code, kernels are kept
    nowhere.
    """
    sources = {path.stem: path.read_text() for path in KERNELS.glob("*.py")}

    class Importer:
        def find_spec(self, name: str, path: None) -> Any:
            return types.SimpleNamespace(loader=self, origin=None)

        def get_code(self, name: str) -> types.CodeType:
            return compile(sources[name.rpartition(".")[2]], "nowhere", "exec")

    def digest() -> str:
        return cache._sources.__wrapped__()

    monkeypatch.setattr(
        cache.pkgutil, "iter_modules", lambda *_: [pkgutil.ModuleInfo(Importer(), name, False) for name in sources]
    )
    seen = [digest()]
    sources["welford"] = "# a line above\n" + sources["welford"]
    assert digest() == seen[0]
    for before, after in (
        ("count_b / count", "count_b * count"),
        ("0.0 if m2 < 0.0", "1.0 if m2 < 0.0"),
        ("(mean, m2)", "(m2, mean)"),
    ):
        assert before in sources["welford"]
        sources["welford"] = sources["welford"].replace(before, after)
        seen.append(digest())
    assert len(set(seen)) == 4
    assert cache._text(frozenset("abcdef")) == "('a', 'b', 'c', 'd', 'e', 'f')"
    sources.clear()
    monkeypatch.setattr(cache, "_sources", cache._sources.__wrapped__)
    assert (cache.stamp(), cache.directories()) == ("", [])
    assert info.cache_directory().startswith("nowhere: this program's importer does not show fastbn's modules")


def test_a_program_that_unpacks_itself_keeps_kernels_with_the_user(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own directory is there for one process only."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    assert len(cache.directories()) == 2
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert [place.name[:7] for place in cache.directories()] == ["fastbn-"]


def test_numbas_own_choice_of_directories_is_not_asked(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They know nothing of an edit of a leaf."""
    monkeypatch.setenv("NUMBA_CACHE_LOCATOR_CLASSES", "InTreeCacheLocator")
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "InTreeCacheLocator")
    assert tiny.compiled() == ["double_serial"]
    assert len(files(kept)) == 2


def test_code_that_holds_addresses_is_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As most does with NUMBA_OPT=0: numba would warn of it, and ask for a file that fastbn's cache does not know."""
    monkeypatch.setattr(codegen.CodeLibrary, "has_dynamic_globals", True)
    assert tiny.compiled() == ["double_serial"]
    assert files(kept) == set()
    monkeypatch.setattr(numba.config, "OPT", 0)
    assert "most are compiled anew at each start, since NUMBA_OPT=0" in info.cache_directory()


SHAPES = (
    (8, 4), (3000, 40), (300, 300), (4, 3, 5, 5), (32, 64, 7, 7), (2, 2, 300, 300), (4, 64, 64, 64), (4, 20, 30, 30)
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_warmup_covers_every_call(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Nothing is compiled, and nothing runs: what counts is which kernels are asked for."""
    asked: set[Any] = set()
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 is a dtype of ml_dtypes")
    kind = np.dtype(dtype)
    assert dtypes.supported(kind)

    def compiled(kernel: jit.Kernel, *form: Any) -> Any:
        asked.add((kernel.name, *form))
        return lambda *arguments: None

    monkeypatch.setattr(jit.Kernel, "compiled", compiled)
    pytorchs = team.Runtime(1, 2, 3)
    assert len(list(cpu.warmup([kind], pytorchs))) > len(jit.KERNELS)
    warm = asked.copy()
    asked.clear()
    for runtime in (None, pytorchs):
        with np.errstate(all="ignore"), threads.on_team(runtime):  # results are whatever the memory held
            _everything(kind, runtime)
    assert asked - warm == set()
    assert len({name for name, *_ in asked}) == len(jit.KERNELS)  # and each kernel is of use
    assert not threads.usable() or {form for *_, form in warm} == {False, True, pytorchs}


def _everything(kind: np.dtype[Any], runtime: team.Runtime | None) -> None:
    """Every kind of call on arrays of a dtype."""
    for shape in SHAPES:
        for last in (False, True):
            x = np.ones(shape, kind)
            x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1) if last else x
            layer = fastbn.BatchNorm(shape[1], dtype=np.float64 if kind.itemsize == 8 else np.float32)
            layer.backward(layer(x))
            layer.eval(backward=True).backward(layer(x))
            m = fastbn.moments(x)
            fastbn.batch_norm(x)
            fastbn.batch_norm_backward(x, x, m)
            fastbn.batch_norm(x[::2, ::-1])
    for dims in ((3000, 40), (4, 64, 4096)):
        cpu.compact(dims, dims, kind).inference(0, 0, 0, 0, 0, 0, 1e-5, runtime)


def test_odd_arrays_compile_nothing() -> None:
    """Read-only, unaligned, reversed, strided, broadcast ones run in kernels of compact ones: one a dtype and form."""

    def everything(x: Any, dy: Any) -> None:
        y, m = fastbn.batch_norm(x)
        fastbn.batch_norm_inference(x, m.mean, m.var())
        fastbn.batch_norm_backward(dy, x, m)
        fastbn.batch_norm_inference_backward(dy, x, m.mean, m.var())
        fastbn.batch_norm(x, out=np.empty((*y.shape, 2), y.dtype)[..., 0])

    def forms() -> set[Any]:
        return {(kernel.name, *key) for kernel in jit.KERNELS for key in kernel._compiled}

    before = forms()
    rng = np.random.default_rng(0)
    for shape in ((6, 4, 5, 6), (30, 20), (8, 16, 40, 40), (6000, 20)):  # both layouts, serial and parallel
        x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
        everything(x, dy)
        frozen = x.copy()
        frozen.flags.writeable = False
        shifted = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(shape)
        assert not shifted.flags.aligned
        last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
        views = x[::-1], x[:, ::-1], x[..., ::-1], np.repeat(x, 2, 0)[::2], np.broadcast_to(x[:1], shape), last[::-1]
        for odd in (frozen, shifted, *views):
            everything(odd, odd)
    more = {key[1] for key in forms() - before if not key[0].startswith("elementwise.")}  # which are float64
    assert more <= {np.dtype(np.float32)}
