"""Do the tests notice a wrong line? A mutant is the package with one small error; the tests that run that line judge
it, as plain Python.

    python -m tests.mutants                                     this checkout's mutants, judged by its own tests
    python -m tests.mutants --root OTHER --json before.json     by those of another checkout
    python -m tests.mutants --compare before.json

Every function of the CPU kernels, their schedule, layouts and checks has one or more, found in another checkout by the
function's text. It forks; a few minutes on two cores.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

os.environ["NUMBA_DISABLE_JIT"] = "1"
os.environ["FASTBN_TEST_CACHE"] = "keep"  # the conftest.py of older checkouts wants it where numba is imported already

import hypothesis  # noqa: F401 # this and numba take a second to import: once for all processes
import numba  # noqa: F401
import pytest

from .mutations import ROOT, SCOPE, Mutant, chosen, functions

# What shows a wrong result of the files above on small arrays. Others are of processes, tables and packages, or for
# compiled kernels.
TESTS = (
    "cpu/test_kernels",
    "test_kernels",
    "test_contract",
    "test_backends",
    "arguments/test_layout",
    "arguments/test_errors",
    "test_layer_errors",
    "test_statistics",
    "test_functional_split",
    "test_half",
    "arguments/test_dtypes",
    "arguments/test_scalars",
    "arguments/test_foreign",
    "arguments/test_integers",
    "test_batchnorm",
    "test_kept",
    "test_properties",
    "cpu/test_threads",
    "test_fold",
    "test_determinism",
    "test_accuracy",
)
SLOW = 6  # seconds of a processor that a test may take; those that take longer as plain Python judge nothing
BUDGET = 60  # the same for all tests that judge a mutant
MEMORY = 8 * 2**30


class Judge:
    """A plugin of pytest: which tests run, in which order; what each took, and the lines that it ran."""

    def __init__(self, pick: Callable[[list[pytest.Item]], list[pytest.Item]], lines: str = "") -> None:
        self.pick, self.coverage = pick, None
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        if lines:
            import coverage

            self.coverage = coverage.Coverage(data_file=None, config_file=False, source=[lines])
            self.coverage.start()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = self.pick(items)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.coverage:
            self.coverage.switch_context(item.nodeid)
            signal.signal(signal.SIGVTALRM, _slow)  # which otherwise ends the process
            for module in [module for name, module in sys.modules.items() if name.startswith("fastbn")]:
                for value in vars(module).values():  # what a test finds in a cache, it doesn't run
                    getattr(value, "cache_clear", int)()
        signal.setitimer(signal.ITIMER_VIRTUAL, SLOW)
        began = time.process_time()
        yield
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        self.seconds[item.nodeid] = time.process_time() - began

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += [report.nodeid] if report.failed else []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.failed += [f"{report.nodeid}, at import"] if report.failed else []


def _slow(*_: object) -> None:
    raise TimeoutError("too slow as plain Python")


def run_tests(slot: Path, files: list[str], judge: Judge, *options: str) -> None:
    """Of the copy in this slot, in a process of its own; what comes of it lies in found.json."""
    copy = slot / "copy"
    with (slot / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    ours = (ROOT, ROOT / "tests" / "shared")
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).resolve() not in ours)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # the copy has its own
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    known = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # of what is imported already
    plain = ("-q", "-n0", "--tb=short", "-p", "no:cacheprovider", "-p", "no:randomly", f"--basetemp={slot / 'tmp'}")
    code = int(pytest.main([*plain, *known, *options, *files], plugins=[judge]))
    found: dict[str, Any] = {"code": code, "seconds": judge.seconds, "failed": judge.failed, "lines": {}}
    if judge.coverage:
        judge.coverage.stop()
        data = judge.coverage.get_data()
        for file in data.measured_files():
            found["lines"][Path(file).relative_to(copy).as_posix()] = data.contexts_by_lineno(file)
    (slot / "found.json").write_text(json.dumps(found))


class Bench:
    """A copy of a checkout for each process at a time, and what its tests run."""

    def __init__(self, root: Path, work: Path, jobs: int) -> None:
        self.root, self.slots = work / "root", [work / str(job) for job in range(jobs)]
        for name in ("fastbn", "tests", "bench"):  # once: the checkout may change meanwhile
            shutil.copytree(root / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root / "pyproject.toml", self.root)
        for slot in self.slots:
            shutil.copytree(self.root, slot / "copy")
        self.seconds: dict[str, float] = {}
        self.lines: dict[tuple[str, int], set[str]] = {}
        self.clock = int(time.time())

    def each(self, tasks: dict[Any, Callable[[Path], None]], limit: float) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Each task in a process of its own, one at a time in a slot; what it found, nothing where it ended before."""
        waiting, free, running = list(tasks.items()), list(self.slots), {}
        while waiting or running:
            while waiting and free:
                (key, task), slot = waiting.pop(0), free.pop()
                (slot / "found.json").unlink(missing_ok=True)
                process = multiprocessing.get_context("fork").Process(target=task, args=(slot,))
                process.start()
                running[process.sentinel] = key, slot, process, time.monotonic()
            wait(running, 1)
            for sentinel, (key, slot, process, began) in list(running.items()):
                if time.monotonic() - began > limit:
                    process.kill()
                if not process.is_alive():
                    process.join()
                    del running[sentinel]
                    free.append(slot)
                    answer = slot / "found.json"
                    yield key, json.loads(answer.read_text()) if answer.exists() else {}

    def learn(self) -> list[str]:
        """Run all tests once; those that fail, which judge nothing."""
        files = [f"tests/{name}.py" for name in TESTS if (self.root / f"tests/{name}.py").exists()]
        jobs, failed = len(self.slots), []

        def task(job: int) -> Callable[[Path], None]:
            return lambda slot: run_tests(
                slot, files, Judge(lambda items: items[job::jobs], str(slot / "copy" / "fastbn"))
            )

        for job, found in self.each({job: task(job) for job in range(jobs)}, 3600):
            if not found or not found["seconds"]:
                sys.exit(f"the tests can't be run: {self.slots[job].joinpath('log').read_text()[-3000:]}")
            failed += found["failed"]
            self.seconds |= found["seconds"]
            for file, lines in found["lines"].items():
                for line, names in lines.items():
                    self.lines.setdefault((file, int(line)), set()).update(names)
        self.seconds = {name: seconds for name, seconds in self.seconds.items() if name not in failed}
        return failed

    def covering(self, file: str, lines: range) -> list[str]:
        """The tests that run one of these lines: the quickest of each function, then any, while time is left."""
        names = set().union(*(self.lines.get((file, line), ()) for line in lines)) & self.seconds.keys()
        quickest: dict[str, str] = {}
        for name in sorted(names, key=lambda name: (self.seconds[name], name)):
            quickest.setdefault(name.partition("[")[0], name)
        others = names.difference(quickest.values())
        order = [*quickest.values(), *sorted(others, key=lambda name: random.Random(name).random())]
        spent = accumulate(self.seconds[name] for name in order)
        return [name for name, seconds in zip(order, spent, strict=True) if seconds < BUDGET]

    def judged(self, mutants: list[Mutant]) -> Iterator[tuple[Mutant, bool, str]]:
        """Each mutant, whether it is caught, and by what."""
        tasks = {}
        for mutant in mutants:
            file, lines = mutant.place(self.root)
            order = self.covering(file, lines)
            if order:
                tasks[mutant] = self._task(mutant, file, order)
            else:
                yield mutant, False, "no test runs it" if file else "no such function there"
        for mutant, found in self.each(tasks, 600):
            if not found:
                yield mutant, True, "it does not end, or ends the process"
            else:
                yield mutant, found["code"] != 0, (found["failed"] or [f"{len(found['seconds'])} tests"])[0]

    def _task(self, mutant: Mutant, file: str, order: list[str]) -> Callable[[Path], None]:
        self.clock += 2
        when = self.clock

        def pick(items: list[pytest.Item]) -> list[pytest.Item]:
            there = {item.nodeid: item for item in items}
            return [there[name] for name in order if name in there]

        def task(slot: Path) -> None:
            shutil.copytree(self.root / "fastbn", slot / "copy" / "fastbn", dirs_exist_ok=True)  # over the last mutant
            path = slot / "copy" / file
            path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
            os.utime(path, (when, when))  # one of its own: Python takes bytecode for that of a source by the second
            run_tests(slot, sorted({name.partition("::")[0] for name in order}), Judge(pick), "-x")

        return task

    def check(self) -> None:
        """A function as it is passes, and one that raises is caught: it is the copy that tests import."""
        function = next(function for function in functions("arguments/checks.py") if function.name == "as_input")
        right = function.mutant(*function.errors[0])._replace(new=function.old, operator="none")
        wrong = right._replace(new="def as_input(*_: Any, **__: Any) -> Any:\n    raise RuntimeError", operator="all")
        found = {mutant.operator: caught for mutant, caught, _ in self.judged([right, wrong])}
        if found != {"none": False, "all": True}:
            sys.exit(f"these tests can't judge: {found}")


# What a person reads


def table(rows: list[dict[str, Any]], before: dict[str, bool]) -> str:
    lines = ["| file | tried | caught before | caught now |", "| --- | ---: | ---: | ---: |"]
    for name in [*SCOPE, "all"]:
        some = [row for row in rows if name in (row["file"], "all")]
        counts = (
            len(some),
            sum(before[row["mutant"]] for row in some) if before else "",
            sum(row["caught"] for row in some),
        )
        lines += [f"| {name} | {' | '.join(map(str, counts))} |"] if some else []
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose tests judge")
    parser.add_argument("--json", type=Path, help="write the verdicts there")
    parser.add_argument("--compare", type=Path, help="verdicts that --json wrote")
    parser.add_argument("--only", default="", help="of functions (file:function) that match this")
    parser.add_argument("--count", type=int, help="so many, drawn")
    parser.add_argument("--seed", type=int, default=0, help="another number chooses other mutants")
    parser.add_argument("--list", action="store_true", help="show them and judge nothing")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args()
    mutants = {
        str(mutant): mutant
        for mutant in chosen(options.seed)
        if re.search(options.only, f"{mutant.file}:{mutant.function}")
    }
    mutants = dict(random.Random(options.seed).sample(list(mutants.items()), min(options.count or 10**9, len(mutants))))
    if options.list:
        print(*mutants, sep="\n")
        return 0
    before = (
        {row["mutant"]: row["caught"] for row in json.loads(options.compare.read_text())} if options.compare else {}
    )
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(options.root.resolve(), Path(work), options.jobs)
        failed = bench.learn()
        print(
            f"{len(bench.seconds)} tests judge; {len(failed)} fail or take over {SLOW} s as plain Python:",
            *failed,
            sep="\n  ",
            flush=True,
        )
        bench.check()
        for mutant, caught, by in bench.judged(list(mutants.values())):
            rows.append({"file": mutant.file, "mutant": str(mutant), "caught": caught, "by": by})
            if not caught:
                print(f"not caught, {by}: {mutant}", flush=True)
    print(table(rows, before), f"{time.monotonic() - began:.0f} s", sep="\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return int(any(not row["caught"] and before.get(row["mutant"], True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
