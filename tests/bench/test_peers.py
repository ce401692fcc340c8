"""`python -m bench.peers`: ratios are right, nobody wrong is timed, and what was measured is shown and written."""

import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bench import contestants, limit, machine, measure, onnx_runtime, peers, pytorch, xla
from bench.problem import PASSES, Call, Problem, Refused, case, own
from bench.suite import cases
from fastbn.cli import timing
from tests import ROOT

SHAPES = ("2x16x8x8", "1x256x24x26 last", "8x256x1120 last", "32x64", "3x5x2x3x4 last")  # both orders, other ranks


@pytest.fixture
def instant(monkeypatch):
    """Turns that call once and take a millisecond, whoever's they are, on a machine that counts as quiet."""
    monkeypatch.setattr(timing, "turn", lambda call: (call(), 1.00496e-3)[1])
    monkeypatch.setattr(measure, "LEAST", 1)
    monkeypatch.setattr(timing, "others", lambda: 0.0)


@pytest.mark.parametrize("seconds", [2e-3, 1e-6, 0.3])
def test_a_turn_is_what_a_call_takes_after_a_rest_and_a_warm_up(seconds, monkeypatch):
    clock = SimpleNamespace(now=0.0, busy=0.0, perf_counter=lambda: clock.now, process_time=lambda: clock.busy)

    def sleep(pause):
        clock.busy += pause if clock.now < 0.009 else 0.0  # a library's threads spin on
        clock.now += pause

    def call():
        assert clock.now > 0.014
        clock.now += seconds if clock.now > 0.034 else 3 * seconds  # cold at first

    clock.sleep = sleep
    monkeypatch.setattr(timing, "time", clock)
    assert timing.turn(call) == pytest.approx(seconds)


def test_rounds_interleave_everyone_and_the_slow_of_a_class_leave(monkeypatch):
    turns, prepared = [], []
    takes = {"a": 1.0, "b": 2.9, "slow": 3.1, "alone": 99.0}
    monkeypatch.setattr(timing, "turn", lambda call: (turns.append(call()), takes[turns[-1]])[1])
    calls, before = {name: (lambda name=name: name) for name in takes}, {"slow": lambda: prepared.append(len(turns))}
    times = measure.rounds(calls, 60.0, [("a", "b", "slow"), ("alone",)], before)
    assert times == {name: [takes[name]] * (3 if name == "slow" else 15) for name in takes}
    assert [sorted(turns[i : i + 4]) for i in (0, 4, 8)] == [sorted(takes)] * 3
    assert prepared == [i for i, name in enumerate(turns) if name == "slow"]


def test_ratios_are_paired_within_a_round():
    # The machine slows down in the second round: the ratio of the medians would be 2.
    assert measure.paired([3.0, 20.0, 4.0], [1.0, 4.0, 2.0]) == 3.0
    assert measure.paired([3.0], [1.0, 100.0, 100.0]) == 3.0  # who left early is held against the rounds it ran in
    times = {"fastbn": [1.0, 2.0, 2.0], "a": [3.0, 6.0, 8.0], "b": [2.0, 4.0, 4.0], "fastbn float32": [1.5, 3.0, 3.0]}
    record = measure.summary({**times, "l": [0.5, 1.0, 1.0], "m": [0.4, 1.6, 1.6]}, ["a", "b"], ["l", "m"])
    assert (record["ratios"], record["fastest"], record["ratio"]) == ({"a": 3.0, "b": 2.0}, "b", 2.0)
    assert (record["limit"], record["times_limit"], record["float32"]) == ("l", 2.0, 1.5)
    assert record["seconds"] == {"fastbn": 2.0, "a": 6.0, "b": 4.0, "fastbn float32": 3.0}


def test_everyone_gets_as_many_threads_and_scaling_each_number(instant, monkeypatch):
    given = []
    for module in (xla, onnx_runtime, pytorch):
        monkeypatch.setattr(module, "set_threads", given.append)
    monkeypatch.setattr("fastbn.set_num_threads", given.append)
    monkeypatch.setattr("numba.set_num_threads", given.append)
    assert [machine.give_threads(3)] * 5 == given
    given.clear()
    record = measure.scaling("32x64", "float32", ["moments"], 1e-9, measure.thread_counts(3), measure.Crowd())[0]
    assert (given[:2], set(given[2:-1]), given[-1]) == ([1, 2], {1, 2}, None)
    assert record["speedup"] == {"1": 1.0, "2": 1.0}


CHANGES = {
    "honest": lambda results: results,
    "liar": lambda results: [np.where(np.arange(a.size).reshape(a.shape) == a.size - 1, a + 1.5, a) for a in results],
    "short": lambda results: results[1:],
    "flat": lambda results: [a[:1] for a in results],
    "none": lambda results: [a * np.nan for a in results],
}


@pytest.mark.parametrize("what", PASSES)
def test_a_wrong_peer_is_reported_and_not_timed(what, monkeypatch):
    def make(name):
        if name == "shy":
            raise Refused("not on\nThursdays")
        return Call(lambda: CHANGES[name]([np.array(a) for a in call.read(call.run())]), tuple)

    p, names = Problem("2x16x8x8", "float32"), (*CHANGES, "shy")
    call = own(p, what)
    listed = {name: lambda p, what, name=name: {name: lambda: make(name)} for name in names}
    monkeypatch.setattr(contestants, "PEERS", listed)
    monkeypatch.setattr(contestants, "BLOCK", 64)  # of which every one is compared
    calls, refused = contestants.field(p, what, names)
    assert (list(calls), list(refused)) == (["fastbn", "honest"], ["liar", "short", "flat", "none", "shy"])
    assert re.match(r"wrong: result \d is off by \d.*, want at most 0.0001$", refused["liar"])
    assert refused["shy"] == "Refused: not on Thursdays"


PACKAGES = {"PyTorch": "torch", "oneDNN": "torch", "JAX": "jax", "ONNX Runtime": "onnxruntime"}
PEERS = ["NumPy", *(pytest.param(peer, marks=[pytest.mark.bench, pytest.mark.peers]) for peer in PACKAGES)]


@pytest.mark.parametrize("peer", PEERS)  # torch.compile takes 10 s: once, in the next test
def test_every_peer_agrees_or_says_why_not(peer):
    pytest.importorskip(PACKAGES.get(peer, "numpy"), reason=f"{peer} is not installed")
    for name, dtype in [*((name, "float32") for name in SHAPES), ("32x64", "float64")]:
        p = Problem(name, dtype)
        for what in PASSES:
            calls, refused = contestants.field(p, what, [peer])
            assert not [reason for reason in refused.values() if reason.startswith("wrong")]
            oned = what != "moments" and not p.case.last and dtype == "float32"
            served = {"ONNX Runtime": what == "inference", "oneDNN": oned, "JAX": dtype == "float32"}
            assert (peer in calls) == served.get(peer, True), refused
            if peer in ("PyTorch", "ONNX Runtime") and peer in calls and what in ("forward", "inference"):
                p.out[...] = 0  # they write where fastbn does, in memory that is there already
                calls[peer].run()
                assert p.out.any()


@pytest.mark.bench
@pytest.mark.peers
def test_the_command_beside_every_peer(tmp_path):
    for package in PACKAGES.values():
        pytest.importorskip(package, reason="the peers are not installed")
    data = tmp_path / "out.json"
    words = ["--shapes", "32x64", "--passes", "inference", "--seconds", "0.01", "--json", data]  # they all have it
    subprocess.run([sys.executable, "-m", "bench.peers", *words], cwd=ROOT, check=True, timeout=600)
    result = peers.load(data)
    assert result["records"][0]["refused"] == {}
    assert contestants.PEERS.keys() <= result["records"][0]["ratios"].keys()
    assert result["small"][0]["ratios"].keys() == {f"{pair.own} / {pair.peer}" for pair in peers.small.PAIRS}


@pytest.mark.bench
@pytest.mark.parametrize("name", ["1x64x7x7", "131071x1"])  # 64 bytes' multiple, and not
def test_the_limits_move_every_byte(name):
    p = Problem(name, "float32")
    x, dy, out = (limit.flat(a, p) for a in (p.x, p.dy, p.out))
    assert p.x.nbytes - 64 < x.nbytes <= p.x.nbytes
    for what, expected in (("forward", x), ("inference", x), ("backward", x + dy)):
        for way, run in limit.calls(p, what, 2).items():
            out[...] = np.nan
            run()
            np.testing.assert_array_equal(out, expected, err_msg=way)
    sums = np.zeros(16, np.float32)
    limit._read(x, x.size // limit.LANES, sums.size, sums)
    several = sums.sum() - x[: limit.LANES].sum() * 2 * sums.size  # each part begins two sums with the first vector
    np.testing.assert_allclose(several, x.sum(), rtol=1e-3)


BLOCK = (
    r"<!-- (\w+):begin -->\n((?:(?!<!-- ).)*`python -m bench\.(\w+)` from \[its results\]\((\S+)\)(?:(?!<!-- "
    r").)*)<!-- \1:end -->\n"
)


def test_the_tables_of_the_documents_are_made_of_the_results(tmp_path):
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    written = []
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text, copy = document.read_text(encoding="utf-8"), tmp_path / document.relative_to(ROOT)
        for name, block, module, data in re.findall(BLOCK, text, re.DOTALL):
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(text.replace(block, "old\n"), encoding="utf-8")
            command = importlib.import_module(f"bench.{module}")
            assert command.main(["--from", str(copy.parent / data), "--readme", str(copy)]) == 0
            assert copy.read_text(encoding="utf-8") == text, f"{name} of {document.name}: run {module} --from {data}"
            written.append(name)
    assert {"peers", "float16", "bfloat16", "scaling", "resnet"} <= set(written)


def test_a_run_writes_all_that_it_was_asked_for(tmp_path, instant, monkeypatch, capsys):
    monkeypatch.setattr(machine, "keep_memory", lambda: True)  # a setting of the whole process
    monkeypatch.setattr(limit, "calls", lambda p, what, threads: {"copy": lambda: None})  # uncompiled
    monkeypatch.setattr(pytorch, "there", lambda: False)
    for name in ("NPROC", "PJRT_NPROC", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "")  # as they were, afterwards
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- peers:begin -->\nold\n<!-- peers:end -->\nafter\n")
    shapes, passes = ["4096x256", "32x64"], ["forward", "moments"]
    words = ["--shapes", *shapes, "--passes", *passes, "--peers", "NumPy", "ONNX Runtime", "--seconds", "1e-9"]
    assert peers.main([*words, "--json", "--plot", "--readme", str(readme)]) == 0
    (data,) = tmp_path.glob("peers-20??-??-??-*.json")  # a complete run's name: with the date and the machine
    result = peers.load(data)
    assert [(r["shape"], r["pass"]) for r in result["records"]] == [(name, what) for name in shapes for what in passes]
    assert all((r["fastest"], r["ratio"]) == ("NumPy", 1.0) for r in result["records"])
    assert all(r["seconds"] == {"fastbn": 1.005e-3, "NumPy": 1.005e-3} for r in result["records"])
    assert [r["shape"] for r in result["small"]] == ["32x64"]
    assert result["machine"]["cache"] >= 2**18
    assert data.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")
    text = readme.read_text()
    assert re.fullmatch(rf"before\n<!-- .* -->\n\|.*\]\({data.stem}.png\).*-->\nafter\n", text, re.DOTALL)
    assert "ONNX Runtime (4x): Refused: ONNX Runtime runs inference only" in capsys.readouterr().out

    # The file gives what the run gave, to the digit, without drawing again; nothing where processes were in the way.
    words = ["--from", str(data), "--readme", str(readme)]
    assert peers.main(words) == 0
    assert readme.read_text() == text
    data.write_text(json.dumps({**result, "doubt": "other processes used 1.2 of 2 processors meanwhile"}))
    readme.write_text(other := text.replace("1.01 ms", "9 ms"))
    assert peers.main(words) == 1
    assert readme.read_text() == other != text
    assert re.search("other processes used.*is left as it was", capsys.readouterr().err, re.DOTALL)


def test_shapes_of_the_table_keep_their_names_and_any_other_has_one():
    asked = ["small", "32,64", "(32, 64, 56, 56) last", "3x5x7 last", "4096x70 last", "2x3x4x5x6", "3x5x7 last"]
    names = ["32x64x56x56 last", "3x5x7 last", "4096x70", "2x3x4x5x6"]
    assert peers.chosen(asked, True) == [*cases.names("small"), *names]
    groups = [(case(name).group, case(name).last) for name in names]
    assert groups == [("last", True), ("own", True), ("own", False), ("own", False)]
    for name, dtype in itertools.product(names[1:], ("float16", "float64")):
        p = Problem(name, dtype)
        assert (p.x.dtype, p.rows(p.x).flags.c_contiguous, p.out.strides) == (dtype, True, p.x.strides)
        assert p.x.shape == tuple(map(int, name.removesuffix(" last").split("x")))


REFUSED = {
    "--shapes frist": "--shapes: given 'frist', want whole numbers with commas between them, like 32,64,56,56",
    "--shapes 4x3x5x": "--shapes: given '4x3x5x', want whole numbers",
    "--shapes 7": "--shapes '7': given rank 1, shape (7,); want rank 2 or more",
    "--shapes 32x0": "given shape (32, 0), with no channels",
    "--shapes 1x4": "--shapes: given '1x4', want two values or more a channel",
    "--shapes 99999x99999x9999": "--shapes: given '99999x99999x9999', its arrays and the peers' take about",
    "--seconds 0": "--seconds: given 0.0, want more than 0",
    "--from asv.conf.json": "is no result of python -m bench.peers",
    "--json no/such/folder/x.json": "there is no directory",
    "--readme CHANGELOG.md": "has 0 blocks from <!-- peers:begin -->",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_one_clear_line_before_anything_is_measured(words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(peers, "measured", lambda *_: pytest.fail("measured before it looked"))
    assert peers.main(words.split()) == 2
    err = capsys.readouterr().err
    assert (err.startswith("python -m bench.peers: "), err.count("\n")) == (True, 1)
    assert REFUSED[words] in err
