"""The table of `fastbn bench`, written into a page: `python -m bench.quick --readme docs/benchmarks.md`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from bench import command
from fastbn.cli import bench, info

COMMAND = "python -m bench.quick"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="What `fastbn bench` measures, written into a page.")
    bench.add_arguments(parser)
    parser.add_argument("--readme", type=Path, metavar="FILE", help="the page, with <!-- speed:begin --> and its end")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where the machine was too busy for --readme."""
    if args.readme:
        command.replace_block(args.readme, "speed")
    result = bench.measured(args)
    if args.readme and result["doubt"]:
        print(f"{COMMAND}: {args.readme} is left as it was", file=sys.stderr)
        return 1
    if args.readme:
        written = f"{bench.NOTE} {info.sentence(result['machine'])}. Written by `{COMMAND}`."
        command.replace_block(args.readme, "speed", command.markdown(*bench.table(result["speed"])), written)
    return 0


main = partial(command.main, _parser, run)

if __name__ == "__main__":
    sys.exit(main())
