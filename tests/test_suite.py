"""What conftest.py promises of a run: that what measures is alone, that what is left out is said."""

import itertools
import os
import subprocess
import sys

import pytest

from tests import ROOT

SOME = """
import os, time
from pathlib import Path
import pytest

def work(name, seconds):
    begin = time.monotonic()
    time.sleep(seconds)
    with Path(os.environ["INTERVALS"]).open("a") as file:
        file.write(f"{name} {begin} {time.monotonic()}\\n")

@pytest.mark.parametrize("n", range(12))
def test_beside(n):
    work("beside", 0.3)

@pytest.mark.alone
@pytest.mark.parametrize("n", range(4))
def test_alone(n):
    work("alone", 0.05)

@pytest.mark.full
@pytest.mark.parametrize("n", range(3))
def test_full(n):
    work("full", 0)

@pytest.mark.process
@pytest.mark.full
def test_process():
    work("process", 0)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[str, float, float]]]:
    """What a run of two workers said, and when its tests ran."""
    place = tmp_path_factory.mktemp("suite")
    (place / "test_some.py").write_text(SOME)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTEST_ADDOPTS": "", "INTERVALS": str(place / "intervals"), "PYTHONPATH": places}
    done = subprocess.run(
        [*command, str(place)], env=environment, capture_output=True, text=True, check=False, cwd=place
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in (place / "intervals").read_text().splitlines()]
    return done.stdout, [(name, float(begin), float(end)) for name, begin, end in lines]


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="file locks are of POSIX")
def test_what_measures_runs_alone(ran: tuple[str, list[tuple[str, float, float]]]) -> None:
    intervals = ran[1]
    assert [name for name, *_ in intervals].count("alone") == 4
    together = {
        frozenset((a, b))
        for (a, begin, end), (b, start, stop) in itertools.combinations(intervals, 2)
        if begin < stop and start < end
    }
    assert together == {frozenset(("beside",))}  # the others do run side by side, two alone ones do not


@pytest.mark.process
def test_the_closing_line_says_what_was_left_out(ran: tuple[str, list[tuple[str, float, float]]]) -> None:
    *_, left_out, last = ran[0].strip().splitlines()
    assert left_out == '4 tests left out (full 3, process 1): `pytest -m KIND` runs one kind, `pytest -m ""` all'
    assert "16 passed" in last
