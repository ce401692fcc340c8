"""Compiled kernels on disk: found again by every process, also in directories that can't be written, and only where they still fit."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest

import fastbn

pytestmark = [
    pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="without the JIT nothing is compiled"),
    pytest.mark.skipif(sys.platform == "win32", reason="a directory can't be sealed by its mode on Windows"),
]

HERE = Path(__file__).parent
PACKAGE = Path(fastbn.__file__).parent

CALL = """
import json, os, sys
import unprivileged
unprivileged.drop()
import numpy as np
from numba.core import event
import fastbn
from fastbn import info
from fastbn.kernels import _jit
@_jit.kernel("x1 s1")
def double(x, out):
    for i in _jit.prange(x.size):
        out[i] = 2 * x[i]
sealed = [unprivileged.sealed(place) for place in sys.argv[1:]]
x = np.arange(32, dtype=np.float32)
with event.install_recorder("numba:compile") as seen:
    if "PUBLIC" in os.environ:
        mean = fastbn.moments(x.reshape(2, 16)).mean
    else:  # which compiles in a fifth of the time
        mean = np.empty(32)
        double.form(x.dtype, False)(x, mean)
compiled = sorted({e.data["dispatcher"].py_func.__name__ for _, e in seen.buffer})
right = bool((mean == np.arange(8, 24)).all() if "PUBLIC" in os.environ else (mean == 2 * x).all())
print(json.dumps({"file": fastbn.__file__, "sealed": sealed, "compiled": compiled, "right": right, "kept": info.cache_directory()}))
"""


class Machine:
    """An installation and a home of their own."""

    def __init__(self, place: Path) -> None:
        self.site, self.home, self.cache = place / "site", place / "home", place / "cache"
        for path in (self.home, self.cache):
            path.mkdir(parents=True)
        shutil.copytree(PACKAGE, self.site / "fastbn", ignore=shutil.ignore_patterns("__pycache__"))

    def python(self, *words: str, **environment: str) -> str:
        """What a Python there prints; nothing may go to stderr."""
        own = ("FASTBN_", "NUMBA_", "XDG_", "HOME", "PYTHONPATH", "COV_", "COVERAGE")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        clean |= {"HOME": str(self.home), "PYTHONPATH": os.pathsep.join([str(self.site), str(HERE)]), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, *words], env=clean | environment, capture_output=True, text=True, check=False, timeout=100, cwd=self.home
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    def call(self, *sealed: Path, **environment: str) -> dict[str, Any]:
        """What one small call compiled, and where it is kept; `sealed` can't be written, or this fails."""
        said: dict[str, Any] = json.loads(self.python("-c", CALL, *map(str, sealed), **environment))
        assert said["file"] == str(self.site / "fastbn" / "__init__.py")
        assert said["sealed"] == [True] * len(sealed)
        assert said["right"]
        return said


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "one")


@pytest.fixture
def seal() -> Iterator[Callable[..., None]]:
    """A function that makes directories, and all in them, read-only until the test is over."""
    done: list[Path] = []

    def close(*places: Path) -> None:
        for place in places:
            for path in (place, *place.rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
                done.append(path)

    yield close
    for path in done:
        path.chmod(0o755)


def files(place: Path) -> set[str]:
    return {path.name for path in place.rglob("*.nb?")}


@pytest.mark.parametrize(("public", "name"), [({}, "double_serial"), ({"PUBLIC": "1"}, "moments_serial")])
def test_the_second_process_compiles_nothing(machine: Machine, public: dict[str, str], name: str) -> None:
    first = machine.call(**public)
    assert name in first["compiled"]
    assert first["kept"] == str(machine.site / "fastbn" / "kernels" / "__pycache__")
    assert len(files(Path(first["kept"]))) == 2
    assert files(machine.home) == set()
    assert machine.call(**public)["compiled"] == []


def test_a_read_only_installation_keeps_kernels_in_the_home(machine: Machine, seal: Callable[..., None]) -> None:
    seal(machine.site)
    first = machine.call(machine.site / "fastbn" / "kernels")
    assert first["compiled"]
    assert Path(first["kept"]).is_relative_to(machine.home)
    assert machine.call(machine.site / "fastbn" / "kernels")["compiled"] == []


def test_a_filled_installation_that_is_read_only_is_used(machine: Machine, seal: Callable[..., None]) -> None:
    assert machine.call()["compiled"]
    seal(machine.site, machine.home)
    again = machine.call(machine.site / "fastbn" / "kernels", machine.home)
    assert again["compiled"] == []
    assert again["kept"].endswith("__pycache__ (read-only)")


def test_nothing_can_be_written_at_all(machine: Machine, seal: Callable[..., None]) -> None:
    seal(machine.site, machine.home)
    for public in ({}, {"PUBLIC": "1"}):
        said = machine.call(machine.site / "fastbn" / "kernels", machine.home, **public)
        assert said["compiled"]
        assert said["kept"].startswith("nowhere: no directory can be written; set NUMBA_CACHE_DIR")


@pytest.mark.parametrize("filled", [True, False])
def test_a_read_only_cache_directory(machine: Machine, seal: Callable[..., None], filled: bool) -> None:
    """numba itself passes over a NUMBA_CACHE_DIR that it can't write, also where all kernels lie in it."""
    if filled:
        assert machine.call(NUMBA_CACHE_DIR=str(machine.cache))["compiled"]
    before = files(machine.cache)
    seal(machine.cache)
    said = machine.call(machine.cache, NUMBA_CACHE_DIR=str(machine.cache))
    assert bool(said["compiled"]) != filled
    assert files(machine.cache) == before
    assert files(machine.site) | files(machine.home) == set()  # a directory that is named is the only one


def test_the_cache_directory_can_be_carried_elsewhere(machine: Machine, tmp_path: Path) -> None:
    """To another path, for another installation of the same version, whatever the times of its files."""
    assert machine.call(NUMBA_CACHE_DIR=str(machine.cache))["compiled"]
    other = Machine(tmp_path / "two")
    for path in (other.site / "fastbn" / "kernels").iterdir():
        os.utime(path, (1e9, 1e9))
    shutil.copytree(machine.cache, other.cache, dirs_exist_ok=True)
    shutil.rmtree(machine.site)
    assert other.call(NUMBA_CACHE_DIR=str(other.cache))["compiled"] == []


def test_an_upgrade_of_a_leaf_compiles_its_kernels_anew(machine: Machine) -> None:
    """numba looks at the file of the kernel only, and would go on with the old leaf."""
    assert machine.call()["compiled"]
    assert machine.call()["compiled"] == []
    leaf = machine.site / "fastbn" / "kernels" / "welford.py"
    leaf.write_text(leaf.read_text() + "\n# the next version\n")
    assert machine.call()["compiled"]
    assert machine.call()["compiled"] == []


def test_a_damaged_file_is_compiled_anew(machine: Machine) -> None:
    assert machine.call(NUMBA_CACHE_DIR=str(machine.cache))["compiled"]
    for kind in ("*.nbc", "*.nbi"):
        for path in machine.cache.rglob(kind):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert machine.call(NUMBA_CACHE_DIR=str(machine.cache))["compiled"]
        assert machine.call(NUMBA_CACHE_DIR=str(machine.cache))["compiled"] == []


def test_a_full_disk_is_no_error(machine: Machine) -> None:
    code = (
        "import errno, numba.core.caching as caching\ndef full(self, *arguments): raise OSError(errno.ENOSPC, 'no space left on device')\n"
        f"caching.IndexDataCacheFile.save = full\n{CALL}"
    )
    assert json.loads(machine.python("-c", code))["compiled"]
    assert files(machine.site) | files(machine.home) == set()


WARMUP = """
import sys
from fastbn import cli
from fastbn.backends import cpu
from fastbn.kernels import _jit
import unprivileged
unprivileged.drop()
_jit.KERNELS[:] = [kernel for kernel in _jit.KERNELS if kernel.name == "channels_last.moments"]  # all of them take a minute
print(cli.main(["warmup", *sys.argv[1:]]))
"""


def test_warmup_fills_a_directory_for_read_only_use(machine: Machine, seal: Callable[..., None]) -> None:
    cache = {"NUMBA_CACHE_DIR": str(machine.cache)}
    out = machine.python("-c", WARMUP, "float32", **cache).splitlines()
    assert out[0].split("  ")[-1] == "channels_last.moments float32 serial"
    assert out[-1] == "0"
    assert "float64" not in "".join(out)
    seal(machine.cache)
    assert machine.call(machine.cache, **cache, PUBLIC="1")["compiled"] == []
    assert machine.call(machine.cache, **cache)["compiled"] != []  # the control: a kernel that was not warmed up


def test_warmup_that_can_keep_nothing_fails(machine: Machine, seal: Callable[..., None]) -> None:
    seal(machine.cache)
    out = machine.python("-c", WARMUP, "float32", NUMBA_CACHE_DIR=str(machine.cache)).splitlines()
    assert "kept in nowhere" in out[-2]
    assert out[-1] == "1"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_warmup_covers_every_call(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Nothing is compiled, and nothing runs: what counts is which kernels are asked for."""
    import numpy as np

    from fastbn import dtypes
    from fastbn.backends import cpu
    from fastbn.kernels import _jit

    asked: set[Any] = set()
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 is a dtype of ml_dtypes") if dtype == "bfloat16" else None
    kind = np.dtype(ml_dtypes.bfloat16 if ml_dtypes else dtype)
    assert dtypes.supported(kind)
    monkeypatch.setattr(
        _jit.Kernel, "compiled", lambda kernel, kind, form: asked.add((kernel.name, kind, form)) or (lambda *arguments: None)
    )
    assert len(list(cpu.warmup([kind]))) > len(_jit.KERNELS)
    warm = asked.copy()
    asked.clear()
    with np.errstate(all="ignore"):  # results are whatever the memory held
        for shape in ((8, 4), (3000, 40), (300, 300), (4, 3, 5, 5), (32, 64, 7, 7), (2, 2, 300, 300), (4, 64, 64, 64), (4, 20, 30, 30)):
            for last in (False, True):
                x = np.ones(shape, kind)
                x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1) if last else x
                layer = fastbn.BatchNorm(shape[1], dtype=np.float64 if kind.itemsize == 8 else np.float32)
                layer.backward(layer(x))
                layer.eval().backward(layer(x))
                m = fastbn.moments(x)
                fastbn.batch_norm(x)
                fastbn.batch_norm_backward(x, x, m)
                fastbn.batch_norm(x[::2, ::-1])
        for dims in ((3000, 40), (4, 64, 4096)):
            cpu.compact("inference", dims, dims, kind)(0, 0, 0, 0, 0, 0, 1e-5)
    assert asked - warm == set()
    assert len({name for name, *_ in asked}) == len(_jit.KERNELS)  # and each kernel is of use


def test_odd_arrays_compile_nothing() -> None:
    """Read-only, unaligned, reversed, strided and broadcast arrays run in the kernels of compact ones: one for each dtype and form."""
    import numpy as np

    from fastbn.kernels import _jit

    def everything(x: Any, dy: Any) -> None:
        y, m = fastbn.batch_norm(x)
        fastbn.batch_norm_inference(x, m.mean, m.var())
        fastbn.batch_norm_backward(dy, x, m)
        fastbn.batch_norm_inference_backward(dy, x, m.mean, m.var())
        fastbn.batch_norm(x, out=np.empty((*y.shape, 2), y.dtype)[..., 0])

    def forms() -> set[Any]:
        return {(kernel.name, *key) for kernel in _jit.KERNELS for key in kernel._compiled}

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
        for odd in (frozen, shifted, x[::-1], x[:, ::-1], x[..., ::-1], np.repeat(x, 2, 0)[::2], np.broadcast_to(x[:1], shape), last[::-1]):
            everything(odd, odd)
    more = {key[1] for key in forms() - before if not key[0].startswith("statistics.")}  # on statistics, which are float64
    assert more <= {np.dtype(np.float32)}
