"""Scripts in processes of their own, which may hang or abort without harm to the tests."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numba
import pytest

import fastbn

HERE = Path(__file__).parent

compiled = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="without the JIT there are no threads")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Layer(NamedTuple):
    """What a process finds, and what it should do."""

    hide: str  # the layers whose libraries are not there
    how: str


LAYERS = {"tbb": Layer("", "tbb parallel"), "omp": Layer("tbb", "omp serial"), "workqueue": Layer("tbb omp", "workqueue serial")}

Run = Callable[..., tuple[str, str]]  # code, layer and environment to (stdout, stderr)


def run(script: Path, code: str, environment: dict[str, str]) -> tuple[str, str]:
    """Run a script that begins as child.py; its stdout and stderr. It must end by itself, with nobody's word about termination."""
    body = textwrap.indent(textwrap.dedent(code), "    ")
    script.write_text(f"import child\nfrom child import *\nif __name__ == '__main__':\n{body}")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTBN_", "NUMBA_THREADING"))}
    places = [str(HERE), str(Path(fastbn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "always::RuntimeWarning", str(script)],
        env=clean | {"NUMBA_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(places)} | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    assert "erminat" not in done.stderr
    return done.stdout, done.stderr


def warned(stderr: str) -> int:
    """How many warnings of one thread there were."""
    return stderr.count("RuntimeWarning: fastbn runs on one thread: ")


def once(stderr: str, layer: str) -> bool:
    """Whether there was one warning, with its remedy; none where TBB is."""
    return warned(stderr) == (layer != "tbb") and ("pip install tbb" in stderr) == (layer != "tbb")
