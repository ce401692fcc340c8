"""How every `python -m bench.*` ends: what a person did wrong, or what lacks, is one line, and no traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fastbn.arguments.errors import MissingExtra


def main(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Run a command line; the exit code.

    What `run` returns, 2 for bad input or a package that lacks, 130 for an interrupt.
    """
    args = parser.parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MissingExtra) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
