"""Compiled kernels on disk, between processes and installations, also in directories that can't be written."""

import compileall
import json
import os
import py_compile
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

import fastbn
from fastbn.cpu.kernels import cache
from tests import ROOT

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="without the JIT nothing is compiled"),
    pytest.mark.skipif(sys.platform == "win32", reason="a directory can't be sealed by its mode on Windows"),
]

SHARED = ROOT / "tests" / "shared"
PACKAGE = Path(fastbn.__file__).parent


def files(place: Path) -> set[str]:
    return {path.name for path in place.rglob("*.nb?")}


CALL = """
import json, os, sys
import unprivileged
unprivileged.drop()
import fastbn, tiny
from fastbn.cli import info
sealed = [unprivileged.sealed(place) for place in sys.argv[1:]]
compiled = tiny.compiled(os.environ.get("DTYPE", "float32"))
print(json.dumps({"file": fastbn.__file__, "sealed": sealed, "compiled": compiled, "kept": info.cache_directory()}))
"""


class Machine:
    """An installation and a home of their own."""

    suffix = ".py"  # of its modules

    def __init__(self, place: Path) -> None:
        self.site, self.home, self.cache = place / "site", place / "home", place / "cache"
        for path in (self.home, self.cache):
            path.mkdir(parents=True)
        shutil.copytree(PACKAGE, self.site / "fastbn", ignore=shutil.ignore_patterns("__pycache__"))
        self.kernels = self.site / "fastbn" / "cpu" / "kernels"
        # Where kernels are kept: without a word, and where NUMBA_CACHE_DIR names the cache.
        self.own, self.named = self.kernels / "__pycache__", self.cache / f"fastbn-{cache.stamp()[:16]}"

    def python(self, *words: str, **environment: str) -> str:
        """What a Python there prints; nothing may go to stderr."""
        own = ("FASTBN_", "NUMBA_", "XDG_", "HOME", "PYTHONPATH", "COV_", "COVERAGE")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        clean |= {"HOME": str(self.home), "PYTHONPATH": os.pathsep.join([str(self.site), str(SHARED)])}
        done = subprocess.run(
            [sys.executable, "-B", *words],
            env=clean | environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    def call(self, *sealed: Path, **environment: str) -> dict[str, Any]:
        """What one small call compiled, and where it is kept; `sealed` can't be written, or this fails."""
        said: dict[str, Any] = json.loads(self.python("-c", CALL, *map(str, sealed), **environment))
        assert said["file"] == str(self.site / "fastbn" / "__init__") + self.suffix
        assert said["sealed"] == [True] * len(sealed)
        return said


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first process keeps, to be copied."""
    machine = Machine(tmp_path_factory.mktemp("kept"))
    said = machine.call()
    assert said["compiled"] == ["double_serial"]
    assert said["kept"] == str(machine.own)
    assert len(files(machine.own)) == 2
    assert files(machine.home) == set()
    return machine.own


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


def test_the_second_process_compiles_nothing(machine: Machine, kept: Path) -> None:
    """Wherever the installation, and whatever the time of its files."""
    shutil.copytree(kept, machine.own)
    for path in machine.kernels.glob("*.py"):
        os.utime(path, (1e9, 1e9))
    assert machine.call()["compiled"] == []


def test_a_read_only_installation_keeps_kernels_in_the_home(machine: Machine, seal: Callable[..., None]) -> None:
    seal(machine.site)
    first = machine.call(machine.kernels)
    assert first["compiled"]
    assert Path(first["kept"]).is_relative_to(machine.home)
    assert machine.call(machine.kernels)["compiled"] == []


def test_a_filled_installation_is_used_read_only(machine: Machine, kept: Path, seal: Callable[..., None]) -> None:
    shutil.copytree(kept, machine.own)
    seal(machine.site, machine.home)
    again = machine.call(machine.kernels, machine.home)
    assert again["compiled"] == []
    assert again["kept"].endswith("__pycache__ (read-only)")


def test_nothing_can_be_written_at_all(machine: Machine, seal: Callable[..., None]) -> None:
    seal(machine.site, machine.home)
    said = machine.call(machine.kernels, machine.home)
    assert said["compiled"]
    assert said["kept"].startswith("nowhere: no directory can be written; set NUMBA_CACHE_DIR")


@pytest.mark.parametrize("filled", [True, False])
def test_a_read_only_cache_directory(machine: Machine, kept: Path, seal: Callable[..., None], filled: bool) -> None:
    """numba itself passes over a NUMBA_CACHE_DIR that it can't write, also where all kernels lie in it."""
    if filled:
        shutil.copytree(kept, machine.named)
    before = files(machine.cache)
    assert bool(before) == filled
    seal(machine.cache)
    said = machine.call(machine.cache, NUMBA_CACHE_DIR=str(machine.cache))
    assert bool(said["compiled"]) != filled
    assert files(machine.cache) == before
    assert files(machine.site) | files(machine.home) == set()  # a directory that is named is the only one


MOMENTS = """
import json
import numpy as np
from numba.core import event
import fastbn
x = np.arange(18000.0).reshape(1, 2, 9000)  # blocks, which `merge` merges
with event.install_recorder("numba:compile") as seen:
    m = fastbn.moments(x)
print(json.dumps([sorted({e.data["dispatcher"].py_func.__name__ for _, e in seen.buffer}), m.m2.tolist()]))
"""


def test_a_public_call_follows_an_upgrade_of_a_leaf(machine: Machine) -> None:
    """Kernels carried from this installation to another serve there until a function is edited that they contain."""
    want = fastbn.moments(np.arange(18000.0).reshape(1, 2, 9000)).m2
    machine.named.mkdir()
    for path in cache.directories()[0].glob("rows.moments_serial*.nb?"):
        shutil.copy(path, machine.named)

    def call() -> tuple[list[str], list[float]]:
        names, m2 = json.loads(machine.python("-c", MOMENTS, NUMBA_CACHE_DIR=str(machine.cache)))
        return names, m2

    assert call() == ([], want.tolist())
    leaf = machine.kernels / "welford.py"
    source = leaf.read_text()
    assert source.count("m2_a + m2_b") == 1
    leaf.write_text(source.replace("m2_a + m2_b", "2 * (m2_a + m2_b)"))
    names, m2 = call()
    assert "moments_serial" in names
    assert (np.array(m2) > 1.5 * want).all()
    assert call() == ([], m2)


def test_settings_that_change_code_have_directories_of_their_own(machine: Machine, kept: Path) -> None:
    """Checks of bounds, or code without optimization, were taken by later runs. With NUMBA_OPT=0 most can't be kept at
    all, nor need be.
    """
    shutil.copytree(kept, machine.own)
    cache = {"NUMBA_CACHE_DIR": str(machine.cache)}
    for settings in ({}, {"NUMBA_BOUNDSCHECK": "1"}, {"NUMBA_OPT": "1"}):
        assert [bool(machine.call(**cache, **settings)["compiled"]) for _ in range(2)] == [True, False]
    names, _ = json.loads(machine.python("-W", "error", "-c", MOMENTS, NUMBA_OPT="0"))
    assert "moments_serial" in names


def pack(machine: Machine, how: str) -> None:
    """Leave the installation in a zip, or as bytecode without sources, or both."""
    home = machine.site / "fastbn"
    if "bytecode" in how:
        machine.suffix = ".pyc"
        compileall.compile_dir(
            home, quiet=2, legacy=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
        for path in home.rglob("*.py"):
            path.unlink()
    if "zip" in how:
        whole = machine.site.parent / "lib.zip"
        with zipfile.ZipFile(whole, "w") as packed:
            for path in home.rglob(f"*{machine.suffix}"):
                packed.write(path, path.relative_to(machine.site))
        machine.site = whole


@pytest.mark.parametrize("how", ["zip", "zip of bytecode", "bytecode"])
def test_an_installation_without_source_files(tmp_path: Path, how: str) -> None:
    """Kernels are kept, beside it or else in the home, and follow an upgrade."""
    machine, upgraded = Machine(tmp_path), Machine(tmp_path / "next")
    leaf = upgraded.kernels / "welford.py"
    leaf.write_text(leaf.read_text().replace("m2_a + m2_b", "2 * (m2_a + m2_b)"))
    pack(machine, how), pack(upgraded, how)
    first = machine.call()
    assert first["compiled"]
    assert Path(first["kept"]).is_relative_to(machine.home if "zip" in how else machine.kernels)
    assert machine.call()["compiled"] == []
    if "zip" not in how:
        shutil.copytree(machine.own, upgraded.own)
    upgraded.home = machine.home
    assert upgraded.call()["compiled"]


WARMUP = """
import sys
from fastbn import cli
from fastbn.cpu import passes
from fastbn.cpu.kernels import jit
import tiny, unprivileged
unprivileged.drop()
sys.stderr = sys.stdout
jit.KERNELS[:] = [tiny.kernel()]  # all of them take a minute
print(cli.main(["warmup", *sys.argv[1:]]))
"""


def test_warmup_fills_a_directory_for_read_only_use(machine: Machine, seal: Callable[..., None]) -> None:
    cache = {"NUMBA_CACHE_DIR": str(machine.cache)}
    out = machine.python("-c", WARMUP, "float32", **cache).splitlines()
    assert out[0].split("  ")[-1] == "tiny.double float32 serial"
    assert out[-1] == "0"
    assert "float64" not in "".join(out)
    seal(machine.cache)
    assert machine.call(machine.cache, **cache)["compiled"] == []
    assert machine.call(machine.cache, **cache, DTYPE="float64")["compiled"] != []  # the control: it was not warmed up


def test_warmup_that_can_keep_nothing_fails(machine: Machine, seal: Callable[..., None]) -> None:
    seal(machine.cache)
    out = machine.python("-c", WARMUP, "float32", NUMBA_CACHE_DIR=str(machine.cache)).splitlines()
    said, code = out
    assert said.startswith(
        "fastbn: warmup has not begun, for kernels would be kept nowhere: no directory can be written"
    )
    assert code == "1"
