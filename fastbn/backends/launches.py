"""Launches on a GPU: canonical views of its arrays, streams, workspaces, and which kernel on which grid."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from fastbn.backends import devices, grids
from fastbn.backends.devices import STORED, Buffer
from fastbn.backends.views import DOUBLE, Sized, View, flat, kind_of, pad_of
from fastbn.kernels.cuda import _gpu, _jit, columns, finish, moving, rows

ALIGNED = 256  # bytes


def pointer(buffer: Buffer) -> Any:
    """What a kernel takes for a buffer."""
    return _jit.pointer(buffer.address, *buffer.span(), STORED[buffer.dtype]) if _gpu.SIMULATED else buffer.address


class _Work:
    """Memory for partial results of one stream of one device, kept from call to call; grown memory stays, for launches may still use it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._kept: list[Any] = []
        self._begin = self._size = self._used = 0

    def reserve(self, nbytes: int) -> None:
        """Begin a call that needs so much."""
        self._used = 0
        if nbytes > self._size:
            self._size = max(nbytes, 2 * self._size, 1 << 20)
            owner, self._begin = _jit.raw(self._size)
            self._kept.append(owner)

    def take(self, count: int, dtype: np.dtype[Any]) -> Any:
        """A pointer to so many elements of what was reserved."""
        return self.take_place(count, dtype)[1]

    def take_place(self, count: int, dtype: np.dtype[Any]) -> tuple[int, Any]:
        """(address, pointer) of the same."""
        low, nbytes = self._begin + self._used, count * dtype.itemsize
        self._used += -(-nbytes // ALIGNED) * ALIGNED
        if self._used > self._size:  # a kernel would write where another stream's workspace lies
            raise RuntimeError(f"a workspace of {self._size} bytes was reserved, and {self._used} are taken: please report this")
        return low, _jit.pointer(low, low, low + nbytes, dtype)


_work: dict[tuple[int, int], _Work] = {}
_guard = threading.Lock()


class Call(NamedTuple):
    """One call on one stream of one device."""

    device: int
    stream: int
    work: _Work
    about: str  # shape and dtype, for errors

    def launch(self, kernel: _jit.Kernel, dtype: np.dtype[Any], blocks: int, *arguments: Any, statistic: str = "float64") -> None:
        """Launch a kernel for memory of a dtype, and given statistics of another.

        Raises
        ------
        RuntimeError
            CUDA refuses it, or reports what went wrong before.
        """
        try:
            kernel.launch(dtype, STORED[statistic], blocks, grids.THREADS, self.stream, self.device, arguments)
        except Exception as error:
            where = f"kernel {kernel.name}, {blocks} blocks of {grids.THREADS} threads, x {self.about}, stream {self.stream:#x}"
            raise RuntimeError(f"CUDA failed at {where}: {error}") from error


@contextmanager
def calling(x: Buffer, stream: Any) -> Iterator[Call]:
    """A call on x's device and a stream; two Python threads take turns on one stream, whose workspace they share."""
    device = devices.device_of(x)
    handle = devices.current_stream(x) if stream is None else devices.handle(stream)
    with nullcontext() if device == _jit.current() else _jit.on(device):
        with _guard:
            work = _work.setdefault((device, handle), _Work())
        with work.lock:
            yield Call(device, handle, work, f"{x.shape} {x.dtype}")


def copy(call: Call, source: Buffer, target: Buffer) -> None:
    """target = source, whatever the strides of both.

    Raises
    ------
    ValueError
        More axes than the kernel takes, once those are joined that lie alike in both.
    """
    axes = [a for a in range(len(source.shape)) if source.shape[a] != 1]
    axes.sort(key=lambda a: -abs(target.strides[a]))
    joined: list[tuple[int, int, int]] = []
    for a in axes:
        n, s, t = source.shape[a], source.strides[a], target.strides[a]
        if joined and joined[-1][1] == s * n and joined[-1][2] == t * n:
            joined[-1] = (joined[-1][0] * n, s, t)
        else:
            joined.append((n, s, t))
    if len(joined) > moving.RANK:
        raise ValueError(f"x: given strides {source.strides} for shape {source.shape}: copy it to contiguous memory first")
    joined = [(1, 0, 0)] * (moving.RANK - len(joined)) + joined
    sizes, first, second = zip(*joined, strict=True)
    kind = STORED[source.dtype]
    blocks = -(-source.size // grids.THREADS)
    call.launch(moving.move, kind, blocks, pointer(source), pointer(target), *sizes, *first, *second)


def workspace(C: int, plan: Sized | None) -> int:
    """Bytes that a call takes at most: partial results, what they deviate from, coefficients, sums, and statistics of another dtype."""
    partial = 0 if plan is None else 3 * plan.entries * plan.width + 2 * plan.width
    return 8 * (partial + 5 * pad_of(C) + 4 * C) + 8 * ALIGNED


def alike(call: Call, mean: Buffer, var: Buffer) -> tuple[Buffer, Buffer]:
    """Given statistics in one dtype: float64 where they are of two."""
    if mean.dtype == var.dtype:
        return mean, var
    return wide(call, mean), wide(call, var)


def wide(call: Call, values: Buffer) -> Buffer:
    """Statistics in float64."""
    if values.dtype == "float64":
        return values
    address, wide = call.work.take_place(values.size, DOUBLE)
    call.launch(finish.widen, DOUBLE, threads(values.size), pointer(values), values.size, wide, statistic=values.dtype)
    return values._replace(address=address, dtype="float64", owner=None, strides=(1,))


def partial_moments(call: Call, x: View, plan: Sized) -> tuple[Any, Any]:
    """(partial, given): what `finish` merges to moments."""
    kind, stored = kind_of(x), STORED[x.buffer.dtype]
    given, partial = call.work.take(2 * plan.width, kind), call.work.take(3 * plan.entries * plan.width, kind)
    if (grid := plan.rows) is not None:
        call.launch(
            rows.moments_rows, stored, grid.blocks(x.C), pointer(x.buffer), x.N, x.C, x.S, x.outer, x.inner, x.base, grid.slots, grid.rest,
            grid.step_n, grid.step_v, grid.parts, grid.chunk, grid.chunk_rest, given, partial,
        )  # fmt: skip
    elif (cut := plan.columns) is not None:
        call.launch(
            columns.moments_columns, stored, cut.blocks(plan.lanes), pointer(x.buffer), cut.R, cut.W, cut.fold * x.outer, cut.rest,
            cut.across, cut.parts, cut.chunk, plan.even, given, partial,
        )  # fmt: skip
    return partial, given


def partial_sums(call: Call, dy: View, x: View, mean: Buffer, plan: Sized) -> Any:
    """What `finish_backward` merges to the sums of dy and dy * (x - mean)."""
    kind, stored = kind_of(x), STORED[x.buffer.dtype]
    partial = call.work.take(2 * plan.entries * plan.width, kind)
    if (grid := plan.rows) is not None:
        call.launch(
            rows.sums_rows, stored, grid.blocks(x.C), pointer(x.buffer), pointer(dy.buffer), pointer(mean), x.N, x.C, x.S, x.outer, x.inner,
            dy.outer, dy.inner, x.base, dy.base, grid.slots, grid.rest, grid.step_n, grid.step_v, grid.parts, grid.chunk, grid.chunk_rest,
            partial, statistic=mean.dtype,
        )  # fmt: skip
    elif (cut := plan.columns) is not None:
        call.launch(
            columns.sums_columns, stored, cut.blocks(plan.lanes), pointer(x.buffer), pointer(dy.buffer), pointer(mean), cut.R, cut.W,
            x.C, x.S, cut.fold * x.outer, cut.fold * dy.outer, cut.rest, cut.across, cut.parts, cut.chunk, plan.even,
            partial, statistic=mean.dtype,
        )  # fmt: skip
    return partial


def warps(C: int) -> int:
    """Blocks of a kernel that takes a channel per warp."""
    return -(-C // (grids.THREADS // grids.WARP))


def threads(C: int) -> int:
    """Blocks of a kernel that takes a channel per thread."""
    return -(-C // grids.THREADS)


def elementwise(call: Call, kernels: tuple[_jit.Kernel, _jit.Kernel], coefs: Any, *views: View) -> None:
    """An elementwise pass over inputs and, last, the result; `kernels` for positions of 32 and of 64 bits."""
    x = views[0]
    grid, steps, aligned = flat(*views)
    call.launch(
        kernels[x.N * x.C * x.S >= grids.LONG], STORED[x.buffer.dtype], grid.blocks(grids.THREADS),
        *(pointer(v.buffer) for v in views), coefs, pad_of(x.C), x.C, x.S, grid.runs, grid.length, grid.per_run, grid.inner, *steps,
        grid.groups, grid.even, aligned,
    )  # fmt: skip
