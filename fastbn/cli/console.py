"""stdout and stderr of the commands: any text, whatever their encoding, and what goes wrong in one line."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO


@contextmanager
def writable() -> Iterator[None]:
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


def complain(text: str) -> None:
    """A line on stderr."""
    with suppress(OSError):  # then the exit code must say it
        print(f"fastbn: {text}", file=sys.stderr)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Let what fastbn warns of be a line like the others: no line of a program's is at fault."""
    show: Any = warnings.showwarning

    def line(message: Any, *where: Any, **how: Any) -> None:
        if str(message).startswith("fastbn "):
            complain(str(message).removeprefix("fastbn "))
        else:
            show(message, *where, **how)

    module: Any = warnings
    module.showwarning = line
    try:
        yield
    finally:
        module.showwarning = show
