"""Statistics and normalization of .npy files larger than memory, and the `moments` command.

A file is read in its own memory order, a bounded piece at a time, into one buffer. Plain reads, not a memory map:
mapped pages count as this process's memory until something evicts them, and a file cut short under a map kills the
process with SIGBUS.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn import functional, progress
from fastbn.arguments import checks, config, dtypes
from fastbn.arguments.errors import DataError
from fastbn.cli import files
from fastbn.statistics import Moments

Array = NDArray[Any]
Advance = Callable[[int], object]

CHUNK_MB = 16.0  # two of them fit a common last-level cache: a chunk is still there when it is written
RAW = np.dtype("V2")  # how numpy.save writes bfloat16
HEADER_BYTES = 2**16  # read at most: NumPy refuses a header of more than 10,000, but only once it has it
SHOWN = 20  # channels printed; more are left to --save


class Npy(NamedTuple):
    """A checked .npy file: what its header says, and where the data begins.

    `dims` and `axis` are in the file's order, outermost first: the shape reversed for Fortran order.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    axis: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of data, the header not counted."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_npy(path: Path, axis: int, bfloat16: bool = False, integers: bool = False) -> Npy:
    """Read and check a header, and that the file is as long as it says.

    Parameters
    ----------
    path : Path
        Of the file.
    axis : int
        The channel axis.
    bfloat16 : bool
        Whether values of two raw bytes are that: what numpy.save writes of it says no more.
    integers : bool
        Whether those of 8 and 16 bits will do: for statistics, not to be normalized.

    Raises
    ------
    DataError
        Absent, not a .npy file, cut short, or of a dtype that is not supported.
    ValueError
        Rank below 2, axis out of range, no values.
    MissingExtra
        bfloat16 without `ml_dtypes`.
    """
    if not path.is_file():
        absent = (
            "leads in a circle of links"
            if files.circular(path)
            else "is a link to nothing"
            if path.is_symlink()
            else "no such file"
        )
        found = "is not a file" if path.exists() else absent
        raise DataError(f"{path}: {found}; want a .npy file, as numpy.save writes it")
    with path.open("rb") as file:
        shape, fortran, dtype, offset = _header(file.read(HEADER_BYTES), path)
    if bfloat16:
        if dtype != RAW:
            raise DataError(
                f"{path}: holds {dtype}, not bfloat16, which numpy.save writes as {RAW.str}: leave out --bfloat16"
            )
        dtype = dtypes.bfloat16()
    elif dtype == RAW:
        raise DataError(
            f"{path}: holds {RAW.str}, two bytes a value without a type: if they are bfloat16, add --bfloat16"
        )
    if not (dtypes.supported(dtype) or (integers and dtypes.small(dtype))):
        if dtypes.small(dtype):
            raise DataError(
                f"{path}: holds {dtype}, a copy to be normalized wants {dtypes.WANTED}: array.astype('float32') first"
            )
        raise DataError(
            f"{path}: holds {dtype}, want {dtypes.WANTED}, or integers of 8 or 16 bits: convert it first, "
            "array.astype('float32')"
        )
    missing = offset + math.prod(shape) * dtype.itemsize - path.stat().st_size
    if missing > 0 or min(shape, default=0) < 0:
        raise DataError(
            f"{path}: cut short: the header promises {dtype} of shape {shape}, {missing:,} bytes more than there are"
        )
    axis = checks.check_axis(shape, axis, str(path))
    if 0 in shape:
        raise DataError(f"{path}: holds no values, its shape is {shape}")
    if fortran:
        return Npy(path, dtype, shape, shape[::-1], len(shape) - 1 - axis, offset)
    return Npy(path, dtype, shape, shape, axis, offset)


def _header(start: bytes, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """(shape, whether in Fortran order, dtype, where the data begin) of a file that starts with these bytes."""
    if start.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: is an .npz archive, want a .npy file: save one of its arrays with numpy.save")
    if not start.startswith(b"\x93NUM"):
        raise DataError(f"{path}: is not a .npy file; want one as numpy.save writes it")
    file = io.BytesIO(start)
    try:
        version = np.lib.format.read_magic(file)
        # 3.0 is 2.0 in UTF-8, which only names of fields need: of records, which are refused.
        later = np.lib.format.read_array_header_2_0
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): later, (3, 0): later}.get(version)
        if read is not None:
            return *read(file), file.tell()
    except Exception as error:  # NumPy's parser lets tokenize's and ast's errors through
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: has a damaged .npy header ({reason})") from None
    raise DataError(
        f"{path}: is of .npy format {'.'.join(map(str, version))}, want 1.0, 2.0 or 3.0: save it again with numpy.save"
    )


class Chunk(NamedTuple):
    """A piece of a file, contiguous there.

    Native values in file order, all ranks kept, and the channels that it holds.
    """

    values: Array
    first: int  # channel


def _chunks(npy: Npy, limit: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(shape, first channel) of consecutive pieces of at most `limit` bytes, in file order.

    A piece is a range of one axis: the outermost one whose rows fit. Everything within is whole, everything outside is
    one index.
    """
    dims, axis = npy.dims, npy.axis
    split = next(
        d for d in range(len(dims)) if d == len(dims) - 1 or math.prod(dims[d + 1 :]) * npy.dtype.itemsize <= limit
    )
    step = max(1, limit // (math.prod(dims[split + 1 :]) * npy.dtype.itemsize))
    for outer in np.ndindex(*dims[:split]):
        for start in range(0, dims[split], step):
            shape = (*(1 for _ in outer), min(step, dims[split] - start), *dims[split + 1 :])
            yield shape, 0 if axis > split else (*outer, start)[axis]


def read_chunks(npy: Npy, limit: int) -> Iterator[Chunk]:
    """Read the whole file, once, through one buffer: a chunk is valid until the next."""
    buffer: NDArray[np.uint8] | None = None
    with npy.path.open("rb") as file:
        file.seek(npy.offset)
        for shape, first in _chunks(npy, limit):
            nbytes = math.prod(shape) * npy.dtype.itemsize
            if buffer is None:  # the first chunk is the largest
                buffer = np.empty(nbytes, np.uint8)
            if file.readinto(buffer[:nbytes].data) != nbytes:
                raise DataError(f"{npy.path}: was cut short while it was read")
            values = buffer[:nbytes].view(npy.dtype).reshape(shape)
            yield Chunk(_swap(values, npy.dtype.newbyteorder("=")), first)


def _swap(values: Array, dtype: np.dtype[Any]) -> Array:
    """Swap bytes in place where `dtype` has the other order."""
    return values if values.dtype == dtype else values.byteswap(inplace=True).view(dtype)


def file_moments(npy: Npy, limit: int, advance: Advance) -> Moments:
    """Moments of each channel of a file, in one pass.

    Parameters
    ----------
    npy : Npy
        From `open_npy`.
    limit : int
        Bytes in memory at a time.
    advance : callable
        Told the bytes done, chunk by chunk.
    """
    found: dict[int, Moments] = {}  # by first channel: a chunk holds all channels, a range of them, or one
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf propagate without a word
        for chunk in read_chunks(npy, limit):
            m = functional.moments(chunk.values, npy.axis)
            found[chunk.first] = found[chunk.first].merge(m) if chunk.first in found else m
            advance(chunk.values.nbytes)
    parts = [found[first] for first in sorted(found)]
    return Moments(parts[0].count, np.concatenate([m.mean for m in parts]), np.concatenate([m.m2 for m in parts]))


def write_normalized(npy: Npy, m: Moments, eps: float, limit: int, out: IO[bytes], advance: Advance) -> None:
    """Write (x - mean) / sqrt(var + eps) as a .npy file of the same dtype, shape and order.

    Parameters
    ----------
    npy, limit, advance
        As in `file_moments`.
    m : Moments
        Of each channel.
    eps : float
        Added to the variance, in units of x squared.
    out : binary file
        Takes header and data.
    """
    with npy.path.open("rb") as file:
        out.write(file.read(npy.offset))
    mean, var = m.mean, m.var()
    for x, first in read_chunks(npy, limit):
        own = slice(first, first + x.shape[npy.axis])
        functional.batch_norm_inference(x, mean[own], var[own], axis=npy.axis, eps=eps, out=x)
        out.write(_swap(x, npy.dtype).view(np.uint8).data)  # as bytes: bfloat16 has no buffer format
        advance(x.nbytes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `moments` command."""
    parser.add_argument(
        "file",
        metavar="FILE.npy",
        type=Path,
        help="floating point, or integers of 8 or 16 bits, two axes or more, as numpy.save writes it",
    )
    parser.add_argument(
        "--axis", type=int, default=1, metavar="A", help="the channel axis, negative counts from the end (default: 1)"
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="the file holds bfloat16, of which numpy.save writes two bytes a value"
    )
    parser.add_argument(
        "--save", type=Path, metavar="OUT.npz", help="write count, mean, var, std and axis for numpy.load"
    )
    parser.add_argument("--normalize", type=Path, metavar="OUT.npy", help="write the copy (x - mean) / sqrt(var + eps)")
    parser.add_argument(
        "--eps", type=float, default=config.EPS, metavar="E", help="added to the variance (default: %(default)s)"
    )
    parser.add_argument(
        "--chunk-mb",
        type=float,
        default=CHUNK_MB,
        metavar="MB",
        help="megabytes held in memory at a time (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the `moments` command."""
    eps = checks.check_eps(args.eps, training=False)
    if not 0 < args.chunk_mb < 1e6:
        raise ValueError(f"--chunk-mb: given {args.chunk_mb:g}, want a positive number of megabytes, e.g. {CHUNK_MB:g}")
    limit = int(args.chunk_mb * 1e6)
    npy = open_npy(args.file, args.axis, args.bfloat16, integers=args.normalize is None)
    if rest := npy.path.stat().st_size - npy.offset - npy.nbytes:
        print(f"{npy.path}: {rest:,} bytes after the first array are not read", file=sys.stderr)
    axis, channels = args.axis % len(npy.shape), npy.dims[npy.axis]
    copy = files.check_output(args.normalize, npy.offset + npy.nbytes, npy.path) if args.normalize else None
    saved = files.check_output(args.save, 24 * channels + 4096, npy.path) if args.save else None
    if copy and copy == saved:
        raise ValueError(f"{copy}: given to both --save and --normalize; want two names")
    with ExitStack() as stack:
        copy_file = stack.enter_context(files.replacing(copy)) if copy else None
        saved_file = stack.enter_context(files.replacing(saved)) if saved else None
        with progress.byte_progress() as start:
            m = file_moments(npy, limit, start("mean, variance", npy.nbytes))
            if copy_file:
                write_normalized(npy, m, eps, limit, copy_file, start("normalized copy", npy.nbytes))
        if saved_file:
            np.savez(saved_file, count=m.count, mean=m.mean, var=m.var(), std=m.std(), axis=axis)
    _print(npy, m, axis, eps if copy else None)
    for path, what in ((args.save, "count, mean, var, std, axis"), (args.normalize, f"normalized copy, eps {eps:g}")):
        if path:
            print(f"wrote {path} ({what})")
    return 0


def _print(npy: Npy, m: Moments, axis: int, eps: float | None) -> None:
    print(f"{npy.path}: {npy.dtype.name}, shape {npy.shape}, {npy.nbytes:,} bytes")
    print(f"channel axis {axis}: {m.mean.size:,} channels of {m.count:,} values")
    mean, std = m.mean, m.std()
    half = SHOWN // 2
    shown = (
        list(range(m.mean.size)) if m.mean.size <= SHOWN else [*range(half), *range(m.mean.size - half, m.mean.size)]
    )
    rows = [[f"{c}", f"{mean[c]:.9g}", f"{std[c]:.9g}"] for c in shown]
    left_out = m.mean.size - len(shown)
    if left_out:
        rows.insert(half, ["...", "...", "..."])
    progress.table(["channel", "mean", "std"], rows)
    if left_out:
        print(f"{left_out:,} channels in between are left out; --save OUT.npz keeps them all")
    bad = np.count_nonzero(~np.isfinite(m.mean + m.m2))
    if bad:
        print(f"{bad:,} channels hold NaN or infinite values", file=sys.stderr)
    if constant := eps == 0 and np.count_nonzero(m.m2 == 0):
        print(f"{constant:,} channels have variance 0: with --eps 0 their copy is NaN", file=sys.stderr)
