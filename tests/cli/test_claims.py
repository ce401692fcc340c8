"""The `claims` command: end to end on small data, what it keeps and goes on from, what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbn.arguments.errors import MissingExtra
from fastbn.cli import claims, main
from fastbn.cli.claims import processes, report
from fastbn.cli.claims.runs import Run
from fastbn.cli.train.data import Dataset

from .test_data import NAMES, idx
from .test_training import toy

Command = Callable[..., int]


def write_idx(directory: Path, data: Dataset) -> Path:
    directory.mkdir()
    images, tests = (rows.reshape(-1, *data.pixels) for rows in (data.images, data.test_images))
    for name, array in zip(NAMES, (images, data.labels, tests, data.test_labels), strict=True):
        (directory / name).write_bytes(idx(array))
    return directory


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `claims` with runs of 4 steps, on IDX files in ./idx, in an empty directory that is no terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write_idx(tmp_path / "idx", toy())
    monkeypatch.setattr(claims, "STEPS", 4)
    monkeypatch.setattr(claims, "QUICK_STEPS", 3)
    return lambda *words: main(["claims", "--data", "idx", *words])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that are made from now on: in this process, for it is what becomes of them that is asked for."""
    found: list[Run] = []

    def results(runs: list[Run], data: Dataset, done: Callable[[int], object]) -> Iterator[tuple[Run, dict[str, Any]]]:
        from fastbn.cli.train import training

        inputs = training.Inputs(data)
        for run in runs:
            found.append(run)
            yield run, processes.measured(run, inputs, lambda step: None)
            done(sum(run.steps for run in found))

    monkeypatch.setattr(processes, "results", results)
    return found


def kept(out: str = "fastbn-claims") -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(Path(out, "claims.json").read_text())["runs"]
    return runs


def test_the_whole_in_processes_of_its_own(command: Command, capfd: pytest.CaptureFixture[str]) -> None:
    assert command() == 0
    out = Path("fastbn-claims")
    assert {path.name for path in out.iterdir()} == {
        "claims.md",
        "claims.json",
        *(f"{name}.png" for name in claims.CLAIMS),
    }
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in out.glob("*.png"))
    runs = {Run(**entry["run"]): entry["result"] for entry in kept()}
    assert len(runs) == len(kept()) > 100
    page = (out / "claims.md").read_text()
    assert page.startswith(
        "# What batch normalization does, on idx\n\n60 images of 2 x 2 pixels to train on, 24 to test"
    )
    for name, claim in claims.CLAIMS.items():
        section = page.partition(f"\n## {name}: {claim.sentence}\n")[2].partition("\n## ")[0]
        assert f"![{name}]({name}.png)" in section
        said = re.search(
            r"^\*\*(Holds|Holds in part|Does not hold|Undecided)\.\*\*\n\n((?:\* .*\n)+)\n(.*)$", section, re.M
        )
        assert said and said[2].count("\n") >= 3 and said[3].startswith("*The rule:* ")
        table = [line for line in section.splitlines() if line.startswith("|")]
        assert len(table) > 4 and len({line.count(" | ") for line in table}) == 1
    # what a process found is what it is
    some = next(run for run in runs if run.measure == "accuracy")
    again = processes.measured(some, claims.training.Inputs(claims.load(Path("idx"))), lambda step: None)
    assert again | {"seconds": 0} == runs[some] | {"seconds": 0}
    said, err = capfd.readouterr()
    assert said.startswith("data:     idx, 2 x 2 pixels: 60 to train on, 24 to test\n") and err == ""
    outcomes = dict(re.findall(r"^(\w+) +(holds(?: in part)?|does not hold|undecided) +[A-Z].*\.$", said, re.MULTILINE))
    assert list(outcomes) == list(claims.CLAIMS) and said.endswith(f"report:   {out / 'claims.md'}\n")
    for name, outcome in outcomes.items():
        assert re.search(rf"^\| {name} \|.*\| {outcome} \|$", page, re.MULTILINE)


def test_only_some_and_then_others(command: Command, made: list[Run]) -> None:
    assert command("--only", "test,shift") == 0
    assert [run.measure for run in made] == ["shift", "shift", "test"]
    made.clear()
    assert command("--only", "noise") == 0
    assert {run.measure for run in made} == {"noise", "gap"}
    page = Path("fastbn-claims/claims.md").read_text()
    assert re.findall(r"^## (\w+)", page, re.MULTILINE) == ["shift", "noise", "test"]  # all that is known


def test_finished_runs_are_not_made_again(
    command: Command, made: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--only", "shift") == 0 and len(made) == 2
    page, picture = (Path("fastbn-claims", name).read_bytes() for name in ("claims.md", "shift.png"))
    made.clear()
    capsys.readouterr()
    assert command("--only", "shift") == 0 and not made
    assert f"runs:     2 of 2 are there already, in {Path('fastbn-claims/claims.json')}\n" in capsys.readouterr().out
    assert [Path("fastbn-claims", name).read_bytes() for name in ("claims.md", "shift.png")] == [page, picture]
    assert len(kept()) == 2


def test_other_data_seeds_and_steps_are_other_runs_and_all_are_kept(command: Command, made: list[Run]) -> None:
    write_idx(Path("others"), toy(90, 30))
    Path("moved").symlink_to("idx")
    for words, new in (
        ((), 2),
        (("--seed", "1"), 2),
        (("--quick", "--out", "fastbn-claims"), 2),
        (("--data", "others"), 2),
        (("--data", "moved"), 0),  # the same images
        ((), 0),
    ):
        made.clear()
        assert command("--only", "shift", *words) == 0
        assert len(made) == new
    assert len(kept()) == 8


def test_runs_of_another_version_are_made_anew(
    command: Command, made: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("--only", "test") == 0
    monkeypatch.setattr(report, "MADE_BY", "0.0.0/1")
    assert command("--only", "test") == 0
    assert len(made) == len(kept()) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_what_was_done_before_an_end_is_kept(
    command: Command, made: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any
) -> None:
    results = processes.results

    def some(*given: Any) -> Iterator[Any]:
        found = results(*given)
        for _ in range(3):
            yield next(found)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(processes, "results", some)
        assert command("--only", "noise") == (130 if error is KeyboardInterrupt else 2)
    assert len(kept()) == 3 and {path.name for path in Path("fastbn-claims").iterdir()} == {"claims.json"}
    err = capsys.readouterr().err.splitlines()
    assert (
        err[0]
        == f"fastbn: 3 of 10 runs are kept in {Path('fastbn-claims/claims.json')}: the same command goes on there"
    )
    assert err[1:] == ["fastbn: interrupted" if error is KeyboardInterrupt else "fastbn: no space left"]
    first = list(made)
    made.clear()
    assert command("--only", "noise") == 0
    assert len(made) == 7 and not set(first[:3]) & set(made) and len(kept()) == 10


# In processes.


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="a terminal's Ctrl-C is sent in another way")
def test_ctrl_c_of_a_terminal_leaves_no_process_and_what_was_done(command: Command) -> None:
    """It reaches every process of the group."""
    words = [sys.executable, "-m", "fastbn", "claims", "--quick", "--out", "fastbn-claims"]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not Path("fastbn-claims/claims.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    lines = [line for line in err.splitlines() if not re.match(r"(steps|compiling): \d+ s", line)]
    assert re.fullmatch(r"fastbn: \d+ of \d+ runs are kept in .*", lines[0]) and lines[1:] == ["fastbn: interrupted"]
    with pytest.raises(ProcessLookupError):  # nobody is left in the group
        for _ in range(500):
            os.killpg(started.pid, 0)
            time.sleep(0.01)
    assert 0 < len(kept()) < 131


@pytest.mark.process
@pytest.mark.skipif(sys.platform == "win32", reason="a terminal's Ctrl-C is sent in another way")
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_ctrl_c_while_processes_start_is_not_lost(command: Command, seconds: float) -> None:
    """Sent when a first one is there; each is held up by its imports."""
    code = (
        "import multiprocessing, os, signal, threading, time\n"
        "from fastbn.cli import main\n"
        "def send():\n"
        "    while not multiprocessing.active_children(): time.sleep(0.001)\n"
        f"    time.sleep({seconds})\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "if __name__ == '__main__':\n"
        "    threading.Thread(target=send, daemon=True).start()\n"
        "    raise SystemExit(main(['claims', '--only', 'shift']))\n"
    )
    Path("run.py").write_text(code)
    words = [sys.executable, "run.py"]
    started = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _, err = started.communicate(timeout=300)
    lines = [line for line in err.splitlines() if not re.match(r"(steps|compiling): \d+ s", line)]
    assert started.returncode == 130 and lines[1:] == ["fastbn: interrupted"], err
    assert lines[0].startswith("fastbn: 0 of 2 runs are kept in ")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_process_that_is_ended_from_outside_is_said() -> None:
    runs = [Run("accuracy", "sigmoid", "xavier", 0.1, True, 10**9, 0)] * 2

    def done(steps: int) -> None:
        if steps:
            os.kill(processes.multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    with pytest.raises(OSError, match=r"was ended by signal 9 \(by the system, where memory ran out\?\)"):
        next(processes.results(runs, toy(), done))
    assert not processes.multiprocessing.active_children()


def test_an_error_in_a_process_is_the_error_here() -> None:
    with pytest.raises(KeyError, match="none such"):
        list(processes.results([Run("none such", "sigmoid", 1, 0.1, True, 1, 0)], toy(), lambda steps: None))
    assert not processes.multiprocessing.active_children()


def test_a_loop_that_is_left_ends_its_processes() -> None:
    run = Run("accuracy", "sigmoid", "xavier", 0.1, True, 2, 0, batch=20)
    seen: list[int] = []
    found = processes.results([run, run._replace(steps=10**9)], toy(), seen.append)
    assert next(found)[0] == run and len(processes.multiprocessing.active_children()) == 2
    found.close()  # type: ignore[attr-defined]
    assert not processes.multiprocessing.active_children()


# Refused before any work.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--only", "rat"),
            "--only: given 'rat', want some of rate, init, depth, shift, noise, test, with commas between them",
        ),
        (
            ("--only", ""),
            "--only: given '', want some of rate, init, depth, shift, noise, test, with commas between them",
        ),
        (("--seed", "-1"), "--seed: given -1, want a whole number, 0 or more"),
        (("--seed", "x"), "--seed: given 'x', want a whole number, 0 or more"),
        (("--data", "none"), "--data: none is not there; want a directory of IDX files"),
        (("--out", "none/out"), "--out: none/out can't be written: No such file or directory"),
        (("--out", "file"), "--out: file can't be written: File exists"),
        (("--data", "few"), "--data: few has 59 training images, want 60 or more, a batch"),
        (("--data", "one"), "--data: one has one test image, want two or more: one has no variance"),
    ],
)
def test_bad_options(
    command: Command, made: list[Run], words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    write_idx(Path("few"), toy(59, 24))
    write_idx(Path("one"), toy(60, 1))
    before = sorted(Path.cwd().iterdir())
    assert command(*words) == 2
    assert capsys.readouterr() == ("", f"fastbn: {message}\n")
    assert sorted(Path.cwd().iterdir()) == before and not made


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"runs": 1}', '{"runs": [{"run": {"measure": "x"}}]}', '{"runs": [1']
)
def test_a_file_that_holds_no_runs_is_left_alone(
    command: Command, made: list[Run], content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("fastbn-claims/claims.json")
    path.parent.mkdir()
    path.write_text(content)
    assert command() == 2
    line = capsys.readouterr().err
    assert line.startswith(f"fastbn: --out: {path} holds no runs of this command (") and line.count("\n") == 1
    assert line.endswith("; give another directory, or remove the file\n")
    assert path.read_text() == content and not made


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["run"].update(init=[1]),
        lambda entry: entry["result"].update(seconds="1"),
        lambda entry: entry["result"].pop("layers"),
        lambda entry: entry["result"].update(accuracy="x"),
        lambda entry: entry["result"].update(steps=[1]),
    ],
)
def test_a_file_that_was_changed_is_named(
    command: Command, made: list[Run], change: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--only", "shift") == 0
    path = Path("fastbn-claims/claims.json")
    entries = kept()
    change(entries[0])
    path.write_text(json.dumps({"runs": entries}))
    capsys.readouterr()
    assert command("--only", "shift") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastbn: --out: {path} holds ") and err.count("\n") == 1 and "remove the file\n" in err


def test_two_commands_at_once_lose_nothing(command: Command, made: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """One ends while the other is at its first run."""
    results = processes.results

    def beside(*given: Any) -> Iterator[Any]:
        with monkeypatch.context() as patch:
            patch.setattr(processes, "results", results)
            assert command("--only", "test") == 0
        yield from results(*given)

    with monkeypatch.context() as patch:
        patch.setattr(processes, "results", beside)
        assert command("--only", "shift") == 0
    assert len(kept()) == 3 and re.findall(r"^## (\w+)", Path("fastbn-claims/claims.md").read_text(), re.M) == [
        "shift",
        "test",
    ]


def test_where_kernels_are_kept_nowhere_it_is_said(
    command: Command, made: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims.info, "cache_directory", lambda: "nowhere (/cache can't be written)")
    assert command("--only", "shift") == 0
    line = "kernels:  kept nowhere (/cache can't be written): 2 processes compile them anew, too\n"
    assert line in capsys.readouterr().out


def test_a_picture_that_can_not_be_replaced_is_said_before_the_runs(
    command: Command, made: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("fastbn-claims/rate.png").mkdir(parents=True)
    assert command() == 2 and not made
    assert re.match(
        r"fastbn: --out: .*rate\.png: is not a file and can't be replaced; give another name\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn", "threadpoolctl"])
def test_a_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch, package: str, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    message = "claims needs rich, matplotlib, scikit-learn and threadpoolctl: pip install 'fastbn[demo]'"
    with pytest.raises(MissingExtra, match=f"^{re.escape(message)}$"):
        main(["--traceback", "claims"])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("name", ["\udcff", "a $x_{$|", "\u6570\u5b57", "two\nlines"])
def test_data_in_a_directory_of_any_name(command: Command, made: list[Run], name: str) -> None:
    write_idx(Path(name), toy())
    assert command("--only", "shift", "--data", name) == 0
    first = Path("fastbn-claims/claims.md").read_text().partition("\n\n")[0]
    assert first.startswith("# What batch normalization does, on ") and "\n" not in first


def test_images_without_a_difference_end_in_a_report(command: Command, made: list[Run]) -> None:
    """Every pixel the same: nothing can be learned, and nothing fails."""
    data = toy()
    write_idx(
        Path("blank"), data._replace(images=np.full_like(data.images, 7), test_images=np.full_like(data.test_images, 7))
    )
    assert command("--data", "blank") == 0
    for name in ("rate", "init", "depth"):
        assert f"| {name} | {claims.CLAIMS[name].sentence} | holds |" not in Path("fastbn-claims/claims.md").read_text()
