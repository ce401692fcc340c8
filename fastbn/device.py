"""The functions of `functional` for arrays on a GPU: validate, launch on a stream, return without waiting for it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from fastbn import checks, layout, scalars
from fastbn.backends import cuda, devices, launches, views
from fastbn.backends.devices import Buffer
from fastbn.device_checks import as_input, as_moment, as_parameter, as_statistic, check_out, parameters
from fastbn.device_checks import check_apart as check_apart
from fastbn.device_checks import check_features as check_features
from fastbn.device_checks import same_memory as same_memory
from fastbn.kernels.cuda import finish
from fastbn.moments import Moments, made


class DeviceMoments(Moments):
    """Moments whose mean and m2 are arrays on a GPU, of the kind of x, float64; so is what its methods return."""

    def _spread(self, ddof: float, root: bool) -> Any:
        ddof = scalars.check_ddof(ddof)
        m2 = as_moment(self.m2, "moments.m2")
        found = devices.empty(m2.shape, (0,), "float64", m2)
        freedom = float(self.count - ddof) if self.count > ddof else np.nan
        with launches.calling(m2, None) as call:
            _per_channel(call, finish.spread, m2, freedom, int(root), m2.size, found)
        return found

    def var(self, ddof: float = 0) -> Any:
        """Variance of each channel: see `Moments.var`."""
        return self._spread(ddof, False)

    def std(self, ddof: float = 0) -> Any:
        """Standard deviation of each channel: see `Moments.std`."""
        return self._spread(ddof, True)

    def rstd(self, eps: float) -> Any:
        """1 / sqrt(var + eps) of each channel: see `Moments.rstd`."""
        eps = scalars.check_eps(eps, training=False)
        m2 = as_moment(self.m2, "moments.m2")
        found = devices.empty(m2.shape, (0,), "float64", m2)
        with launches.calling(m2, None) as call:
            _per_channel(call, finish.rstd, m2, float(self.count or np.nan), eps, m2.size, found)
        return found

    def merge(self, other: Moments) -> DeviceMoments:
        """Moments of both groups of values together, on the same GPU; neither is changed: see `Moments.merge`."""
        if not isinstance(other, DeviceMoments):
            raise TypeError(f"merge: given {type(other).__name__}, want moments that are on the GPU too")
        mean, m2 = as_moment(self.mean, "moments.mean"), as_moment(self.m2, "moments.m2")
        theirs = as_moment(other.mean, "other.mean"), as_moment(other.m2, "other.m2")
        if not mean.shape == m2.shape == theirs[0].shape == theirs[1].shape:
            raise ValueError(f"merge: given {theirs[0].size} channels, want {mean.size}, as many as on the left")
        same_device(mean, m2=m2, other=theirs[0], other_m2=theirs[1])
        found, found_m2 = (devices.empty(m2.shape, (0,), "float64", m2) for _ in range(2))
        with launches.calling(m2, None) as call:
            _per_channel(call, finish.join_moments, float(self.count), mean, m2, float(other.count), *theirs, m2.size, found, found_m2)
        return made(self.count + other.count, found, found_m2, DeviceMoments)


def _per_channel(call: launches.Call, kernel: Any, *arguments: Any) -> None:
    """Launch a kernel that takes a channel per thread; buffers and arrays become pointers."""
    C = next(a for a in reversed(arguments) if type(a) is int)
    call.launch(kernel, views.DOUBLE, launches.threads(C), *(pointer(a) if _is_memory(a) else a for a in arguments))


def clear(call: launches.Call, array: Any) -> None:
    """Zeros."""
    found = devices.view(array, "array")
    call.launch(finish.clear, devices.STORED[found.dtype], launches.threads(found.size), launches.pointer(found), found.size)


def _is_memory(value: Any) -> bool:
    return not isinstance(value, int | float)


def pointer(value: Any) -> Any:
    """What a kernel takes for an array or a buffer."""
    buffer = value if isinstance(value, Buffer) else devices.view(value, "array")
    return launches.pointer(buffer)


def same_device(x: Buffer, **others: Buffer | None) -> None:
    """ValueError where another array is on another GPU than x."""
    home = devices.device_of(x)
    for name, buffer in others.items():
        if buffer is not None and buffer.size and (there := devices.device_of(buffer)) != home:
            raise ValueError(f"{name}: given an array on GPU {there}, want GPU {home}, where x is")


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


def new(plan: layout.Plan, x: Buffer) -> Any:
    """A result in the memory order of x."""
    return devices.empty(x.shape, tuple(plan.memory), x.dtype, x)


def settled(call: launches.Call, plan: layout.Plan, buffer: Buffer) -> views.View:
    """The canonical view of an input; of a copy in the plan's memory order where two strides can't describe it."""
    found = views.view(buffer, plan)
    if found is None:
        copy = devices.view(new(plan, buffer), "copy")
        launches.copy(call, buffer, copy)
        found = views.view(copy, plan)
        assert found is not None  # a compact array in this order always has one
    return found


def widened(values: Any) -> Any:
    """A copy of (C,) statistics in float64, queued before what changes them next."""
    buffer = as_statistic(values, devices.view(values, "statistics").size, "statistics")
    found = devices.empty(buffer.shape, (0,), "float64", buffer)
    with launches.calling(buffer, None) as call:
        call.launch(
            finish.widen, views.DOUBLE, launches.threads(buffer.size), launches.pointer(buffer), buffer.size, pointer(found),
            statistic=buffer.dtype,
        )  # fmt: skip
    return found


def copied(values: Any) -> Any:
    """A copy of (C,) parameters, queued before what changes them next."""
    buffer = as_input(values, "gamma")
    found = devices.empty(buffer.shape, (0,), buffer.dtype, buffer)
    with launches.calling(buffer, None) as call:
        launches.copy(call, buffer, devices.view(found, "copy"))
    return found


def track(m: Moments, freedom: float, weight: float, running_mean: Any, running_var: Any) -> None:
    """Running statistics move towards m.mean and m.m2 / freedom by `weight`, in place, on the GPU."""
    mean, m2 = as_moment(m.mean, "moments.mean"), as_moment(m.m2, "moments.m2")
    first = as_statistic(running_mean, mean.size, "running_mean")
    second = as_parameter(running_var, mean.size, first.dtype, "running_var")
    assert second is not None
    same_device(mean, m2=m2, running_mean=first, running_var=second)
    with launches.calling(mean, None) as call:
        call.launch(
            finish.track, devices.STORED[first.dtype], launches.threads(mean.size), launches.pointer(mean), launches.pointer(m2),
            freedom, weight, mean.size, launches.pointer(first), launches.pointer(second),
        )  # fmt: skip


def moments(x: Any, axis: int, stream: Any) -> DeviceMoments:
    """`fastbn.moments`."""
    x = as_input(x)
    plan = planned(x, axis)
    stats = devices.empty((2, plan.channels), (0, 1), "float64", x)
    found = made(plan.count, stats[0], stats[1], DeviceMoments)
    with launches.calling(x, stream) as call:
        if not plan.count:
            clear(call, stats)
            return found
        seen = settled(call, plan, x)
        cuda.moments(call, seen, pointer(stats))
    return found


def batch_norm(x: Any, gamma: Any, beta: Any, axis: int, eps: float, out: Any, stream: Any) -> tuple[Any, DeviceMoments]:
    """`fastbn.batch_norm`."""
    x = as_input(x)
    plan = planned(x, axis)
    kind = parameters(x)
    gamma, beta = as_parameter(gamma, plan.channels, kind, "gamma"), as_parameter(beta, plan.channels, kind, "beta")
    eps = checks.check_eps(eps, training=True)
    checks.check_count(x, plan.count)
    target = None if out is None else check_out(out, x, gamma=gamma, beta=beta)
    same_device(x, gamma=gamma, beta=beta, out=target)
    out = new(plan, x) if out is None else out
    target = target or devices.view(out, "out")
    stats = devices.empty((2, plan.channels), (0, 1), "float64", x)
    with launches.calling(x, stream) as call:
        if not plan.count:
            clear(call, stats)
        else:
            seen = settled(call, plan, x)
            place, late = place_for(plan, target, x)
            cuda.forward(call, seen, gamma, beta, eps, place, pointer(stats))
            if late:
                launches.copy(call, place.buffer, target)
    return out, made(plan.count, stats[0], stats[1], DeviceMoments)


def place_for(plan: layout.Plan, target: Buffer, x: Buffer) -> tuple[views.View, bool]:
    """Where a kernel writes, and whether that must be copied to the target."""
    found = views.view(target, plan)
    if found is not None:
        return found, False
    beside = views.view(devices.view(new(plan, x), "copy"), plan)
    assert beside is not None
    return beside, True


def batch_norm_inference(x: Any, mean: Any, var: Any, gamma: Any, beta: Any, axis: int, eps: float, out: Any, stream: Any) -> Any:
    """`fastbn.batch_norm_inference`."""
    x = as_input(x)
    plan = planned(x, axis)
    checks.check_running(mean, var)
    kind = parameters(x)
    mean, var = as_statistic(mean, plan.channels, "mean"), as_statistic(var, plan.channels, "var")
    gamma, beta = as_parameter(gamma, plan.channels, kind, "gamma"), as_parameter(beta, plan.channels, kind, "beta")
    eps = checks.check_eps(eps, training=False)
    target = None if out is None else check_out(out, x, mean=mean, var=var, gamma=gamma, beta=beta)
    same_device(x, mean=mean, var=var, gamma=gamma, beta=beta, out=target)
    out = new(plan, x) if out is None else out
    target = target or devices.view(out, "out")
    if plan.count:
        with launches.calling(x, stream) as call:
            seen = settled(call, plan, x)
            place, late = place_for(plan, target, x)
            cuda.inference(call, seen, mean, var, gamma, beta, eps, place)
            if late:
                launches.copy(call, place.buffer, target)
    return out
