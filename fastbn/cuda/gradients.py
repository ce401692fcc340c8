"""The functions of `gradients` and `split` for arrays on a GPU, as `device` has the forward's."""

from __future__ import annotations

from typing import Any

from fastbn.arguments import checks, layout
from fastbn.cuda import launches, passes
from fastbn.cuda.backend import axis_of, clear, lies, new, pair, place_for, planned, settled
from fastbn.cuda.buffers import Buffer
from fastbn.cuda.checks import (
    as_input,
    check_out,
    check_pair,
    check_parameter,
    check_room,
    check_statistic,
    optional,
    parameters,
)
from fastbn.cuda.launches import Call, Queue, fresh
from fastbn.statistics import check_moments


def backward(
    dy: Any, x: Any, m: Any, constant: tuple[Any, Any] | None, gamma: Any, axis: int, eps: float, out: Any, stream: Any
) -> tuple[Any, Any, Any]:
    """`fastbn.batch_norm_backward`; with `constant` statistics (mean, var) `fastbn.batch_norm_inference_backward`."""
    training = constant is None
    names = ("moments.mean", "moments.m2") if training else ("mean", "var")
    x, dy, gamma, target = as_input(x), as_input(dy, "dy"), optional(gamma, "gamma"), optional(out, "out")
    check_pair(dy, x)
    axis = axis_of(x, axis)
    if constant is None:
        plan = planned(x, axis)
        check_moments(m, plan.channels, plan.count)
        constant = m.mean, m.m2
    mean, spread = (as_input(value, name) for value, name in zip(constant, names, strict=True))
    program = launches.program(_backward, lies(x, dy, mean, spread, gamma, target, None), axis, names, training)
    plan, eps = program.found, checks.check_eps(eps, training=training)
    check_out(target, (x, dy), gamma=gamma, **{names[0]: mean, names[1]: spread})
    with Queue(x, stream, dy=dy, mean=mean, var=spread, gamma=gamma, out=target) as queue:
        out, place = new(plan, x) if target is None else (out, target)
        address, dbeta, dgamma = pair(plan.channels, parameters(x), x)
        queue.run(program, (x, dy, mean, spread, gamma, place, address), eps)
    return out, dgamma, dbeta


def _backward(
    call: Call,
    x: Buffer,
    dy: Buffer,
    mean: Buffer,
    spread: Buffer,
    gamma: Buffer | None,
    out: Buffer | None,
    grads: None,
    axis: int,
    names: tuple[str, str],
    training: bool,
) -> layout.Plan:
    plan, kind = planned(x, axis), parameters(x)
    C, count = plan.channels, float(plan.count) if training else 1.0
    check_parameter(gamma, C, kind, "gamma")
    if training:
        checks.check_count(x, plan.count)
    check_statistic(mean, C, names[0])
    check_statistic(spread, C, names[1])
    check_room(out, x)
    to = fresh(7, (2, C), kind)
    if not plan.count:
        clear(call, to, C, kind)
        return plan
    seen, steep = settled(call, plan, x), settled(call, plan, dy)
    place, late = place_for(call, plan, out, x, 6)
    passes.backward(call, steep, seen, mean, spread, count, call.value(0), gamma, place, training, to)
    if late is not None:
        launches.copy(call, place.buffer, late)
    return plan


def batch_norm_backward_reduce(
    dy: Any, x: Any, mean: Any, var: Any, axis: int, eps: float, stream: Any
) -> tuple[Any, Any]:
    """`fastbn.batch_norm_backward_reduce`."""
    x, dy = as_input(x), as_input(dy, "dy")
    check_pair(dy, x)
    checks.check_running(mean, var)
    mean, var = as_input(mean, "mean"), as_input(var, "var")
    program = launches.program(_reduce, lies(x, dy, mean, var, None), axis_of(x, axis))
    eps = checks.check_eps(eps, training=True)
    with Queue(x, stream, dy=dy, mean=mean, var=var) as queue:
        address, sum_dy, sum_dy_xhat = pair(program.found.channels, "float64", x)
        queue.run(program, (x, dy, mean, var, address), eps)
    return sum_dy, sum_dy_xhat


def _reduce(call: Call, x: Buffer, dy: Buffer, mean: Buffer, var: Buffer, sums: None, axis: int) -> layout.Plan:
    plan = planned(x, axis)
    check_statistic(mean, plan.channels, "mean")
    check_statistic(var, plan.channels, "var")
    to = fresh(5, (2, plan.channels), "float64")
    if plan.count:
        passes.grad_reduce(call, settled(call, plan, dy), settled(call, plan, x), mean, var, call.value(0), to)
    else:
        clear(call, to, plan.channels, "float64")
    return plan


def batch_norm_backward_input(
    dy: Any,
    x: Any,
    mean: Any,
    var: Any,
    sum_dy: Any,
    sum_dy_xhat: Any,
    count: int,
    gamma: Any,
    axis: int,
    eps: float,
    out: Any,
    stream: Any,
) -> Any:
    """`fastbn.batch_norm_backward_input`."""
    x, dy = as_input(x), as_input(dy, "dy")
    check_pair(dy, x)
    checks.check_running(mean, var)
    mean, var = as_input(mean, "mean"), as_input(var, "var")
    sums = as_input(sum_dy, "sum_dy"), as_input(sum_dy_xhat, "sum_dy_xhat")
    gamma, target = optional(gamma, "gamma"), optional(out, "out")
    program = launches.program(_input, lies(x, dy, mean, var, *sums, gamma, target), axis_of(x, axis))
    plan = program.found
    count = checks.check_whole(count, plan.count)
    checks.check_count(x, count)
    eps = checks.check_eps(eps, training=True)
    beside = {"mean": mean, "var": var, "sum_dy": sums[0], "sum_dy_xhat": sums[1], "gamma": gamma}
    check_out(target, (x, dy), **beside)
    with Queue(x, stream, dy=dy, out=target, **beside) as queue:
        out, place = new(plan, x) if target is None else (out, target)
        queue.run(program, (x, dy, mean, var, *sums, gamma, place), eps, float(count))
    return out


def _input(
    call: Call,
    x: Buffer,
    dy: Buffer,
    mean: Buffer,
    var: Buffer,
    sum_dy: Buffer,
    sum_dy_xhat: Buffer,
    gamma: Buffer | None,
    out: Buffer | None,
    axis: int,
) -> layout.Plan:
    plan = planned(x, axis)
    for name, row in (("mean", mean), ("var", var), ("sum_dy", sum_dy), ("sum_dy_xhat", sum_dy_xhat)):
        check_statistic(row, plan.channels, name)
    check_parameter(gamma, plan.channels, parameters(x), "gamma")
    check_room(out, x)
    if plan.count:
        seen, steep = settled(call, plan, x), settled(call, plan, dy)
        place, late = place_for(call, plan, out, x, 8)
        sums = sum_dy, sum_dy_xhat
        passes.grad_input(call, steep, seen, mean, var, call.value(0), sums, call.value(1), gamma, place)
        if late is not None:
            launches.copy(call, place.buffer, late)
    return plan
