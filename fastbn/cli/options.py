"""Options of the commands: what they take, and the one line where they are given something else."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastbn.arguments.errors import DataError


def listed(names: Sequence[str]) -> str:
    """The names in a sentence: a, b or c."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def whole(text: str, least: int | None = None) -> int:
    """Read a whole number, of so much at the least."""
    try:
        if least is None or int(text) >= least:
            return int(text)
        given = text
    except ValueError:
        given = repr(text)
    limit = "" if least is None else f", {least} or more"
    raise argparse.ArgumentTypeError(f"given {given}, want a whole number{limit}")


def whole_from(least: int) -> Callable[[str], int]:
    """Read a whole number of so much or more: the type of an option."""
    return lambda text: whole(text, least)


def number(text: str) -> float:
    """Read a number; its range is the command's business."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"given {text!r}, want a number") from None


def above_zero(text: str, want: str = "a number above 0, like 0.1") -> float:
    """Read a finite number above 0."""
    try:
        if 0 < float(text) < math.inf:
            return float(text)
        given = text
    except ValueError:
        given = repr(text)
    raise argparse.ArgumentTypeError(f"given {given}, want {want}")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line like every other, DataError, without the usage."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.register("type", int, whole)
        self.register("type", float, number)

    def parse_known_args(self, *args: Any, **how: Any) -> tuple[Any, list[str]]:
        """Refuse what is not known here, where the command's name is: argparse leaves that to the program's parser."""
        found, others = super().parse_known_args(*args, **how)
        if others:
            self.error(f"{others[0]}: not taken here")
        return found, others

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        message = message.removeprefix("argument ").replace("the following arguments are required", "missing")
        if "given " not in message:  # words that do not say what is wanted
            message = f"{message}; `{self.prog} --help` shows what is"
        raise DataError(message) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"given {value!r}, want {listed(list(action.choices))}")

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:  # argparse itself ignores a full device, and without a buffer nothing is left to flush
            file.write(message)
        else:
            super()._print_message(message, file)
