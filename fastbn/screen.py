"""Tables and progress bars of the commands, with rich (the extra `demo`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fastbn.errors import MissingExtra

T = TypeVar("T")


def need(*packages: str, command: str = "this command", named: str = "rich") -> None:
    """MissingExtra where a package of the extra `demo` is not installed: to be called before any work."""
    try:
        for package in packages or ("rich",):
            importlib.import_module(package)
    except ImportError as error:
        raise MissingExtra(f"{command} needs {named}: pip install 'fastbn[demo]'") from error


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> None:
    """Print a table on stdout: the first column to the left, numbers to the right; cut at the terminal's width, or at `width`."""
    need()
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=SIMPLE, show_edge=False, pad_edge=False)
    for i, header in enumerate(headers):
        drawn.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    Console(highlight=False, markup=False, width=width).print("", drawn, "", sep="\n")


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int], Callable[[int], object]]]:
    """Progress bars in bytes on stderr, nothing where that is no terminal: (what, total) -> (bytes done since) -> None."""
    need()
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>15}"), BarColumn(20), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def start(what: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(what, total=total)
            return lambda done: progress.advance(task, done)

        yield start


@contextmanager
def tracked(items: Iterable[T], what: str) -> Iterator[Iterable[T]]:
    """The items, with a progress bar on stderr, nothing where that is no terminal."""
    need(command=f"{what} with a progress bar (progress=False: without)")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>15}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress.track(items, description=what)
