"""What `python -m bench.peers` measures: who is timed and who refused, how ratios are paired, what the limit is."""

import math
import re

import numpy as np
import pytest

from bench import cases, contestants, limit, machine, measure, onnx_runtime, pytorch, rounds, small, targets, xla
from bench.contestants import PEERS, apart, disagreement, field
from bench.problem import PASSES, Call, Problem, Refused, own
from fastbn import timing

# float32 images in both orders and rank 3, small enough to compare in no time.
TINY = {
    "2x4x5x6": ("first", (2, 4, 5, 6)),
    "2x4x5x6 last": ("last", (2, 4, 5, 6)),
    "3x8x11 last": ("last", (3, 8, 11)),
    "9x8": ("flat", (9, 8)),
}


@pytest.fixture
def tiny(monkeypatch):
    for name, (group, shape) in TINY.items():
        monkeypatch.setitem(cases.CASES, name, cases.Case(shape, group))


@pytest.fixture
def instant(monkeypatch):
    """Turns that call once and take a millisecond, whoever's they are."""
    monkeypatch.setattr(timing, "turn", lambda call: (call(), 1e-3)[1])


def test_ratios_are_paired_within_a_round():
    # The machine slows down fourfold in the second round: the ratio of the medians would be 2, every round says 3 or 5.
    assert rounds.paired([3.0, 12.0, 5.0], [1.0, 4.0, 1.0]) == 3.0
    assert rounds.paired([3.0, 20.0], [1.0, 4.0]) == 4.0
    assert rounds.paired([3.0], [1.0, 100.0, 100.0]) == 3.0  # who left early is held against the rounds it ran in


def test_the_slow_leave_their_class_after_the_first_rounds():
    times = {"a": [1.0, 1.0, 9.0], "b": [2.9, 2.9, 2.9], "c": [3.1, 3.1, 3.1], "alone": [99.0]}
    assert rounds.leave(times, [("a", "b", "c"), ("alone",)]) == {"c"}
    assert rounds.leave(times, []) == set()


def test_rounds_interleave_everyone(monkeypatch):
    turns = []
    monkeypatch.setattr(timing, "turn", lambda call: (turns.append(call()), {"slow": 4.0}.get(turns[-1], 1.0))[1])
    times = rounds.rounds({name: (lambda name=name: name) for name in ("a", "b", "slow")}, 1e-9, [("a", "slow")])
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3, "slow": [4.0] * 3}  # no time left, and yet the least number of rounds
    assert [sorted(turns[i : i + 3]) for i in (0, 3, 6)] == [["a", "b", "slow"]] * 3

    turns.clear()
    prepared = []
    times = rounds.rounds({"a": lambda: "a", "slow": lambda: "slow"}, 60.0, [("a", "slow")], {"slow": lambda: prepared.append(1)})
    assert (len(times["a"]), len(times["slow"]), len(prepared)) == (rounds.MOST, rounds.LEAST, rounds.LEAST)


def test_a_turn_measures_what_a_call_takes():
    import time

    assert 2e-3 <= timing.turn(lambda: time.sleep(2e-3)) <= 20e-3
    assert 0 < timing.turn(lambda: None) < 1e-5


def test_differences_are_seen_in_every_block():
    expected = np.zeros((5, 2**17), np.float32)
    for i in (0, 4):
        found = expected.copy()
        found[i, -1] = 0.5
        assert apart(found, expected) == 0.5
    found[2, 7] = np.nan
    assert math.isnan(apart(found, expected))
    assert apart(found[:4], expected) == math.inf
    assert apart(np.full(1, 1010.0), np.full(1, 1000.0)) == 0.01
    assert apart(np.full(1, 10.0), np.zeros(1), 1000.0) == 0.01


def _liar(change):
    """A peer with fastbn's result and a change."""
    return lambda p, what: {"liar": lambda: Call(lambda: change(*(np.array(a) for a in own(p, what).read(own(p, what).run()))), tuple)}


def _refuses(p, what):
    def make():
        raise Refused("not on\nThursdays")

    return {"shy": make}


@pytest.mark.parametrize("what", PASSES)
def test_a_wrong_peer_is_reported_and_not_timed(what, monkeypatch):
    def spoil(*results):
        results[-1].flat[-1] += 1 + abs(results[-1].flat[-1])
        return results

    monkeypatch.setattr(
        contestants,
        "PEERS",
        {
            "honest": lambda p, what: {"honest": _liar(lambda *r: r)(p, what)["liar"]},
            "liar": _liar(spoil),
            "short": lambda p, what: {"short": _liar(lambda *r: r[1:])(p, what)["liar"]},
            "none": lambda p, what: {"none": _liar(lambda *r: tuple(a * np.nan for a in r))(p, what)["liar"]},
            "shy": _refuses,
        },
    )
    calls, refused = field(Problem("2x16x8x8", "float32"), what, ("honest", "liar", "short", "none", "shy"))
    assert list(calls) == ["fastbn", "honest"]
    assert sorted(refused) == ["liar", "none", "short", "shy"]
    assert re.match(r"wrong: result \d is off by \d.*, want at most 0.0001$", refused["liar"])
    assert "off by nan" in refused["none"]
    assert refused["short"].startswith("wrong: ")
    assert refused["shy"] == "Refused: not on Thursdays"


def _needs(peer):
    for package in {"JAX": ["jax"], "ONNX Runtime": ["onnx", "onnxruntime"], "NumPy": []}.get(peer, ["torch"]):
        pytest.importorskip(package, reason=f"{peer} is not installed")


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != "torch.compile"])  # compiling takes 15 s
def test_every_peer_agrees_or_says_why_not(peer, name, tiny):
    _needs(peer)
    p = Problem(name, "float32")
    for what in PASSES:
        calls, refused = field(p, what, [peer])
        assert not [reason for reason in refused.values() if reason.startswith("wrong")]
        timed = len(calls) > 1
        served = {"ONNX Runtime": what == "inference", "oneDNN": what != "moments" and not p.case.last}.get(peer, True)
        assert timed == served, refused


def test_peers_write_where_fastbn_does(tiny):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    p = Problem("3x8x11 last", "float32")
    for what in ("forward", "inference"):
        call = pytorch.eager(p, what)["PyTorch"]()
        p.out[...] = 0
        call.run()
        assert p.out.any()


def test_torch_compile_says_that_it_has_no_compiler(tiny, monkeypatch):
    monkeypatch.setattr(pytorch.shutil, "which", lambda name: None)
    with pytest.raises(Refused, match=r"needs a C\+\+ compiler"):
        pytorch.compiled(Problem("9x8", "float32"), "forward")["torch.compile"]()


def test_refusals_of_a_dtype(tiny):
    p = Problem("9x8", "float64")
    assert disagreement(contestants.numpy_peer(p, "backward")["NumPy"](), own(p, "backward").run(), "float64", p.count) is None
    with pytest.raises(Refused, match="jax_enable_x64"):
        xla.calls(p, "forward")["JAX"]()
    with pytest.raises(Refused, match="inference only"):
        onnx_runtime.calls(p, "forward")["ONNX Runtime"]()


@pytest.mark.parametrize("name", ["1x64x7x7", "3x8x11 last"])  # 64 bytes' multiple, and not
def test_the_limits_move_every_byte(name, tiny):
    p = Problem(name, "float32")
    x, dy, out = (limit.flat(a, p) for a in (p.x, p.dy, p.out))
    assert p.x.nbytes - 64 < x.nbytes <= p.x.nbytes
    for what, expected in (("forward", x), ("inference", x), ("backward", x + dy)):
        calls = limit.calls(p, what, 2)
        assert {"copy, streaming", "copy", "np.copyto"} <= calls.keys() or {"triad, streaming", "triad", "np.add"} <= calls.keys()
        for way, run in calls.items():
            out[...] = np.nan
            run()
            np.testing.assert_array_equal(out, expected, err_msg=way)
    sums = np.zeros(16, np.float32)
    limit._read(x, x.size // limit.LANES, sums.size, sums)
    several = sums.sum() - x[: limit.LANES].sum() * 2 * sums.size  # each part begins two sums with the first vector
    np.testing.assert_allclose(several, x.sum(), rtol=1e-3)


def test_a_record_has_medians_ratios_and_refusals(tiny, instant, monkeypatch):
    monkeypatch.setattr(limit, "calls", lambda p, what, threads: {"quick": lambda: None, "slow": lambda: None})
    record = measure.beside_peers("2x4x5x6", "float32", ["forward"], ["NumPy"], 1e-9, 1, measure.Crowd())[0]
    assert {key: record[key] for key in ("shape", "group", "bytes", "pass")} == {
        "shape": "2x4x5x6", "group": "first", "bytes": 960, "pass": "forward"
    }  # fmt: skip
    assert (record["fastest"], record["ratio"], record["times_limit"], record["limit"]) == ("NumPy", 1.0, 1.0, "quick")
    assert record["seconds"] == {"fastbn": 1e-3, "NumPy": 1e-3}
    assert record["refused"] == {}


def test_the_summary_of_made_up_times():
    times = {"fastbn": [1.0, 2.0, 2.0], "a": [3.0, 6.0, 8.0], "b": [2.0, 4.0, 4.0], "l1": [0.5, 1.0, 1.0], "l2": [0.4, 1.6, 1.6]}
    record = measure.summary(times, ["a", "b"], ["l1", "l2"])
    assert record["ratios"] == {"a": 3.0, "b": 2.0}
    assert (record["fastest"], record["ratio"], record["limit"], record["times_limit"]) == ("b", 2.0, "l1", 2.0)
    assert record["seconds"] == {"fastbn": 2.0, "a": 6.0, "b": 4.0}
    alone = measure.summary({"fastbn": [1.0], "fastbn float32": [1.5], "l": [0.5]}, [], ["l"])
    assert (alone["fastest"], alone["ratio"], alone["float32"]) == (None, None, 1.5)


def test_scaling_sets_each_number_of_threads_and_resets_it(tiny, instant, monkeypatch):
    asked = []
    monkeypatch.setattr("fastbn.set_num_threads", asked.append, raising=False)
    record = measure.scaling("9x8", "float32", ["moments"], 1e-9, [1, 2], measure.Crowd())[0]
    assert set(asked[:-1]) == {1, 2}
    assert asked[-1] is None
    assert record["speedup"] == {"1": 1.0, "2": 1.0}
    assert measure.thread_counts(6) == [1, 2, 4]


def test_small_calls_agree(instant):
    record = small.record("2x16x8x8", 1e-9)
    assert {"batch_norm", "BatchNorm", "batch_norm + backward", "BatchNorm + backward"} <= record["seconds"].keys()
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert record["ratios"] == {f"{pair.own} / {pair.peer}": 1.0 for pair in small.PAIRS}


def test_limits_wanted():
    cell = {"shape": "32x64x112x112", "group": "first", "bytes": 103e6, "pass": "forward"}
    cache = 32 * 2**20

    def wanted(**changes):
        return targets.limit_target({**cell, **changes}, cache)

    assert wanted() == 1.35
    assert wanted(shape="32x2048x7x7") == 1.7
    assert wanted(**{"pass": "backward"}, shape="32x2048x7x7") == 1.5
    assert wanted(group="last") == 2.0
    assert wanted(group="flat", bytes=5e6) == 1.6
    assert wanted(**{"pass": "inference"}) == 1.1
    assert wanted(**{"pass": "moments"}) is wanted(bytes=1e6) is None
    assert targets.peer_target({**cell, "group": "small"}) is None
    assert [targets.peer_target({**cell, "pass": what}) for what in PASSES] == [1.2, 1.1, 1.0, None]


def test_everyone_gets_as_many_threads(monkeypatch):
    given = []
    for module in (xla, onnx_runtime, pytorch):
        monkeypatch.setattr(module, "set_threads", given.append)
    monkeypatch.setattr("fastbn.set_num_threads", given.append, raising=False)
    monkeypatch.setattr("numba.set_num_threads", given.append)
    assert machine.give_threads(3) == 3
    assert given == [3] * 5
    given.clear()
    assert [machine.give_threads(None)] * 3 == given


def test_the_limit_of_other_dtypes_moves_as_many_bytes_of_plain_numbers():
    p = Problem("1x64x7x7", "float64")
    x, out = limit.flat(p.x, p), limit.flat(p.out, p)
    assert x.nbytes == p.x.nbytes
    assert (x == 1).all()
    assert not np.shares_memory(x, out)


def test_the_last_level_cache_and_the_name_of_the_machine():
    assert machine.last_level_cache() >= 2**18
    assert re.fullmatch(r"2020-01-02-amd-epyc-7-2", machine.slug({"date": "2020-01-02", "processor": "AMD EPYC(7)", "cores": 2}))


def test_the_readers_of_torch_keep_float64(tiny):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    p = Problem("9x8", "float64")
    calls, refused = field(p, "moments", ["PyTorch"])
    assert {"PyTorch", "PyTorch var_mean"} <= calls.keys()
    assert list(refused) == ["PyTorch batch_norm_stats"]
