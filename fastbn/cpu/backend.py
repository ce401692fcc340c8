"""The CPU backend, host side.

Allocate statistics and workspaces, pick the kernel, call it. See `fastbn.backends.Backend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import layout
from fastbn.cpu import routes, threads
from fastbn.cpu import team as _team
from fastbn.cpu.kernels import columns as channels_last
from fastbn.cpu.kernels import columns_apply, columns_backward, inference, jit, rows_backward
from fastbn.cpu.kernels import rows as channels_first
from fastbn.cpu.kernels import statistics as per_channel
from fastbn.statistics import Moments, made

Array = NDArray[Any]
Wide = NDArray[np.float64]
Ints = tuple[int, ...]


def moments(x: Array) -> Moments:
    """Count, mean and m2 of each channel."""
    route = routes.of(x.shape, x.dtype, x.strides)
    C, bits = x.shape[1], route.see(x)
    stats = np.empty((2, C))
    if (plan := route.first) is not None:
        lot, tasks = routes.lot(plan, C), routes.tasks(C * plan.parts, plan.parallel)
        run = channels_first.moments.form(route.stored, tasks > 1)
        run(bits, plan.rows, plan.splits, plan.blocks, plan.parts, lot, tasks, np.empty((plan.parts, 3, C)), stats)
    elif (cut := route.last) is not None:
        tasks = routes.tasks(cut.parts * cut.blocks, cut.parallel)
        work, partial = np.empty(tasks * cut.work + 64, route.kind), np.empty((cut.parts + 1, 2, cut.fold * C))
        run = channels_last.moments.form(route.stored, tasks > 1)
        run(
            *routes.folded(cut, bits),
            C,
            route.share,
            cut.fold,
            cut.rest,
            cut.parts,
            cut.block * cut.fold,
            tasks,
            cut.columns,
            cut.along,
            work,
            partial,
            stats,
        )
    return made(route.values, stats[0], stats[1])


def rstd(m2: Wide, count: float, eps: float) -> Wide:
    """1 / sqrt(m2 / count + eps)."""
    found = np.empty(m2.size)
    per_channel.rstd.compiled(routes.DOUBLE, False)(m2, count, eps, found)
    return found


def track(m: Moments, freedom: float, weight: float, running_mean: Array, running_var: Array) -> None:
    """Running statistics move towards m.mean and m.m2 / freedom by `weight`, in place."""
    if running_mean.flags.carray and running_var.flags.carray:
        per_channel.track.compiled(running_mean.dtype, False)(m.mean, m.m2, freedom, weight, running_mean, running_var)
        return
    moved = np.array((running_mean, running_var))  # strided ones, or off their elements' boundary
    track(m, freedom, weight, *moved)
    running_mean[...], running_var[...] = moved


def normalize(x: Array, mean: Wide, rstd: Wide, gamma: Array | None, beta: Array | None, out: Array) -> Array:
    """y = gamma * (x - mean) * rstd + beta."""
    return _normalize(x.shape, x.shape, x.dtype, out.strides, x.strides)(x, mean, rstd, gamma, beta, out)


@lru_cache(maxsize=4096)
def _normalize(given: Ints, shape: Ints, dtype: np.dtype[Any], out: Ints, x: Ints) -> Callable[..., Array]:
    """The normalization of arrays of one shape, dtype and memory order, with all decided that these decide.

    `given` reshapes to `shape`.
    """
    C, stream = shape[1], routes.streams(math.prod(shape) * dtype.itemsize, 2)
    route = routes.of(shape, dtype, x, out, applied=True)
    bits, stored, kind, seen, _, share, first, last, none = route
    as_is = bits is None and given == seen

    def run(x: Array, mean: Wide, rstd: Wide, gamma: Array | None, beta: Array | None, out: Array) -> Array:
        z, y = (x, out) if as_is else (route.see(x), route.see(out))
        gamma, beta = none if gamma is None else gamma, none if beta is None else beta
        if first is not None:
            tasks = routes.tasks(shape[0] * C * first.pieces, first.parallel)
            kernel = channels_first.normalize.form(stored, tasks > 1)
            kernel(z, mean, rstd, gamma, beta, first.pieces, tasks, stream, np.empty((3, C + 7 & -8), kind), y)
        elif last is not None:
            (rows, rest), (rows_y, rest_y) = (
                ((z, z), (y, y)) if last.fold == 1 else (routes.folded(last, z), routes.folded(last, y))
            )
            tasks = routes.tasks(last.runs * last.blocks, True) if last.parallel else 1
            kernel = columns_apply.normalize.form(stored, tasks > 1)
            kernel(
                rows, rest, mean, rstd, gamma, beta, share, last.fold, last.rest, last.runs, last.block, tasks,
                last.columns, stream,
                np.empty(tasks * last.work + 64, kind), rows_y, rest_y,
            )  # fmt: skip
        return out

    return run


def grad_reduce(dy: Array, x: Array, mean: Wide, rstd: Wide) -> tuple[Wide, Wide]:
    """(sum of dy, sum of dy * xhat) of each channel: (dbeta, dgamma)."""
    sums = _sums(dy, x, mean, rstd)
    return sums[0], sums[1]


def _sums(dy: Array, x: Array, mean: Wide, rstd: Wide) -> Wide:
    route = routes.of(x.shape, x.dtype, x.strides, dy.strides)
    bits, bits_dy, C = route.see(x), route.see(dy), mean.size
    sums = np.empty((2, C))
    if (plan := route.first) is not None:
        lot, tasks = routes.lot(plan, C), routes.tasks(C * plan.parts, plan.parallel)
        work, partial = np.empty((tasks, 3, lot + 7 & -8), route.kind), np.empty((plan.parts, 2, C))
        run = rows_backward.grad_reduce.form(route.stored, tasks > 1)
        run(bits_dy, bits, mean, rstd, plan.rows, plan.splits, plan.blocks, plan.parts, lot, tasks, work, partial, sums)
    elif (cut := route.last) is not None:
        tasks = routes.tasks(cut.parts * cut.blocks, cut.parallel)
        work, partial = np.empty(tasks * cut.work + 64, route.kind), np.empty((cut.parts + 1, 2, cut.fold * C))
        run = columns_backward.grad_reduce.form(route.stored, tasks > 1)
        run(
            *routes.folded(cut, bits_dy), *routes.folded(cut, bits), mean, rstd,
            route.share, cut.fold, cut.rest, cut.parts, cut.block, tasks, cut.columns, cut.back_along, work, partial,
            sums,
        )  # fmt: skip
    return sums


def grad_input(
    dy: Array,
    x: Array,
    mean: Wide,
    rstd: Wide,
    gamma: Array | None,
    sums: tuple[Wide, Wide] | None,
    count: int,
    out: Array,
) -> Array:
    """dx in training; with sums=None the statistics are constants, as at inference."""
    stream = routes.streams(out.nbytes, 3)
    route = routes.of(x.shape, x.dtype, x.strides, dy.strides, out.strides, applied=True)
    training, both = sums is not None, np.zeros((2, mean.size)) if sums is None else np.stack(sums)
    bits, bits_dy, dx, C = route.see(x), route.see(dy), route.see(out), mean.size
    gamma = route.none if gamma is None else gamma
    if (plan := route.first) is not None:
        tasks = routes.tasks(x.shape[0] * C * plan.pieces, plan.parallel)
        work = np.empty((5, C + 7 & -8), route.kind)
        run = rows_backward.grad_input.form(route.stored, tasks > 1)
        run(bits_dy, bits, mean, rstd, gamma, both, count, training, plan.pieces, tasks, stream, work, dx)
    elif (cut := route.last) is not None:
        tasks = routes.tasks(cut.runs * cut.blocks, cut.parallel)
        work = np.empty(tasks * cut.work + 64, route.kind)
        run = columns_backward.grad_input.form(route.stored, tasks > 1)
        run(
            *routes.folded(cut, bits_dy), *routes.folded(cut, bits), mean, rstd, gamma, both, count, training,
            route.share, cut.fold, cut.rest, cut.runs, cut.block, tasks, cut.columns, stream, work, *routes.folded(cut,
            dx),
        )  # fmt: skip
    return out


def forward(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
    """Moments and normalize; in one kernel, x from memory once, where a task's share stays in the cache."""
    return _forward(x.shape, x.shape, x.dtype, out.strides, x.strides)(x, gamma, beta, eps, out)


@lru_cache(maxsize=4096)
def _forward(
    given: Ints, shape: Ints, dtype: np.dtype[Any], out: Ints, x: Ints
) -> Callable[..., tuple[Array, Moments]]:
    """The forward of arrays of one shape, dtype and memory order, with all decided that these decide.

    Arrays as `given` reshape to it.
    """
    route = routes.fused(shape, dtype, out, x)
    if route is None:
        return _forward_in_two
    bits, stored, kind, seen, count, share, first, last, none = route
    as_is = bits is None and given == seen
    C, stream = shape[1], routes.streams(math.prod(shape) * dtype.itemsize, 2)

    def run(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
        z, y = (x, out) if as_is else (route.see(x), route.see(out))
        gamma, beta = none if gamma is None else gamma, none if beta is None else beta
        stats = np.empty((2, C))
        if first is not None:
            tasks = routes.tasks(-(-C // first.lot), first.parallel)
            kernel = channels_first.forward.form(stored, tasks > 1)
            work = np.empty((tasks, 3, 8), kind)
            kernel(
                z,
                gamma,
                beta,
                eps,
                first.rows,
                first.splits,
                first.blocks,
                first.lot,
                tasks,
                first.ahead,
                stream,
                work,
                y,
                stats,
            )
        elif last is not None:
            tasks = routes.tasks(last.blocks, True) if last.parallel else 1
            kernel = columns_apply.forward.form(stored, tasks > 1)
            work = np.empty(tasks * last.work + 64, kind)
            kernel(z, gamma, beta, eps, share, last.block, tasks, last.columns, stream, work, y, stats)
        return out, made(count, stats[0], stats[1])

    return run


def _forward_in_two(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
    m = moments(x)
    return normalize(x, m.mean, rstd(m.m2, m.count, eps), gamma, beta, out), m


def backward(
    dy: Array,
    x: Array,
    mean: Wide,
    rstd: Wide,
    gamma: Array | None,
    out: Array,
    training: bool = True,
    grads: Array | None = None,
) -> tuple[Array, Wide, Wide]:
    """grad_reduce and grad_input, in one kernel where a task's share stays in the cache: (dx, dgamma, dbeta)."""
    return _backward(x.shape, x.shape, x.dtype, out.strides, x.strides, dy.strides)(
        dy, x, mean, rstd, gamma, out, training, grads
    )


@lru_cache(maxsize=4096)
def _backward(
    given: Ints, shape: Ints, dtype: np.dtype[Any], out: Ints, x: Ints, dy: Ints
) -> Callable[..., tuple[Array, Wide, Wide]]:
    """The backward, as `_forward`."""
    route = routes.fused(shape, dtype, out, x, dy)
    if route is None:
        return _backward_in_two
    bits, stored, kind, seen, _, share, first, last, none = route
    as_is = bits is None and given == seen
    C, stream = shape[1], routes.streams(math.prod(shape) * dtype.itemsize, 3)

    def run(
        dy: Array,
        x: Array,
        mean: Wide,
        rstd: Wide,
        gamma: Array | None,
        out: Array,
        training: bool,
        grads: Array | None,
    ) -> tuple[Array, Wide, Wide]:
        z, dz, dx = (x, dy, out) if as_is else (route.see(x), route.see(dy), route.see(out))
        gamma = none if gamma is None else gamma
        sums, grads = np.empty((2, C)), np.empty((2, C), kind) if grads is None else grads
        if first is not None:
            tasks = routes.tasks(-(-C // first.back_lot), first.parallel)
            kernel = rows_backward.backward.form(stored, tasks > 1)
            work = np.empty((tasks, 5, 8), kind)
            kernel(
                dz, z, mean, rstd, gamma, training, first.rows, first.splits, first.blocks, first.back_lot, tasks,
                first.back_ahead, stream,
                work, dx, sums, grads,
            )  # fmt: skip
        elif last is not None:
            tasks = routes.tasks(last.blocks, True) if last.parallel else 1
            kernel = columns_backward.backward.form(stored, tasks > 1)
            work = np.empty(tasks * last.work + 64, kind)
            kernel(
                dz,
                z,
                mean,
                rstd,
                gamma,
                training,
                share,
                last.block,
                tasks,
                last.columns,
                stream,
                work,
                dx,
                sums,
                grads,
            )
        return out, sums[1], sums[0]

    return run


def _backward_in_two(
    dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, out: Array, training: bool, grads: Array | None
) -> tuple[Array, Wide, Wide]:
    sums = _sums(dy, x, mean, rstd)
    grad_input(dy, x, mean, rstd, gamma, (sums[0], sums[1]) if training else None, x.size // x.shape[1], out)
    if grads is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            grads[...] = sums
    return out, sums[1], sums[0]


@lru_cache(maxsize=4096)
def _inference(shape: Ints, dtype: np.dtype[Any]) -> Callable[..., None]:
    """`rstd` and `normalize` of memory without gaps.

    Addresses of x, y, mean, var, gamma and beta, 0 where absent, and eps.
    """
    one, C, stream = (
        layout.compact(shape, dtype.itemsize),
        shape[1],
        routes.streams(math.prod(shape) * dtype.itemsize, 2),
    )
    route = routes.of(shape, dtype, one, one, applied=True)
    stored, kind, like, most = route.stored, route.kind, np.empty(0, route.stored), 4 * threads.most()
    arguments: Ints
    size: Ints
    if (plan := route.first) is not None:
        tasks = min(shape[0] * C * plan.pieces, most) if plan.parallel else 1
        kernel, size = inference.rows, (3, C + 7 & -8)
        arguments = (shape[0], C, shape[2], plan.pieces, tasks, stream)
    elif (cut := route.last) is not None:
        tasks = min(cut.runs * cut.blocks, most) if cut.parallel else 1
        kernel, size = inference.columns, (tasks * cut.work + 64,)
        rows = route.seen[0] // cut.fold
        arguments = (rows, C, route.share, cut.fold, cut.rest, cut.runs, cut.block, tasks, cut.columns, stream)

    def run(x: int, y: int, mean: int, var: int, gamma: int, beta: int, eps: float, team: Any = None) -> None:
        found = kernel.form(stored, tasks > 1, team)
        found(like, x, y, mean, var, gamma, beta, eps, *arguments, np.empty((2, C)), np.empty(size, kind))

    return run


def compact(method: str, shape: Ints, dims: Ints, dtype: np.dtype[Any]) -> Callable[..., Any] | None:
    """Of the methods that are one kernel."""
    if method == "inference":
        return _inference(dims, dtype)
    one = layout.compact(dims, dtype.itemsize)
    if method == "normalize":
        return _normalize(shape, dims, dtype, one, one)
    if method == "forward":
        return _forward(shape, dims, dtype, one, one) if routes.fused(dims, dtype, one, one) else None
    return _backward(shape, dims, dtype, one, one, one) if routes.fused(dims, dtype, one, one, one) else None


def describe(dims: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """Kernel and schedule for a canonical shape, for a person to read."""
    one = layout.compact(dims, dtype.itemsize)
    first, last, share = (route := routes.of(dims, dtype, one)).first, route.last, route.share
    if last is not None:
        cut = f"{last.fold} rows folded into one" if last.fold > 1 else "rows as they are"
        cut += f", {share} columns a channel" if share > 1 else ""
        units, parallel = last.parts * last.blocks, last.parallel
    elif first is not None:
        cut, units = f"{first.blocks} blocks a channel", dims[1] * first.parts
        parallel = first.parallel and units > 1
    columns = last is not None
    statistics, apply = (channels_last, columns_apply) if columns else (channels_first, channels_first)
    back = columns_backward if columns else rows_backward
    fused, streams = (
        routes.fused(dims, dtype, one, one) is not None,
        routes.streams(math.prod(dims) * dtype.itemsize, 2),
    )
    rows = routes.of(dims, dtype, one, one, applied=True).first is not None
    forwards = [apply.forward] if fused else [statistics.moments, (channels_first if rows else columns_apply).normalize]
    along = rows_backward if routes.of(dims, dtype, one, one, one, applied=True).first is not None else back
    backwards = [back.backward] if routes.fused(dims, dtype, one, one, one) else [back.grad_reduce, along.grad_input]
    names = [" + ".join(kernel.name for kernel in kernels) for kernels in (forwards, backwards)]
    passes = "fused, x is read from memory once" if fused else "two passes over memory: moments, then normalize"
    how = threads.describe() if parallel else "one thread: too small to wake the others"
    stores = "streaming, past the cache" if streams else "ordinary, into the cache"
    form = f"{dtype}, {'parallel' if parallel and threads.parallel() else 'serial'}"
    lines = (
        f"kernels: {names[0]} ({form})",
        f"backward: {names[1]}",
        f"schedule: {passes}; {units} task{'s' * (units != 1)}, {cut}",
    )
    return "\n".join((*lines, f"threads: {how}", f"stores: {stores}"))


def warmup(dtypes: Iterable[np.dtype[Any]], team: _team.Runtime | None = None) -> Iterator[str]:
    """Compile every kernel for each dtype, serial and.

    Where threads are safe, parallel, on numba's threads and a team's; yields names.
    """
    forms = {"serial": False, "parallel": True} | ({} if team is None else {"team": team})
    for kernel in jit.KERNELS:
        for dtype in dtypes:
            stored = routes.BITS.get(dtype.name, dtype)
            if not kernel.parallel:  # on statistics, which are double, or on parameters
                stored = routes.DOUBLE if kernel is per_channel.rstd or dtype.itemsize == 8 else routes.SINGLE
            for name, parallel in forms.items():
                if not parallel or (kernel.parallel and threads.usable()):
                    kernel.compiled(stored, parallel)
                    yield f"{kernel.name} {dtype} {name}"
