"""The `bench` command: its tables, its README blocks, and what it refuses to time."""

import functools
import json
import sys

import numpy as np
import pytest
from test_cli import refused

from fastbn import cases, config, quickbench
from fastbn.cli import main


@pytest.fixture
def tiny(monkeypatch):
    """A bench of two small arrays, on a machine that counts as quiet."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(quickbench, "SHAPES", (((4, 3, 5, 5), True), ((16, 4), False)))
    monkeypatch.setattr(quickbench, "others", lambda: 0.0)
    monkeypatch.setattr(cases, "accuracy", functools.partial(cases.accuracy, (8, 4, 6, 6)))


README = "# Title\n\n<!-- speed:begin -->\nold\n<!-- speed:end -->\nbetween\n<!-- accuracy:begin -->\n<!-- accuracy:end -->\nlast line\n"


def test_bench_speed(tiny, tmp_path, capsys):
    readme, numbers = tmp_path / "README.md", tmp_path / "speed.json"
    readme.write_text(README)
    assert main(["bench", "--repeats", "2", "--json", str(numbers), "--readme", str(readme)]) == 0
    out = capsys.readouterr().out
    record = json.loads(numbers.read_text())
    assert [(row["shape"], row["channels"], row["pass"]) for row in record["speed"]] == [
        ("4x3x5x5", "last", "forward"), ("4x3x5x5", "last", "backward"), ("16x4", "first", "forward"), ("16x4", "first", "backward"),
    ]  # fmt: skip
    assert all(0 < s < 1 for row in record["speed"] for s in row["seconds"].values())
    assert set(record["speed"][0]["seconds"]) >= {"fastbn", "NumPy"}
    assert record["machine"]["numpy"] == np.__version__
    text = readme.read_text()
    assert text.startswith("# Title\n\n<!-- speed:begin -->\n| shape | channels | pass | fastbn | NumPy takes |")
    assert text.endswith("<!-- speed:end -->\nbetween\n<!-- accuracy:begin -->\n<!-- accuracy:end -->\nlast line\n")
    assert "old" not in text
    assert text.count("\n| ") == 1 + 1 + 4
    assert record["machine"]["date"] in text
    ratio = record["speed"][0]["seconds"]["NumPy"] / record["speed"][0]["seconds"]["fastbn"]
    assert f"{ratio:.1f}x" in text
    assert f"{ratio:.1f}x" in out


def test_bench_accuracy(tiny, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert main(["bench", "--accuracy", "--readme", str(readme)]) == 0
    out = capsys.readouterr().out
    text = readme.read_text()
    assert "<!-- speed:begin -->\nold\n<!-- speed:end -->" in text
    for name in cases.accuracy_cases((2, 1)):
        assert f"\n| {name} | " in text
        assert f"\n{name} " in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("wrote")) <= 80


def test_accuracy_sees_errors_of_the_peer(monkeypatch):
    """The table is worth its name: a naive variance in place of fastbn's shows there."""

    def naive(x):
        var = np.square(x).mean((0, 2, 3)) - np.square(x.mean((0, 2, 3)))
        return (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(np.maximum(var, 0) + config.EPS).reshape(1, -1, 1, 1), var

    shape = (8, 4, 16, 16)
    right = {row["case"]: row["errors"]["fastbn first"] for row in cases.accuracy(shape)}
    monkeypatch.setattr(cases, "_fastbn", naive)
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = {row["case"]: row["errors"]["fastbn first"] for row in cases.accuracy(shape)}
    assert wrong["offset 0"]["var"] < 1e-5
    for case in ("offset 1e4", "offset 1e6"):
        assert right[case]["var"] < 2e-6 < 1e-2 < wrong[case]["var"]
        assert right[case]["y"] < 2e-6 < 1e-2 < wrong[case]["y"]


def test_pytorch_stands_beside(tiny, capsys):
    pytest.importorskip("torch", reason="the peers extra is not installed")
    assert main(["bench", "--repeats", "1"]) == 0
    assert "PyTorch takes" in capsys.readouterr().out
    assert main(["bench", "--accuracy"]) == 0
    assert "PyTorch last" in capsys.readouterr().out


def test_without_pytorch_it_is_left_out(tiny, capsys, monkeypatch):
    monkeypatch.setattr(cases, "torch", lambda: None)
    assert main(["bench", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "PyTorch is not installed and is left out" in out
    assert "PyTorch takes" not in out
    assert main(["bench", "--accuracy"]) == 0
    assert "PyTorch first" not in capsys.readouterr().out


def test_results_that_differ_are_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(quickbench, "numpy_forward", lambda x, gamma, beta, y, axes: (x + 1,))
    monkeypatch.setattr(quickbench, "interleaved", lambda *_: pytest.fail("timed a wrong result"))
    with pytest.raises(SystemExit, match="result 0 of NumPy and fastbn differ by"):
        main(["bench", "--repeats", "1"])


def test_a_busy_machine_writes_no_readme(tiny, tmp_path, capsys, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    used = iter((0.0, 1e6))
    monkeypatch.setattr(quickbench, "others", lambda: next(used))
    assert main(["bench", "--repeats", "1", "--readme", str(readme)]) == 1
    assert "repeat them on a quiet machine" in capsys.readouterr().err
    assert readme.read_text() == README


def test_others_counts_other_processes_only():
    before = quickbench.others()
    if before is None:
        pytest.skip("this system has no /proc/stat")
    assert quickbench.crowded(before, 1e9, 1) is None
    assert quickbench.crowded(None, 1.0, 1) is None
    assert "other processes used" in quickbench.crowded(before - 1e9, 1.0, 1)


@pytest.mark.parametrize("text", ["no markers", README + README])
def test_bench_wants_one_block_before_it_starts(text, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickbench, "speed", lambda repeats: pytest.fail("worked before it looked"))
    (tmp_path / "README.md").write_text(text)
    assert "blocks from <!-- speed:begin --> to <!-- speed:end -->, want one" in refused(
        capsys, "bench", "--readme", str(tmp_path / "README.md")
    )
    assert (tmp_path / "README.md").read_text() == text


def test_bench_refuses(tmp_path, capsys, monkeypatch):
    assert "--repeats: given 0, want 1 or more" in refused(capsys, "bench", "--repeats", "0")
    assert "there is no directory" in refused(capsys, "bench", "--json", str(tmp_path / "none" / "x.json"))
    assert "No such file" in refused(capsys, "bench", "--readme", str(tmp_path / "none.md"))
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "pip install 'fastbn[demo]'" in refused(capsys, "bench")
