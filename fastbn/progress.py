"""Tables of the commands, and their progress bars, with rich (the extra `demo`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

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
