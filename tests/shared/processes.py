"""Scripts in processes of their own, which may hang or abort without harm to the tests."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import launch
import numba
import pytest
import scenes

PATIENCE = 600  # seconds that a script may take: five, and tenfold on a machine that is busy

compiled = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="without the JIT there are no threads")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Layer(NamedTuple):
    """What a process finds, and what it should do."""

    hide: str  # the layers whose libraries are not there
    how: str

    def variables(self) -> dict[str, str]:
        """The same, for the process."""
        return {"HIDE": self.hide, "HOW": self.how}


LAYERS = {
    "tbb": Layer("", "tbb parallel"),
    "omp": Layer("tbb", "omp serial"),
    "workqueue": Layer("tbb omp", "workqueue serial"),
}

Run = Callable[..., tuple[str, str]]  # code, layer and environment to (stdout, stderr)


def run(script: Path, code: str, environment: dict[str, str]) -> tuple[str, str]:
    """Run a script that begins as child.py; its stdout and stderr. It must end by itself, and terminate nothing."""
    body = textwrap.indent(textwrap.dedent(code), "    ")
    script.write_text(f"import child\nfrom child import *\nif __name__ == '__main__':\n{body}")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FASTBN_", "NUMBA_THREADING"))}
    clean |= launch.PLACES | {"NUMBA_NUM_THREADS": "2", "PYTHONFAULTHANDLER": "1"}
    said = script.with_suffix(".out"), script.with_suffix(".err")  # a pipe would wait for children of one that hangs
    with said[0].open("w") as out, said[1].open("w") as err:
        command = [sys.executable, "-W", "always::RuntimeWarning", str(script)]
        process = subprocess.Popen(command, env=clean | environment, stdout=out, stderr=err)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it says where every thread of it stands
        finally:
            process.wait()
    out, err = (path.read_text() for path in said)
    assert process.returncode == 0, f"{process.returncode}: {out}{err}"
    assert "Traceback" not in err, err
    assert "erminat" not in err, err
    return out, err


def play(run: Run, life: str, layer: str, **environment: str) -> None:
    """Run all scenes of a life in one process. Each must be right, and warn as often as it should."""
    acts = scenes.LIVES[life]
    _, err = run(f"import scenes; scenes.play({life!r})", layer, **environment)
    begun = re.split(r"^scene: (.*)\n", err, flags=re.MULTILINE)[1:]
    counts = dict(zip(begun[::2], map(warned, begun[1::2]), strict=True))
    assert list(counts) == [act.name for act in acts]
    assert [act for act in acts if counts[act.name] not in (act.warnings if layer != "tbb" else (0,))] == [], err
    assert ("pip install tbb" in err) == (warned(err) > 0)


def warned(stderr: str) -> int:
    """How many warnings of one thread there were."""
    return stderr.count("RuntimeWarning: fastbn runs on one thread: ")


def once(stderr: str, layer: str) -> bool:
    """Whether there was one warning, with its remedy; none where TBB is."""
    return warned(stderr) == (layer != "tbb") and ("pip install tbb" in stderr) == (layer != "tbb")
