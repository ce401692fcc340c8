"""The functions of `gradients` and `split` for arrays on a GPU: validate, launch on a stream, return without waiting for it."""

from __future__ import annotations

from typing import Any

from fastbn import checks, device, device_checks
from fastbn.backends import cuda, devices, launches
from fastbn.backends.devices import Buffer


def _pair(dy: Any, x: Any) -> tuple[Buffer, Buffer]:
    """dy and x, alike."""
    x, dy = device_checks.as_input(x), device_checks.as_input(dy, "dy")
    if dy.shape != x.shape:
        raise ValueError(f"dy: given shape {dy.shape}, want {x.shape}, the shape of x")
    if dy.dtype != x.dtype:
        raise TypeError(f"dy: given dtype {dy.dtype}, want {x.dtype}, the dtype of x: convert one of them")
    return dy, x


def backward(
    dy: Any, x: Any, m: Any, constant: tuple[Any, Any] | None, gamma: Any, axis: int, eps: float, out: Any, stream: Any
) -> tuple[Any, Any, Any]:
    """`fastbn.batch_norm_backward`, and `fastbn.batch_norm_inference_backward` with `constant` statistics (mean, var)."""
    dy, x = _pair(dy, x)
    plan = device.planned(x, axis)
    kind, C = device_checks.parameters(x), plan.channels
    gamma, eps = device_checks.as_parameter(gamma, C, kind, "gamma"), checks.check_eps(eps, training=constant is None)
    if constant is None:
        checks.check_moments(m, C, plan.count)
        checks.check_count(x, plan.count)
        mean, spread = device_checks.as_statistic(m.mean, C, "moments.mean"), device_checks.as_statistic(m.m2, C, "moments.m2")
    else:
        mean, spread = device_checks.as_statistic(constant[0], C, "mean"), device_checks.as_statistic(constant[1], C, "var")
    names = ("moments.mean", "moments.m2") if constant is None else ("mean", "var")
    target = None if out is None else device_checks.check_out(out, x, dy, gamma=gamma, **dict(zip(names, (mean, spread), strict=True)))
    device.same_device(x, dy=dy, mean=mean, var=spread, gamma=gamma, out=target)
    out = device.new(plan, x) if out is None else out
    target = target or devices.view(out, "out")
    grads = devices.empty((2, C), (0, 1), kind, x)
    with launches.calling(x, stream) as call:
        if not plan.count:
            device.clear(call, grads)
        else:
            seen, steep = device.settled(call, plan, x), device.settled(call, plan, dy)
            place, late = device.place_for(plan, target, x)
            count = float(plan.count) if constant is None else 1.0
            cuda.backward(call, steep, seen, mean, spread, count, eps, gamma, place, constant is None, device.pointer(grads))
            if late:
                launches.copy(call, place.buffer, target)
    return out, grads[1], grads[0]


def batch_norm_backward_reduce(dy: Any, x: Any, mean: Any, var: Any, axis: int, eps: float, stream: Any) -> tuple[Any, Any]:
    """`fastbn.batch_norm_backward_reduce`."""
    dy, x = _pair(dy, x)
    plan = device.planned(x, axis)
    checks.check_running(mean, var)
    mean, var = device_checks.as_statistic(mean, plan.channels, "mean"), device_checks.as_statistic(var, plan.channels, "var")
    eps = checks.check_eps(eps, training=True)
    device.same_device(x, dy=dy, mean=mean, var=var)
    sums = devices.empty((2, plan.channels), (0, 1), "float64", x)
    with launches.calling(x, stream) as call:
        if plan.count:
            seen, steep = device.settled(call, plan, x), device.settled(call, plan, dy)
            cuda.grad_reduce(call, steep, seen, mean, var, eps, device.pointer(sums))
        else:
            device.clear(call, sums)
    return sums[0], sums[1]


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
    dy, x = _pair(dy, x)
    plan = device.planned(x, axis)
    C = plan.channels
    checks.check_running(mean, var)
    mean, var = device_checks.as_statistic(mean, C, "mean"), device_checks.as_statistic(var, C, "var")
    sums = device_checks.as_statistic(sum_dy, C, "sum_dy"), device_checks.as_statistic(sum_dy_xhat, C, "sum_dy_xhat")
    count = checks.check_whole(count, plan.count)
    checks.check_count(x, count)
    gamma, eps = device_checks.as_parameter(gamma, C, device_checks.parameters(x), "gamma"), checks.check_eps(eps, training=True)
    kept = {"mean": mean, "var": var, "sum_dy": sums[0], "sum_dy_xhat": sums[1], "gamma": gamma}
    target = None if out is None else device_checks.check_out(out, x, dy, **kept)
    device.same_device(x, dy=dy, mean=mean, var=var, sum_dy=sums[0], sum_dy_xhat=sums[1], gamma=gamma, out=target)
    out = device.new(plan, x) if out is None else out
    target = target or devices.view(out, "out")
    if plan.count:
        with launches.calling(x, stream) as call:
            seen, steep = device.settled(call, plan, x), device.settled(call, plan, dy)
            place, late = device.place_for(plan, target, x)
            cuda.grad_input(call, steep, seen, mean, var, eps, sums, float(count), gamma, place)
            if late:
                launches.copy(call, place.buffer, target)
    return out
