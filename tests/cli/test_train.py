"""The `train` command: what it says, its options, and end to end."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from launch import python

from fastbn.arguments.errors import DataError, MissingExtra
from fastbn.cli import train
from fastbn.cli.train import network as nets
from fastbn.cli.train import training

from .test_data import NAMES, idx
from .test_training import toy

# What is said.


def test_a_rate_far_too_high_is_said_not_warned_of() -> None:
    inputs, network = training.Inputs(toy()), nets.Network(nets.initial_weights((4, 12, 3), 0.03, 0), "relu", None)
    history = training.train(network, training.Optimizer(), 1e30, inputs, training.batches(60, 20, 40, 0), 40)
    sentence = train._summary({True: history, False: training.History(24, [0, 40], [8, 24])}, 40, 1 / 3)[0]
    assert sentence.endswith(
        f"diverged at step {history.diverged} (the loss is no longer a number; try a smaller --lr)."
    )
    assert train._answer(network, inputs.test[:1]) == "diverged"
    cells = [
        row[1:] for row in train._rows({True: history, False: training.History(24, [0, 1, 2, 40], [8, 9, 9, 24])}, 40)
    ]
    assert ("diverged", "100.0 %") in cells


@pytest.mark.parametrize(
    ("ours", "twin", "want"),
    [
        ([45, 441, 444], [45, 46, 46], ["98 % of the test images right after 50 steps, 98.7 % at the end",
                                        "never 98 % within 100 steps, 10.2 % at the end, near chance (10.2 %)"]),
        ([45, 430, 440], [45, 442, 443], ["never 98 % within 100 steps, 97.8 % at the end",
                                          "98 % of the test images right after 50 steps, 98.4 % at the end"]),
        ([45, 430, 441], [45, 442, 430], ["98 % of the test images right after 100 steps, 98.0 % at the end",
                                          "98 % of the test images right after 50 steps, 95.6 % at the end"]),
        ([45, 200, 210], [45, 40, 50], ["46.7 % at the end", "11.1 % at the end, near chance (10.2 %)"]),
    ],
    ids=["ours", "twin", "both", "neither"],
)  # fmt: skip
def test_summary_follows_the_numbers(ours: list[int], twin: list[int], want: list[str]) -> None:
    histories = {True: training.History(450, [0, 50, 100], ours), False: training.History(450, [0, 50, 100], twin)}
    found = train._summary(histories, 100, 46 / 450)
    assert found == [f"With batch normalization: {want[0]}.", f"Without: {want[1]}."]


def test_table_rows() -> None:
    steps = list(range(0, 2001, 50))
    ours, twin = training.History(450, steps, [45] + [441] * 40, 1.26), training.History(450, steps, [45] * 41, 0.5)
    rows = train._rows({True: ours, False: twin}, 2000)
    assert [row[0].strip() for row in rows[1:14]] == [str(n) for n in (0, 50, 100, *range(200, 2001, 200))]
    assert rows[2] == ("  50", "98.0 %", "10.0 %")
    assert ("  for 98 %", "50", "not within 2000") in rows
    assert ("seconds of training", "1.3", "0.5") in rows


def test_plot_shows_both_curves_and_says_what_they_are() -> None:
    histories = {True: training.History(24, [0, 10], [8, 24]), False: training.History(24, [0, 10], [8, 9])}
    (axes,) = train._figure(histories, toy()).axes
    assert (
        axes.get_xlabel() == "training steps" and axes.get_ylabel() == "test accuracy (%)" and axes.get_title() == "toy"
    )
    ours, twin, _ = axes.get_lines()
    np.testing.assert_allclose(ours.get_xydata(), [[0, 100 / 3], [10, 100]])
    np.testing.assert_allclose(twin.get_xydata(), [[0, 100 / 3], [10, 37.5]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "with batch normalization",
        "without",
        "chance",
    ]


@pytest.mark.parametrize("name", ["\udcff", "a $x_{$", "\u6570\u5b57", "two\nlines"])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_plot_takes_any_name_of_a_directory(name: str, kind: str, tmp_path: Path) -> None:
    """No text, no formula, no letters that its font has: the training is over when it is drawn, and warnings may be
    errors.
    """
    histories = {True: training.History(24, [0, 10], [8, 24]), False: training.History(24, [0, 10], [8, 9])}
    with (tmp_path / "p").open("wb") as file:
        train._save(train._figure(histories, toy()._replace(name=name)), file, kind)
    assert (tmp_path / "p").stat().st_size > 1000


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
        parser = argparse.ArgumentParser()
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
    assert lines[0] == "data:     scikit-learn's handwritten digits, 8 x 8 pixels: 1347 to train on, 450 to test"
    assert lines[1] == "network:  64-24-24-10 units, sigmoid; same initial weights and batches for both (seed 0)"
    assert lines[2] == "training: 60 steps of 60 images, sgd at rate 0.1 (over the last quarter falling to 0)"
    assert re.fullmatch(
        r"kernels:  ready after \d+\.\d s \(the first run compiles them, later ones find them compiled\)", lines[3]
    )
    assert re.search(r"^  60 +\d+\.\d % +\d+\.\d %", out, re.MULTILINE)
    assert re.search(r"^  for 98 % +not within 60 +not within 60", out, re.MULTILINE)
    assert re.search(r"^seconds of training +\d+\.\d +\d+\.\d", out, re.MULTILINE)
    assert len(re.findall(r"^image \d+ +\d +\d \(\d+ %\) +\d \(\d+ %\)", out, re.MULTILINE)) == train.EXAMPLES
    assert re.search(r"^With batch normalization: .*\d+\.\d % at the end", lines[-3])
    assert re.search(r"^Without: .*\d+\.\d % at the end", lines[-2])
    assert lines[-1] == f"plot of both curves: {Path.cwd() / 'curves.png'}"
    assert "\x1b" not in out and "\N{HORIZONTAL ELLIPSIS}" not in out and max(map(len, lines[5:-1])) <= 100


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="2000 steps take minutes without compiled kernels")
def test_the_default_run_shows_what_batch_normalization_does(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    histories: dict[bool, training.History] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_rows", lambda given, steps: (histories.update(given), [])[1])
        assert command() == 0
    assert Path("fastbn-train.png").stat().st_size > 10_000
    assert histories[True].steps[-1] == 2000 and histories[True].first(0.98) is not None
    assert histories[True].accuracy[-1] > 0.975 and histories[False].accuracy[-1] < 0.95
    assert "98 % of the test images right after" in capsys.readouterr().out


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
    assert "98 % of the test images right after" in out


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
        (["--steps", "0"], "--steps: given 0, want 1 or more"),
        (["--seed", "-1"], "--seed: given -1, want 0 or more"),
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

    monkeypatch.setattr(train, "_figure", interrupt)
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
    options = ("optimizer", "activation", "batch", "steps", "lr", "hidden", "seed", "plot", "data")
    assert all(f"  --{option} " in shown for option in options)
