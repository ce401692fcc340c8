"""The CPU backend, host side: allocate statistics and workspaces, pick the kernel, call it. See `fastbn.backends.Backend`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn import config, threads
from fastbn.backends import schedule
from fastbn.kernels import _jit, channels_first, channels_first_backward, channels_last, channels_last_apply, channels_last_backward
from fastbn.kernels import statistics as per_channel
from fastbn.kernels.channels_last import WORK
from fastbn.moments import Moments

Array = NDArray[Any]
Wide = NDArray[np.float64]
Ints = tuple[int, ...]

# Half precision reaches the kernels as its bits, in the integer type that tells them which one it is.
_BITS: dict[str, np.dtype[Any]] = {"float16": np.dtype(np.uint16), "bfloat16": np.dtype(np.int16)}
_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
_NONE = {kind: np.empty(0, kind) for kind in (_SINGLE, _DOUBLE)}  # an absent parameter is an empty array to the kernels


class _Route(NamedTuple):
    """How arrays of one shape, dtype and memory order are walked together."""

    bits: np.dtype[Any] | None  # what half precision is seen as
    stored: np.dtype[Any]  # what the kernels see
    kind: np.dtype[Any]  # what they compute in
    flat: Ints | None  # columns: the shape (R, C * S), where that is another one
    share: int  # columns of a channel, S; 0 for the kernels on rows
    first: schedule.First | None
    last: schedule.Last | None
    none: Array


@lru_cache(maxsize=4096)
def _route(shape: Ints, dtype: np.dtype[Any], *strides: Ints) -> _Route:
    """On columns where the kernels for that serve every array: channels last, or short rows without gaps between them."""
    bits = None if dtype in _NONE else _BITS[dtype.name]
    kind = _DOUBLE if dtype.itemsize == 8 else _SINGLE
    if len(shape) == 2:
        contiguous = all(s[0] == shape[1] * dtype.itemsize for s in strides)
        last = schedule.last(*shape, 1, kind.itemsize, contiguous)
        return _Route(bits, bits or dtype, kind, None, 1, None, last, _NONE[kind])
    N, C, S = shape
    if schedule.short(N, S, kind.itemsize) and (C == 1 or all(s[1] == S * dtype.itemsize for s in strides)):
        contiguous = all(s[0] == C * S * dtype.itemsize for s in strides)
        last = schedule.last(N, C, S, kind.itemsize, contiguous)
        return _Route(bits, bits or dtype, kind, (N, C * S), S, None, last, _NONE[kind])
    return _Route(bits, bits or dtype, kind, None, 0, schedule.first(N, C, S, kind.itemsize), None, _NONE[kind])


@lru_cache(maxsize=4096)
def _fused(shape: Ints, dtype: np.dtype[Any], out: Ints, *strides: Ints) -> _Route | None:
    """The route of a call in one kernel, where a task's share stays in the cache between its two passes.

    Not where the last-level cache holds all arrays and they are not small: there two kernels in the order of memory are faster.
    The inputs alone decide how statistics are taken, so that they do not depend on where the result goes.
    """
    route = _route(shape, dtype, *strides)
    if route.first is not None:
        held = schedule.SWEEP_BYTES <= (1 + len(strides)) * math.prod(shape) * dtype.itemsize < config.STREAM_BYTES
        return None if held or route.first.parts > 1 else route
    fits = route.last is not None and route.last.parts == 1 and route.last.fold == 1
    return route if fits and _route(shape, dtype, out).last is not None else None


def _seen(route: _Route, array: Array) -> Array:
    """An array as the kernels see it."""
    if route.bits is not None:
        array = array.view(route.bits)
    return array if route.flat is None else array.reshape(route.flat)


def _stream(out: Array, arrays: int) -> bool:
    """Whether a result is written past the cache, in a call on so many arrays of its size."""
    return arrays * out.nbytes >= config.STREAM_BYTES


def _tasks(units: int, parallel: bool) -> int:
    return min(units, 4 * threads.get_num_threads()) if parallel else 1


def _lot(plan: schedule.First, C: int) -> int:
    """Channels that statistics alone take together: as many as leave work for every task; one where its rows are long."""
    if plan.splits > 1:
        return 1
    return max(1, C * plan.parts // (4 * threads.get_num_threads())) if plan.parallel else C


def _folded(cut: schedule.Last, array: Array) -> tuple[Array, Array]:
    """(rows folded, the rows left over as one row) of an (R, F) array."""
    if cut.fold == 1:
        return array, array
    whole = array.shape[0] - cut.rest
    return array[:whole].reshape(-1, cut.fold * array.shape[1]), array[whole:].reshape(1, -1)


def _work(route: _Route, cut: schedule.Last, tasks: int) -> Array:
    return np.empty(tasks * WORK * cut.columns + 64, route.kind)


def _count(x: Array) -> int:
    """Values per channel."""
    return int(x.size // x.shape[1])


def moments(x: Array) -> Moments:
    """Count, mean and m2 of each channel."""
    route = _route(x.shape, x.dtype, x.strides)
    C, bits = x.shape[1], _seen(route, x)
    stats = np.empty((2, C))
    if (plan := route.first) is not None:
        lot, tasks = _lot(plan, C), _tasks(C * plan.parts, plan.parallel)
        run = channels_first.moments.form(route.stored, plan.parallel)
        run(bits, plan.rows, plan.splits, plan.blocks, plan.parts, lot, tasks, np.empty((plan.parts, 3, C)), stats)
    elif (cut := route.last) is not None:
        tasks = _tasks(cut.parts * cut.blocks, cut.parallel)
        work, partial = _work(route, cut, tasks), np.empty((cut.parts + 1, 2, cut.fold * C))
        run = channels_last.moments.form(route.stored, cut.parallel)
        run(
            *_folded(cut, bits),
            C,
            route.share,
            cut.fold,
            cut.rest,
            cut.parts,
            cut.block * cut.fold,
            tasks,
            cut.columns,
            work,
            partial,
            stats,
        )
    return Moments(_count(x), stats[0], stats[1])


def rstd(m2: Wide, count: float, eps: float) -> Wide:
    """1 / sqrt(m2 / count + eps)."""
    found = np.empty(m2.size)
    per_channel.rstd.form(_DOUBLE, False)(m2, count, eps, found)
    return found


def track(m: Moments, freedom: float, weight: float, running_mean: Array, running_var: Array) -> None:
    """Running statistics move towards m.mean and m.m2 / freedom by `weight`, in place."""
    per_channel.track.form(running_mean.dtype, False)(m.mean, m.m2, freedom, weight, running_mean, running_var)


def normalize(x: Array, mean: Wide, rstd: Wide, gamma: Array | None, beta: Array | None, out: Array) -> Array:
    """y = gamma * (x - mean) * rstd + beta."""
    route = _route(x.shape, x.dtype, x.strides, out.strides)
    bits, y, stream, C = _seen(route, x), _seen(route, out), _stream(out, 2), mean.size
    gamma, beta = route.none if gamma is None else gamma, route.none if beta is None else beta
    if (plan := route.first) is not None:
        tasks = _tasks(x.shape[0] * C * plan.pieces, plan.parallel)
        run = channels_first.normalize.form(route.stored, plan.parallel)
        run(bits, mean, rstd, gamma, beta, plan.pieces, tasks, stream, np.empty((3, C + 7 & -8), route.kind), y)
    elif (cut := route.last) is not None:
        (rows, rest), (rows_y, rest_y) = _folded(cut, bits), _folded(cut, y)
        tasks = _tasks(cut.runs * cut.blocks, cut.parallel)
        work = _work(route, cut, tasks)
        run = channels_last_apply.normalize.form(route.stored, cut.parallel)
        run(
            rows, rest, mean, rstd, gamma, beta,
            route.share, cut.fold, cut.rest, cut.runs, cut.block, tasks, cut.columns, stream, work, rows_y, rest_y,
        )  # fmt: skip
    return out


def grad_reduce(dy: Array, x: Array, mean: Wide, rstd: Wide) -> tuple[Wide, Wide]:
    """(sum of dy, sum of dy * xhat) of each channel: (dbeta, dgamma)."""
    sums = _sums(dy, x, mean, rstd)
    return sums[0], sums[1]


def _sums(dy: Array, x: Array, mean: Wide, rstd: Wide) -> Wide:
    route = _route(x.shape, x.dtype, x.strides, dy.strides)
    bits, bits_dy, C = _seen(route, x), _seen(route, dy), mean.size
    sums = np.empty((2, C))
    if (plan := route.first) is not None:
        lot, tasks = _lot(plan, C), _tasks(C * plan.parts, plan.parallel)
        work, partial = np.empty((tasks, 3, lot + 7 & -8), route.kind), np.empty((plan.parts, 2, C))
        run = channels_first_backward.grad_reduce.form(route.stored, plan.parallel)
        run(bits_dy, bits, mean, rstd, plan.rows, plan.splits, plan.blocks, plan.parts, lot, tasks, work, partial, sums)
    elif (cut := route.last) is not None:
        tasks = _tasks(cut.parts * cut.blocks, cut.parallel)
        work, partial = _work(route, cut, tasks), np.empty((cut.parts + 1, 2, cut.fold * C))
        run = channels_last_backward.grad_reduce.form(route.stored, cut.parallel)
        run(
            *_folded(cut, bits_dy), *_folded(cut, bits), mean, rstd,
            route.share, cut.fold, cut.rest, cut.parts, cut.block, tasks, cut.columns, work, partial, sums,
        )  # fmt: skip
    return sums


def grad_input(
    dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, sums: tuple[Wide, Wide] | None, count: int, out: Array
) -> Array:
    """dx in training; with sums=None the statistics are constants, as at inference."""
    route = _route(x.shape, x.dtype, x.strides, dy.strides, out.strides)
    training, both = sums is not None, np.zeros((2, mean.size)) if sums is None else np.stack(sums)
    bits, bits_dy, dx, stream, C = _seen(route, x), _seen(route, dy), _seen(route, out), _stream(out, 3), mean.size
    gamma = route.none if gamma is None else gamma
    if (plan := route.first) is not None:
        tasks = _tasks(x.shape[0] * C * plan.pieces, plan.parallel)
        work = np.empty((5, C + 7 & -8), route.kind)
        run = channels_first_backward.grad_input.form(route.stored, plan.parallel)
        run(bits_dy, bits, mean, rstd, gamma, both, count, training, plan.pieces, tasks, stream, work, dx)
    elif (cut := route.last) is not None:
        tasks = _tasks(cut.runs * cut.blocks, cut.parallel)
        work = _work(route, cut, tasks)
        run = channels_last_backward.grad_input.form(route.stored, cut.parallel)
        run(
            *_folded(cut, bits_dy), *_folded(cut, bits), mean, rstd, gamma, both, count, training,
            route.share, cut.fold, cut.rest, cut.runs, cut.block, tasks, cut.columns, stream, work, *_folded(cut, dx),
        )  # fmt: skip
    return out


def forward(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
    """Moments and normalize; in one kernel, x from memory once, where a task's share stays in the cache."""
    route = _fused(x.shape, x.dtype, out.strides, x.strides)
    if route is None:
        m = moments(x)
        return normalize(x, m.mean, rstd(m.m2, m.count, eps), gamma, beta, out), m
    bits, y, C = _seen(route, x), _seen(route, out), x.shape[1]
    gamma, beta = route.none if gamma is None else gamma, route.none if beta is None else beta
    stats = np.empty((2, C))
    if (plan := route.first) is not None:
        tasks = _tasks(C, plan.parallel)
        run = channels_first.forward.form(route.stored, plan.parallel)
        run(
            bits, gamma, beta, eps, plan.rows, plan.splits, plan.blocks, tasks, plan.ahead, _stream(out, 2),
            np.empty((tasks, 3, 8), route.kind), y, stats,
        )  # fmt: skip
    elif (cut := route.last) is not None:
        tasks = _tasks(cut.blocks, cut.parallel)
        work = _work(route, cut, tasks)
        run = channels_last_apply.forward.form(route.stored, cut.parallel)
        run(bits, gamma, beta, eps, route.share, cut.block, tasks, cut.columns, _stream(out, 2), work, y, stats)
    return out, Moments(_count(x), stats[0], stats[1])


def backward(
    dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, out: Array, training: bool = True, grads: Array | None = None
) -> tuple[Array, Wide, Wide]:
    """grad_reduce and grad_input, in one kernel where a task's share stays in the cache: (dx, dgamma, dbeta)."""
    route = _fused(x.shape, x.dtype, out.strides, x.strides, dy.strides)
    C = mean.size
    if route is None:
        sums = _sums(dy, x, mean, rstd)
        grad_input(dy, x, mean, rstd, gamma, (sums[0], sums[1]) if training else None, _count(x), out)
        if grads is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                grads[...] = sums
        return out, sums[1], sums[0]
    bits, bits_dy, dx = _seen(route, x), _seen(route, dy), _seen(route, out)
    gamma = route.none if gamma is None else gamma
    sums, grads = np.empty((2, C)), np.empty((2, C), route.kind) if grads is None else grads
    if (plan := route.first) is not None:
        tasks = _tasks(C, plan.parallel)
        run = channels_first_backward.backward.form(route.stored, plan.parallel)
        run(
            bits_dy, bits, mean, rstd, gamma, training, plan.rows, plan.splits, plan.blocks, tasks, plan.ahead, _stream(out, 3),
            np.empty((tasks, 5, 8), route.kind), dx, sums, grads,
        )  # fmt: skip
    elif (cut := route.last) is not None:
        tasks = _tasks(cut.blocks, cut.parallel)
        work = _work(route, cut, tasks)
        run = channels_last_backward.backward.form(route.stored, cut.parallel)
        run(bits_dy, bits, mean, rstd, gamma, training, route.share, cut.block, tasks, cut.columns, _stream(out, 3), work, dx, sums, grads)
    return out, sums[1], sums[0]


def describe(dims: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """Kernel and schedule for a canonical shape, for a person to read."""
    itemsize = 8 if dtype == _DOUBLE else 4
    columns = len(dims) == 2 or schedule.short(dims[0], dims[2], itemsize)
    if columns:
        R, C, S = dims if len(dims) == 3 else (*dims, 1)
        last = schedule.last(R, C, S, itemsize, True)
        cut = f"{last.fold} rows folded into one" if last.fold > 1 else "rows as they are"
        cut += f", {S} columns a channel" if S > 1 else ""
        units, fused, parallel = last.parts * last.blocks, last.parts == 1 and last.fold == 1, last.parallel
    else:
        first = schedule.first(*dims, itemsize)
        cut, units, fused, parallel = f"{first.blocks} blocks a channel", dims[1] * first.parts, first.parts == 1, first.parallel
    statistics, apply = (channels_last, channels_last_apply) if columns else (channels_first, channels_first)
    back = channels_last_backward if columns else channels_first_backward
    forwards = [apply.forward] if fused else [statistics.moments, apply.normalize]
    backwards = [back.backward] if fused else [back.grad_reduce, back.grad_input]
    names = [" + ".join(kernel.name for kernel in kernels) for kernels in (forwards, backwards)]
    passes = "fused, x is read from memory once" if fused else "two passes over memory: moments, then normalize"
    how = threads.describe() if parallel else "one thread: too small to wake the others"
    stores = "streaming, past the cache" if 2 * np.prod(dims) * dtype.itemsize >= config.STREAM_BYTES else "ordinary, into the cache"
    form = f"{dtype}, {'parallel' if parallel and threads.parallel() else 'serial'}"
    lines = (f"kernels: {names[0]} ({form})", f"backward: {names[1]}", f"schedule: {passes}; {units} tasks, {cut}")
    return "\n".join((*lines, f"threads: {how}", f"stores: {stores}"))


def warmup(dtypes: Iterable[np.dtype[Any]] = tuple(_NONE)) -> Iterator[str]:
    """Compile every kernel for each dtype, serial and, where threads are safe, parallel; yields the name of each as it is done."""
    for kernel in _jit.KERNELS:
        for dtype in dtypes:
            stored = _BITS.get(dtype.name, dtype)
            if not kernel.parallel:  # on statistics, which are double, or on parameters
                stored = _DOUBLE if kernel is per_channel.rstd or dtype.itemsize == 8 else _SINGLE
            for parallel in (False, True)[: 1 + (kernel.parallel and threads.usable())]:
                kernel.compiled(stored, parallel)
                yield f"{kernel.name} {dtype} {'parallel' if parallel else 'serial'}"
