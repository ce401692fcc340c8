"""The `train` command: what it says, its options, and end to end."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from launch import python
from numba.core import event

from fastbn import progress
from fastbn.arguments.errors import DataError, MissingExtra
from fastbn.cli import options, train
from fastbn.cli.train import kernels, training
from fastbn.cli.train import network as nets
from fastbn.cpu.kernels import jit

from .test_data import NAMES, idx
from .test_training import toy

# The command.

Command = Callable[..., int]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `train` with these arguments in an empty directory, no terminal, whatever the environment asks of rich."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*arguments: str) -> int:
        parser = options.Parser()
        train.add_arguments(parser)
        return train.run(parser.parse_args(arguments))

    return run


SHORT = ("--steps", "60", "--hidden", "24,24")


def test_a_short_run(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*SHORT, "--plot", "curves.png") == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["curves.png"]
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    out, err = capsys.readouterr()
    assert err == ""  # no bar where there is no terminal
    lines = out.splitlines()
    assert lines[0] == "data:     scikit-learn's handwritten digits, 8 x 8 pixels: 1,347 to train on, 450 to test"
    network = "64-24-24-10 units, sigmoid, initial weights xavier"
    assert lines[1] == f"network:  {network}; the same weights and batches for both (seed 0)"
    assert lines[2] == "training: 60 steps of 60 images, sgd at rate 0.1 (over the last quarter falling to 0)"
    assert any(line.startswith("kernels:  ") for line in lines[3:5])
    assert re.search(r"^  60 +\d+\.\d % +\d+\.\d %", out, re.MULTILINE)
    assert len(re.findall(r"^  for \d+\.\d % \(9[059] % of the better\) ", out, re.MULTILINE)) == 3
    assert re.search(r"^processor seconds, checks apart +\d+\.\d +\d+\.\d", out, re.MULTILINE)
    assert len(re.findall(r"^image \d+ +\d +\d \(\d+ %\) +\d \(\d+ %\)", out, re.MULTILINE)) == train.EXAMPLES
    assert re.search(r"^With batch normalization: .*\d+\.\d % at the end", lines[-3])
    assert re.search(r"^Without: .*\d+\.\d % at the end", lines[-2])
    assert lines[-1] == f"plot of both curves: {Path.cwd() / 'curves.png'}"
    assert "\x1b" not in out and "\N{HORIZONTAL ELLIPSIS}" not in out and max(map(len, lines[5:-1])) <= 100


def test_what_compiles_is_said_before_it_does(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a line follows every ten seconds, here every 0.02."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    with kernels.announced():
        for done in (1, 2):
            with event.trigger_event("numba:compile"):
                assert (
                    capfd.readouterr().out
                    == "kernels:  compiling what these shapes need, once; up to a minute or two ...\n" * (done == 1)
                )
                deadline, err = time.monotonic() + 10, ""
                while f"compiling: 0 s, {done - 1} functions\n" not in err and time.monotonic() < deadline:
                    time.sleep(0.01)
                    err += capfd.readouterr().err
                assert f"compiling: 0 s, {done - 1} functions\n" in err
    assert re.fullmatch(r"kernels:  ready after 0\.\d s\n", capfd.readouterr().out)
    with kernels.announced():
        pass
    assert capfd.readouterr() == ("kernels:  there already, nothing to compile\n", "")


@pytest.mark.parametrize("words", [(), ("--batch", "512", "--hidden", "10"), ("--batch", "2", "--hidden", "3,200")])
def test_every_kernel_is_called_before_the_clocks_start(
    command: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """So that nothing is left to compile; and all are serial, which is less to compile."""
    called: set[tuple[str, Any, bool]] = set()
    before: set[tuple[str, Any, bool]] = set()
    compiled, train_both = jit.Kernel.compiled, train._train_both
    monkeypatch.setattr(
        jit.Kernel,
        "compiled",
        lambda kernel, dtype, form: (called.add((kernel.name, dtype, bool(form))), compiled(kernel, dtype, form))[1],
    )
    monkeypatch.setattr(train, "_train_both", lambda *given: (before.update(called), train_both(*given))[1])
    assert command("--steps", "2", *words) == 0
    assert called == before and len(called) > 5
    assert not any(parallel for *_, parallel in called)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="2000 steps take minutes without compiled kernels")
def test_the_default_run_shows_what_batch_normalization_does(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    histories: dict[bool, training.History] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.report, "rows", lambda given, *_: (histories.update(given), [])[1])
        assert command() == 0
    assert Path("fastbn-train.png").stat().st_size > 10_000
    ours, twin = histories[True], histories[False]
    assert ours.steps[-1] == twin.steps[-1] == 2000
    assert ours.accuracy[-1] > 0.97 and 0.8 < twin.accuracy[-1] < 0.95  # it learns too, only slower
    assert (ours.first(0.85) or 0) * 5 < (twin.first(0.85) or 0)
    out = capsys.readouterr().out
    assert "\nWith batch normalization: reached " in out and "\nWithout: slower, " in out


def test_both_networks_get_the_same_weights_and_batches(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
    real = training.train

    def spy(
        network: nets.Network,
        optimizer: training.Optimizer,
        rate: float,
        inputs: training.Inputs,
        chosen: Any,
        steps: int,
        *report: Any,
    ) -> Any:
        batches = list(chosen)
        seen.append(([layer.weight.copy() for layer in network.layers if isinstance(layer, nets.Linear)], batches))
        return real(network, optimizer, rate, inputs, iter(batches), steps, *report)

    monkeypatch.setattr(training, "train", spy)
    assert command(*SHORT, "--seed", "3", "--optimizer", "adam", "--activation", "relu") == 0
    _, ours, twin = seen  # the first one compiles the kernels
    for a, b in zip(ours[0] + ours[1], twin[0] + twin[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(ours[1]) == 60


def test_progress_in_a_terminal_without_colour(
    command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert command(*SHORT) == 0
    out, err = capsys.readouterr()
    assert "60/60" in err and "with batch normalization" in err and "% right" in err
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", out + err)  # foreground colours


@pytest.fixture
def idx_directory(tmp_path: Path) -> Path:
    data, directory = toy(), tmp_path / "idx"
    directory.mkdir()
    images, tests = (rows.reshape(-1, 2, 2) for rows in (data.images, data.test_images))
    for name, array in zip(NAMES, (images, data.labels, tests, data.test_labels), strict=True):
        (directory / name).write_bytes(idx(array))
    return directory


@pytest.mark.parametrize("kind", ["svg", "PDF"])
def test_idx_files_and_other_kinds_of_plot(
    command: Command, idx_directory: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SHORT, "--data", str(idx_directory), "--batch", "60", "--plot", f"curves.{kind}") == 0
    assert Path(f"curves.{kind}").read_bytes().startswith({"svg": b"<?xml", "PDF": b"%PDF"}[kind])
    out = capsys.readouterr().out
    assert out.startswith(
        f"data:     {idx_directory}, 2 x 2 pixels: 60 to train on, 24 to test\nnetwork:  4-24-24-3 units"
    )


def test_an_old_plot_is_replaced(command: Command) -> None:
    Path("old.png").write_bytes(b"old")
    assert command(*SHORT, "--plot", "old.png") == 0
    assert Path("old.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1"], "--batch: given 1, want 2 (a variance needs two images) to 1347, the training images"),
        (["--batch", "1348"], "--batch: given 1348, want 2 (a variance needs two images) to 1347, the training images"),
        (["--lr", "-0.1"], "--lr: given -0.1, want a number above 0, like 0.1"),
        (["--lr", "0"], "--lr: given 0, want a number above 0, like 0.1"),
        (["--lr", "nan"], "--lr: given nan, want a number above 0, like 0.1"),
        (["--lr", "inf"], "--lr: given inf, want a number above 0, like 0.1"),
        (["--lr", "abc"], "--lr: given 'abc', want a number above 0, like 0.1"),
        (["--init", "foo"], "--init: given 'foo', want xavier, he, or a number above 0, like 0.03"),
        (["--init", "0"], "--init: given 0, want xavier, he, or a number above 0, like 0.03"),
        (["--steps", "0"], "--steps: given 0, want a whole number, 1 or more"),
        (["--steps", "x"], "--steps: given 'x', want a whole number, 1 or more"),
        (["--batch", "1.5"], "--batch: given '1.5', want a whole number"),
        (["--seed", "-1"], "--seed: given -1, want a whole number, 0 or more"),
        *((["--hidden", text], f"--hidden: given '{text}', want whole numbers above 0 with commas between them, like "
                               f"100,100,100")
          for text in ("0,abc", "100,0", "", "10,,10", "1.5")),
        (["--plot", "p.bmp"], "--plot: given 'p.bmp', want a file name that ends in .png, .pdf or .svg"),
        (["--plot", "png"], "--plot: given 'png', want a file name that ends in .png, .pdf or .svg"),
        (["--plot", "none/p.png"], "--plot: {cwd}/none/p.png: there is no directory {cwd}/none; make it first"),
        (["--plot", ".."], "--plot: given '..', want a file name that ends in .png, .pdf or .svg"),
        (["--data", "none"], "--data: none is not there; want a directory of IDX files"),
    ],
)  # fmt: skip
def test_bad_options(command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message.format(cwd=Path.cwd()))}$"):
        command(*arguments)
    assert capsys.readouterr() == ("", "")
    assert list(Path.cwd().iterdir()) == []


def test_a_plot_that_is_a_directory(command: Command) -> None:
    Path("p.png").mkdir()
    with pytest.raises(DataError, match=r"^--plot: .*p\.png: is not a file and can't be replaced; give another name$"):
        command("--plot", "p.png")


def test_a_directory_that_takes_no_files(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Iterator[None]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train.files, "replacing", refuse)  # permissions don't stop root
    with pytest.raises(
        DataError, match=rf"^--plot: {re.escape(str(Path.cwd()))}/p\.png can't be written: Permission denied$"
    ):
        command("--plot", "p.png")


@pytest.mark.parametrize("kept", [None, b"old"])
def test_an_interrupt_leaves_nothing_half_written(
    command: Command, monkeypatch: pytest.MonkeyPatch, kept: bytes | None
) -> None:
    if kept:
        Path("p.png").write_bytes(kept)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.report, "figure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command(*SHORT, "--plot", "p.png")
    assert {path.name: path.read_bytes() for path in Path.cwd().iterdir()} == ({"p.png": kept} if kept else {})


def test_a_plot_is_in_its_place_before_a_terminal_can_refuse_the_table(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.progress, "table", lambda *_: open("/none/such"))
    with pytest.raises(OSError, match="none"):
        command(*SHORT, "--plot", "p.png")
    assert [path.name for path in Path.cwd().iterdir()] == ["p.png"]


@pytest.mark.parametrize("package", ["rich", "matplotlib", "sklearn", "threadpoolctl"])
def test_a_missing_extra_is_said(command: Command, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = "train needs rich, matplotlib, scikit-learn and threadpoolctl: pip install 'fastbn[demo]'"
    with pytest.raises(MissingExtra, match=f"^{re.escape(message)}$"):
        command(*SHORT)
    assert list(Path.cwd().iterdir()) == []


def test_the_options_need_none_of_the_extra() -> None:
    code = (
        "import argparse, sys\n"
        "for name in ('rich', 'matplotlib', 'sklearn', 'threadpoolctl'): sys.modules[name] = None\n"
        "from fastbn.cli import train\n"
        "train.add_arguments(parser := argparse.ArgumentParser())\n"
        "print(parser.format_help())"
    )
    shown = python("-c", code)
    names = ("optimizer", "activation", "batch", "steps", "lr", "init", "hidden", "seed", "plot", "data")
    assert all(f"  --{option} " in shown for option in names)
