"""`fastbn bench`, and bench.quick and bench.accuracy, which write pages: right ratios and errors, refusals."""

import functools
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from bench import accuracy, pytorch, quick
from fastbn.cli import bench, main, timing

BLOCKS = "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\nbehind\n" for name in ("speed", "accuracy"))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Two small arrays on a quiet machine without PyTorch; NumPy takes 2.5 times as long; a page for the tables."""
    takes = itertools.cycle((1e-3, 2.5e-3))
    monkeypatch.setattr(timing, "turn", lambda call: (call(), next(takes))[1])
    monkeypatch.setattr(timing, "others", lambda: 0.0)
    monkeypatch.setattr(bench, "_pytorch", lambda: None)
    monkeypatch.setattr(pytorch, "there", lambda: False)
    monkeypatch.setattr(bench, "SHAPES", (((4, 3, 5, 5), True), ((16, 4), False)))
    monkeypatch.setattr(accuracy, "accuracy", functools.partial(accuracy.accuracy, (8, 4, 6, 6)))
    path = tmp_path / "page.md"
    path.write_text(BLOCKS)
    return path


def test_speed(page, tmp_path, capsys, monkeypatch):
    arrays = (("4x3x5x5", "last"), ("16x4", "first"))
    rows = [(shape, order, what) for shape, order in arrays for what in ("forward", "backward")]
    words = ["--repeats", "2", "--json", str(tmp_path / "speed.json")]
    assert main(["bench", *words]) == 0
    out, record = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    assert [(row["shape"], row["channels"], row["pass"]) for row in record["speed"]] == rows
    assert all(row["seconds"] == {"fastbn": 1e-3, "NumPy": 2.5e-3} for row in record["speed"])
    assert out.count("2.5x") == 4
    assert "PyTorch is not installed and is left out" in out

    assert quick.main([*words, "--readme", str(page)]) == 0
    text, rest = page.read_text(), BLOCKS.partition("old\n")[2]
    assert text.startswith("<!-- speed:begin -->\n| shape | channels | pass | fastbn | NumPy takes |\n| --- | ---: |")
    assert all(f"\n| {' | '.join(row)} | 1 ms | 2.5x |\n" in text for row in rows)
    assert text.endswith(f"{record['machine']['date']}. Written by `python -m bench.quick`.\n{rest}")

    used = iter((0.0, 1e6))
    monkeypatch.setattr(timing, "others", lambda: next(used))
    page.write_text(BLOCKS)
    assert quick.main([*words, "--readme", str(page)]) == 1
    assert "repeat them on a quiet machine" in capsys.readouterr().err
    assert page.read_text() == BLOCKS


def test_accuracy(page, capsys, monkeypatch):
    assert accuracy.main(["--readme", str(page), "--json", str(page.with_suffix(".json"))]) == 0
    out, text = capsys.readouterr().out, page.read_text()
    assert text.startswith(BLOCKS.partition("accuracy:begin")[0])
    assert all(f"\n| {name} | " in text and f"\n{name} " in out for name in accuracy.accuracy_cases((2, 1)))
    rows = json.loads(page.with_suffix(".json").read_text())["accuracy"]
    assert [row["case"] for row in rows] == list(accuracy.accuracy_cases((2, 1)))

    right = accuracy._fastbn
    monkeypatch.setattr(accuracy, "_fastbn", lambda x: tuple(np.float32(1.01) * a for a in right(x)))
    errors = {row["case"]: row["errors"]["fastbn first"] for row in accuracy.accuracy()}
    for case, quantity in itertools.product(("offset 0", "offset 1e6", "ramp 0..1e4"), ("var", "y")):
        assert errors[case][quantity] == pytest.approx(0.01, rel=0.05)


@pytest.mark.bench
@pytest.mark.peers
def test_pytorch_stands_beside(monkeypatch, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(bench, "SHAPES", (((4, 3, 5, 5), True),))
    monkeypatch.setattr(accuracy, "accuracy", functools.partial(accuracy.accuracy, (8, 4, 6, 6)))
    assert main(["bench", "--repeats", "1"]) == accuracy.main([]) == 0
    out = capsys.readouterr().out
    assert "PyTorch takes" in out
    assert "PyTorch last" in out


def test_results_that_differ_are_not_timed(page, monkeypatch):
    monkeypatch.setattr(bench, "numpy_forward", lambda x, gamma, beta, y, axes: (x + 1,))
    monkeypatch.setattr(timing, "turn", lambda call: pytest.fail("timed a wrong result"))
    with pytest.raises(SystemExit, match="result 0 of NumPy and fastbn differ by"):
        main(["bench", "--repeats", "1"])


def test_only_what_other_processes_use_makes_a_machine_busy(monkeypatch):
    stat = SimpleNamespace(read_text=lambda: "cpu 300 20 100 7000 50 5 3 2 0 0\ncpu0 ...\n")  # of which 7050 idle
    monkeypatch.setattr(timing, "Path", lambda path: stat)
    own = SimpleNamespace(user=1.5, system=0.5)
    system = SimpleNamespace(times=lambda: own, sysconf=lambda name: 100, cpu_count=lambda: 2)
    monkeypatch.setattr(timing, "os", system)
    assert timing.others() == pytest.approx(4.3 - 2.0)
    assert timing.crowded(2.3 - 10.0, 10.0, 1) is timing.crowded(None, 1.0, 2) is None
    assert "used 1.0 of 2" in timing.crowded(2.3 - 10.0, 10.0, 2)


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
    assert quick.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.partition(": ")[0], err.count("\n")) == ("", "python -m bench.quick", 1)
    assert REFUSED[words] in err
    if "--readme" not in words:
        assert main(["bench", *words.split()]) == 2
        assert capsys.readouterr().err == err.replace("python -m bench.quick: ", "fastbn: ")
