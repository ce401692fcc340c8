"""Accuracy beside PyTorch's on float32 data where sums of squares, float32 sums and poor shifts go wrong.

`python -m bench.accuracy`, see --help.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn
from bench import command, pytorch
from fastbn import progress, reference
from fastbn.arguments import config
from fastbn.cli import files, info
from fastbn.cli.selftest import error

Array = NDArray[Any]

COMMAND = "python -m bench.accuracy"
SHAPE = (32, 16, 56, 56)
EPS = config.EPS


def accuracy_cases(shape: tuple[int, ...], axis: int = 1, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Named inputs of one shape, each hard for another reason.

    Parameters
    ----------
    shape : tuple of int
        Of every array.
    axis : int
        The channel axis; ramp and outlier run along all others.
    seed : int
        Of the normal noise, standard deviation 1, that all but the constant are made of.

    Returns
    -------
    dict of str to ndarray, shape `shape`, float32, C order
        ``offset 0``, ``offset 1e2``, ``offset 1e4``, ``offset 1e6``: noise around a mean.
        ``ramp 0..1e4``: noise on a rise, so that no block's mean is the channel's.
        ``outlier 1e6``: one such value per channel, the first of channel 0, elsewhere in the others.
        ``scale 1e-18``, ``scale 1e30``: variances below and beyond float32.
        ``constant 1e7/3``: no variance, and a sum that float32 can't hold.
    """
    axis %= len(shape)
    channels = shape[axis]
    count = math.prod(shape) // max(channels, 1)
    noise = np.random.default_rng(seed).standard_normal((count, channels))
    outlier = noise.copy()
    if count:
        c = np.arange(channels)
        outlier[c * 7919 % count, c] = 1e6
    rows = {
        "offset 0": noise,
        "offset 1e2": noise + 1e2,
        "offset 1e4": noise + 1e4,
        "offset 1e6": noise + 1e6,
        "ramp 0..1e4": noise + np.linspace(0.0, 1e4, count)[:, None],
        "outlier 1e6": outlier,
        "scale 1e-18": noise * 1e-18,
        "scale 1e30": noise * 1e30,
        "constant 1e7/3": np.full_like(noise, 1e7 / 3),
    }
    moved = (*shape[:axis], *shape[axis + 1 :], channels)
    return {name: np.ascontiguousarray(np.moveaxis(x.reshape(moved), -1, axis), np.float32) for name, x in rows.items()}


def _fastbn(x: Array) -> tuple[Array, Array]:
    """(y, var)."""
    y, m = fastbn.batch_norm(x, eps=EPS)
    return y, m.var()


def _pytorch(x: Array) -> tuple[Array, Array]:
    """(y, var); var from a call without eps, since 1 / rstd**2 - eps would lose it."""
    library = pytorch.library()
    tensor = library.from_numpy(x)
    y = library.nn.functional.batch_norm(tensor, None, None, training=True, eps=EPS)
    rstd = library.native_batch_norm(tensor, None, None, None, None, True, 0.1, 0.0)[2].numpy().astype(np.float64)
    with np.errstate(divide="ignore"):
        return y.numpy(), np.where(rstd == 0, 0.0, rstd**-2.0)


def accuracy(shape: tuple[int, ...] = SHAPE) -> list[dict[str, Any]]:
    """One record per case: its name, and the worst errors of var and of y, by library and place of the channels.

    The error of var is relative, or absolute where var is 0; that of y is in units of max(1, |xhat|).
    """
    calls = {"fastbn": _fastbn, **({"PyTorch": _pytorch} if pytorch.there() else {})}
    rows = []
    for case, x in accuracy_cases(shape).items():
        wide = x.astype(np.float64).reshape(*shape[:2], -1)
        m = reference.moments(wide)
        var, y = m.var(), reference.normalize(wide, m.mean, m.rstd(EPS), None, None, np.empty_like(wide))
        memory = {"first": x, "last": np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)}
        errors = {}
        for name, call in calls.items():
            for channels, array in memory.items():
                found_y, found_var = call(array)
                canonical = np.ascontiguousarray(found_y, np.float64).reshape(y.shape)
                with np.errstate(invalid="ignore"):  # Inf where a peer overflows
                    worst_var = error(found_var, var, np.where(var == 0, 1.0, var))
                    errors[f"{name} {channels}"] = {
                        "var": worst_var,
                        "y": error(canonical, y, np.maximum(1.0, np.abs(y))),
                    }
        rows.append({"case": case, "errors": errors})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines; a cell is "error of var / error of y"."""
    lines = [[row["case"], *(f"{e['var']:.0e} / {e['y']:.0e}" for e in row["errors"].values())] for row in rows]
    return ["float32 data", *rows[0]["errors"]], lines


NOTE = (
    "Worst errors of var / of y, against float64 on the same float32 data: of var relative (absolute where it is 0), "
    f"of y in units of max(1, abs(xhat)). Shape {'x'.join(map(str, SHAPE))}, channels first or last in memory."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Worst errors on hard float32 data, fastbn's and PyTorch's, where that is installed."
    )
    command.add_outputs(parser, "accuracy", "write the numbers", source=False)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.readme:
        command.replace_block(args.readme, "accuracy")
    if args.json:
        files.check_output(args.json, 2**20)
    pytorch.set_threads(fastbn.get_num_threads())
    facts, rows = info.machine(), accuracy()
    progress.table(*table(rows))
    print(textwrap.fill(f"{NOTE} {info.sentence(facts)}.", 79))
    if args.json:
        with files.replacing(args.json) as file:
            file.write(json.dumps({"machine": facts, "accuracy": rows}, indent=1).encode())
        print(f"wrote {args.json}")
    if args.readme:
        written = f"{NOTE} {info.sentence(facts)}. Written by `{COMMAND}`."
        command.replace_block(args.readme, "accuracy", command.markdown(*table(rows)), written)
    return 0


main = partial(command.main, _parser, run)

if __name__ == "__main__":
    sys.exit(main())
