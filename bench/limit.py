"""The machine's own limit: the best way to move the bytes of a pass, measured beside it.

Forward and inference are held against a copy x -> y, backward against a triad x, dy -> dx, moments against reading x
once. Each is written with streaming and with ordinary stores, and as NumPy and PyTorch do it; the fastest is the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

from bench import pytorch
from bench.problem import Problem
from bench.suite import cases
from fastbn.cpu.kernels.simd import fence, load, load_far, store, store_stream, total

Array = NDArray[Any]

LANES = 16  # float32 in a vector: any dtype's bytes are moved as float32
PARTS = 8  # per thread


@numba.njit(parallel=True, nogil=True)
def _copy_stream(x, y, vectors, parts):  # type: ignore[no-untyped-def]  # typed by numba
    for part in prange(parts):
        for i in range(vectors * part // parts * LANES, vectors * (part + 1) // parts * LANES, LANES):
            store_stream(y, (i,), load(x, (i,)))
        fence()


@numba.njit(parallel=True, nogil=True)
def _copy(x, y, vectors, parts):  # type: ignore[no-untyped-def]  # typed by numba
    for part in prange(parts):
        for i in range(vectors * part // parts * LANES, vectors * (part + 1) // parts * LANES, LANES):
            store(y, (i,), load_far(x, (i,)))


@numba.njit(parallel=True, nogil=True)
def _triad_stream(x, dy, dx, vectors, parts):  # type: ignore[no-untyped-def]  # typed by numba
    for part in prange(parts):
        for i in range(vectors * part // parts * LANES, vectors * (part + 1) // parts * LANES, LANES):
            store_stream(dx, (i,), load(x, (i,)) + load(dy, (i,)))
        fence()


@numba.njit(parallel=True, nogil=True)
def _triad(x, dy, dx, vectors, parts):  # type: ignore[no-untyped-def]  # typed by numba
    for part in prange(parts):
        for i in range(vectors * part // parts * LANES, vectors * (part + 1) // parts * LANES, LANES):
            store(dx, (i,), load_far(x, (i,)) + load_far(dy, (i,)))


@numba.njit(parallel=True, nogil=True)
def _read(x, vectors, parts, sums):  # type: ignore[no-untyped-def]  # typed by numba
    for part in prange(parts):
        start, stop = vectors * part // parts * LANES, vectors * (part + 1) // parts * LANES
        # Two sums, so that not every addition waits for the one before.
        a = b = load(x, (0,))
        body = start + (stop - start) // (2 * LANES) * 2 * LANES
        for i in range(start, body, 2 * LANES):
            a = a + load_far(x, (i,))
            b = b + load_far(x, (i + LANES,))
        if body < stop:
            a = a + load(x, (body,))
        sums[part] = total(a + b)


def flat(array: Array, p: Problem) -> NDArray[np.float32]:
    """An array's memory as float32, whole vectors of it: up to 63 bytes at its end are left out.

    Of another dtype, or of less than a vector, as many bytes of other memory.
    """
    octets = p.rows(array).reshape(-1).view(np.uint8)
    found = octets[: octets.size // 64 * 64].view(np.float32)
    if p.dtype == "float32" and found.size:
        return found
    # halves and doubles read as float32 would be NaN and denormal numbers, which add slowly
    other = cases.aligned(max(64, found.nbytes)).view(np.float32)
    other[...] = 1
    return other


def calls(p: Problem, what: str, threads: int) -> dict[str, Callable[[], Any]]:
    """The ways to move a pass's bytes."""
    x, dy, out = (flat(a, p) for a in (p.x, p.dy, p.out))
    vectors, parts = x.size // LANES, PARTS * threads
    made: dict[str, Callable[[], Any]]
    if what == "moments":
        sums = np.empty(parts, np.float32)
        made = {"sum": lambda: _read(x, vectors, parts, sums), "np.sum": x.sum}
    elif what == "backward":
        made = {
            "triad, streaming": lambda: _triad_stream(x, dy, out, vectors, parts),
            "triad": lambda: _triad(x, dy, out, vectors, parts),
            "np.add": lambda: np.add(x, dy, out=out),
        }
    else:
        made = {
            "copy, streaming": lambda: _copy_stream(x, out, vectors, parts),
            "copy": lambda: _copy(x, out, vectors, parts),
            "np.copyto": lambda: np.copyto(out, x),
        }
    if not pytorch.there():
        return made
    torch = pytorch.library()
    tx, tdy, tout = (torch.from_numpy(a) for a in (x, dy, out))
    if what == "moments":
        return {**made, "torch.sum": lambda: torch.sum(tx)}
    if what == "backward":
        return {**made, "torch.add": lambda: torch.add(tx, tdy, out=tout)}
    return {**made, "torch.copy_": lambda: tout.copy_(tx)}
