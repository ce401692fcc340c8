"""`python -m bench.ideas`: every idea can be taken out of fastbn's calls and is put back, and the table has all."""

import re
from pathlib import Path

import pytest

from bench import ideas
from bench.problem import Problem, own
from bench.suite import cases
from fastbn import quickbench, ready, timing
from fastbn.backends import routes, schedule
from fastbn.kernels import _jit

SHAPES = {"long rows": (3, 2, 20, 30), "short rows": (4, 8, 7, 7), "threads": (4, 16, 40, 40)}  # tiny
IDEAS = [pytest.param(i, id=i.name, marks=[pytest.mark.bench] * bool(i.instead)) for i in ideas.IDEAS]  # these compile


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, shape in SHAPES.items():
        monkeypatch.setitem(cases.CASES, name, cases.Case(shape, "first"))


@pytest.mark.parametrize("idea", IDEAS)
def test_an_idea_changes_what_runs_and_no_result(idea, monkeypatch):
    ran, form = [], _jit.Kernel.form

    def watched(self, dtype, parallel):
        compiled = form(self, dtype, parallel)
        return lambda *a: (ran.append((self.name, parallel, [v for v in a if isinstance(v, bool)])), compiled(*a))[1]

    def what_runs(patches):
        ran.clear()
        with ideas.patched(patches):
            for p, what in calls:
                own(p, what).run()
            plans = schedule.last(100_352, 256, 1, 4, True), routes.lot(schedule.first(3, 2, 600, 4), 2)
            return [*ran, plans, hasattr(ready._ready, "cache_info")]

    calls = [(Problem(name, "float32"), what) for name in SHAPES for what in ("forward", "inference")]
    for p, what in calls if not idea.instead else calls[::2]:
        ideas.compare(idea, p, what)
    monkeypatch.setattr(_jit.Kernel, "form", watched)
    with_it = what_runs(idea.on)
    assert bool(idea.instead) != (what_runs(idea.off) != with_it)
    assert what_runs(idea.on) == with_it


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch):
    idea, fused = ideas.IDEAS[0]._replace(shapes=("long rows",), passes=("forward",)), routes.fused
    monkeypatch.setattr(ideas, "IDEAS", [idea])
    monkeypatch.setattr(timing, "turn", lambda call: (call(), 1e-3 if routes.fused is fused else 3e-3)[1])
    monkeypatch.setattr(quickbench, "crowded", lambda before, seconds, threads: None)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- ideas:begin -->\nold\n<!-- ideas:end -->\nafter\n")
    assert ideas.main(["--seconds", "1e-9", "--readme", str(readme)]) == 0
    line = rf"\| {idea.name} \| long rows \| forward \| 3 ms \| 1 ms \| 3.00x \|"
    assert re.fullmatch(f"before\n<!-- .*-->\n[|].*\n{line}\n\n.*<!-- .* -->\nafter\n", readme.read_text(), re.DOTALL)


def test_the_readme_has_every_idea():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- ideas:begin -->\n(.*?)<!-- ideas:end -->", readme, re.DOTALL)[1]
    rows = [tuple(cell.strip(" *") for cell in line.split("|")[1:4]) for line in block.splitlines() if line[:1] == "|"]
    assert rows[2:] == [(i.name, shape, what) for i in ideas.IDEAS for shape in i.shapes for what in i.passes]
