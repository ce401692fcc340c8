"""Which kernel and schedule will run for an array: the `explain` command, and shapes as they are typed."""

from __future__ import annotations

import argparse
import re

import fastbn
from fastbn.arguments import dtypes

SHAPE = re.compile(r"[(\[]?\s*(\d+(?:\s*[x,]\s*\d+)*)\s*,?\s*[)\]]?(\s+last)?", re.ASCII)


def parsed(text: str, name: str = "SHAPE", also: str = "") -> tuple[tuple[int, ...], bool]:
    """(shape, whether the channels are innermost in memory) of text like 32,64,56,56 or '32x64x56x56 last'.

    Raises
    ------
    ValueError
        It is not such a text; `name` says whose it is, `also` what else it may be.
    """
    found = SHAPE.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"{name}: given {text!r}, want whole numbers with commas between them, like 32,64,56,56, or with x, like "
            f"32x64x56x56, and ' last' behind them where the channels are last in memory{also}"
        )
    return tuple(map(int, re.findall(r"\d+", found[1]))), found[2] is not None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `explain` command."""
    parser.add_argument(
        "shape",
        metavar="SHAPE",
        help="of the array, like 32,64,56,56 or 32x64x56x56; '32x64x56x56 last' is the same as --channels-last",
    )
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


def run(args: argparse.Namespace) -> int:
    """Run the `explain` command."""
    shape, last = parsed(args.shape)
    last |= args.channels_last
    print(fastbn.explain(shape, args.dtype, args.axis, channels_last=last, backend=args.backend))
    return 0
