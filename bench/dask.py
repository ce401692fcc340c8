"""Statistics and normalization of an array far larger than memory, by fastbn.dask: `python -m bench.dask`, see --help.

A synthetic array, made block by block, goes through moments, then through normalize, with the mean of the result as the
end; the process may hold no more than the limit at any time.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import command
from bench.machine import peak
from fastbn.cli import info
from fastbn.cli.files import replacing

COMMAND = "python -m bench.dask"
GB = 1e9
CHANNELS, PIXELS = 64, 56
STD = 2.0
SURE = 6.0  # standard errors that a sampled mean, or standard deviation, may be off
THREADS = 8  # at most, unless told: each holds a few blocks


def offsets() -> NDArray[np.float32]:
    """The mean of each channel: 0 to 1000, where sums of squares in float32 have lost the variance."""
    return np.linspace(0.0, 1e3, CHANNELS, dtype=np.float32)


def block(number: NDArray[np.int64], images: int) -> NDArray[np.float32]:
    """Normal values, the same for the same number: (images, C, H, W)."""
    rng = np.random.Generator(np.random.SFC64(int(number.flat[0])))
    x = rng.standard_normal((images, CHANNELS, PIXELS, PIXELS), np.float32)
    x *= np.float32(STD)
    x += offsets().reshape(-1, 1, 1)
    return x


def synthetic(gigabytes: float, chunk_mb: float) -> Any:
    """A dask array of float32 of at least so many bytes, in blocks of about so many, none of which exists yet."""
    import dask.array as da

    image = 4 * CHANNELS * PIXELS**2
    images = max(1, round(chunk_mb * 1e6 / image))
    blocks = math.ceil(gigabytes * GB / (images * image))
    numbers = da.arange(blocks, chunks=1)
    chunks = ((images,) * blocks, (CHANNELS,), (PIXELS,), (PIXELS,))
    return numbers.map_blocks(
        block, images, chunks=chunks, new_axis=(1, 2, 3), dtype=np.float32, meta=np.empty((0,) * 4, np.float32)
    )


def measured(gigabytes: float, limit: float, chunk_mb: float, threads: int) -> dict[str, Any]:
    """Time and peak memory; MemoryError as soon as the limit is passed, ArithmeticError for wrong results."""
    import dask
    from dask.callbacks import Callback
    from dask.diagnostics import ProgressBar

    import fastbn.dask

    def stop(*_: Any) -> None:
        if peak() > limit * GB:
            raise MemoryError(f"held {peak() / GB:.2f} GB, want at most {limit:g} GB")

    x = synthetic(gigabytes, chunk_mb)
    start = time.perf_counter()
    bar = ProgressBar(out=sys.stderr) if sys.stderr.isatty() else nullcontext()
    with bar, Callback(posttask=stop), dask.config.set(scheduler="threads", num_workers=threads):
        m = fastbn.dask.moments(x).compute()
        between = time.perf_counter()
        y_mean = float(fastbn.dask.normalize(x, m).mean(dtype=np.float64).compute())
    end = time.perf_counter()
    stop()
    check(m, y_mean, x.size // CHANNELS)
    return {
        "kind": "dask",
        "machine": {**info.machine(), **{name: info.version(name) for name in ("fastbn", "numba", "numpy", "dask")}},
        "shape": list(x.shape),
        "bytes": x.nbytes,
        "chunk_bytes": math.prod(x.chunksize) * x.dtype.itemsize,
        "threads": threads,
        "seconds": {"moments": between - start, "normalize": end - between},
        "peak": peak(),
        "limit": limit * GB,
    }


def check(m: Any, y_mean: float, count: int) -> None:
    """ArithmeticError where the statistics are not those of the values that were drawn, or y is not centred."""
    error = STD / math.sqrt(count)
    off = {
        "count": abs(m.count - count),
        "mean, in standard errors": float(np.abs(m.mean - offsets()).max() / error) / SURE,
        "standard deviation, in standard errors": float(np.abs(m.std() - STD).max() / (error / math.sqrt(2))) / SURE,
        "mean of y": abs(y_mean) / 1e-6,  # each y is rounded to float32, to either side
    }
    wrong = {what: value for what, value in off.items() if not value <= 1}
    if wrong:
        raise ArithmeticError(f"wrong results, as multiples of what may be: {wrong}")


def sentence(result: dict[str, Any]) -> str:
    """One line on a result."""
    size = result["bytes"] / GB
    passes = ", ".join(
        f"{what} {seconds:.1f} s ({size / seconds:.2f} GB/s)" for what, seconds in result["seconds"].items()
    )
    return (
        f"{size:.2f} GB of float32 in blocks of {result['chunk_bytes'] / 1e6:.1f} MB on {result['threads']} threads: "
        f"{passes}, drawing the values included; peak memory {result['peak'] / GB:.2f} GB of {result['limit'] / GB:g} "
        "allowed"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="An array far larger than memory through fastbn.dask, in bounded memory."
    )
    add = parser.add_argument
    add("--gb", type=float, default=20.0, metavar="GB", help="size of the array, 1e9 bytes (default: %(default)g)")
    add(
        "--limit-gb",
        type=float,
        default=2.0,
        metavar="GB",
        help="memory of the process, at most (default: %(default)g)",
    )
    add("--chunk-mb", type=float, default=16.0, metavar="MB", help="size of a block (default: %(default)g)")
    add(
        "--threads",
        type=int,
        default=min(THREADS, info.cores()),
        metavar="N",
        help="of dask's scheduler (default here: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the result here")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where memory passes the limit or results are wrong."""
    for name in ("gb", "limit_gb", "chunk_mb"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: given {getattr(args, name):g}, want a number above 0")
    if args.threads < 1:
        raise ValueError(f"--threads: given {args.threads}, want 1 or more")
    import fastbn.dask  # noqa: F401 # MissingExtra, before any work

    try:
        result = measured(args.gb, args.limit_gb, args.chunk_mb, args.threads)
    except (MemoryError, ArithmeticError) as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 1
    if args.json:
        with replacing(args.json) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    print(sentence(result))
    print(info.sentence(result["machine"]))
    return 0


main = partial(command.main, _parser, run)

if __name__ == "__main__":
    sys.exit(main())
