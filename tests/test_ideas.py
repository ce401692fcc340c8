"""`python -m bench.ideas`: every switch takes its idea out of fastbn's own calls, changes no result and is put back; the README's block."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bench import cases, ideas, textbook
from bench.problem import Problem, own
from fastbn import config, layout, quickbench, ready, timing
from fastbn.backends import cpu, routes, schedule
from fastbn.kernels import _jit

pytest.importorskip("rich", reason="tables and progress need rich")

# Small arrays, with long rows, with short rows, and large enough for threads.
TINY = {"3x2x20x30": (3, 2, 20, 30), "4x8x7x7": (4, 8, 7, 7), "4x16x40x40": (4, 16, 40, 40)}
IDEAS = {idea.name: idea for idea in ideas.IDEAS}
SWITCHED = {name: idea for name, idea in IDEAS.items() if idea.off}


@pytest.fixture
def tiny(monkeypatch):
    for name, shape in TINY.items():
        monkeypatch.setitem(cases.CASES, name, cases.Case(shape, "first"))


@pytest.fixture
def kernels(monkeypatch):
    """The kernels of the calls since, as (name, whether parallel, its flags)."""
    ran, form = [], _jit.Kernel.form

    def watched(self, dtype, parallel):
        compiled = form(self, dtype, parallel)

        def run(*arguments):
            ran.append((self.name, parallel, tuple(a for a in arguments if isinstance(a, bool))))
            compiled(*arguments)

        return run

    monkeypatch.setattr(_jit.Kernel, "form", watched)
    return ran


def _traced(kernels, p, what, patches):
    kernels.clear()
    with ideas.patched(patches):
        own(p, what).run()
    return [kernel for kernel in kernels if not kernel[0].startswith("statistics.")]


@pytest.mark.parametrize(
    ("name", "shape", "with_it", "without"),
    [
        ("one read of memory", "3x2x20x30", ["channels_first.forward"], ["channels_first.moments", "channels_first.normalize"]),
        ("short rows as columns", "4x8x7x7", ["channels_last_apply.forward"], ["channels_first.forward"]),
    ],
)
def test_other_kernels_run_without_the_idea(tiny, kernels, name, shape, with_it, without):
    p, idea = Problem(shape, "float32"), IDEAS[name]
    for patches, wanted in ((idea.on, with_it), (idea.off, without), (idea.on, with_it)):
        assert [kernel for kernel, _, _ in _traced(kernels, p, "forward", patches)] == wanted
    ideas.compare(idea, p, "forward")


@pytest.mark.parametrize(
    ("name", "shape", "parallel"), [("threads for large calls", "4x16x40x40", True), ("no threads for small calls", "4x8x7x7", False)]
)
def test_the_other_form_runs_without_the_idea(tiny, kernels, name, shape, parallel):
    p, idea = Problem(shape, "float32"), IDEAS[name]
    for patches, wanted in ((idea.on, parallel), (idea.off, not parallel), (idea.on, parallel)):
        assert [form for _, form, _ in _traced(kernels, p, "forward", patches)] == [wanted]
    ideas.compare(idea, p, "forward")


def test_stores_go_past_the_cache_with_the_idea_only(tiny, kernels):
    p, idea = Problem("3x2x20x30", "float32"), IDEAS["stores past the cache"]
    flags = [_traced(kernels, p, "inference", patches)[0][2] for patches in (idea.on, idea.off)]
    assert flags == [(True,), (False,)]
    assert not idea.taken(p, "inference")  # too small: fastbn leaves it out, and the table says so
    ideas.compare(idea, p, "inference")


def test_one_channel_and_several_rows_at_a_time_without_the_order_of_memory(tiny):
    p, idea = Problem("3x2x20x30", "float32"), IDEAS["statistics in the order of memory"]
    for patches, channels in ((idea.on, 2), (idea.off, 1), (idea.on, 2)):
        with ideas.patched(patches):
            small, wide = schedule.first(*p.x.shape[:2], 600, 4), schedule.last(100_352, 256, 1, 4, True)
            assert [routes.lot(small, 2), small.lot] == [channels, channels]
            assert {wide.along, wide.back_along} == {channels == 2}
    for what in idea.passes:
        ideas.compare(idea, p, what)


def test_nothing_is_remembered_without_the_plans(tiny):
    p, idea = Problem("4x8x7x7", "float32"), IDEAS["each shape planned once"]
    assert {p.name for p in idea.off} >= {"of", "fused", "first", "last", "_forward", "_backward", "_normalize", "planned", "_ready"}
    with ideas.patched(idea.on):
        own(p, "forward").run()
        own(p, "forward").run()
        assert ready._ready.cache_info()[:2] == (1, 1)
    with ideas.patched(idea.off):
        own(p, "forward").run()
        assert not any(hasattr(f, "cache_info") for f in (routes.of, routes.fused, schedule.last, layout.planned, ready._ready))
    ideas.compare(idea, p, "forward")


@pytest.mark.parametrize("name", SWITCHED)
def test_what_was_patched_is_put_back_even_after_an_error(name):
    idea = IDEAS[name]
    for patches in filter(None, (idea.off, idea.on)):
        before = [getattr(p.owner, p.name) for p in patches]
        with pytest.raises(RuntimeError, match="stop"), ideas.patched(patches):
            assert all(getattr(p.owner, p.name) is p.value for p in patches)
            raise RuntimeError("stop")
        assert all(getattr(p.owner, p.name) is value for p, value in zip(patches, before, strict=True))


def test_every_idea_can_be_left_out():
    assert all(bool(idea.off) != bool(idea.instead) for idea in ideas.IDEAS)
    assert all(shape in cases.CASES for idea in ideas.IDEAS for shape in idea.shapes)


@pytest.mark.parametrize("kernel", [textbook.welford, textbook.loops])
def test_the_textbook_is_right(kernel):
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (5, 3, 37)).astype(np.float32)
    gamma, beta, y = np.float32([1.0, 0.5, -2.0]), np.float32([0.0, 1.0, 3.0]), np.empty_like(x)
    kernel(x, gamma, beta, 1e-5, y)
    wide = x.astype(np.float64)
    wanted = (wide - wide.mean((0, 2), keepdims=True)) / np.sqrt(wide.var((0, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, wanted * gamma[:, None] + beta[:, None], atol=1e-5)


def test_a_wrong_result_is_not_timed(tiny):
    wrong = ideas.Patch(cpu, "_normalize", lambda *key: lambda x, mean, rstd, gamma, beta, out: out.fill(0.0))
    with pytest.raises(AssertionError, match="broken, 3x2x20x30 inference: wrong: result 0 is off by"):
        ideas.compare(ideas.Idea("broken", ("3x2x20x30",), ("inference",), (wrong,)), Problem("3x2x20x30", "float32"), "inference")


def test_a_changed_bit_is_not_timed(tiny):
    right = cpu._normalize.__wrapped__

    def nudged(*key):
        def run(x, mean, rstd, gamma, beta, out):
            right(*key)(x, mean, rstd, gamma, beta, out)
            out.flat[7] = np.nextafter(out.flat[7], np.float32(9), dtype=np.float32)
            return out

        return run

    patches, p = (ideas.Patch(cpu, "_normalize", nudged),), Problem("3x2x20x30", "float32")
    with pytest.raises(AssertionError, match="result 0 changes its bits"):
        ideas.compare(ideas.Idea("inexact", ("3x2x20x30",), ("inference",), patches), p, "inference")
    ideas.compare(ideas.Idea("inexact", ("3x2x20x30",), ("inference",), patches, exact=False), p, "inference")


@pytest.fixture
def quick(tiny, monkeypatch):
    """Two ideas on a tiny array; a call takes 3 ms without streaming stores and 1 ms with them."""
    wanted = [IDEAS["stores past the cache"], IDEAS["one read of memory"]]
    monkeypatch.setattr(ideas, "IDEAS", [idea._replace(shapes=("3x2x20x30",), passes=("forward",)) for idea in wanted])
    monkeypatch.setattr(timing, "turn", lambda call: (call(), 3e-3 if config.STREAM_BYTES == ideas.NEVER else 1e-3)[1])
    monkeypatch.setattr(quickbench, "crowded", lambda before, seconds, threads: None)


def test_the_command_writes_what_it_measured(quick, tmp_path, capsys):
    readme, numbers = tmp_path / "README.md", tmp_path / "ideas.json"
    readme.write_text("before\n<!-- ideas:begin -->\nold\n<!-- ideas:end -->\nafter\n")
    assert ideas.main(["--seconds", "1e-9", "--json", str(numbers), "--readme", str(readme)]) == 0
    records = json.loads(numbers.read_text())["records"]
    assert [(r["idea"], r["worth"], r["taken"]) for r in records] == [
        ("stores past the cache", 3.0, False),
        ("one read of memory", 1.0, True),
    ]
    assert records[0]["seconds"] == {"without": 3e-3, "with": 1e-3}
    line = "| stores past the cache * | 3x2x20x30 | forward | 3 ms | 1 ms | 3.00x |"
    block = re.fullmatch(r"before\n<!-- ideas:begin -->\n(.*)<!-- ideas:end -->\nafter\n", readme.read_text(), re.DOTALL)
    assert block
    assert line in block[1]
    assert "old" not in block[1]
    for fact in ("* Forced here", "fastbn ", "numba ", "threads", "MB of cache", "python -m bench.ideas --readme README.md"):
        assert fact in block[1]
    assert "3.00x" in capsys.readouterr().out


def test_a_busy_machine_leaves_the_readme(quick, tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- ideas:begin -->\n<!-- ideas:end -->\n")
    monkeypatch.setattr(quickbench, "crowded", lambda before, seconds, threads: "too busy")
    assert ideas.main(["--seconds", "1e-9", "--readme", str(readme)]) == 1
    assert readme.read_text() == "<!-- ideas:begin -->\n<!-- ideas:end -->\n"
    assert "too busy" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seconds", "0"], "--seconds: given 0.0, want more than 0"), (["--readme", "LICENSE"], "has 0 blocks from <!-- ideas:begin -->")],
)
def test_bad_options_are_refused_before_anything_runs(arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(ideas, "measured", None)
    assert ideas.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_readme_has_every_idea():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- ideas:begin -->\n(.*?)<!-- ideas:end -->", text, re.DOTALL)
    assert block
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in block[1].splitlines() if line.startswith("|")][2:]
    assert [tuple(row[:3]) for row in rows] == [(i.name, shape, what) for i in ideas.IDEAS for shape in i.shapes for what in i.passes]
