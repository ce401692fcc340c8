"""Files that commands write: looked at before any work, and written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def circular(path: Path) -> bool:
    """Whether links lead in a circle, at the end of a path or on its way."""
    try:
        # which leaves such links, and no others; Path.resolve raises RuntimeError, until Python 3.13
        found = Path(os.path.realpath(path))
    except FileNotFoundError:  # the current directory is gone
        return False
    return any(part.is_symlink() for part in (found, *found.parents))


def _resolved(path: Path) -> Path:
    """Absolute, and what links lead to: the name that a file is replaced under."""
    if circular(path):
        raise ValueError(f"{path}: leads in a circle of links; give another name")
    try:
        return Path(os.path.realpath(path))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: the current directory is gone; change into another, or give an absolute name"
        ) from None


def check_output(path: Path, nbytes: int, source: Path | None = None) -> Path:
    """Resolve the path of an output of so many bytes; ValueError, before any work, where it can't be written."""
    path = _resolved(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no directory {path.parent}; make it first")
    if path.exists():
        if not path.is_file():
            raise ValueError(f"{path}: is not a file and can't be replaced; give another name")
        if source and path.samefile(source):
            raise ValueError(f"{path}: is the input itself; give the output another name")
    free = shutil.disk_usage(path.parent).free
    if free < nbytes:
        raise ValueError(
            f"{path}: needs {nbytes:,} bytes, its disk has {free:,} left; free some or choose another disk"
        )
    return path


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that replaces it at the end; after an error or an interrupt nothing is left of it."""
    path = _resolved(path)
    # 60 letters: 240 bytes of the 255 that a name may have
    part = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
