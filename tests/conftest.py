"""What every test shares: kernels compiled once, the hypothesis profile, backends, processes to run scripts in, turns
for what measures.

Importing it decides where kernels are kept; the hooks compile them before the first test and say at the end what a run
left out.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llvmlite.binding
import numba
import pytest
from hypothesis import HealthCheck, settings

from fastbn.cpu.kernels import cache
from tests import ROOT

for _helper in (
    "absurd",
    "launch",
    "processes",
    "published",
    "rank_checks",
    "shapes",
    "tolerances",
    "torch_pairs",
    "torch_ranks",
):
    pytest.register_assert_rewrite(_helper)
from shapes import BACKENDS  # noqa: E402 # asserts of the modules above hold under `python -O` too

if TYPE_CHECKING:
    import processes


# Kernels are kept between runs in a directory of their sources' stamp, which processes that tests start find too.
# Functions of the tests' own that are cached and compiled together with fastbn's lie there as well: numba alone would
# not see an edit of fastbn's.
OWN = ROOT / ".pytest_cache" / "kernels"


def _kernels() -> Path:
    """The directory: of the run that this one is a part of, or under the user's own, or ours; elsewhere where that
    can't be written.
    """
    if "FASTBN_TEST_KERNELS" in os.environ:
        return Path(os.environ["FASTBN_TEST_KERNELS"])
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or OWN)
    base = base if cache.writable(base) else Path(tempfile.gettempdir(), "fastbn-kernels")
    return base / cache.stamp()[:16]


KERNELS = _kernels()
KERNELS.mkdir(parents=True, exist_ok=True)
os.environ["FASTBN_TEST_KERNELS"] = os.environ["NUMBA_CACHE_DIR"] = numba.config.CACHE_DIR = str(KERNELS)

# What runs in numba's CUDA simulator has a process of its own: see cuda/test_simulator.py.
collect_ignore = [] if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" else ["cuda/simulated"]

# A shell leaves interrupts ignored in what it starts in the background, and in all processes that this starts; some
# tests send one.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A first call compiles for seconds, so there is no deadline, and a busy machine draws slowly; the same examples in
# every run, so that a failure repeats.
settings.register_profile(
    "fastbn",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    max_examples=40,
    database=None,
    print_blob=True,
)
settings.load_profile("fastbn")


# Kernels, compiled by two processes at a time: 60 to 100 s for the 59 forms of float32 and float64, once for a version
# of their sources.


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile what nearly every test needs; whoever names files or words waits for those kernels only that they use."""
    config = session.config
    chosen = not all(Path(arg).is_dir() for arg in config.args) or config.option.keyword or config.option.collectonly
    done = KERNELS / f"complete {sys.implementation.cache_tag} {llvmlite.binding.get_host_cpu_name()}"
    if hasattr(config, "workerinput") or chosen or numba.config.DISABLE_JIT or numba.config.ENABLE_CUDASIM:
        return
    os.utime(KERNELS)
    for other in OWN.glob("[0-9a-f]" * 16):
        if time.time() - other.stat().st_mtime > 7 * 24 * 3600:  # no run has used it for a week
            shutil.rmtree(other, ignore_errors=True)
    if done.exists():
        return
    print("compiling the kernels of float32 and float64, once for this version of their sources", flush=True)
    commands = [[sys.executable, "-m", "fastbn", "warmup", dtype] for dtype in ("float32", "float64")]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for command in commands]
    try:
        failed = any([process.wait() for process in started])
    finally:
        for process in started:
            process.kill()  # nothing where it has ended
    if failed:
        pytest.exit("the kernels could not be compiled: run `python -m fastbn warmup`", 1)
    done.touch()


# Tests that measure time or memory are marked `alone`: where several processes run tests, they wait until no other test
# runs.


def _lock(run: str, name: str) -> Path:
    return Path(tempfile.gettempdir(), f"fastbn-{run}.{name}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Two locks, so that who waits to be alone is not overtaken for ever: a turn, taken by all for a moment, and the
    right to run.
    """
    if not hasattr(item.config, "workerinput") or sys.platform == "win32":
        return (yield)
    import fcntl

    alone = item.get_closest_marker("alone") is not None
    turn_file, run_file = (_lock(item.config.workerinput["testrunuid"], name) for name in ("turn", "run"))
    with turn_file.open("w") as turn, run_file.open("w") as running:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(turn, fcntl.LOCK_UN)
        return (yield)


# The closing line.

_LEFT_OUT = pytest.StashKey["Counter[str]"]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin to count, and name the run before its workers start."""
    config.stash[_LEFT_OUT] = Counter()
    if not hasattr(config, "workerinput"):
        config.option.testrunuid = uuid.uuid4().hex


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count by the first of the markers that leave tests out, in the order of pyproject.toml."""
    for item in items:
        names = {marker.name for marker in item.iter_markers()}
        kind = next(
            (line.partition(":")[0] for line in item.config.getini("markers") if line.partition(":")[0] in names), None
        )
        if kind is not None:
            item.config.stash[_LEFT_OUT][kind] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells its controller; the controller, or the only process, takes the locks away."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = dict(session.config.stash[_LEFT_OUT])
        return
    for name in ("turn", "run"):
        _lock(session.config.option.testrunuid, name).unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All workers collect the same tests."""
    if counts := getattr(node, "workeroutput", {}).get("left out"):  # nothing from one that crashed
        node.config.stash[_LEFT_OUT] = Counter(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out, and how to run it."""
    counts = config.stash[_LEFT_OUT]
    if counts and not config.option.keyword and config.option.markexpr.startswith("not "):  # as pyproject.toml has it
        kinds = ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
        terminalreporter.write_line(
            f'{sum(counts.values())} tests left out ({kinds}): `pytest -m KIND` runs one kind, `pytest -m ""` all'
        )


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """PyTorch's generator begins each test alike, in whatever order: a failure repeats."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend that serves host arrays."""
    return str(request.param)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let copies of the reference, with some functions replaced, serve as the CPU backend."""
    from fastbn import backends, reference
    from fastbn.cpu.backend import Host

    def install(**replaced: Callable[..., Any]) -> None:
        passes: Any = types.SimpleNamespace(**{**vars(reference), **replaced})
        monkeypatch.setitem(backends._loaded, "cpu", Host(passes))

    return install


@pytest.fixture
def replan(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that gives constants of the schedule other values; plans made before are forgotten, and those made
    with them.
    """
    from fastbn.arguments import config
    from fastbn.backends import select
    from fastbn.cpu import passes, schedule

    host: Any = select("cpu")

    def forget() -> None:
        host._plan.cache_clear()
        passes.decided.cache_clear()

    def patch(**constants: int) -> None:
        for name, value in constants.items():
            monkeypatch.setattr(config if hasattr(config, name) else schedule, name, value)
        forget()

    yield patch
    monkeypatch.undo()
    forget()


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
    from fastbn.cpu import pool

    if request.param == "tbb" and pool.layer() != "tbb":
        pytest.skip("TBB has no wheel for this machine")
    return str(request.param)


@pytest.fixture
def run(tmp_path: Path, want: str) -> "processes.Run":
    """A function that runs a script in a process of its own."""
    import processes

    def start(code: str, layer: str, **environment: str) -> tuple[str, str]:
        return processes.run(
            tmp_path / "script.py", code, processes.LAYERS[layer].variables() | {"WANT": want} | environment
        )

    return start
