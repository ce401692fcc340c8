"""The `bench` command: right ratios and errors on the screen, as JSON and in the README; what it refuses."""

import functools
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from fastbn.cli import bench, cases, main, timing

BLOCKS = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nbehind\n" for name in ("speed", "accuracy"))


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """A bench of two small arrays on a quiet machine without PyTorch, where NumPy takes 2.5 times as long."""
    takes = itertools.cycle((1e-3, 2.5e-3))
    monkeypatch.setattr(timing, "turn", lambda call: (call(), next(takes))[1])
    monkeypatch.setattr(cases, "torch", lambda: None)
    monkeypatch.setattr(bench, "others", lambda: 0.0)
    monkeypatch.setattr(bench, "SHAPES", (((4, 3, 5, 5), True), ((16, 4), False)))
    monkeypatch.setattr(cases, "accuracy", functools.partial(cases.accuracy, (8, 4, 6, 6)))
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "README.md"
    path.write_text(BLOCKS)
    return path


def test_speed(readme, tmp_path, capsys, monkeypatch):
    words = ["bench", "--repeats", "2", "--json", str(tmp_path / "speed.json"), "--readme", str(readme)]
    assert main(words) == 0
    out, record = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    arrays = (("4x3x5x5", "last"), ("16x4", "first"))
    rows = [(shape, order, what) for shape, order in arrays for what in ("forward", "backward")]
    assert [(row["shape"], row["channels"], row["pass"]) for row in record["speed"]] == rows
    assert all(row["seconds"] == {"fastbn": 1e-3, "NumPy": 2.5e-3} for row in record["speed"])
    text, rest, date = readme.read_text(), BLOCKS.partition("old\n")[2], record["machine"]["date"]
    assert text.startswith("<!-- speed:begin -->\n| shape | channels | pass | fastbn | NumPy takes |\n| --- | ---: |")
    assert all(f"\n| {' | '.join(row)} | 1 ms | 2.5x |\n" in text for row in rows)
    assert text.endswith(f"{date}. Written by `python -m fastbn bench`.\n{rest}")
    assert out.count("2.5x") == 4
    assert "PyTorch is not installed and is left out" in out

    used = iter((0.0, 1e6))
    monkeypatch.setattr(bench, "others", lambda: next(used))
    readme.write_text(BLOCKS)
    assert main(words) == 1
    assert "repeat them on a quiet machine" in capsys.readouterr().err
    assert readme.read_text() == BLOCKS


def test_accuracy(readme, capsys, monkeypatch):
    assert main(["bench", "--accuracy", "--readme", str(readme)]) == 0
    out, text = capsys.readouterr().out, readme.read_text()
    assert text.startswith(BLOCKS.partition("accuracy:begin")[0])
    assert all(f"\n| {name} | " in text and f"\n{name} " in out for name in cases.accuracy_cases((2, 1)))
    assert max(len(line) for line in out.splitlines() if not line.startswith("wrote")) <= 80

    right = cases._fastbn
    monkeypatch.setattr(cases, "_fastbn", lambda x: tuple(np.float32(1.01) * a for a in right(x)))
    errors = {row["case"]: row["errors"]["fastbn first"] for row in cases.accuracy()}
    for case, quantity in itertools.product(("offset 0", "offset 1e6", "ramp 0..1e4"), ("var", "y")):
        assert errors[case][quantity] == pytest.approx(0.01, rel=0.05)


@pytest.mark.bench
@pytest.mark.peers
def test_pytorch_stands_beside(monkeypatch, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(bench, "SHAPES", (((4, 3, 5, 5), True),))
    monkeypatch.setattr(cases, "accuracy", functools.partial(cases.accuracy, (8, 4, 6, 6)))
    assert main(["bench", "--repeats", "1"]) == main(["bench", "--accuracy"]) == 0
    out = capsys.readouterr().out
    assert "PyTorch takes" in out
    assert "PyTorch last" in out


def test_results_that_differ_are_not_timed(readme, monkeypatch):
    monkeypatch.setattr(bench, "numpy_forward", lambda x, gamma, beta, y, axes: (x + 1,))
    monkeypatch.setattr(timing, "turn", lambda call: pytest.fail("timed a wrong result"))
    with pytest.raises(SystemExit, match="result 0 of NumPy and fastbn differ by"):
        main(["bench", "--repeats", "1"])


def test_only_what_other_processes_use_makes_a_machine_busy(monkeypatch):
    stat = SimpleNamespace(read_text=lambda: "cpu 300 20 100 7000 50 5 3 2 0 0\ncpu0 ...\n")  # of which 7050 idle
    monkeypatch.setattr(bench, "Path", lambda path: stat)
    own = SimpleNamespace(user=1.5, system=0.5)
    system = SimpleNamespace(times=lambda: own, sysconf=lambda name: 100, cpu_count=lambda: 2)
    monkeypatch.setattr(bench, "os", system)
    assert bench.others() == pytest.approx(4.3 - 2.0)
    assert bench.crowded(2.3 - 10.0, 10.0, 1) is bench.crowded(None, 1.0, 2) is None
    assert "used 1.0 of 2" in bench.crowded(2.3 - 10.0, 10.0, 2)


REFUSED = {
    "--repeats 0": "--repeats: given 0, want 1 or more",
    "--json none/x.json": "there is no directory",
    "--json loop": "leads in a circle of links",
    "--readme loop": "loop",
    "--readme none.md": "No such file",
    "--readme twice.md": "has 2 blocks from <!-- speed:begin --> to <!-- speed:end -->, want one",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_one_clear_line_before_any_work(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.md").write_text(BLOCKS * 2)
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(bench, "speed", lambda repeats: pytest.fail("worked before it looked"))
    assert main(["bench", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err[:8], err.count("\n")) == ("", "fastbn: ", 1)
    assert REFUSED[words] in err
