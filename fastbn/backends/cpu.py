"""The CPU backend, host side: allocate statistics and workspaces, pick the kernel, call it. See `fastbn.backends.Backend`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn import threads
from fastbn.backends import schedule
from fastbn.kernels import _jit, channels_first, channels_first_backward, channels_last, channels_last_apply, channels_last_backward
from fastbn.moments import Moments

Array = NDArray[Any]
Wide = NDArray[np.float64]

_NONE = {np.dtype(kind): np.empty(0, kind) for kind in (np.float32, np.float64)}


def _parameter(value: Array | None, x: Array) -> Array:
    """An absent parameter is an empty array to the kernels."""
    return _NONE[x.dtype] if value is None else value


def _last(x: Array, *others: Array) -> schedule.Last:
    """The schedule of (R, C) arrays that are walked together."""
    R, C = x.shape
    contiguous = all(a.strides[0] == C * a.itemsize for a in (x, *others))
    return schedule.last(R, C, x.itemsize, contiguous)


def _folded(plan: schedule.Last, array: Array) -> tuple[Array, Array]:
    """(rows folded, rows left over) of an (R, C) array."""
    if plan.fold == 1:
        return array, array
    R, C = array.shape
    return array[: R - plan.rest].reshape(-1, plan.fold * C), array[R - plan.rest :]


def moments(x: Array) -> Moments:
    """Count, mean and m2 of each channel."""
    if x.ndim == 3:
        N, C, S = x.shape
        mean, m2 = np.empty((2, C))
        plan = schedule.first(N, C, S, x.itemsize)
        run = channels_first.moments.form(x.dtype, plan.parallel)
        run(x, plan.rows, plan.splits, plan.blocks, plan.parts, np.empty((C, plan.parts, 3)), mean, m2)
        return Moments(N * S, mean, m2)
    R, C = x.shape
    mean, m2 = np.empty((2, C))
    cut = _last(x)
    folded, rest = _folded(cut, x)
    work = np.zeros((cut.parts, 3, cut.width), x.dtype)
    run = channels_last.moments.form(x.dtype, cut.parallel)
    run(folded, rest, cut.fold, cut.rest, cut.parts, cut.groups, work, np.empty((cut.parts + 1, 2, cut.width)), mean, m2)
    return Moments(R, mean, m2)


def normalize(x: Array, mean: Wide, rstd: Wide, gamma: Array | None, beta: Array | None, out: Array) -> Array:
    """y = gamma * (x - mean) * rstd + beta."""
    gamma, beta = _parameter(gamma, x), _parameter(beta, x)
    if x.ndim == 3:
        plan = schedule.first(*x.shape, x.itemsize)
        parts = max(plan.parts, min(plan.blocks, -(-schedule.TASKS // x.shape[1]))) if plan.parallel else 1
        run = channels_first.normalize.form(x.dtype, plan.parallel)
        groups, work = plan.groups if parts == 1 else x.shape[1], np.empty((parts, 3, x.shape[1]), x.dtype)
        run(x, mean, rstd, gamma, beta, plan.rows, plan.splits, plan.blocks, parts, groups, plan.stream, work, out)
        return out
    cut = _last(x, out)
    (folded, rest), (folded_out, rest_out) = _folded(cut, x), _folded(cut, out)
    work = np.empty((cut.parts, 3, cut.width), x.dtype)
    run = channels_last_apply.normalize.form(x.dtype, cut.parallel)
    run(folded, rest, mean, rstd, gamma, beta, cut.rest, cut.parts, cut.groups, cut.stream, work, folded_out, rest_out)
    return out


def grad_reduce(dy: Array, x: Array, mean: Wide, rstd: Wide) -> tuple[Wide, Wide]:
    """(sum of dy, sum of dy * xhat) of each channel: (dbeta, dgamma)."""
    sums = np.empty((2, mean.size))
    if x.ndim == 3:
        plan = schedule.first(*x.shape, x.itemsize)
        run = channels_first_backward.grad_reduce.form(x.dtype, plan.parallel)
        partial = np.empty((mean.size, plan.parts, 2))
        run(dy, x, mean, rstd, plan.rows, plan.splits, plan.blocks, plan.parts, partial, sums)
        return sums[0], sums[1]
    cut = _last(x, dy)
    (folded, rest), (folded_dy, rest_dy) = _folded(cut, x), _folded(cut, dy)
    work = np.empty((cut.parts, 5, cut.width), x.dtype)
    partial = np.empty((cut.parts + 1, 2, cut.width))
    run = channels_last_backward.grad_reduce.form(x.dtype, cut.parallel)
    run(folded_dy, rest_dy, folded, rest, mean, rstd, cut.rest, cut.parts, cut.groups, work, partial, sums)
    return sums[0], sums[1]


def grad_input(
    dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, sums: tuple[Wide, Wide] | None, count: int, out: Array
) -> Array:
    """dx in training; with sums=None the statistics are constants, as at inference."""
    gamma, training = _parameter(gamma, x), sums is not None
    both = np.zeros((2, mean.size)) if sums is None else np.stack(sums)
    if x.ndim == 3:
        plan = schedule.first(*x.shape, x.itemsize)
        run = channels_first_backward.grad_input.form(x.dtype, plan.parallel)
        work = np.empty((plan.parts, 5, mean.size), x.dtype)
        run(
            dy, x, mean, rstd, gamma, both, count, training,
            plan.rows, plan.splits, plan.blocks, plan.parts, plan.groups, plan.stream, work, out,
        )  # fmt: skip
        return out
    cut = _last(x, dy, out)
    pairs = [_folded(cut, array) for array in (dy, x, out)]
    work = np.empty((cut.parts, 5, cut.width), x.dtype)
    run = channels_last_backward.grad_input.form(x.dtype, cut.parallel)
    run(
        *pairs[0], *pairs[1], mean, rstd, gamma, both, count, training, cut.rest, cut.parts, cut.groups, cut.stream, work, *pairs[2]
    )  # fmt: skip
    return out


def forward(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
    """Moments and normalize; in one kernel, x from memory once, where a task's slab stays in the cache."""
    if x.ndim == 3:
        N, C, S = x.shape
        plan = schedule.first(N, C, S, x.itemsize)
        if plan.parts == 1:
            mean, m2 = np.empty((2, C))
            run = channels_first.forward.form(x.dtype, plan.parallel)
            run(
                x, _parameter(gamma, x), _parameter(beta, x), eps,
                plan.rows, plan.splits, plan.blocks, plan.groups, plan.stream, np.empty((3, C), x.dtype), out, mean, m2,
            )  # fmt: skip
            return out, Moments(N * S, mean, m2)
    else:
        cut = _last(x)  # x alone decides, so that the statistics do not depend on where the result goes
        if cut.parts == 1 and cut.fold == 1:
            R, C = x.shape
            mean, m2 = np.empty((2, cut.width))
            work = np.zeros((3, cut.width), x.dtype)
            run = channels_last_apply.forward.form(x.dtype, cut.parallel)
            run(x, _parameter(gamma, x), _parameter(beta, x), eps, cut.groups, cut.stream, work, out, mean, m2)
            return out, Moments(R, mean[:C], m2[:C])
    m = moments(x)
    return normalize(x, m.mean, m.rstd(eps), gamma, beta, out), m


def backward(
    dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, out: Array, training: bool = True
) -> tuple[Array, Wide, Wide]:
    """grad_reduce and grad_input, in one kernel where a task's slabs stay in the cache: (dx, dgamma, dbeta)."""
    if x.ndim == 3:
        plan = schedule.first(*x.shape, x.itemsize)
        if plan.parts == 1:
            sums = np.empty((2, mean.size))
            run = channels_first_backward.backward.form(x.dtype, plan.parallel)
            work = np.empty((5, mean.size), x.dtype)
            run(
                dy, x, mean, rstd, _parameter(gamma, x), training,
                plan.rows, plan.splits, plan.blocks, plan.groups, plan.stream, work, out, sums,
            )  # fmt: skip
            return out, sums[1], sums[0]
    else:
        cut = _last(x, dy)
        if cut.parts == 1 and cut.fold == 1:
            sums = np.empty((2, cut.width))
            work = np.zeros((5, cut.width), x.dtype)
            run = channels_last_backward.backward.form(x.dtype, cut.parallel)
            run(dy, x, mean, rstd, _parameter(gamma, x), training, cut.groups, cut.stream, work, out, sums)
            return out, sums[1, : mean.size], sums[0, : mean.size]
    found = grad_reduce(dy, x, mean, rstd)
    grad_input(dy, x, mean, rstd, gamma, found if training else None, x.size // mean.size, out)
    return out, found[1], found[0]


def describe(dims: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """Kernel and schedule for a canonical shape, for a person to read."""
    if len(dims) == 3:
        plan = schedule.first(*dims, dtype.itemsize)
        cut, fused = f"{plan.blocks} blocks a channel", plan.parts == 1
        tasks = plan.groups if fused else dims[1] * plan.parts
        chosen: schedule.First | schedule.Last = plan
    else:
        chosen = schedule.last(*dims, dtype.itemsize, True)
        cut = f"{chosen.fold} rows folded into one" if chosen.fold > 1 else "rows as they are"
        tasks, fused = chosen.parts * chosen.groups, chosen.parts == 1 and chosen.fold == 1
    modules = (channels_first,) * 2 if len(dims) == 3 else (channels_last, channels_last_apply)
    back = channels_first_backward if len(dims) == 3 else channels_last_backward
    forwards = [modules[1].forward] if fused else [modules[0].moments, modules[1].normalize]
    backwards = [back.backward] if fused else [back.grad_reduce, back.grad_input]
    names = [" + ".join(kernel.name for kernel in kernels) for kernels in (forwards, backwards)]
    passes = "fused, x is read from memory once" if fused else "two passes over memory: moments, then normalize"
    how = threads.describe() if chosen.parallel else "one thread: too small to wake the others"
    stores = "streaming, past the cache" if chosen.stream else "ordinary, into the cache"
    form = f"{dtype}, {'parallel' if chosen.parallel and threads.parallel() else 'serial'}"
    return f"kernels: {names[0]} ({form})\nbackward: {names[1]}\nschedule: {passes}; {tasks} tasks, {cut}\nthreads: {how}\nstores: {stores}"


def warmup(dtypes: Iterable[np.dtype[Any]] = tuple(_NONE)) -> Iterator[str]:
    """Compile every kernel for each dtype, serial and, where threads are safe, parallel; yields the name of each as it is done."""
    for kernel in _jit.KERNELS:
        for dtype in dtypes:
            for parallel in (False, True) if threads.usable() else (False,):
                kernel.compiled(dtype, parallel)
                yield f"{kernel.name} {dtype} {'parallel' if parallel else 'serial'}"
