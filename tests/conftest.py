"""What every test shares: a fresh numba cache, the hypothesis profile, the backends, and processes to run scripts in."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from shapes import BACKENDS

if TYPE_CHECKING:
    import processes

# numba's disk cache does not see edits in another file (a kernel keeps the old leaf): every run starts without one.
if os.environ.get("FASTBN_TEST_CACHE") != "keep":
    if "numba" in sys.modules:
        raise RuntimeError("numba was imported before tests/conftest.py could give it a fresh NUMBA_CACHE_DIR")
    os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="fastbn-numba-")
    atexit.register(shutil.rmtree, os.environ["NUMBA_CACHE_DIR"], ignore_errors=True)

# What runs in numba's CUDA simulator has a process of its own: see test_simulator.py.
collect_ignore = [] if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" else ["simulated"]

# A shell leaves interrupts ignored in what it starts in the background, and in all processes that this starts; some tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A first call compiles for seconds, so there is no deadline; the same examples in every run, so that a failure repeats.
settings.register_profile("fastbn", deadline=None, derandomize=True, max_examples=40, database=None, print_blob=True)
settings.load_profile("fastbn")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that serves host arrays."""
    return str(request.param)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let copies of the reference, with some functions replaced, serve as the CPU backend."""
    from fastbn import backends, ready, reference

    def install(**replaced: Callable[..., Any]) -> None:
        monkeypatch.setitem(backends._loaded, "cpu", types.SimpleNamespace(**{**vars(reference), **replaced}))
        ready._ready.cache_clear()

    yield install
    ready._ready.cache_clear()


@pytest.fixture(scope="session")
def want() -> str:
    """What child.py's call gives; the kernels that its processes need are then in their cache, serial and parallel."""
    import child

    import fastbn

    fastbn.set_num_threads(1)
    try:
        one = child.call()
    finally:
        fastbn.set_num_threads(None)
    assert child.call() == one
    return one


@pytest.fixture(params=["tbb", "omp", "workqueue"])
def layer(request: pytest.FixtureRequest) -> str:
    """The threading layer that a process of `run` finds."""
    from fastbn import pool

    if request.param == "tbb" and pool.layer() != "tbb":
        pytest.skip("TBB has no wheel for this machine")
    return str(request.param)


@pytest.fixture
def run(tmp_path: Path, want: str) -> "processes.Run":
    """A function that runs a script in a process of its own."""
    import processes

    def start(code: str, layer: str, **environment: str) -> tuple[str, str]:
        return processes.run(tmp_path / "script.py", code, {"HIDE": processes.LAYERS[layer].hide, "WANT": want} | environment)

    return start
