"""The functions of `functional` for arrays on a GPU: validate, launch on a stream, return without waiting for it.

What depends on shapes, strides, dtypes and alignments alone is looked at once, by the functions that write a program.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from fastbn.arguments import checks, layout, scalars
from fastbn.cuda import buffers, launches, passes, views
from fastbn.cuda.buffers import Buffer, Lies
from fastbn.cuda.checks import (
    as_input,
    as_moment,
    check_out,
    check_parameter,
    check_room,
    check_statistic,
    optional,
    parameters,
)
from fastbn.cuda.checks import check_apart as check_apart
from fastbn.cuda.checks import check_features as check_features
from fastbn.cuda.checks import same_memory as same_memory
from fastbn.cuda.kernels import finish
from fastbn.cuda.launches import Call, Place, Queue, fresh, pointer
from fastbn.statistics import Moments, made


class DeviceMoments(Moments):
    """Moments whose mean and m2 are arrays on a GPU, of the kind of x, float64; so is what its methods return."""

    def _of_m2(self, kernel: Any, *values: float, **options: int) -> Any:
        """What a kernel makes of m2, a channel per thread."""
        m2 = as_moment(self.m2, "moments.m2")
        program = launches.program(_each, lies(m2, None), kernel, len(values), *options.values())
        with Queue(m2, None) as queue:
            found = buffers.empty(m2.shape, (0,), "float64", m2)
            queue.run(program, (m2, buffers.address(found)), *values)
        return found

    def _spread(self, ddof: float, root: bool) -> Any:
        ddof = scalars.check_ddof(ddof)
        freedom = float(self.count - ddof) if self.count > ddof else np.nan
        return self._of_m2(finish.spread, freedom, root=int(root))

    def var(self, ddof: float = 0) -> Any:
        """Variance of each channel: see `Moments.var`."""
        return self._spread(ddof, False)

    def std(self, ddof: float = 0) -> Any:
        """Standard deviation of each channel: see `Moments.std`."""
        return self._spread(ddof, True)

    def rstd(self, eps: float) -> Any:
        """1 / sqrt(var + eps) of each channel: see `Moments.rstd`."""
        eps = scalars.check_eps(eps, training=False)
        return self._of_m2(finish.rstd, float(self.count or np.nan), eps)

    def merge(self, other: Moments) -> DeviceMoments:
        """Moments of both groups of values together, on the same GPU; neither is changed: see `Moments.merge`."""
        if not isinstance(other, DeviceMoments):
            raise TypeError(f"merge: given {type(other).__name__}, want moments that are on the GPU too")
        given = as_moment(self.mean, "moments.mean"), as_moment(self.m2, "moments.m2")
        theirs = as_moment(other.mean, "other.mean"), as_moment(other.m2, "other.m2")
        if not given[0].shape == given[1].shape == theirs[0].shape == theirs[1].shape:
            raise ValueError(f"merge: given {theirs[0].size} channels, want {given[0].size}, as many as on the left")
        program = launches.program(_join, lies(*given, *theirs, None))
        with Queue(given[1], None, mean=given[0], other=theirs[0], other_m2=theirs[1]) as queue:
            address, mean, m2 = pair(given[1].size, "float64", given[1])
            queue.run(program, (*given, *theirs, address), float(self.count), float(other.count))
        return made(self.count + other.count, mean, m2, DeviceMoments)


def _each(call: Call, m2: Buffer, found: None, kernel: Any, values: int, *options: int) -> None:
    given = [call.value(k) for k in range(values)]
    call.launch(
        kernel,
        views.DOUBLE,
        launches.threads(m2.size),
        pointer(m2),
        *given,
        *options,
        m2.size,
        fresh(2, m2.shape, "float64"),
    )


def _join(call: Call, mean: Buffer, m2: Buffer, other: Buffer, other_m2: Buffer, found: None) -> None:
    C = m2.size
    left, right = ((call.value(k), *map(pointer, pair)) for k, pair in enumerate(((mean, m2), (other, other_m2))))
    rows = (Place(5, 8 * C * k, (8 * C * k, 8 * C * (k + 1)), views.DOUBLE) for k in range(2))
    call.launch(finish.join_moments, views.DOUBLE, launches.threads(C), *left, *right, C, *rows)


def lies(*buffers: Buffer | None) -> tuple[Lies | None, ...]:
    """How the arrays of a call lie; None for one that is absent, or is made for the result."""
    return tuple([None if buffer is None else buffer.lies for buffer in buffers])


def pair(C: int, dtype: str, like: Buffer) -> tuple[int, Any, Any]:
    """(address, first row, second row) of fresh memory (2, C)."""
    both = buffers.empty((2, C), (0, 1), dtype, like)
    return buffers.address(both), both[0], both[1]


def planned(x: Buffer, axis: int) -> layout.Plan:
    """The plan of an array on a GPU; of a compact one in the same memory order, where two strides can't describe it."""
    return _planned(x.shape, x.strides, x.itemsize, checks.check_axis(x.shape, axis))


@lru_cache(maxsize=1024)
def _planned(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int) -> layout.Plan:
    plan = layout.planned(shape, tuple(s * itemsize for s in strides), axis, itemsize)
    if not plan.count or views.view(Buffer(0, shape, strides, "", False, None, None), plan) is not None:
        return plan
    order = sorted(range(len(shape)), key=lambda a: -abs(strides[a]))
    steps = [itemsize * math.prod(shape[b] for b in order[order.index(a) + 1 :]) for a in range(len(shape))]
    return layout.planned(shape, tuple(steps), axis, itemsize)


def new(plan: layout.Plan, x: Buffer) -> tuple[Any, int]:
    """(array, address) of a result in the memory order of x."""
    out = buffers.empty(x.shape, tuple(plan.memory), x.dtype, x)
    return out, buffers.address(out)


def clear(call: Call, found: Place, C: int, dtype: str) -> None:
    """Zeros in (2, C)."""
    call.launch(finish.clear, buffers.STORED[dtype], launches.threads(2 * C), found, 2 * C)


def settled(call: Call, plan: layout.Plan, buffer: Buffer) -> views.View:
    """The canonical view of an input; of a copy in the plan's memory order where two strides can't describe it."""
    found = views.view(buffer, plan)
    if found is not None:
        return found
    copy = beside(call, plan, buffer)
    launches.copy(call, buffer, copy.buffer)
    return copy


def beside(call: Call, plan: layout.Plan, x: Buffer) -> views.View:
    """The canonical view of workspace for an array like x, in the plan's memory order."""
    found = views.view(call.take_like(x, x.dtype, buffers.strides_of(x.shape, plan.memory)), plan)
    assert found is not None  # a compact array in this order always has one
    return found


def place_for(
    call: Call, plan: layout.Plan, out: Buffer | None, x: Buffer, number: int
) -> tuple[views.View, Buffer | None]:
    """Where a kernel writes the result that has this number, and what that must be copied to."""
    if out is None:
        out = buffers.lying((x.shape, buffers.strides_of(x.shape, plan.memory), x.dtype, 0), number)
    found = views.view(out, plan)
    return (found, None) if found is not None else (beside(call, plan, x), out)


def widened(values: Any) -> Any:
    """A copy of (C,) statistics in float64, queued before what changes them next."""
    buffer = as_input(values, "statistics")
    program = launches.program(_widen, lies(buffer, None))
    with Queue(buffer, None) as queue:
        found = buffers.empty(buffer.shape, (0,), "float64", buffer)
        queue.run(program, (buffer, buffers.address(found)))
    return found


def _widen(call: Call, values: Buffer, found: None) -> None:
    C = values.size
    check_statistic(values, C, "statistics")
    to = fresh(2, (C,), "float64")
    call.launch(finish.widen, views.DOUBLE, launches.threads(C), pointer(values), C, to, statistic=values.dtype)


def copied(values: Any) -> Any:
    """A copy of (C,) parameters, queued before what changes them next."""
    buffer = as_input(values, "gamma")
    program = launches.program(_copy, lies(buffer, None))
    with Queue(buffer, None) as queue:
        found = buffers.empty(buffer.shape, (0,), buffer.dtype, buffer)
        queue.run(program, (buffer, buffers.address(found)))
    return found


def _copy(call: Call, values: Buffer, found: None) -> None:
    launches.copy(call, values, buffers.lying((values.shape, buffers.compact(values.shape), values.dtype, 0), 2))


def track(m: Moments, freedom: float, weight: float, running_mean: Any, running_var: Any) -> None:
    """Running statistics move towards m.mean and m.m2 / freedom by `weight`, in place, on the GPU."""
    mean, m2 = as_moment(m.mean, "moments.mean"), as_moment(m.m2, "moments.m2")
    first, second = as_input(running_mean, "running_mean"), as_input(running_var, "running_var")
    program = launches.program(_track, lies(mean, m2, first, second))
    with Queue(mean, None, m2=m2, running_mean=first, running_var=second) as queue:
        queue.run(program, (mean, m2, first, second), freedom, weight)


def _track(call: Call, mean: Buffer, m2: Buffer, first: Buffer, second: Buffer) -> None:
    C = mean.size
    check_statistic(first, C, "running_mean")
    check_parameter(second, C, first.dtype, "running_var")
    call.launch(
        finish.track, buffers.STORED[first.dtype], launches.threads(C), pointer(mean), pointer(m2), call.value(0),
        call.value(1), C,
        pointer(first), pointer(second),
    )  # fmt: skip


def axis_of(x: Buffer, axis: Any) -> int:
    """An axis as a key: an int, which the plan looks at."""
    return axis if type(axis) is int else checks.check_axis(x.shape, axis)


def moments(x: Any, axis: int, stream: Any) -> DeviceMoments:
    """`fastbn.moments`."""
    x = as_input(x)
    program = launches.program(_moments, lies(x, None), axis_of(x, axis))
    plan = program.found
    with Queue(x, stream) as queue:
        address, mean, m2 = pair(plan.channels, "float64", x)
        queue.run(program, (x, address))
    return made(plan.count, mean, m2, DeviceMoments)


def _moments(call: Call, x: Buffer, stats: None, axis: int) -> layout.Plan:
    plan = planned(x, axis)
    to = fresh(2, (2, plan.channels), "float64")
    if plan.count:
        passes.moments(call, settled(call, plan, x), to)
    else:
        clear(call, to, plan.channels, "float64")
    return plan


def batch_norm(
    x: Any, gamma: Any, beta: Any, axis: int, eps: float, out: Any, stream: Any
) -> tuple[Any, DeviceMoments]:
    """`fastbn.batch_norm`."""
    x, gamma, beta, target = as_input(x), optional(gamma, "gamma"), optional(beta, "beta"), optional(out, "out")
    program = launches.program(_forward, lies(x, gamma, beta, target, None), axis_of(x, axis))
    plan, eps = program.found, checks.check_eps(eps, training=True)
    check_out(target, (x,), gamma=gamma, beta=beta)
    with Queue(x, stream, gamma=gamma, beta=beta, out=target) as queue:
        out, place = new(plan, x) if target is None else (out, target)
        address, mean, m2 = pair(plan.channels, "float64", x)
        queue.run(program, (x, gamma, beta, place, address), eps)
    return out, made(plan.count, mean, m2, DeviceMoments)


def _forward(
    call: Call, x: Buffer, gamma: Buffer | None, beta: Buffer | None, out: Buffer | None, stats: None, axis: int
) -> layout.Plan:
    plan, kind = planned(x, axis), parameters(x)
    check_parameter(gamma, plan.channels, kind, "gamma")
    check_parameter(beta, plan.channels, kind, "beta")
    checks.check_count(x, plan.count)
    check_room(out, x)
    to = fresh(5, (2, plan.channels), "float64")
    if not plan.count:
        clear(call, to, plan.channels, "float64")
        return plan
    seen = settled(call, plan, x)
    place, late = place_for(call, plan, out, x, 4)
    passes.forward(call, seen, gamma, beta, call.value(0), place, to)
    if late is not None:
        launches.copy(call, place.buffer, late)
    return plan


def batch_norm_inference(
    x: Any, mean: Any, var: Any, gamma: Any, beta: Any, axis: int, eps: float, out: Any, stream: Any
) -> Any:
    """`fastbn.batch_norm_inference`."""
    checks.check_running(mean, var)
    x, mean, var = as_input(x), as_input(mean, "mean"), as_input(var, "var")
    gamma, beta, target = optional(gamma, "gamma"), optional(beta, "beta"), optional(out, "out")
    program = launches.program(_inference, lies(x, mean, var, gamma, beta, target), axis_of(x, axis))
    plan, eps = program.found, checks.check_eps(eps, training=False)
    check_out(target, (x,), mean=mean, var=var, gamma=gamma, beta=beta)
    with Queue(x, stream, mean=mean, var=var, gamma=gamma, beta=beta, out=target) as queue:
        out, place = new(plan, x) if target is None else (out, target)
        queue.run(program, (x, mean, var, gamma, beta, place), eps)
    return out


def _inference(
    call: Call,
    x: Buffer,
    mean: Buffer,
    var: Buffer,
    gamma: Buffer | None,
    beta: Buffer | None,
    out: Buffer | None,
    axis: int,
) -> layout.Plan:
    plan, kind = planned(x, axis), parameters(x)
    check_statistic(mean, plan.channels, "mean")
    check_statistic(var, plan.channels, "var")
    check_parameter(gamma, plan.channels, kind, "gamma")
    check_parameter(beta, plan.channels, kind, "beta")
    check_room(out, x)
    if plan.count:
        seen = settled(call, plan, x)
        place, late = place_for(call, plan, out, x, 6)
        passes.inference(call, seen, mean, var, gamma, beta, call.value(0), place)
        if late is not None:
            launches.copy(call, place.buffer, late)
    return plan
