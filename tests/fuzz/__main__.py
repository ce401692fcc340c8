"""Every kind of array, right and wrong, into every argument and attribute of every public call, until one does what it
should not.

    python -m tests.fuzz                        a minute
    python -m tests.fuzz --seconds 3600         an hour
    python -m tests.fuzz --seed 1 --call 4711   one call again, as a finding names it

Arrays end, or begin, at pages that nobody may touch, so that a read or write beyond them ends the process; what lies
between their elements is looked at after each call, results are held against float64 formulas. A call must be served
right where the documentation says so, else refused in words that name the argument, or served right; one that is
refused leaves nothing changed. It forks.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import math
import mmap
import os
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("NUMBA_NUM_THREADS", "2")

from .judge import Finding, Judge
from .profiles import Profiles, load

# seconds without a call, after which a process hangs: a first call compiles, on a busy machine for minutes
SILENCE = 300.0
SPARE = 3  # times that one kind of call may end a process
PLACE = 8192  # of what was counted, behind the words


class Said:
    """Memory that outlives a process: the call it is at, and what it counted."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 2**16)

    def call(self, text: str) -> None:
        self._write(0, text.encode()[: PLACE // 2])

    def last(self) -> list[Any]:
        """Number, function, odd arguments, all kinds."""
        try:
            found: list[Any] = json.loads(self._read(0))
        except ValueError:
            return [-1, "before the first call", "", ""]
        return found

    def count(self, counts: Counter[str]) -> None:
        self._write(PLACE, json.dumps(counts).encode())

    def counted(self) -> Counter[str]:
        return Counter(json.loads(self._read(PLACE) or b"{}"))

    def _write(self, at: int, text: bytes) -> None:
        self._map[at : at + 4 + len(text)] = struct.pack("I", len(text)) + text

    def _read(self, at: int) -> bytes:
        return self._map[at + 4 : at + 4 + struct.unpack("I", self._map[at : at + 4])[0]]


class Child:
    """A process that makes the calls of some numbers."""

    def __init__(self, runner: Runner, numbers: range, until: float, name: str) -> None:
        self.numbers, self.said, self.log = numbers, Said(), Path(runner.folder.name, f"log{name}")
        self._seen: tuple[list[Any], float] = ([], time.monotonic())
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            try:
                runner.work(self, until)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)

    def silent(self) -> bool:
        """Whether it has hung, and was ended."""
        last = self.said.last()
        if last != self._seen[0]:
            self._seen = last, time.monotonic()
        if time.monotonic() - self._seen[1] > SILENCE:
            os.kill(self.process, signal.SIGABRT)
            self._seen = last, math.inf
        return self._seen[1] == math.inf

    def place(self) -> str:
        """The innermost line of fastbn's in what faulthandler wrote."""
        lines = [line.strip() for line in self.log.read_text().splitlines() if "fastbn/" in line and "File" in line]
        return lines[0].removeprefix("File ") if lines else ""


class Runner:
    """Processes that call, and what becomes of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.counts, self.found = arguments, Counter[str](), dict[str, Finding]()
        # of each finding; of each kind of call that ended a process
        self.times, self.ended = Counter[str](), Counter[str]()
        self.folder = tempfile.TemporaryDirectory()
        self._findings = Path(self.folder.name, "findings")
        self._findings.touch()
        self._read = 0
        self.enough: Callable[[Finding], bool] = lambda finding: False  # to stop at

    def run(self) -> None:
        """Until time is over, or the calls are made."""
        given, until = self.arguments, time.monotonic() + self.arguments.seconds
        ranges = [range(job, given.calls, given.jobs) for job in range(given.jobs)]
        if given.call is not None:
            ranges, until = [range(given.call, given.call + 1)], math.inf
        running = {job: Child(self, numbers, until, str(job)) for job, numbers in enumerate(ranges)}
        while running:
            time.sleep(0.02)
            if self._collect():
                for child in running.values():
                    os.kill(child.process, signal.SIGKILL)
                    os.waitpid(child.process, 0)
                return
            for job, child in list(running.items()):
                hung = child.silent()
                gone, status = os.waitpid(child.process, os.WNOHANG)
                if not gone:
                    continue
                del running[job]
                self.counts += child.said.counted()
                if status:
                    rest = self._died(child, "hangs" if hung else f"ends the process ({ended(status)})")
                    if rest and time.monotonic() < until:
                        running[job] = Child(self, rest, until, str(job))
        self._collect()

    def _collect(self) -> bool:
        """Read what children have found; whether that is enough."""
        with self._findings.open() as file:
            file.seek(self._read)
            text = file.read()
        lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        self._read += sum(len(line.encode()) for line in lines)
        for line in lines:
            self._take(Finding(*json.loads(line)))
        return any(map(self.enough, self.found.values()))

    def _died(self, child: Child, outcome: str) -> range:
        """The numbers that are left."""
        number, api, odd, kinds = child.said.last()
        self._take(Finding(self.arguments.seed, number, api, odd, outcome, f"{kinds}: {child.place()}"))
        self.ended[f"{api}({odd})"] += 1
        numbers = child.numbers
        return range(max(number, numbers.start) + numbers.step, numbers.stop, numbers.step)

    def _take(self, finding: Finding) -> None:
        self.times[finding.same] += 1
        kept = self.found.get(finding.same)
        if kept is None or len(finding.detail) < len(kept.detail):  # the plainest of these
            self.found[finding.same] = finding

    def work(self, child: Child, until: float) -> None:
        """The calls of a child, in it."""
        fault = child.log.open("w")
        faulthandler.enable(fault)
        judge = Judge(self.arguments.seed, self.arguments.dtypes.split(","), child.said.call, self._report)
        judge.fatal = {text for text, times in self.ended.items() if times >= SPARE}
        profiles = Profiles(self.arguments.torch)
        for number in child.numbers:
            if time.monotonic() > until:
                break
            one(judge, profiles, number, self.arguments.only)
            if number // self.arguments.jobs % 16 == 0:
                child.said.count(judge.counts)
        judge.world.end()
        gc.collect()
        child.said.count(judge.counts)

    def _report(self, finding: Finding) -> None:
        with self._findings.open("a") as file:
            file.write(json.dumps(finding) + "\n")

    def again(self, finding: Finding) -> str:
        """The command that makes its call."""
        options = "" if self.arguments.torch else " --no-torch"
        options += "" if self.arguments.dtypes == DTYPES else f" --dtypes {self.arguments.dtypes}"
        return f"python -m tests.fuzz --seed {finding.seed} --call {finding.number}{options}"

    def summary(self) -> str:
        """One line."""
        count, refusal = self.counts, "refused by "
        refused = [f"{name.removeprefix(refusal)} {n}" for name, n in sorted(count.items()) if name.startswith(refusal)]
        computed = f"{count['computed']} computed ({count['computed from odd arguments']} from odd arguments)"
        left = f"{count['skipped']} skipped, processes ended: {sum(self.ended.values())}, findings: {len(self.found)}"
        return f"fuzz: {count['calls']} calls, {computed}, refused: {', '.join(refused) or 'none'}; {left}"


def one(judge: Judge, profiles: Profiles, number: int, only: str | None) -> None:
    """A call, or some that belong together; nothing where another is wanted."""
    make = judge.begin(number)
    chosen = profiles.choose(make.rng)
    if only is not None and chosen.__name__ != only:
        return
    judge.guard = profiles.of(number)
    try:
        chosen(judge, make)
    except Exception as error:  # of the fuzz test itself, or an attribute that it can't read
        place = traceback.extract_tb(error.__traceback__)[-1]
        judge.found("fuzz", "", f"raised {type(error).__name__}: {str(error)[:80]}", f"{place.filename}:{place.lineno}")
    judge.world.thaw()


def ended(status: int) -> str:
    return (
        signal.Signals(os.WTERMSIG(status)).name
        if os.WIFSIGNALED(status)
        else (f"status {os.waitstatus_to_exitcode(status)}")
    )


DTYPES = "float32,float64,float16,bfloat16"


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="another number draws other calls")
    parser.add_argument("--calls", type=int, default=2**62, help="stop after the calls of so many numbers")
    parser.add_argument("--call", type=int, help="of this number alone")
    parser.add_argument("--only", help="such calls, e.g. batch_norm or layer, of all")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--dtypes", default=DTYPES, help=f"of x, by commas (default: {DTYPES})")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave fastbn.torch out")
    parser.add_argument("--json", action="store_true", help="findings as JSON, one a line")
    return parser.parse_args(words)


def main() -> int:
    arguments = parsed()
    load(arguments.torch)
    runner = Runner(arguments)
    runner.run()
    for finding in sorted(runner.found.values(), key=lambda finding: finding.same):
        times, again = runner.times[finding.same], runner.again(finding)
        if arguments.json:
            print(json.dumps({**finding._asdict(), "times": times, "again": again}))
        else:
            print(f"{finding.same}, {times} times: {again}\n    {finding.detail}")
    print(runner.summary())
    return int(bool(runner.found) or not runner.counts["calls"])


if __name__ == "__main__":
    sys.exit(main())
