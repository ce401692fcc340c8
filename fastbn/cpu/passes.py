"""Passes over canonical views on the CPU: which kernel runs, with which statistics and workspace. See `backend.Passes`.

Each is decided once for arrays of one shape, dtype and memory order: `Decided`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.arguments import dtypes, layout
from fastbn.cpu import schedule, team, threads
from fastbn.cpu.kernels import columns, columns_apply, columns_backward, inference, jit, rows, rows_backward
from fastbn.cpu.kernels import elementwise as per_channel
from fastbn.statistics import Moments, made

Array = NDArray[Any]
Wide = NDArray[np.float64]
Ints = tuple[int, ...]


class Decided:
    """The passes over arrays of one shape that reshapes to `dims`, of one dtype, with these canonical strides.

    A member is decided, with all that shape, dtype and strides decide, when it is first asked for.
    """

    def __init__(self, shape: Ints, dims: Ints, dtype: dtypes.Dtype, x: Ints, out: Ints = (), dy: Ints = ()) -> None:
        self.shape, self.dims, self.dtype, self.C = shape, dims, dtype, dims[1]
        self.count = math.prod(dims) // self.C
        self.x, self.out, self.dy = x, out, dy

    def _as_is(self, route: schedule.Route) -> bool:
        return route.storage == self.dtype and self.shape == route.shape

    @cached_property
    def moments(self) -> Callable[[Array], Moments]:
        """Of x."""
        route, C, count = schedule.route(self.dims, self.dtype, self.x), self.C, self.count
        by_rows, by_columns, storage, S = route.by_rows, route.by_columns, route.storage, route.columns_per_channel

        def run(x: Array) -> Moments:
            x_view, stats = route.view(x), np.empty((2, C))
            if by_rows is not None:
                group = schedule.group_of_statistics(by_rows, C)
                tasks = schedule.tasks(C * by_rows.parts, by_rows.parallel)
                kernel, partial = rows.moments.form(storage, tasks > 1), np.empty((by_rows.parts, 3, C))
                block_rows, splits, blocks, parts = by_rows[:4]
                kernel(x_view, block_rows, splits, blocks, parts, group, tasks, partial, stats)
            elif by_columns is not None:
                c = by_columns
                tasks = schedule.tasks(c.parts * c.blocks, c.parallel)
                work, totals = np.empty(tasks * c.work + 64, route.arithmetic), np.empty((c.parts + 1, 2, c.fold * C))
                columns.moments.form(storage, tasks > 1)(
                    *schedule.folded(c, x_view), C, S, c.fold, c.rest, c.parts, c.block * c.fold, tasks, c.pad, c.along,
                    work, totals, stats,
                )  # fmt: skip
            return made(count, stats[0], stats[1])

        return run

    @cached_property
    def normalize(self) -> Callable[..., Array]:
        """(x, mean, rstd, gamma, beta, out) -> out."""
        route = schedule.route(self.dims, self.dtype, self.x, self.out, applied=True)
        by_rows, by_columns, storage, S = route.by_rows, route.by_columns, route.storage, route.columns_per_channel
        arithmetic, absent, as_is, C, N = route.arithmetic, route.absent, self._as_is(route), self.C, self.dims[0]
        stream = schedule.streams(self.dims, self.dtype, 2)

        def run(x: Array, mean: Wide, rstd: Wide, gamma: Array | None, beta: Array | None, out: Array) -> Array:
            x_view, y_view = (x, out) if as_is else (route.view(x), route.view(out))
            gamma, beta = absent if gamma is None else gamma, absent if beta is None else beta
            if by_rows is not None:
                tasks = schedule.tasks(N * C * by_rows.pieces, by_rows.parallel)
                kernel, work = rows.normalize.form(storage, tasks > 1), np.empty((3, C + 7 & -8), arithmetic)
                kernel(x_view, mean, rstd, gamma, beta, by_rows.pieces, tasks, stream, work, y_view)
            elif by_columns is not None:
                c = by_columns
                whole, rest = (x_view, x_view) if c.fold == 1 else schedule.folded(c, x_view)
                whole_y, rest_y = (y_view, y_view) if c.fold == 1 else schedule.folded(c, y_view)
                tasks = schedule.tasks(c.runs * c.blocks, True) if c.parallel else 1
                columns_apply.normalize.form(storage, tasks > 1)(
                    whole, rest, mean, rstd, gamma, beta, S, c.fold, c.rest, c.runs, c.block, tasks, c.pad, stream,
                    np.empty(tasks * c.work + 64, arithmetic), whole_y, rest_y,
                )  # fmt: skip
            return out

        return run

    @cached_property
    def sums(self) -> Callable[[Array, Array, Wide, Wide], Wide]:
        """(dy, x, mean, rstd) -> sums of dy and of dy * xhat, (2, C)."""
        route, C = schedule.route(self.dims, self.dtype, self.x, self.dy), self.C
        by_rows, by_columns, storage, S = route.by_rows, route.by_columns, route.storage, route.columns_per_channel

        def run(dy: Array, x: Array, mean: Wide, rstd: Wide) -> Wide:
            x_view, dy_view, sums = route.view(x), route.view(dy), np.empty((2, C))
            if by_rows is not None:
                group = schedule.group_of_statistics(by_rows, C)
                tasks = schedule.tasks(C * by_rows.parts, by_rows.parallel)
                work = np.empty((tasks, 3, group + 7 & -8), route.arithmetic)
                kernel, partial = rows_backward.grad_reduce.form(storage, tasks > 1), np.empty((by_rows.parts, 2, C))
                block_rows, splits, blocks, parts = by_rows[:4]
                kernel(
                    dy_view, x_view, mean, rstd, block_rows, splits, blocks, parts, group, tasks, work, partial, sums
                )
            elif by_columns is not None:
                c = by_columns
                tasks = schedule.tasks(c.parts * c.blocks, c.parallel)
                scratch, totals = (
                    np.empty(tasks * c.work + 64, route.arithmetic),
                    np.empty((c.parts + 1, 2, c.fold * C)),
                )
                columns_backward.grad_reduce.form(storage, tasks > 1)(
                    *schedule.folded(c, dy_view), *schedule.folded(c, x_view), mean, rstd, S, c.fold, c.rest, c.parts,
                    c.block, tasks, c.pad, c.back_along, scratch, totals, sums,
                )  # fmt: skip
            return sums

        return run

    @cached_property
    def grad_input(self) -> Callable[..., Array]:
        """(dy, x, mean, rstd, gamma, sums or None, count, out) -> out."""
        route = schedule.route(self.dims, self.dtype, self.x, self.dy, self.out, applied=True)
        by_rows, by_columns, storage, S = route.by_rows, route.by_columns, route.storage, route.columns_per_channel
        C, N, stream = self.C, self.dims[0], schedule.streams(self.dims, self.dtype, 3)

        def run(
            dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, sums: Any, count: int, out: Array
        ) -> Array:
            training, both = sums is not None, np.zeros((2, C)) if sums is None else np.stack(sums)
            x_view, dy_view, dx_view = route.view(x), route.view(dy), route.view(out)
            gamma = route.absent if gamma is None else gamma
            if by_rows is not None:
                tasks = schedule.tasks(N * C * by_rows.pieces, by_rows.parallel)
                kernel = rows_backward.grad_input.form(storage, tasks > 1)
                work = np.empty((5, C + 7 & -8), route.arithmetic)
                kernel(
                    dy_view, x_view, mean, rstd, gamma, both, count, training, by_rows.pieces, tasks, stream,
                    work, dx_view,
                )  # fmt: skip
            elif by_columns is not None:
                c = by_columns
                tasks = schedule.tasks(c.runs * c.blocks, c.parallel)
                columns_backward.grad_input.form(storage, tasks > 1)(
                    *schedule.folded(c, dy_view), *schedule.folded(c, x_view), mean, rstd, gamma, both, count, training,
                    S, c.fold, c.rest, c.runs, c.block, tasks, c.pad, stream,
                    np.empty(tasks * c.work + 64, route.arithmetic), *schedule.folded(c, dx_view),
                )  # fmt: skip
            return out

        return run

    @cached_property
    def forward(self) -> Callable[..., tuple[Array, Moments]]:
        """(x, gamma, beta, eps, out) -> (out, moments)."""
        route = schedule.fused(self.dims, self.dtype, self.out, self.x)
        if route is None:
            return self._forward_in_two
        by_rows, by_columns, storage, S = route.by_rows, route.by_columns, route.storage, route.columns_per_channel
        arithmetic, absent, as_is, C, count = route.arithmetic, route.absent, self._as_is(route), self.C, self.count
        stream = schedule.streams(self.dims, self.dtype, 2)

        def run(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
            x_view, y_view = (x, out) if as_is else (route.view(x), route.view(out))
            gamma, beta = absent if gamma is None else gamma, absent if beta is None else beta
            stats = np.empty((2, C))
            if by_rows is not None:
                r = by_rows
                tasks = schedule.tasks(-(-C // r.group), r.parallel)
                kernel, work = rows.forward.form(storage, tasks > 1), np.empty((tasks, 3, 8), arithmetic)
                kernel(
                    x_view, gamma, beta, eps, r.block_rows, r.splits, r.blocks, r.group, tasks, r.prefetch, stream,
                    work, y_view, stats,
                )  # fmt: skip
            elif by_columns is not None:
                c = by_columns
                tasks = schedule.tasks(c.blocks, True) if c.parallel else 1
                kernel = columns_apply.forward.form(storage, tasks > 1)
                scratch = np.empty(tasks * c.work + 64, arithmetic)
                kernel(x_view, gamma, beta, eps, S, c.block, tasks, c.pad, stream, scratch, y_view, stats)
            return out, made(count, stats[0], stats[1])

        return run

    def _forward_in_two(
        self, x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array
    ) -> tuple[Array, Moments]:
        m = self.moments(x)
        return self.normalize(x, m.mean, rstd(m.m2, m.count, eps), gamma, beta, out), m

    @cached_property
    def backward(self) -> Callable[..., tuple[Array, Wide, Wide]]:
        """(dy, x, mean, rstd, gamma, out, training, grads) -> (out, dgamma, dbeta)."""
        route = schedule.fused(self.dims, self.dtype, self.out, self.x, self.dy)
        if route is None:
            return self._backward_in_two
        by_rows, by_columns, storage, S = route.by_rows, route.by_columns, route.storage, route.columns_per_channel
        arithmetic, absent, as_is, C = route.arithmetic, route.absent, self._as_is(route), self.C
        stream = schedule.streams(self.dims, self.dtype, 3)

        def run(
            dy: Array, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, out: Array, training: bool, grads: Any
        ) -> tuple[Array, Wide, Wide]:
            x_view, dy_view, dx_view = (x, dy, out) if as_is else (route.view(x), route.view(dy), route.view(out))
            gamma = absent if gamma is None else gamma
            sums, grads = np.empty((2, C)), np.empty((2, C), arithmetic) if grads is None else grads
            if by_rows is not None:
                r = by_rows
                tasks = schedule.tasks(-(-C // r.back_group), r.parallel)
                kernel, work = rows_backward.backward.form(storage, tasks > 1), np.empty((tasks, 5, 8), arithmetic)
                kernel(
                    dy_view, x_view, mean, rstd, gamma, training, r.block_rows, r.splits, r.blocks, r.back_group, tasks,
                    r.back_prefetch, stream, work, dx_view, sums, grads,
                )  # fmt: skip
            elif by_columns is not None:
                c = by_columns
                tasks = schedule.tasks(c.blocks, True) if c.parallel else 1
                columns_backward.backward.form(storage, tasks > 1)(
                    dy_view, x_view, mean, rstd, gamma, training, S, c.block, tasks, c.pad, stream,
                    np.empty(tasks * c.work + 64, arithmetic), dx_view, sums, grads,
                )  # fmt: skip
            return out, sums[1], sums[0]

        return run

    def _backward_in_two(
        self,
        dy: Array,
        x: Array,
        mean: Wide,
        rstd: Wide,
        gamma: Array | None,
        out: Array,
        training: bool,
        grads: Array | None,
    ) -> tuple[Array, Wide, Wide]:
        sums = self.sums(dy, x, mean, rstd)
        self.grad_input(dy, x, mean, rstd, gamma, (sums[0], sums[1]) if training else None, self.count, out)
        if grads is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                grads[...] = sums
        return out, sums[1], sums[0]

    @cached_property
    def inference(self) -> Callable[..., None]:
        """`rstd` and `normalize` of memory without gaps, in one kernel.

        Addresses of x, y, mean, var, gamma and beta, 0 where absent, and eps; perhaps a team of threads to run on. Mean
        and var are of the dtype of parameters.
        """
        (N, C, *_), most, stream = self.dims, 4 * threads.most(), schedule.streams(self.dims, self.dtype, 2)
        route = schedule.route(self.dims, self.dtype, self.x, self.out, applied=True)
        storage, arithmetic, like = route.storage, route.arithmetic, np.empty(0, route.storage)
        arguments: Ints
        size: Ints
        if (by_rows := route.by_rows) is not None:
            tasks = min(N * C * by_rows.pieces, most) if by_rows.parallel else 1
            kernel, size = inference.rows, (3, C + 7 & -8)
            arguments = (N, C, self.dims[2], by_rows.pieces, tasks, stream)
        elif (c := route.by_columns) is not None:
            tasks = min(c.runs * c.blocks, most) if c.parallel else 1
            kernel, size = inference.columns, (tasks * c.work + 64,)
            R, S = route.shape[0] // c.fold, route.columns_per_channel
            arguments = (R, C, S, c.fold, c.rest, c.runs, c.block, tasks, c.pad, stream)

        def run(
            x: int, y: int, mean: int, var: int, gamma: int, beta: int, eps: float, runtime: team.Runtime | None = None
        ) -> None:
            found = kernel.form(storage, tasks > 1, runtime)
            found(like, x, y, mean, var, gamma, beta, eps, *arguments, np.empty((2, C)), np.empty(size, arithmetic))

        return run


decided = lru_cache(maxsize=4096)(Decided)


def compact(shape: Ints, dims: Ints, dtype: dtypes.Dtype) -> Decided:
    """The passes over C-contiguous arrays of `shape` that reshape to `dims`."""
    one = layout.compact(dims, dtype.itemsize)
    return Decided(shape, dims, dtype, one, one, one)


def moments(x: Array) -> Moments:
    """Count, mean and m2 of each channel."""
    return decided(x.shape, x.shape, x.dtype, x.strides).moments(x)


def rstd(m2: Wide, count: float, eps: float) -> Wide:
    """1 / sqrt(m2 / count + eps)."""
    found = np.empty(m2.size)
    per_channel.rstd.compiled(dtypes.FLOAT64, False)(m2, count, eps, found)
    return found


def track(moments: Moments, freedom: float, weight: float, running_mean: Array, running_var: Array) -> None:
    """Running statistics move towards moments.mean and moments.m2 / freedom by `weight`, in place."""
    if running_mean.flags.carray and running_var.flags.carray:
        kernel = per_channel.track.compiled(running_mean.dtype, False)
        kernel(moments.mean, moments.m2, freedom, weight, running_mean, running_var)
        return
    moved = np.array((running_mean, running_var))  # strided ones, or off their elements' boundary
    track(moments, freedom, weight, *moved)
    running_mean[...], running_var[...] = moved


def normalize(x: Array, mean: Wide, rstd: Wide, gamma: Array | None, beta: Array | None, out: Array) -> Array:
    """y = gamma * (x - mean) * rstd + beta."""
    return decided(x.shape, x.shape, x.dtype, x.strides, out.strides).normalize(x, mean, rstd, gamma, beta, out)


def grad_reduce(dy: Array, x: Array, mean: Wide, rstd: Wide) -> tuple[Wide, Wide]:
    """(sum of dy, sum of dy * xhat) of each channel: (dbeta, dgamma)."""
    sums = decided(x.shape, x.shape, x.dtype, x.strides, (), dy.strides).sums(dy, x, mean, rstd)
    return sums[0], sums[1]


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
    run = decided(x.shape, x.shape, x.dtype, x.strides, out.strides, dy.strides).grad_input
    return run(dy, x, mean, rstd, gamma, sums, count, out)


def forward(x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array) -> tuple[Array, Moments]:
    """Moments and normalize; in one kernel, x from memory once, where a task's share stays in the cache."""
    return decided(x.shape, x.shape, x.dtype, x.strides, out.strides).forward(x, gamma, beta, eps, out)


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
    run = decided(x.shape, x.shape, x.dtype, x.strides, out.strides, dy.strides).backward
    return run(dy, x, mean, rstd, gamma, out, training, grads)


def describe(dims: Ints, dtype: dtypes.Dtype) -> str:
    """Kernel and schedule for a canonical shape, for a person to read."""
    one = layout.compact(dims, dtype.itemsize)
    route = schedule.route(dims, dtype, one)
    if (c := route.by_columns) is not None:
        cut = f"{c.fold} rows folded into one" if c.fold > 1 else "rows as they are"
        cut += f", {route.columns_per_channel} columns a channel" if route.columns_per_channel > 1 else ""
        units, parallel = c.parts * c.blocks, c.parallel
    elif (r := route.by_rows) is not None:
        cut, together = f"{r.blocks} blocks a channel", r.group if schedule.fused(dims, dtype, one, one) else 1
        units = -(-dims[1] * r.parts // together)
        parallel = r.parallel and dims[1] * r.parts > 1
    statistics, apply, back = (rows, rows, rows_backward) if c is None else (columns, columns_apply, columns_backward)
    fused, streams = schedule.fused(dims, dtype, one, one) is not None, schedule.streams(dims, dtype, 2)
    in_rows = schedule.route(dims, dtype, one, one, applied=True).by_rows is not None
    forwards = [apply.forward] if fused else [statistics.moments, (rows if in_rows else columns_apply).normalize]
    in_rows = schedule.route(dims, dtype, one, one, one, applied=True).by_rows is not None
    backwards = [back.grad_reduce, (rows_backward if in_rows else back).grad_input]
    if schedule.fused(dims, dtype, one, one, one):
        backwards = [back.backward]
    names = [" + ".join(kernel.name for kernel in kernels) for kernels in (forwards, backwards)]
    passes = "fused, x is read from memory once" if fused else "two passes over memory: moments, then normalize"
    how = threads.describe() if parallel else "one thread: too small to wake the others"
    stores = "streaming, past the cache" if streams else "ordinary, into the cache"
    form, tasks = (
        f"{dtype}, {'parallel' if parallel and threads.parallel() else 'serial'}",
        schedule.tasks(units, parallel),
    )
    lines = (
        f"kernels: {names[0]} ({form})",
        f"backward: {names[1]}",
        f"schedule: {passes}; {tasks} task{'s' * (tasks != 1)}, {cut}",
    )
    return "\n".join((*lines, f"threads: {how}", f"stores: {stores}"))


def warmup(which: Iterable[dtypes.Dtype], runtime: team.Runtime | None = None) -> Iterator[str]:
    """Compile every kernel for each dtype; yields their names.

    Serial and, where threads are safe, parallel, on numba's threads and a team's.
    """
    forms = {"serial": False, "parallel": True} | ({} if runtime is None else {"team": runtime})
    for kernel in jit.KERNELS:
        for dtype in which:
            storage = dtypes.HALF_STORAGE.get(dtype.name, dtype)
            if not kernel.parallel:  # on statistics, which are double, or on parameters
                storage = dtypes.FLOAT64 if kernel is per_channel.rstd else dtypes.of_parameters(dtype)
            for name, parallel in forms.items():
                if not parallel or (kernel.parallel and threads.usable()):
                    kernel.compiled(storage, parallel)
                    yield f"{kernel.name} {dtype} {name}"
