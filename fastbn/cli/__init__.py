"""The command line: `python -m fastbn COMMAND`, or `fastbn COMMAND`."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, NamedTuple, TextIO

import fastbn
from fastbn.arguments import checks, dtypes
from fastbn.arguments.errors import BackendUnavailable, MissingExtra
from fastbn.cli import bench, info, npy_moments, selftest, train
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


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shape", metavar="SHAPE", help="of the array, like 32,64,56,56 or 32x64x56x56")
    parser.add_argument(
        "dtype", metavar="DTYPE", nargs="?", default="float32", help=f"{dtypes.WANTED} (default: float32)"
    )
    parser.add_argument(
        "--axis", type=int, default=1, metavar="A", help="the channel axis, negative counts from the end (default: 1)"
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="the channels are innermost in memory, wherever their axis is"
    )
    parser.add_argument("--backend", metavar="NAME", help="ask for one backend: cpu, cuda or reference")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.strip("()[] ").replace("x", ",").split(",") if n.strip())
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise ValueError(f"SHAPE: given {text!r}, want whole numbers with commas between them, like 32,64,56,56")
    return shape


def _explain(args: argparse.Namespace) -> int:
    print(
        fastbn.explain(
            _shape(args.shape), args.dtype, args.axis, channels_last=args.channels_last, backend=args.backend
        )
    )
    return 0


def _warmup_arguments(parser: argparse.ArgumentParser) -> None:
    all_of_them = ", ".join(selftest.DTYPES).replace("bfloat16", "bfloat16 where ml_dtypes is installed")
    help = f"compile for these dtypes only, like float32 (default: {all_of_them})"
    parser.add_argument("dtypes", metavar="DTYPE", nargs="*", help=help)


def _pytorch() -> Any:
    """PyTorch's threads, where it is installed and kernels run on them."""
    try:
        from fastbn.torch import openmp
    except (ImportError, OSError):  # the second from an installation that lacks a library
        return None
    return openmp.runtime()


def _warmup(args: argparse.Namespace) -> int:
    from numba.core import event

    from fastbn.cpu import passes

    start, forms, compiled = time.perf_counter(), 0, 0
    chosen = [checks.check_dtype(dtype) for dtype in args.dtypes] or selftest.installed()
    kept = info.cache_directory()
    if kept.startswith("nowhere"):  # an image that carries nothing must not look well built, and that takes minutes
        _complain(f"warmup has not begun, for kernels would be kept {kept}")
        return 1
    with event.install_recorder("numba:compile") as seen:
        for name in passes.warmup(chosen, _pytorch()):
            forms, compiled = forms + 1, compiled + bool(seen.buffer)
            seen.buffer.clear()
            print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)
    found = f"{compiled} compiled, {forms - compiled} found compiled"
    print(f"{forms} forms of kernels in {time.perf_counter() - start:.1f} s: {found}; kept in {kept}")
    return 0


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
        _explain_arguments,
        _explain,
    ),
    Command(
        "info",
        "versions, processor, threads, and which backends are there and why",
        ("info",),
        _no_arguments,
        info.run,
    ),
    Command(
        "check",
        "hold every public function against the float64 reference on this machine, in seconds (at first some minutes: "
        "it compiles)",
        ("check", "check --backend reference"),
        selftest.add_arguments,
        selftest.run,
    ),
    Command(
        "bench",
        "time fastbn against NumPy, and PyTorch where installed; or compare their accuracy",
        ("bench", "bench --accuracy", "bench --json speed.json --readme docs/benchmarks.md"),
        bench.add_arguments,
        bench.run,
    ),
    Command(
        "warmup",
        "compile every kernel ahead, for an image say, also for the threads of PyTorch where that is installed: a "
        "minute or two a dtype",
        ("warmup", "warmup float32", "NUMBA_CACHE_DIR=/var/cache/numba python -m fastbn warmup float32"),
        _warmup_arguments,
        _warmup,
    ),
)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 78)


def _epilog(examples: Sequence[str]) -> str:
    lines = (example if "fastbn" in example else f"{PROGRAM} {example}" for example in examples)
    return "examples:\n" + "\n".join(f"  {line}" for line in lines)


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:  # argparse itself ignores a full device, and without a buffer nothing is left to flush
            file.write(message)
        else:
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    shape: Any = argparse.RawDescriptionHelpFormatter  # the examples keep their lines
    parser = _Parser(
        prog=PROGRAM,
        description=_paragraph(
            "Batch normalization for NumPy arrays: train with it, take the statistics of a file, check it, time it."
        ),
        epilog=_epilog(("train", "moments images.npy", "explain 32,64,56,56 float32", "COMMAND --help")),
        formatter_class=shape,
    )
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from, not only its message")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
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


@contextmanager
def _writable() -> Iterator[None]:
    """Let stdout and stderr take any text, whatever their encoding, and no text where they are closed."""
    with ExitStack() as stack:
        for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            stream: Any = getattr(sys, name)
            # closed, `>&-`: nor may a file that is opened later take its number, and what libraries print
            if stream is None:
                stack.enter_context(
                    redirect(stack.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace")))
                )
                continue
            if isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
            stack.callback(_settle, stream)
        yield


def _settle(stream: TextIO) -> None:
    """Flush, or give up what can't be written, of which the interpreter would complain at its exit."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):  # no file below it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _complain(text: str) -> None:
    with suppress(OSError):  # then the exit code must say it
        print(f"fastbn: {text}", file=sys.stderr)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Let what fastbn warns of be a line like the others: no line of a program's is at fault."""
    show: Any = warnings.showwarning

    def line(message: Any, *where: Any, **how: Any) -> None:
        if str(message).startswith("fastbn "):
            _complain(str(message).removeprefix("fastbn "))
        else:
            show(message, *where, **how)

    module: Any = warnings
    module.showwarning = line
    try:
        yield
    finally:
        module.showwarning = show


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
    with _writable():
        try:
            try:
                args = _parser().parse_args(argv)
            except SystemExit:
                sys.stdout.flush()  # --help
                raise
            traceback = args.traceback
            with interrupts.terminable(), _plain_warnings():
                code: int = args.run(args)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            _complain("interrupted")
            return INTERRUPTED
        except BrokenPipeError:  # the reader, `head` say, has seen enough
            return CLOSED_PIPE
        except UnicodeEncodeError:  # a ValueError, but no bad input
            raise
        except (ValueError, TypeError, OSError, MissingExtra, BackendUnavailable) as error:  # DataError is a ValueError
            if traceback:
                raise
            _complain(str(error))
            return BAD_INPUT
