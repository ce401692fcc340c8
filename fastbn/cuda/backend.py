"""Batch normalization of arrays on a GPU: validate, launch on a stream, return without waiting for it.

What depends on shapes, strides, dtypes and alignments alone is looked at once, by the functions that write a program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from fastbn.arguments import checks, dtypes, layout
from fastbn.cuda import buffers, cost, launches, passes, views
from fastbn.cuda import moments as device_moments
from fastbn.cuda.buffers import Buffer, geometries, pair
from fastbn.cuda.checks import (
    as_input,
    check_features,
    check_out,
    check_pair,
    check_parameter,
    check_room,
    check_statistic,
    optional,
    same_memory,
)
from fastbn.cuda.launches import Call, Queue, fresh
from fastbn.cuda.moments import DeviceMoments
from fastbn.statistics import Moments, check_moments, made


class Device:
    """Batch normalization of arrays on a GPU, on a stream: see `fastbn.functional` for the arguments.

    Parameters
    ----------
    stream : int or stream, optional
        Where kernels are queued; that of the library of x if None.
    """

    __slots__ = ("stream",)

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream

    def moments(self, x: Any, axis: int) -> Moments:
        """Count, mean and m2 of each channel."""
        x = as_input(x)
        program = launches.program(_moments, geometries(x, None), axis_key(x, axis))
        plan = program.plan
        with Queue(x, self.stream) as queue:
            address, mean, m2 = pair(plan.channels, "float64", x)
            queue.run(program, (x, address))
        return made(plan.count, mean, m2, DeviceMoments)

    def forward(self, x: Any, gamma: Any, beta: Any, axis: int, eps: float, out: Any) -> tuple[Any, Moments]:
        """(y, moments), normalized by the statistics of x."""
        x, gamma, beta, target = as_input(x), optional(gamma, "gamma"), optional(beta, "beta"), optional(out, "out")
        program = launches.program(_forward, geometries(x, gamma, beta, target, None), axis_key(x, axis))
        plan, eps = program.plan, checks.check_eps(eps, training=True)
        check_out(target, (x,), gamma=gamma, beta=beta)
        with Queue(x, self.stream, gamma=gamma, beta=beta, out=target) as queue:
            y, place = fresh_like(plan, x) if target is None else (out, target)
            address, mean, m2 = pair(plan.channels, "float64", x)
            queue.run(program, (x, gamma, beta, place, address), eps)
        return y, made(plan.count, mean, m2, DeviceMoments)

    def inference(self, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, axis: int, eps: float, out: Any) -> Any:
        """y, normalized by given statistics."""
        checks.check_running(mean, var)
        x, mean, var = as_input(x), as_input(mean, "mean"), as_input(var, "var")
        gamma, beta, target = optional(gamma, "gamma"), optional(beta, "beta"), optional(out, "out")
        program = launches.program(_inference, geometries(x, mean, var, gamma, beta, target), axis_key(x, axis))
        plan, eps = program.plan, checks.check_eps(eps, training=False)
        check_out(target, (x,), mean=mean, var=var, gamma=gamma, beta=beta)
        with Queue(x, self.stream, mean=mean, var=var, gamma=gamma, beta=beta, out=target) as queue:
            y, place = fresh_like(plan, x) if target is None else (out, target)
            queue.run(program, (x, mean, var, gamma, beta, place), eps)
        return y

    def backward(
        self, dy: Any, x: Any, moments: Any, gamma: Any, axis: int, eps: float, out: Any
    ) -> tuple[Any, Any, Any]:
        """(dx, dgamma, dbeta) of `forward`."""
        return self._backward(dy, x, moments, None, gamma, axis, eps, out)

    def inference_backward(
        self, dy: Any, x: Any, mean: Any, var: Any, gamma: Any, axis: int, eps: float, out: Any
    ) -> tuple[Any, Any, Any]:
        """(dx, dgamma, dbeta) of `inference`."""
        return self._backward(dy, x, None, (mean, var), gamma, axis, eps, out)

    def _backward(
        self, dy: Any, x: Any, moments: Any, constant: Any, gamma: Any, axis: int, eps: float, out: Any
    ) -> tuple[Any, Any, Any]:
        training = constant is None
        names = ("moments.mean", "moments.m2") if training else ("mean", "var")
        x, dy, gamma, target = as_input(x), as_input(dy, "dy"), optional(gamma, "gamma"), optional(out, "out")
        check_pair(dy, x)
        axis = axis_key(x, axis)
        if training:
            plan = planned(x, axis)
            check_moments(moments, plan.channels, plan.count)
            constant = moments.mean, moments.m2
        mean, var_or_m2 = (as_input(value, name) for value, name in zip(constant, names, strict=True))
        program = launches.program(
            _backward, geometries(x, dy, mean, var_or_m2, gamma, target, None), axis, names, training
        )
        plan, eps = program.plan, checks.check_eps(eps, training=training)
        check_out(target, (x, dy), gamma=gamma, **{names[0]: mean, names[1]: var_or_m2})
        with Queue(x, self.stream, dy=dy, mean=mean, var=var_or_m2, gamma=gamma, out=target) as queue:
            dx, place = fresh_like(plan, x) if target is None else (out, target)
            address, dbeta, dgamma = pair(plan.channels, x.parameters, x)
            queue.run(program, (x, dy, mean, var_or_m2, gamma, place, address), eps)
        return dx, dgamma, dbeta

    def grad_reduce(self, dy: Any, x: Any, mean: Any, var: Any, axis: int, eps: float) -> tuple[Any, Any]:
        """(sum of dy, sum of dy * xhat) over one part of a batch."""
        x, dy = as_input(x), as_input(dy, "dy")
        check_pair(dy, x)
        checks.check_running(mean, var)
        mean, var = as_input(mean, "mean"), as_input(var, "var")
        program = launches.program(_grad_reduce, geometries(x, dy, mean, var, None), axis_key(x, axis))
        eps = checks.check_eps(eps, training=True)
        with Queue(x, self.stream, dy=dy, mean=mean, var=var) as queue:
            address, sum_dy, sum_dy_xhat = pair(program.plan.channels, "float64", x)
            queue.run(program, (x, dy, mean, var, address), eps)
        return sum_dy, sum_dy_xhat

    def grad_input(
        self, dy: Any, x: Any, mean: Any, var: Any, sum_dy: Any, sum_dy_xhat: Any, count: int, gamma: Any, axis: int,
        eps: float, out: Any,
    ) -> Any:  # fmt: skip
        """dx of one part of a batch, given the sums over `count` values a channel of the whole."""
        x, dy = as_input(x), as_input(dy, "dy")
        check_pair(dy, x)
        checks.check_running(mean, var)
        mean, var = as_input(mean, "mean"), as_input(var, "var")
        sums = as_input(sum_dy, "sum_dy"), as_input(sum_dy_xhat, "sum_dy_xhat")
        gamma, target = optional(gamma, "gamma"), optional(out, "out")
        program = launches.program(_grad_input, geometries(x, dy, mean, var, *sums, gamma, target), axis_key(x, axis))
        plan = program.plan
        count = checks.check_whole(count, plan.count)
        checks.check_count(x, count)
        eps = checks.check_eps(eps, training=True)
        beside = {"mean": mean, "var": var, "sum_dy": sums[0], "sum_dy_xhat": sums[1], "gamma": gamma}
        check_out(target, (x, dy), **beside)
        with Queue(x, self.stream, dy=dy, out=target, **beside) as queue:
            dx, place = fresh_like(plan, x) if target is None else (out, target)
            queue.run(program, (x, dy, mean, var, *sums, gamma, place), eps, float(count))
        return dx

    def track(self, moments: Moments, freedom: float, weight: float, running_mean: Any, running_var: Any) -> None:
        """Running statistics move towards moments.mean and moments.m2 / freedom by `weight`, in place."""
        device_moments.track(moments, freedom, weight, running_mean, running_var)

    def check_part(
        self,
        x: Any,
        inputs: tuple[Any, ...],
        axis: int,
        out: Any,
        parameters: Mapping[str, Any],
        statistics: Mapping[str, Any],
    ) -> tuple[int, dtypes.Dtype]:
        """What a call on one part of a batch would refuse, refused; else (channels, dtype of parameters)."""
        x = as_input(x)
        channels, dtype = x.shape[checks.check_axis(x.shape, axis)], x.computed.name
        for name, value in parameters.items():
            check_parameter(optional(value, name), channels, dtype, name)
        if out is not None:
            target, others = as_input(out, "out"), {**parameters, **statistics}
            check_room(target, x)
            beside = {name: optional(array, name) for name, array in others.items()}
            check_out(target, (x, *map(as_input, inputs)), **beside)
        return channels, np.dtype(dtype)

    def check_features(self, x: Any, axis: int, channels: int, dtype: dtypes.Dtype) -> Any:
        """An input that goes with a layer of so many channels, whose parameters are of a dtype."""
        check_features(x, axis, channels, checks.check_parameter_dtype(dtype).name)
        return x

    def same_memory(self, a: Any, b: Any) -> bool:
        """Whether two arrays are element for element the same memory."""
        return same_memory(a, b)

    def statistic_copy(self, values: Any) -> Any:
        """A copy of (C,) statistics in float64."""
        return device_moments.statistic_copy(values)

    def parameter_copy(self, values: Any, dtype: dtypes.Dtype) -> Any:
        """A copy of (C,) parameters."""
        return device_moments.parameter_copy(values)

    def describe(self, dims: tuple[int, ...], dtype: dtypes.Dtype) -> str:
        """Bytes that the kernels move, and their schedule, for a person to read."""
        return cost.describe(dims, dtype)


def axis_key(x: Buffer, axis: Any) -> int:
    """An axis as a key: an int, which the plan looks at."""
    return axis if type(axis) is int else checks.check_axis(x.shape, axis)


def planned(x: Buffer, axis: int) -> layout.Plan:
    """The plan of an array on a GPU; of a compact one in the same memory order, where two strides can't describe it."""
    return _planned(x.shape, x.strides, x.itemsize, checks.check_axis(x.shape, axis))


@lru_cache(maxsize=1024)
def _planned(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, axis: int) -> layout.Plan:
    plan = layout.planned(shape, tuple(s * itemsize for s in strides), axis, itemsize)
    if not plan.count or views.view(Buffer(0, shape, strides, "", False, None, None), plan) is not None:
        return plan
    order = sorted(range(len(shape)), key=lambda a: -abs(strides[a]))
    return layout.planned(shape, tuple(s * itemsize for s in buffers.strides_of(shape, tuple(order))), axis, itemsize)


def fresh_like(plan: layout.Plan, x: Buffer) -> tuple[Any, int]:
    """(array, address) of a result in the memory order of x."""
    out = buffers.empty(x.shape, tuple(plan.memory), x.dtype, x)
    return out, buffers.address(out)


def canonical(call: Call, plan: layout.Plan, buffer: Buffer) -> views.View:
    """The canonical view of an input; of a copy in the plan's memory order where two strides can't describe it."""
    found = views.view(buffer, plan)
    if found is not None:
        return found
    copy = workspace_view(call, plan, buffer)
    launches.copy(call, buffer, copy.buffer)
    return copy


def workspace_view(call: Call, plan: layout.Plan, x: Buffer) -> views.View:
    """The canonical view of workspace for an array like x, in the plan's memory order."""
    found = views.view(call.take_like(x, x.dtype, buffers.strides_of(x.shape, plan.memory)), plan)
    assert found is not None  # a compact array in this order always has one
    return found


@contextmanager
def result_view(call: Call, plan: layout.Plan, x: Buffer, out: Buffer | None, number: int) -> Iterator[views.View]:
    """Where a kernel writes the result that has this number.

    Copied to `out` behind it where two strides can't describe that.
    """
    if out is None:
        out = buffers.stand_in((x.shape, buffers.strides_of(x.shape, plan.memory), x.dtype, 0), number)
    found = views.view(out, plan)
    if found is not None:
        yield found
    else:
        beside = workspace_view(call, plan, x)
        yield beside
        launches.copy(call, beside.buffer, out)


def _moments(call: Call, x: Buffer, stats: None, axis: int) -> layout.Plan:
    plan = planned(x, axis)
    to = fresh(2, (2, plan.channels), "float64")
    if plan.count:
        passes.moments(call, canonical(call, plan, x), to)
    else:
        launches.clear(call, to, plan.channels, "float64")
    return plan


def _forward(
    call: Call, x: Buffer, gamma: Buffer | None, beta: Buffer | None, out: Buffer | None, stats: None, axis: int
) -> layout.Plan:
    plan, dtype = planned(x, axis), x.parameters
    check_parameter(gamma, plan.channels, dtype, "gamma")
    check_parameter(beta, plan.channels, dtype, "beta")
    checks.check_count(x, plan.count)
    check_room(out, x)
    to = fresh(5, (2, plan.channels), "float64")
    if not plan.count:
        launches.clear(call, to, plan.channels, "float64")
        return plan
    x_view = canonical(call, plan, x)
    with result_view(call, plan, x, out, 4) as y_view:
        passes.forward(call, x_view, gamma, beta, call.value(0), y_view, to)
    return plan


def _inference(
    call: Call, x: Buffer, mean: Buffer, var: Buffer, gamma: Buffer | None, beta: Buffer | None, out: Buffer | None,
    axis: int,
) -> layout.Plan:  # fmt: skip
    plan, dtype = planned(x, axis), x.parameters
    check_statistic(mean, plan.channels, "mean")
    check_statistic(var, plan.channels, "var")
    check_parameter(gamma, plan.channels, dtype, "gamma")
    check_parameter(beta, plan.channels, dtype, "beta")
    check_room(out, x)
    if plan.count:
        x_view = canonical(call, plan, x)
        with result_view(call, plan, x, out, 6) as y_view:
            passes.inference(call, x_view, mean, var, gamma, beta, call.value(0), y_view)
    return plan


def _backward(
    call: Call, x: Buffer, dy: Buffer, mean: Buffer, var_or_m2: Buffer, gamma: Buffer | None, out: Buffer | None,
    grads: None, axis: int, names: tuple[str, str], training: bool,
) -> layout.Plan:  # fmt: skip
    plan, dtype = planned(x, axis), x.parameters
    C, count = plan.channels, float(plan.count) if training else 1.0
    check_parameter(gamma, C, dtype, "gamma")
    if training:
        checks.check_count(x, plan.count)
    check_statistic(mean, C, names[0])
    check_statistic(var_or_m2, C, names[1])
    check_room(out, x)
    to = fresh(7, (2, C), dtype)
    if not plan.count:
        launches.clear(call, to, C, dtype)
        return plan
    x_view, dy_view = canonical(call, plan, x), canonical(call, plan, dy)
    with result_view(call, plan, x, out, 6) as dx_view:
        passes.backward(call, dy_view, x_view, mean, var_or_m2, count, call.value(0), gamma, dx_view, training, to)
    return plan


def _grad_reduce(call: Call, x: Buffer, dy: Buffer, mean: Buffer, var: Buffer, sums: None, axis: int) -> layout.Plan:
    plan = planned(x, axis)
    check_statistic(mean, plan.channels, "mean")
    check_statistic(var, plan.channels, "var")
    to = fresh(5, (2, plan.channels), "float64")
    if plan.count:
        passes.grad_reduce(call, canonical(call, plan, dy), canonical(call, plan, x), mean, var, call.value(0), to)
    else:
        launches.clear(call, to, plan.channels, "float64")
    return plan


def _grad_input(
    call: Call, x: Buffer, dy: Buffer, mean: Buffer, var: Buffer, sum_dy: Buffer, sum_dy_xhat: Buffer,
    gamma: Buffer | None, out: Buffer | None, axis: int,
) -> layout.Plan:  # fmt: skip
    plan = planned(x, axis)
    for name, row in (("mean", mean), ("var", var), ("sum_dy", sum_dy), ("sum_dy_xhat", sum_dy_xhat)):
        check_statistic(row, plan.channels, name)
    check_parameter(gamma, plan.channels, x.parameters, "gamma")
    check_room(out, x)
    if plan.count:
        x_view, dy_view = canonical(call, plan, x), canonical(call, plan, dy)
        with result_view(call, plan, x, out, 8) as dx_view:
            sums, eps, count = (sum_dy, sum_dy_xhat), call.value(0), call.value(1)
            passes.grad_input(call, dy_view, x_view, mean, var, eps, sums, count, gamma, dx_view)
    return plan
