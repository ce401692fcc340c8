"""Tables of the commands, and their progress bars, with rich (the extra `demo`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fastbn.arguments.errors import MissingExtra

T = TypeVar("T")


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


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Progress bars in bytes on stderr, nothing where that is no terminal.

    (what, total) -> (bytes done since) -> None.
    """
    need()
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>15}"),
        BarColumn(20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def start(what: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(what, total=total)
            return lambda done: progress.advance(task, done)

        yield start


@contextmanager
def tracked(items: Iterable[T], what: str) -> Iterator[Iterable[T]]:
    """The items, with a progress bar on stderr, nothing where that is no terminal or rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield items
        return

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>15}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress.track(items, description=what)
