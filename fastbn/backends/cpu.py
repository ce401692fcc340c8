"""The CPU backend, host side: allocate statistics and workspaces, pick the kernel, call it. See `fastbn.backends.Backend`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import config
from fastbn.backends import schedule
from fastbn.kernels import _jit, channels_first, channels_first_backward, channels_last, channels_last_apply, channels_last_backward
from fastbn.kernels.channels_last import WORK
from fastbn.moments import Moments

Array = NDArray[Any]
Wide = NDArray[np.float64]

# Half precision reaches the kernels as its bits, in the integer type that tells them which one it is.
_BITS: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.int16)}
_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
_NONE = {kind: np.empty(0, kind) for kind in (_SINGLE, _DOUBLE)}


def _bits(array: Array) -> Array:
    return array if array.dtype in _NONE else array.view(_BITS[array.dtype.name])


def _kind(x: Array) -> np.dtype[Any]:
    """What x is computed in."""
    return _DOUBLE if x.itemsize == 8 else _SINGLE


def _columns(x: Array) -> tuple[int, int, int, Array] | None:
    """(R, C, S, view (R, C * S)) where the kernels on columns serve x: channels last, or short rows without gaps between them."""
    if x.ndim == 2:
        return x.shape[0], x.shape[1], 1, x
    N, C, S = x.shape
    if schedule.short(N, S, _kind(x).itemsize) and (x.strides[1] == S * x.itemsize or C == 1):
        return N, C, S, x.reshape(N, C * S)
    return None


def _stream(out: Array, arrays: int) -> bool:
    """Whether a result is written past the cache, in a call on so many arrays of its size."""
    return arrays * out.nbytes >= config.STREAM_BYTES


def _tasks(units: int, parallel: bool) -> int:
    return min(units, 4 * _jit.threads()) if parallel else 1


def _contiguous(*arrays: Array) -> bool:
    return all(a.strides[0] == a.shape[1] * a.itemsize for a in arrays)


def _folded(plan: schedule.Last, array: Array) -> tuple[Array, Array]:
    """(rows folded, the rows left over as one row) of an (R, F) array."""
    if plan.fold == 1:
        return array, array
    whole = array.shape[0] - plan.rest
    return array[:whole].reshape(-1, plan.fold * array.shape[1]), array[whole:].reshape(1, -1)


def moments(x: Array) -> Moments:
    """Count, mean and m2 of each channel."""
    x = _bits(x)
    kind = _kind(x)
    found = _columns(x)
    if found is None:
        N, C, S = x.shape
        mean, m2 = np.empty((2, C))
        plan = schedule.first(N, C, S, kind.itemsize)
        run = channels_first.moments.form(x.dtype, plan.parallel)
        tasks = _tasks(C * plan.parts, plan.parallel)
        run(x, plan.rows, plan.splits, plan.blocks, plan.parts, tasks, np.empty((C, plan.parts, 3)), mean, m2)
        return Moments(N * S, mean, m2)
    R, C, S, x = found
    mean, m2 = np.empty((2, C))
    cut = schedule.last(R, C, S, kind.itemsize, _contiguous(x))
    rows, rest = _folded(cut, x)
    run = channels_last.moments.form(x.dtype, cut.parallel)
    tasks = _tasks(cut.parts * cut.blocks, cut.parallel)
    work, partial = np.empty((tasks, 3, cut.columns), kind), np.empty((cut.parts + 1, 2, cut.fold * C))
    run(rows, rest, C, S, cut.fold, cut.rest, cut.parts, cut.block * cut.fold, tasks, work, partial, mean, m2)
    return Moments(R * S, mean, m2)


def normalize(x: Array, mean: Wide, rstd: Wide, gamma: Array | None, beta: Array | None, out: Array) -> Array:
    """y = gamma * (x - mean) * rstd + beta."""
    x, y, stream = _bits(x), _bits(out), _stream(out, 2)
    kind = _kind(x)
    gamma, beta = _NONE[kind] if gamma is None else gamma, _NONE[kind] if beta is None else beta
    found, target = _columns(x), _columns(y)
    if found is None or target is None:
        N, C, S = x.shape
        plan = schedule.first(N, C, S, kind.itemsize)
        run = channels_first.normalize.form(x.dtype, plan.parallel)
        tasks = _tasks(N * C * plan.pieces, plan.parallel)
        run(x, mean, rstd, gamma, beta, plan.pieces, tasks, stream, np.empty((3, C + 7 & -8), kind), y)
        return out
    R, C, S, x = found
    y = target[3]
    cut = schedule.last(R, C, S, kind.itemsize, _contiguous(x, y))
    (rows, rest), (rows_y, rest_y) = _folded(cut, x), _folded(cut, y)
    tasks = _tasks(cut.runs * cut.blocks, cut.parallel)
    work = np.empty((tasks, WORK, cut.columns), kind)
    run = channels_last_apply.normalize.form(x.dtype, cut.parallel)
    run(rows, rest, mean, rstd, gamma, beta, S, cut.fold, cut.rest, cut.runs, cut.block, tasks, stream, work, rows_y, rest_y)
    return out


def grad_reduce(dy: Array, x: Array, mean: Wide, rstd: Wide) -> tuple[Wide, Wide]:
    """(sum of dy, sum of dy * xhat) of each channel: (dbeta, dgamma)."""
    x, dy = _bits(x), _bits(dy)
    kind = _kind(x)
    sums = np.empty((2, mean.size))
    found, beside = _columns(x), _columns(dy)
    if found is None or beside is None:
        N, C, S = x.shape
        plan = schedule.first(N, C, S, kind.itemsize)
        run = channels_first_backward.grad_reduce.form(x.dtype, plan.parallel)
        tasks = _tasks(C * plan.parts, plan.parallel)
        work, partial = np.empty((tasks, 3, 8), kind), np.empty((C, plan.parts, 2))
        run(dy, x, mean, rstd, plan.rows, plan.splits, plan.blocks, plan.parts, tasks, work, partial, sums)
        return sums[0], sums[1]
    R, C, S, x = found
    dy = beside[3]
    cut = schedule.last(R, C, S, kind.itemsize, _contiguous(x, dy))
    (rows, rest), (rows_dy, rest_dy) = _folded(cut, x), _folded(cut, dy)
    tasks = _tasks(cut.parts * cut.blocks, cut.parallel)
    work, partial = np.empty((tasks, WORK, cut.columns), kind), np.empty((cut.parts + 1, 2, cut.fold * C))
    run = channels_last_backward.grad_reduce.form(x.dtype, cut.parallel)
    run(rows_dy, rest_dy, rows, rest, mean, rstd, S, cut.fold, cut.rest, cut.parts, cut.block, tasks, work, partial, sums)
    return sums[0], sums[1]


def grad_input(
    dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, sums: tuple[Wide, Wide] | None, count: int, out: Array
) -> Array:
    """dx in training; with sums=None the statistics are constants, as at inference."""
    both = np.zeros((2, mean.size)) if sums is None else np.stack(sums)
    return _grad_input(_bits(dy), _bits(x), mean, rstd, gamma, both, sums is not None, count, out)


def _grad_input(
    dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, sums: Wide, training: bool, count: int, out: Array
) -> Array:
    dx, stream = _bits(out), _stream(out, 3)
    kind = _kind(x)
    gamma = _NONE[kind] if gamma is None else gamma
    found, beside, target = _columns(x), _columns(dy), _columns(dx)
    if found is None or beside is None or target is None:
        N, C, S = x.shape
        plan = schedule.first(N, C, S, kind.itemsize)
        run = channels_first_backward.grad_input.form(x.dtype, plan.parallel)
        tasks, work = _tasks(N * C * plan.pieces, plan.parallel), np.empty((5, C + 7 & -8), kind)
        run(dy, x, mean, rstd, gamma, sums, count, training, plan.pieces, tasks, stream, work, dx)
        return out
    R, C, S, x = found
    cut = schedule.last(R, C, S, kind.itemsize, _contiguous(x, beside[3], target[3]))
    pairs = [_folded(cut, array) for array in (beside[3], x, target[3])]
    tasks = _tasks(cut.runs * cut.blocks, cut.parallel)
    work = np.empty((tasks, WORK, cut.columns), kind)
    run = channels_last_backward.grad_input.form(x.dtype, cut.parallel)
    run(
        *pairs[0], *pairs[1], mean, rstd, gamma, sums, count, training,
        S, cut.fold, cut.rest, cut.runs, cut.block, tasks, stream, work, *pairs[2],
    )  # fmt: skip
    return out


def forward(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
    """Moments and normalize; in one kernel, x from memory once, where a task's slab stays in the cache.

    x alone decides how its statistics are taken, so that they do not depend on where the result goes.
    """
    bits, y = _bits(x), _bits(out)
    kind = _kind(bits)
    found, target = _columns(bits), _columns(y)
    if found is None:
        N, C, S = x.shape
        plan = schedule.first(N, C, S, kind.itemsize)
        if plan.parts == 1:
            mean, m2 = np.empty((2, C))
            run = channels_first.forward.form(bits.dtype, plan.parallel)
            tasks = _tasks(C, plan.parallel)
            run(
                bits, _NONE[kind] if gamma is None else gamma, _NONE[kind] if beta is None else beta, eps,
                plan.rows, plan.splits, plan.blocks, tasks, plan.ahead, _stream(out, 2), np.empty((tasks, 3, 8), kind), y, mean, m2,
            )  # fmt: skip
            return out, Moments(N * S, mean, m2)
    else:
        R, C, S, rows = found
        cut = schedule.last(R, C, S, kind.itemsize, _contiguous(rows))
        if cut.parts == 1 and cut.fold == 1 and target is not None:
            mean, m2 = np.empty((2, C))
            run = channels_last_apply.forward.form(bits.dtype, cut.parallel)
            tasks = _tasks(cut.blocks, cut.parallel)
            run(
                rows, _NONE[kind] if gamma is None else gamma, _NONE[kind] if beta is None else beta, eps,
                S, cut.block, tasks, _stream(out, 2), np.empty((tasks, WORK, cut.columns), kind), target[3], mean, m2,
            )  # fmt: skip
            return out, Moments(R * S, mean, m2)
    m = moments(x)
    return normalize(x, m.mean, m.rstd(eps), gamma, beta, out), m


def backward(
    dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, out: Array, training: bool = True
) -> tuple[Array, Wide, Wide]:
    """grad_reduce and grad_input, in one kernel where a task's slabs stay in the cache: (dx, dgamma, dbeta)."""
    bits, bits_dy, dx = _bits(x), _bits(dy), _bits(out)
    kind = _kind(bits)
    found, beside, target = _columns(bits), _columns(bits_dy), _columns(dx)
    if found is None or beside is None:
        N, C, S = x.shape
        plan = schedule.first(N, C, S, kind.itemsize)
        if plan.parts == 1:
            sums = np.empty((2, C))
            run = channels_first_backward.backward.form(bits.dtype, plan.parallel)
            tasks = _tasks(C, plan.parallel)
            run(
                bits_dy, bits, mean, rstd, _NONE[kind] if gamma is None else gamma, training,
                plan.rows, plan.splits, plan.blocks, tasks, plan.ahead, _stream(out, 3), np.empty((tasks, 5, 8), kind), dx, sums,
            )  # fmt: skip
            return out, sums[1], sums[0]
    else:
        R, C, S, rows = found
        cut = schedule.last(R, C, S, kind.itemsize, _contiguous(rows, beside[3]))
        if cut.parts == 1 and cut.fold == 1 and target is not None:
            sums = np.empty((2, C))
            run = channels_last_backward.backward.form(bits.dtype, cut.parallel)
            tasks = _tasks(cut.blocks, cut.parallel)
            run(
                beside[3], rows, mean, rstd, _NONE[kind] if gamma is None else gamma, training,
                S, cut.block, tasks, _stream(out, 3), np.empty((tasks, WORK, cut.columns), kind), target[3], sums,
            )  # fmt: skip
            return out, sums[1], sums[0]
    reduced = grad_reduce(dy, x, mean, rstd)
    grad_input(dy, x, mean, rstd, gamma, reduced if training else None, x.size // mean.size, out)
    return out, reduced[1], reduced[0]


def describe(dims: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """Kernel and schedule for a canonical shape, for a person to read."""
    itemsize = 8 if dtype == _DOUBLE else 4
    columns = len(dims) == 2 or schedule.short(dims[0], dims[2], itemsize)
    if columns:
        R, C, S = dims if len(dims) == 3 else (*dims, 1)
        chosen: schedule.First | schedule.Last = schedule.last(R, C, S, itemsize, True)
        cut = f"{chosen.fold} rows folded into one" if chosen.fold > 1 else "rows as they are"
        cut += f", {S} columns a channel" if S > 1 else ""
        tasks, fused = chosen.parts * chosen.blocks, chosen.parts == 1 and chosen.fold == 1
    else:
        chosen = schedule.first(*dims, itemsize)
        cut, fused = f"{chosen.blocks} blocks a channel", chosen.parts == 1
        tasks = dims[1] * chosen.parts
    statistics, apply = (channels_last, channels_last_apply) if columns else (channels_first, channels_first)
    back = channels_last_backward if columns else channels_first_backward
    forwards = [apply.forward] if fused else [statistics.moments, apply.normalize]
    backwards = [back.backward] if fused else [back.grad_reduce, back.grad_input]
    names = [" + ".join(kernel.name for kernel in kernels) for kernels in (forwards, backwards)]
    passes = "fused, x is read from memory once" if fused else "two passes over memory: moments, then normalize"
    how = f"{_jit.threads()} threads ({_jit.threading_layer()})" if chosen.parallel else "one thread: too small to wake the others"
    stores = "streaming, past the cache" if 2 * np.prod(dims) * dtype.itemsize >= config.STREAM_BYTES else "ordinary, into the cache"
    form = f"{dtype}, {'parallel' if chosen.parallel else 'serial'}"
    return f"kernels: {names[0]} ({form})\nbackward: {names[1]}\nschedule: {passes}; {tasks} tasks, {cut}\nthreads: {how}\nstores: {stores}"


def warmup() -> Iterator[str]:
    """Compile every kernel for float32 and float64, serial and parallel; yields the name of each as it is done."""
    for kernel in _jit.KERNELS:
        for dtype in _NONE:
            for parallel in (False, True):
                kernel.form(dtype, parallel)
                yield f"{kernel.name} {dtype} {'parallel' if parallel else 'serial'}"
