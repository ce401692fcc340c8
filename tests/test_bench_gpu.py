"""`python -m bench.gpu` as far as no GPU is needed: how rounds become a record, and what it shows and writes."""

import json
import math
from types import SimpleNamespace

import pytest

from bench import gpu, gpu_problem, gpu_timing
from fastbn.backends import devices, model

LARGE, SMALL = "256x64x112x112", "32x64x56x56 last"
FACTS = ("date", "device", "cudnn", "cuda", "fastbn", "numba", "numba-cuda", "numpy", "torch")


def _record(name, fastbn, peer, copy):
    case = gpu_problem.SHAPES[name]
    problem = SimpleNamespace(case=case, dtype="float32", bytes=4 * math.prod(case.shape))
    problem.moved = lambda what: model.moved(what, gpu_problem.dims(case), "float32")
    paces = ((1, 1), (3, 3), (1.1, 9))  # of fastbn and of the others, in each round
    rounds = [{"fastbn": fastbn * pace, "PyTorch cuDNN": peer * other, "copy": copy * other} for pace, other in paces]
    return gpu_timing.summed_up(name, "forward", problem, rounds, {})


def test_what_was_measured_is_shown_and_written_unless_a_check_failed(tmp_path, capsys):
    large, small = records = [_record(LARGE, 3e-3, 6e-3, 2e-3), _record(SMALL, 30e-6, 15e-6, 10e-6)]
    assert (large["fastest"], large["ratio"], small["ratio"]) == ("PyTorch cuDNN", 2.0, 0.5)
    assert large["moved"] == 3 * large["bytes"]
    assert large["of_copy"] == pytest.approx(1.5 * 2 / 3)  # three arrays moved, where a copy moves two
    result = {"machine": dict.fromkeys(FACTS, "9.9"), "failed": [], "host": {"fastbn forward": 30.0}}
    result |= {"records": records, "left": ["x float32"]}
    data, readme = tmp_path / "gpu.json", tmp_path / "README.md"
    data.write_text(json.dumps(result))
    readme.write_text("before\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nafter\n")
    assert gpu.main(["--from", str(data), "--readme", str(readme)]) == 0
    text = readme.read_text()
    for line in (
        "before\n<!-- gpu:begin -->\n* of the copy's bandwidth, arrays over 256 MiB: least 100 % (256x64x112x112 ",
        "0.50x (32x64x56x56 last float32 forward, PyTorch cuDNN); 1 of 2 at 1x; geometric mean 1.00x (target 1.3x)\n",
        "| 256x64x112x112 float32 | 3300 µs, 2.00x PyTorch cuDNN, 100 % | - | - | - |\n",
        "Written by `python -m bench.gpu` from [its results](gpu.json).\n<!-- gpu:end -->\nafter\n",
    ):
        assert line in text
    assert "no time for x float32" in capsys.readouterr().out
    data.write_text(json.dumps({**result, "failed": [{"what": "y", "error": 1.0, "limit": 0.5}]}))
    assert gpu.main(["--from", str(data), "--readme", str(readme)]) == 1
    assert "y is off by 1, want at most 0.5" in capsys.readouterr().err
    assert readme.read_text() == text
    gpu.draw(result, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(devices, "declines", lambda: "no GPU today")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "python -m bench.gpu: no GPU today\n"
