"""What every `python -m bench.*` shares: how it ends, the JSON that it writes, the block of a page that it fills."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastbn.arguments.errors import MissingExtra
from fastbn.cli.files import replacing

RESULTS = Path(__file__).parent / "results"


def main(
    make_parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a command line; what a person did wrong, or what lacks, is one line, and no traceback.

    The exit code is what `run` returns, 2 for bad input or a package that lacks, 130 for an interrupt.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MissingExtra) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2


def add_outputs(parser: argparse.ArgumentParser, name: str, json: str, source: bool = True, **how: Any) -> None:
    """--json, with this help, --readme for a page's block of this name, and --from where `source` says so."""
    add = partial(parser.add_argument, type=Path, metavar="FILE")
    add("--json", help=json, **how)
    add("--readme", help=f"replace the block between <!-- {name}:begin --> and <!-- {name}:end -->")
    if source:
        add("--from", dest="source", help="measure nothing: show an earlier result")


def rounded(value: Any) -> Any:
    """Five digits of every measured number: more are noise, and tables say the same from a result and from its file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def write_result(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all; nothing where there is no path."""
    if path is None:
        return
    text = json.dumps(rounded(result), separators=(",", ":"), ensure_ascii=False)
    with replacing(path) as file:
        file.write((text.replace('{"shape"', '\n{"shape"') + "\n").encode())  # a line per record, for git


def relative(path: Path, readme: Path) -> str:
    """A path as a page links it."""
    return Path(os.path.relpath(path.resolve(), readme.resolve().parent)).as_posix()


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a page, its first column to the left."""
    rule = ["---", *("---:" for _ in headers[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, rule, *lines))


def replace_block(path: Path, name: str, *parts: str) -> None:
    """Put paragraphs between the lines ``<!-- name:begin -->`` and ``<!-- name:end -->`` of a file.

    Without any it only looks whether the lines are there.

    Raises
    ------
    ValueError
        The file has no such lines, or several.
    """
    before = path.read_bytes().decode()
    block = re.compile(rf"(<!-- {name}:begin -->\r?\n).*?(<!-- {name}:end -->)", re.DOTALL)
    after, found = block.subn(lambda match: match[1] + "\n\n".join(parts) + "\n" + match[2], before)
    if found != 1:
        raise ValueError(
            f"{path}: has {found} blocks from <!-- {name}:begin --> to <!-- {name}:end -->, want one, markers on own "
            "lines"
        )
    if parts:
        with replacing(path) as file:
            file.write(after.encode())
        print(f"wrote the {name} block of {path}")
