"""What is kept of the runs, and the page that tells of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fastbn
from fastbn.arguments.errors import DataError
from fastbn.cli import files, info
from fastbn.cli.claims.runs import BATCH, WIDTH, Finding, Plan, Result, Run
from fastbn.cli.train.data import Dataset

FILE = "claims.json"
PAGE = "claims.md"
# Of what runs measure and how: raised with every change of it, so that runs kept before are made anew.
FORMAT = 1
MADE_BY = f"{fastbn.__version__}/{FORMAT}"


def fingerprint(data: Dataset) -> str:
    """Of the images and labels, whatever the directory is called."""
    found = hashlib.sha256()
    for array in (data.images, data.labels, data.test_images, data.test_labels):
        found.update(repr((array.shape, array.dtype.str)).encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


class Kept:
    """The finished runs in a file, of any data and settings: a run that is in it need not be made again."""

    def __init__(self, path: Path, data: Dataset) -> None:
        self.path, self.data = path, {"name": data.name, "fingerprint": fingerprint(data)}
        self.entries: dict[str, dict[str, Any]] = {}
        self.results: dict[Run, Result] = {}
        self._read()

    def _read(self) -> None:
        """Take in what is in the file, perhaps from another command at work beside this one."""
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))["runs"]
            runs = [(Run(**entry["run"]), entry) for entry in found]
            for run, entry in runs:
                hash(run), entry["result"]["seconds"] + 0.0, entry["data"]["fingerprint"], entry["fastbn"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"--out: {self.path} holds no runs of this command ({type(error).__name__}: {error}); give another "
                "directory, or remove the file"
            ) from error
        for run, entry in runs:
            self._take(run, entry)

    def _take(self, run: Run, entry: dict[str, Any]) -> None:
        self.entries[json.dumps([entry["fastbn"], entry["data"]["fingerprint"], run])] = entry
        if entry["data"]["fingerprint"] == self.data["fingerprint"] and entry["fastbn"] == MADE_BY:
            self.results[run] = entry["result"]

    def add(self, run: Run, result: Result) -> None:
        """Keep it: the file is written whole, beside the old one, which it then replaces."""
        self._read()
        self._take(run, {"fastbn": MADE_BY, "data": self.data, "run": run._asdict(), "result": result})
        with files.replacing(self.path) as file:
            lines = ",\n".join(json.dumps(entry) for entry in self.entries.values())
            file.write(f'{{"runs": [\n{lines}\n]}}\n'.encode())

    @contextmanager
    def believed(self) -> Iterator[None]:
        """Results are as they were written, or the file has been changed by other hands."""
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(
                f"--out: {self.path} holds a run that can't be read ({type(error).__name__}: {error}); remove the file"
            ) from error


def page(data: Dataset, plan: Plan, findings: Sequence[tuple[Any, Finding]], seconds: float) -> str:
    """The report, as Markdown: each claim with its sentence, what was done, table, picture and verdict."""
    (height, width), facts = data.pixels, info.machine()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("fastbn", "numpy", "numba", "python"))
    parts = [
        f"# What batch normalization does, on {plain(data.name)}",
        f"{plan.images:,} images of {height} x {width} pixels to train on, {plan.test_images:,} to test; hidden "
        f"layers of {WIDTH} units (three, where nothing else is said), batches of {BATCH}, plain gradient descent "
        f"over {_steps(plan.steps)}, the learning rate falling to 0 over the last quarter; seed {plan.seed}. *With* "
        f"is with batch normalization before each activation. Made by `fastbn claims`: its runs took {seconds:.0f} s "
        f"of processor time. {facts['processor']}, {versions}, {facts['date']}.",
        _table(("claim", "", "verdict"), [(c.name, c.sentence, f.outcome) for c, f in findings], "ll"),
    ]
    for claim, finding in findings:
        parts += [
            f"## {claim.name}: {claim.sentence}",
            finding.done,
            _table(finding.headers, finding.rows, "r"),
            f"![{claim.name}]({claim.name}.png)",
            f"**{finding.outcome.capitalize()}.**",
            "\n".join(f"* {sentence}" for sentence in finding.verdict),
            f"*The rule:* {finding.rule}",
        ]
    return "\n\n".join(parts) + "\n"


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


def plain(name: str) -> str:
    """A directory's name, of any letters, as one line of text."""
    return name.encode(errors="backslashreplace").decode().replace("\n", " ")


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], rest: str) -> str:
    aligned = ["---", *(("---:" if rest == "r" else "---") for _ in headers[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, aligned, *rows))
