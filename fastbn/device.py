"""The functions of `functional` for arrays on a GPU: validate, launch on a stream, return without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from fastbn import checks, foreign, layout, overlap, scalars
from fastbn.backends import cuda, devices, launches, views
from fastbn.backends.devices import Buffer
from fastbn.kernels.cuda import finish
from fastbn.moments import Moments, made


class DeviceMoments(Moments):
    """Moments whose mean and m2 are arrays on a GPU, of the kind of x, float64; so is what its methods return."""

    def _spread(self, ddof: float, root: bool) -> Any:
        ddof = scalars.check_ddof(ddof)
        m2 = _wide(self.m2, "moments.m2")
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
        m2 = _wide(self.m2, "moments.m2")
        found = devices.empty(m2.shape, (0,), "float64", m2)
        with launches.calling(m2, None) as call:
            _per_channel(call, finish.rstd, m2, float(self.count or np.nan), eps, m2.size, found)
        return found

    def merge(self, other: Moments) -> DeviceMoments:
        """Moments of both groups of values together, on the same GPU; neither is changed: see `Moments.merge`."""
        if not isinstance(other, DeviceMoments):
            raise TypeError(f"merge: given {type(other).__name__}, want moments that are on the GPU too")
        mean, m2 = _wide(self.mean, "moments.mean"), _wide(self.m2, "moments.m2")
        theirs = _wide(other.mean, "other.mean"), _wide(other.m2, "other.m2")
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


def as_input(x: Any, name: str = "x") -> Buffer:
    """An input on a GPU; TypeError for a host array beside it."""
    if not foreign.on_device(x):
        raise TypeError(f"{name}: given {type(x).__name__} on the host, want an array on the GPU, where x is: copy it there first")
    return devices.view(x, name)


def as_parameter(value: Any, channels: int, dtype: str, name: str) -> Buffer | None:
    """gamma, beta: (C,) in the dtype of parameters, without gaps; or None."""
    if value is None:
        return None
    buffer = as_input(value, name)
    if buffer.dtype != dtype:
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want {dtype} beside this x: convert it")
    return _row(buffer, channels, name)


def as_statistic(value: Any, channels: int, name: str) -> Buffer:
    """mean, var: (C,) in float32 or float64, without gaps."""
    buffer = as_input(value, name)
    if buffer.dtype not in ("float32", "float64"):
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want float32 or float64")
    return _row(buffer, channels, name)


def _wide(value: Any, name: str) -> Buffer:
    """mean, m2 of moments: (C,) in float64, without gaps."""
    buffer = as_input(value, name)
    if buffer.dtype != "float64":
        raise TypeError(f"{name}: given dtype {buffer.dtype}, want float64")
    return _row(buffer, buffer.size, name)


def _row(buffer: Buffer, channels: int, name: str) -> Buffer:
    if buffer.shape != (channels,):
        raise ValueError(f"{name}: given shape {buffer.shape}, want ({channels},), one value per channel of x")
    if channels > 1 and buffer.strides != (1,):
        raise ValueError(f"{name}: given an array with gaps (strides {buffer.strides} elements), want a contiguous one: copy it first")
    return buffer


def check_out(out: Any, x: Buffer, *inputs: Buffer, **others: Any) -> Buffer:
    """An `out` that can take the result, as `checks.check_out` has it for the host."""
    buffer = as_input(out, "out")
    if buffer.dtype != x.dtype:
        raise TypeError(f"out: given dtype {buffer.dtype}, want {x.dtype}, the dtype of x")
    if buffer.shape != x.shape:
        raise ValueError(f"out: given shape {buffer.shape}, want {x.shape}, the shape of x")
    shadow = _shadow(buffer)
    if buffer.readonly:
        raise ValueError("out: given a read-only array, want one that can be written")
    checks.check_place(shadow, *(_shadow(array) for array in (x, *inputs)))
    checks.check_apart(shadow, **_shadows(others))
    return buffer


def check_apart(out: Any, **others: Any) -> None:
    """Memory that a result may take beside what a layer keeps, as `checks.check_apart` has it for the host."""
    checks.check_apart(_shadow(as_input(out, "out")), **_shadows(others))


def check_kept(arrays: Mapping[str, Any], channels: int, dtype: np.dtype[Any], written: bool, **beside: Any) -> None:
    """Arrays that a layer keeps, as `checks.check_kept` has it for the host; none has gaps."""
    places = []
    for name, value in (*arrays.items(), *beside.items()):
        if (buffer := as_parameter(value, channels, dtype.name, name)) is not None:
            places.append((buffer.address, buffer.address + channels * buffer.itemsize))
            if written and name in arrays and buffer.readonly:
                raise ValueError(f"{name}: given a read-only array, want one that can be written: give it a copy")
    if written and any(begins < end for (_, end), (begins, _) in pairwise(sorted(places))):
        checks.check_disjoint(_shadows(arrays), **_shadows(beside))


class _Interface:
    """Where an array lies, for NumPy's arithmetic on addresses; nobody reads that memory on the host."""

    def __init__(self, buffer: Buffer) -> None:
        strides = tuple(s * buffer.itemsize for s in buffer.strides)
        self.__array_interface__ = {
            "shape": buffer.shape, "strides": strides, "typestr": f"|V{buffer.itemsize}", "data": (buffer.address, False), "version": 3,
        }  # fmt: skip


def _shadow(buffer: Buffer) -> Any:
    return np.empty(buffer.shape, f"|V{buffer.itemsize}") if not buffer.size else np.asarray(_Interface(buffer))


def _shadows(arrays: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in arrays.items() if value is not None}
    return {name: _shadow(value if isinstance(value, Buffer) else as_input(value, name)) for name, value in given.items()}


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


def parameters(x: Buffer) -> str:
    """The dtype of parameters beside x."""
    return "float64" if x.dtype == "float64" else "float32"


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


def check_features(x: Any, axis: int, channels: int, dtype: str) -> None:
    """An input that goes with a layer's parameters."""
    buffer = as_input(x)
    axis = checks.check_axis(buffer.shape, axis)
    if buffer.shape[axis] != checks.check_channels(channels):
        raise ValueError(
            f"x: given {buffer.shape[axis]} channels along axis {axis} of shape {buffer.shape}, want {channels}, as this layer has"
        )
    if (wanted := parameters(buffer)) != dtype:
        raise TypeError(f"x: given dtype {buffer.dtype}, want {dtype}, this layer's: convert x, or make the layer with dtype='{wanted}'")


def same_memory(a: Any, b: Any) -> bool:
    """Whether two arrays on a GPU are element for element the same memory."""
    return a is b or (devices.on_device(a) and overlap.same_memory(_shadow(devices.view(a, "out")), _shadow(devices.view(b, "x"))))


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
    mean, m2 = _wide(m.mean, "moments.mean"), _wide(m.m2, "moments.m2")
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
