"""The command line: `python -m fastbn COMMAND`, or `fastbn COMMAND`."""

from __future__ import annotations

import argparse
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import fastbn
from fastbn.arguments.errors import BackendUnavailable, DataError, MissingExtra
from fastbn.cli import bench, claims, console, explain, info, npy_moments, options, selftest, train, warmup
from fastbn.cpu import interrupts

PROGRAM = "python -m fastbn"  # works where scripts are not on the PATH
BAD_INPUT = 2  # argparse's own code for it
INTERRUPTED = 128 + signal.SIGINT
CLOSED_PIPE = 128 + 13  # SIGPIPE has no name on Windows


class Command(NamedTuple):
    """One subcommand: a line of --help, its examples, its options, and what it does (returning the exit code)."""

    name: str
    line: str
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


COMMANDS = (
    Command(
        "train",
        "train a network on real handwritten digits, with and without batch normalization, and compare the two",
        ("train", "train --optimizer adam --activation relu --plot adam.png", "train --data mnist/ --batch 128"),
        train.add_arguments,
        train.run,
    ),
    Command(
        "claims",
        "try what is said of batch normalization on real images: an experiment, a picture and a verdict for each claim",
        ("claims", "claims --quick --only rate,depth", "claims --data mnist/ --out mnist-claims"),
        claims.add_arguments,
        claims.run,
    ),
    Command(
        "moments",
        "mean and standard deviation per channel of a .npy file of any size, in bounded memory",
        (
            "moments images.npy",
            "moments table.npy --axis -1 --save statistics.npz",
            "moments images.npy --normalize normalized.npy",
        ),
        npy_moments.add_arguments,
        npy_moments.run,
    ),
    Command(
        "explain",
        "say which kernel and schedule will run for an array",
        ("explain 32,64,56,56 float32", "explain 32x64x56x56 float32 --channels-last", "explain 4096,256 float64"),
        explain.add_arguments,
        explain.run,
    ),
    Command(
        "info", "versions, processor, threads, and which backends are there and why", ("info",), _no_arguments, info.run
    ),
    Command(
        "check",
        "hold every public function against the float64 reference on this machine, in seconds (at first some "
        "minutes: it compiles)",
        ("check", "check --backend reference"),
        selftest.add_arguments,
        selftest.run,
    ),
    Command(
        "bench",
        "time fastbn against NumPy, and PyTorch where installed",
        ("bench", "bench --repeats 3 --json speed.json"),
        bench.add_arguments,
        bench.run,
    ),
    Command(
        "warmup",
        "compile every kernel ahead, for an image say, also for the threads of PyTorch where that is installed: a "
        "minute or two a dtype",
        ("warmup", "warmup float32", "NUMBA_CACHE_DIR=/var/cache/numba python -m fastbn warmup float32"),
        warmup.add_arguments,
        warmup.run,
    ),
)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 78)


def _epilog(examples: Sequence[str]) -> str:
    lines = (example if "fastbn" in example else f"{PROGRAM} {example}" for example in examples)
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


def _no_command(args: argparse.Namespace) -> int:
    raise DataError(f"COMMAND: given none, want {options.listed([command.name for command in COMMANDS])}")


def _parser() -> argparse.ArgumentParser:
    shape: Any = argparse.RawDescriptionHelpFormatter  # the examples keep their lines
    parser = options.Parser(
        prog=PROGRAM,
        description=_paragraph(
            "Batch normalization for NumPy arrays: train with it, take the statistics of a file, check it, time it."
        ),
        epilog=_epilog(("train", "moments images.npy", "explain 32,64,56,56 float32", "COMMAND --help")),
        formatter_class=shape,
    )
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from, not only its message")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    parser.set_defaults(run=_no_command)
    for command in COMMANDS:
        line = command.line[0].upper() + command.line[1:]
        sub = commands.add_parser(
            command.name,
            help=command.line,
            description=_paragraph(f"{line}."),
            epilog=_epilog(command.examples),
            formatter_class=shape,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Without the program's name; default the process's own.

    Returns
    -------
    int
        Exit code: 0, 1 where `check` fails or `warmup` can keep nothing, 2 for bad input or output that can't be
        written, 130 after an interrupt, 141 where the reader of the output has gone.
    """
    traceback = False
    with console.writable():
        try:
            try:
                args = _parser().parse_args(argv)
            except SystemExit:
                sys.stdout.flush()  # --help
                raise
            traceback = args.traceback
            with interrupts.terminable(), console.plain_warnings():
                code: int = args.run(args)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            console.complain("interrupted")
            return INTERRUPTED
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            return CLOSED_PIPE
        except UnicodeEncodeError:  # a ValueError, but no bad input
            raise
        except (ValueError, TypeError, OSError, MissingExtra, BackendUnavailable) as error:  # DataError is a ValueError
            if traceback:
                raise
            console.complain(str(error))
            return BAD_INPUT
