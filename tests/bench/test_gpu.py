"""`python -m bench.gpu` as far as no GPU is needed: how rounds become a record, and what it shows and writes."""

import itertools
import json
import math
import re
import sys
import weakref
from types import SimpleNamespace

import pytest

from bench import gpu, gpu_checks, gpu_timing, plot
from fastbn.arguments.errors import MissingExtra
from fastbn.cuda import buffers, cost

LARGE, SMALL = "256x64x112x112", "32x64x56x56 last"
DTYPES = ("float32", "float16", "bfloat16", "float64", "float32")
FACTS = ("date", "device", "cudnn", "cuda", "fastbn", "numba", "numba-cuda", "numpy", "torch")


def _record(name, fastbn, peer, copy):
    case = gpu_timing.SHAPES[name]
    problem = SimpleNamespace(case=case, dtype="float32", bytes=4 * math.prod(case.shape))
    problem.moved = lambda what: cost.moved(what, gpu_timing.dims(case), "float32")
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
        "| 256x64x112x112 float32 | 3300 µs, 2.00x PyTorch cuDNN, 100 % |\n",
        "Written by `python -m bench.gpu` from [its results](gpu.json).\n<!-- gpu:end -->\nafter\n",
    ):
        assert line in text
    assert "no time for x float32" in capsys.readouterr().out
    data.write_text(json.dumps({**result, "failed": [{"what": "y", "error": 1.0, "limit": 0.5}]}))
    assert gpu.main(["--from", str(data), "--readme", str(readme)]) == 1
    assert "y: off by 1, want at most 0.5" in capsys.readouterr().err
    assert readme.read_text() == text
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def _raising(error):
    def run(*_, **__):
        raise error

    return run


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A command line on a machine that seems to have a GPU; the checks are of these cases."""
    cases = []
    monkeypatch.setattr(buffers, "declines", lambda: None)
    monkeypatch.setattr(gpu, "facts", lambda: dict.fromkeys(FACTS, "9.9"))
    monkeypatch.setattr(gpu, "host", lambda: {"fastbn forward": 30.0})
    monkeypatch.setattr(plot, "draw_gpu", lambda result, path, *_: path.write_bytes(b"a plot"))
    monkeypatch.setattr(gpu_checks, "cases", lambda quick: iter(cases))
    monkeypatch.setattr(
        gpu, "timed", lambda result, seconds, quick: result["records"].append(_record(SMALL, 30e-6, 15e-6, 10e-6))
    )
    return SimpleNamespace(cases=cases, path=tmp_path / "gpu.json", argv=["--json", str(tmp_path / "gpu.json")])


def test_a_check_that_raises_leaves_the_others_and_the_result(machine, capsys):
    machine.cases += [
        ("the first", _raising(AssertionError("another run gives other bits"))),
        ("the second", lambda: iter([("y", 3.0, 1.0), ("mean", 0.5, 1.0)])),
        ("the third", lambda: iter([])),
    ]
    assert gpu.main(machine.argv) == 1
    out, err = capsys.readouterr()
    assert "python -m bench.gpu: the first: AssertionError: another run gives other bits\n" in err
    assert "python -m bench.gpu: the second: y: off by 3, want at most 1\n" in err
    assert "of 2 comparisons the worst error is 3.00 of its limit; 2 failed" in out
    result = json.loads(machine.path.read_text())
    assert [failed["what"] for failed in result["failed"]] == ["the first", "the second: y"]
    assert result["records"]


def test_a_device_that_is_gone_is_not_asked_again_and_again(machine, capsys):
    asked = []
    fault = RuntimeError("an illegal\nmemory access")
    machine.cases += [(str(k), lambda k=k: asked.append(k) or _raising(fault)()) for k in range(10)]
    assert gpu.main(machine.argv) == 1
    assert asked == [0, 1, 2]
    assert "python -m bench.gpu: 2: RuntimeError: an illegal memory access\n" in capsys.readouterr().err
    assert len(json.loads(machine.path.read_text())["failed"]) == 4  # the last says that the others were not run


def test_what_there_is_gets_written_whatever_ends_the_run(machine, monkeypatch):
    monkeypatch.setattr(gpu, "timed", _raising(KeyboardInterrupt()))
    monkeypatch.setattr(gpu, "host", _raising(RuntimeError("out of memory")))
    machine.cases.append(("one", lambda: iter([("y", 3.0, 1.0)])))
    assert gpu.main(machine.argv) == 130
    failed = json.loads(machine.path.read_text())["failed"]
    assert [f["what"] for f in failed] == ["one: y", "host time of 32x64"]


def test_the_plot_is_drawn_where_matplotlib_is(machine, monkeypatch, capsys):
    lacks = MissingExtra("the plot needs matplotlib: pip install 'fastbn[demo]'")
    with monkeypatch.context() as patch:
        patch.setattr(gpu.progress, "need", _raising(lacks))
        assert gpu.main(machine.argv) == 0
    assert f"{lacks}; then python -m bench.gpu --from" in capsys.readouterr().out
    assert not machine.path.with_suffix(".png").exists()
    assert gpu.main(["--from", str(machine.path)]) == 0
    assert machine.path.with_suffix(".png").exists()


@pytest.mark.parametrize("quick", [False, True])
def test_every_dtype_and_layout_is_checked_with_statistics_of_both_dtypes(quick, monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_checks, "_compared", lambda *case: seen.append(case))
    for what, run in gpu_checks.cases(quick):
        if what[0] in "fb":  # of a dtype, not of a library
            run()
    dtypes, shapes, layouts, _, statistics = zip(*seen, strict=True)
    both = ("float32", "float64")
    assert set(zip(dtypes, statistics, strict=True)) == set(itertools.product(gpu_checks.LIMITS, both))
    assert set(zip(layouts, statistics, strict=True)) == set(itertools.product(gpu_checks.LAYOUTS, both))
    assert set(shapes) == set(gpu_checks.SHAPES)


class Timed:
    """A contestant that raises at its n-th call, if ever."""

    def __init__(self, error=None, at=math.inf):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, k):
        self.calls += 1
        if self.calls >= self.at:
            raise type(self.error)(*self.error.args)  # another, without the frames of the one before


@pytest.fixture
def timing(monkeypatch):
    """Contestants by name that are timed on no GPU; how often memory was released."""
    released = []
    monkeypatch.setattr(gpu_timing.gc, "collect", lambda: 0)  # a tenth of a second each
    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 1.0)
    cuda = {"empty_cache": lambda: released.append(1), "synchronize": lambda: None, "Event": lambda **_: event}
    torch = SimpleNamespace(cuda=SimpleNamespace(**cuda))
    monkeypatch.setitem(sys.modules, "torch", torch)
    taking = {"fastbn": Timed(), "PyTorch cuDNN": Timed(), "PyTorch native": Timed()}
    calls = lambda *_: {who: lambda call=call: call for who, call in taking.items()}  # noqa: E731
    monkeypatch.setattr(gpu_timing, "contestants", calls)

    def problem(name, dtype):
        case = gpu_timing.SHAPES[name]
        sizes = {"bytes": 4 * math.prod(case.shape), "sets": 2, "moved": lambda what: 1}
        return SimpleNamespace(torch=torch, case=case, dtype=dtype, copy=Timed(), **sizes)

    monkeypatch.setattr(gpu, "Problem", problem)
    monkeypatch.setattr(gpu, "plan", lambda quick: [(SMALL, dtype) for dtype in DTYPES])
    return SimpleNamespace(taking=taking, released=released, result={"records": [], "failed": [], "left": []})


# of its first two calls, of those that count how many make a batch, of the rounds
@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_peer_that_fails_while_it_is_timed_costs_that_peer_alone(at, timing):
    timing.taking["PyTorch cuDNN"] = Timed(RuntimeError("CUDA out\nof memory"), at)
    gpu.timed(timing.result, 60.0, True)
    assert (timing.result["failed"], timing.result["left"]) == ([], [])
    assert len(timing.result["records"]) == 5 * len(gpu.PASSES)
    for record in timing.result["records"]:
        assert set(record["seconds"]) == {"fastbn", "PyTorch native", "copy"}
        assert record["refused"] == {"PyTorch cuDNN": "RuntimeError: CUDA out of memory"}
    assert len(timing.released) == 5 * (len(gpu.PASSES) + 1)  # by each peer that fails, behind each shape


@pytest.mark.parametrize("at", [1, 3, 7])
@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (RuntimeError("an illegal memory access"), 3),
        (RuntimeError("CUDA failed at cuMemAllocFromPoolAsync: CUDA_ERROR_OUT_OF_MEMORY"), 5),
        (type("OutOfMemoryError", (RuntimeError,), {})("tried to allocate 2 GiB"), 5),
        (MemoryError(), 5),
    ],
)
def test_a_device_is_gone_where_fastbn_fails_time_and_again_and_not_for_want_of_memory(at, error, asked, timing):
    timing.taking["fastbn"] = Timed(error, at)
    gpu.timed(timing.result, 60.0, True)
    assert not timing.result["records"]
    assert [failed["what"] for failed in timing.result["failed"]] == [f"{SMALL} {dtype}" for dtype in DTYPES[:asked]]
    assert all(f"{SMALL} " in failed["raised"] and " forward" in failed["raised"] for failed in timing.result["failed"])
    assert len(timing.result["left"]) == 5 - asked
    assert len(timing.released) >= asked


def test_a_problem_that_fails_is_released_before_the_next(timing, monkeypatch):
    problem, alive, left = gpu.Problem, weakref.WeakSet(), []
    monkeypatch.setattr(sys.modules["torch"].cuda, "empty_cache", lambda: left.append(len(alive)))

    def one_at_a_time(name, dtype):
        assert not alive
        alive.add((made := problem(name, dtype)).copy)
        return made

    monkeypatch.setattr(gpu, "Problem", one_at_a_time)
    timing.taking["fastbn"] = Timed(MemoryError(), 3)  # all that a shape held is let go before the cache is emptied
    gpu.timed(timing.result, 60.0, True)
    assert [failed["raised"].endswith(" MemoryError:") for failed in timing.result["failed"]] == [True] * 5
    assert left == [0, *[1, 0] * 4]  # in the rounds; then at the first call, where the others still run on the problem


@pytest.mark.peers
def test_host_time_is_measured_without_a_gpu(monkeypatch):
    pytest.importorskip("numba_cuda", reason="its bindings pack the arguments")
    monkeypatch.setattr(gpu_timing, "HOST_CALLS", 2)
    lines = gpu_timing.host_report(rounds=1)
    assert [line.partition(":")[2].split(",")[0].strip() for line in lines[:-1]] == [
        f"{n} launches" for n in (1, 1, 2, 2, 3, 3, 2, 2)
    ]
    assert re.match(r"a launch with \d+ arguments: ", lines[-1])


def test_without_a_gpu_it_says_why(monkeypatch, capsys):
    monkeypatch.setattr(buffers, "declines", lambda: "no GPU today")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "python -m bench.gpu: no GPU today\n"
