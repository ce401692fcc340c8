"""`python -m bench.gpu` as far as no GPU is needed: what it would time, how rounds become a record, what it prints and writes."""

import json
import math
from types import SimpleNamespace

import pytest

from bench import cases, gpu, gpu_problem, gpu_timing
from fastbn.backends import devices, model

pytest.importorskip("rich", reason="tables and progress need rich")
pytest.importorskip("matplotlib", reason="the plot needs matplotlib")

MACHINE = {
    "date": "2020-01-02", "device": "Some GPU", "multiprocessors": 100, "memory": 1, "cudnn": "9", "cuda": "13.0", "fastbn": "0.1.0",
    "numba": "0.62", "numba-cuda": "0.30", "numpy": "2.0", "torch": "2.9",
}  # fmt: skip


def _problem(name, dtype="float32"):
    case = gpu_problem.SHAPES[name]
    itemsize = 4 if dtype == "float32" else 2
    moved = lambda what: model.moved(what, gpu_problem.dims(case), dtype)  # noqa: E731 # as the problem's method
    return SimpleNamespace(case=case, dtype=dtype, bytes=math.prod(case.shape) * itemsize, moved=moved)


def _record(name, what, fastbn, peer, copy):
    rounds = [{"fastbn": fastbn * noise, "PyTorch cuDNN": peer * noise, "copy": copy * noise} for noise in (1, 3, 1.1)]
    return gpu_timing.summed_up(name, what, _problem(name), rounds, {})


@pytest.fixture
def result():
    large, middle = "256x64x112x112", "32x64x56x56 last"
    records = [_record(large, "forward", 3e-3, 6e-3, 2e-3), _record(middle, "forward", 30e-6, 15e-6, 10e-6)]
    return {"kind": "gpu", "machine": MACHINE, "failed": [], "host": {"fastbn forward": 30.0}, "records": records, "left": ["x float32"]}


def test_every_shape_of_the_peers_and_the_large_ones_are_timed():
    plan = gpu.plan(quick=False)
    for name, case in gpu_problem.SHAPES.items():
        dtypes = [dtype for shape, dtype in plan if shape == name]
        assert dtypes == {"small": [], "first": ["float32"]}.get(case.group, ["float32", "float16", "bfloat16"])
    assert set(cases.CASES) < set(gpu_problem.SHAPES)
    assert {"256x256x56x56", "64x64x224x224 last", "16x32x64x128x128"} <= set(gpu_problem.SHAPES)
    assert set(gpu.COMPILED) | set(gpu.QUICK) <= set(gpu_problem.SHAPES)


def test_rounds_become_paired_ratios_and_a_share_of_the_copys_bandwidth(result):
    large, middle = result["records"]
    assert (large["fastest"], large["ratio"]) == ("PyTorch cuDNN", pytest.approx(2.0))
    assert large["of_copy"] == pytest.approx(1.5 * 2e-3 / 3e-3)  # three arrays moved, where a copy moves two
    assert middle["ratio"] == pytest.approx(0.5)
    assert large["moved"] == 3 * large["bytes"]


def test_the_summary_holds_the_targets_beside_what_was_measured(result):
    assert gpu.summary(result["records"]) == [
        "of the copy's bandwidth, arrays over 256 MiB: least 100 % (256x64x112x112 float32 forward); 1 of 1 at 85 %",
        "PyTorch's best, arrays over 4 MiB: least 0.50x (32x64x56x56 last float32 forward, PyTorch cuDNN); 1 of 2 at 1x; "
        "geometric mean 1.00x (target 1.3x)",
    ]


def test_an_earlier_result_is_printed_and_written(result, tmp_path, capsys):
    data, readme = tmp_path / "gpu.json", tmp_path / "README.md"
    data.write_text(json.dumps(result))
    readme.write_text("before\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nafter\n")
    assert gpu.main(["--from", str(data), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "| 256x64x112x112 float32 | 3300 µs, 2.00x PyTorch cuDNN, 100 % | - | - | - |" in text
    assert "Written by `python -m bench.gpu --from gpu.json --readme README.md`." in text
    assert "old" not in text
    assert "no time for x float32" in capsys.readouterr().out
    data.write_text(json.dumps({**result, "failed": [{"what": "y", "error": 1.0, "limit": 0.5}]}))
    assert gpu.main(["--from", str(data), "--readme", str(readme)]) == 1
    assert "y is off by 1, want at most 0.5" in capsys.readouterr().err
    assert readme.read_text() == text


def test_the_plot_is_a_picture(result, tmp_path):
    gpu.draw(result, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_why(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(devices, "declines", lambda: "no GPU today")
    assert gpu.main(["--json", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "python -m bench.gpu: no GPU today\n"
    assert not (tmp_path / "x.json").exists()
