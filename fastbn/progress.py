"""Tables of the commands, and their progress bars, with rich (the extra `demo`)."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fastbn.arguments.errors import MissingExtra

T = TypeVar("T")
LINE_SECONDS = 10.0  # between the lines where stderr is no terminal


def need(*packages: str, command: str = "this command", named: str = "rich") -> None:
    """MissingExtra where a package of the extra `demo` is not installed: to be called before any work."""
    try:
        for package in packages or ("rich",):
            importlib.import_module(package)
    except ImportError:
        raise MissingExtra(f"{command} needs {named}: pip install 'fastbn[demo]'") from None


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout: the first column to the left, numbers to the right.

    As wide as it is, no digit is cut.
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    for row in ((), headers, rule, *rows, ()):
        cells = (f"{cell:{'>' if i else '<'}{width}}" for i, (cell, width) in enumerate(zip(row, widths, strict=False)))
        print("  ".join(cells).rstrip())


def bars(*columns: Any) -> Any:
    """rich's progress bars with these columns, on stderr, or nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Progress in bytes: (what, total) -> (bytes done since) -> None."""
    need()
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    named = TextColumn("{task.description:>15}")
    with bars(named, BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:

        def start(what: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(what, total=total)
            return lambda done: progress.advance(task, done)

        yield start


@contextmanager
def tracked(items: Iterable[T], what: str) -> Iterator[Iterable[T]]:
    """The items, with a progress bar; nothing where rich is not installed."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        yield items
        return
    named = TextColumn("{task.description:>15}")
    with bars(named, BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        yield progress.track(items, description=what)


class Task:
    """Something that is counted while it goes on: so much done of a total, or None, and a note."""

    def __init__(self, bars: Any, what: str, total: int | None) -> None:
        self.bars, self.what, self.total = bars, what, total
        self.done, self.note, self.begun = 0, "", time.monotonic()
        self.number = bars.add_task(what, total=total, count=self.count, note="")

    @property
    def count(self) -> str:
        """How far it is."""
        return "" if self.total is None else f"{self.done:,}/{self.total:,}"

    def update(self, done: int, note: str = "") -> None:
        """So much done in all."""
        self.done, self.note = done, note
        self.bars.update(self.number, completed=done, count=self.count, note=note)

    def end(self) -> None:
        """Over, also where its total is unknown or not reached."""
        self.total = self.done
        self.bars.update(self.number, total=max(1, self.done), completed=max(1, self.done))

    def line(self) -> str:
        """The task where no bar can be drawn."""
        return ", ".join(filter(None, (f"{self.what}: {time.monotonic() - self.begun:.0f} s", self.count, self.note)))


@contextmanager
def counted() -> Iterator[Callable[[str, int | None], Task]]:
    """Progress of what is counted: (what, total or None) -> a Task, on stderr.

    Bars on a terminal; elsewhere a line every ten seconds for each task that is not over.
    """
    need()
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

    named = TextColumn("{task.description:>24}", markup=False)
    count, note = TextColumn("{task.fields[count]:>13}"), TextColumn("{task.fields[note]}", markup=False)
    tasks: list[Task] = []
    over = threading.Event()

    def lines() -> None:
        while not over.wait(LINE_SECONDS):
            for task in tasks:
                if task.done != task.total:
                    with suppress(OSError):
                        print(task.line(), file=sys.stderr, flush=True)

    with bars(named, BarColumn(20), count, TimeElapsedColumn(), note) as progress:
        writer = threading.Thread(target=lines, name="fastbn-progress", daemon=True)
        if progress.disable:
            writer.start()

        def start(what: str, total: int | None) -> Task:
            tasks.append(Task(progress, what, total))
            return tasks[-1]

        try:
            yield start
        finally:
            over.set()
            if writer.ident:
                writer.join()
