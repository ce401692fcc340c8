"""The CUDA backend: the passes on canonical views, each a few launches; nothing comes back to the host."""

from __future__ import annotations

from typing import Any

from fastbn.backends import launches, views
from fastbn.backends.devices import STORED, Buffer
from fastbn.backends.launches import Call, pointer
from fastbn.backends.views import View, kind_of, pad_of
from fastbn.kernels.cuda import apply, finish

NORMALIZE = apply.normalize, apply.normalize_long
GRADIENT = apply.gradient, apply.gradient_long


def _parameters(x: View, gamma: Buffer | None, beta: Buffer | None = None) -> tuple[Any, Any, int]:
    """gamma, beta and which of them are there, as kernels take them."""
    absent = pointer(x.buffer)  # never read
    return (
        absent if gamma is None else pointer(gamma),
        absent if beta is None else pointer(beta),
        (gamma is not None) + 2 * (beta is not None),
    )


def moments(call: Call, x: View, stats: Any) -> None:
    """Mean and m2 of each channel into `stats` (2, C)."""
    plan = views.sized(x)
    call.work.reserve(launches.workspace(x.C, plan))
    partial, given = launches.partial_moments(call, x, plan)
    call.launch(
        finish.finish_moments, kind_of(x), launches.warps(x.C), partial, given, plan.entries, plan.fold, x.C, plan.share, plan.width, stats
    )  # fmt: skip


def forward(call: Call, x: View, gamma: Buffer | None, beta: Buffer | None, eps: float, out: View, stats: Any) -> None:
    """Moments into `stats` (2, C), and y."""
    plan, kind, pad = views.sized(x), kind_of(x), pad_of(x.C)
    call.work.reserve(launches.workspace(x.C, plan))
    coefs = call.work.take(5 * pad, kind)
    partial, given = launches.partial_moments(call, x, plan)
    call.launch(
        finish.finish_forward, kind, launches.warps(x.C), partial, given, plan.entries, plan.fold, x.C, plan.share, plan.width, eps,
        *_parameters(x, gamma, beta), pad, stats, coefs,
    )  # fmt: skip
    launches.elementwise(call, NORMALIZE, coefs, x, out)


def inference(call: Call, x: View, mean: Buffer, var: Buffer, gamma: Buffer | None, beta: Buffer | None, eps: float, out: View) -> None:
    """The forward with given statistics."""
    kind, pad = kind_of(x), pad_of(x.C)
    call.work.reserve(launches.workspace(x.C, None))
    coefs = call.work.take(5 * pad, kind)
    mean, var = launches.alike(call, mean, var)
    call.launch(
        finish.set_scale, kind, launches.threads(x.C), pointer(mean), pointer(var), 1.0, eps, *_parameters(x, gamma, beta), x.C, pad, coefs,
        statistic=mean.dtype,
    )  # fmt: skip
    launches.elementwise(call, NORMALIZE, coefs, x, out)


def backward(
    call: Call,
    dy: View,
    x: View,
    mean: Buffer,
    spread: Buffer,
    count: float,
    eps: float,
    gamma: Buffer | None,
    out: View,
    training: bool,
    grads: Any,
) -> None:
    """dx, and the sums of dy and dy * xhat into `grads` (2, C); the variance is spread / count."""
    plan, kind, pad = views.sized(x, dy), kind_of(x), pad_of(x.C)
    call.work.reserve(launches.workspace(x.C, plan))
    coefs, sums = call.work.take(5 * pad, kind), call.work.take(2 * x.C, STORED["float64"])
    mean, spread = launches.alike(call, mean, spread)
    partial = launches.partial_sums(call, dy, x, mean, plan)
    weight, _, affine = _parameters(x, gamma)
    call.launch(
        finish.finish_backward, kind, launches.warps(x.C), partial, plan.entries, plan.fold, x.C, plan.share, plan.width, pointer(mean),
        pointer(spread), count, eps, float(x.N * x.S), weight, affine, int(training), pad, sums, grads, coefs, statistic=mean.dtype,
    )  # fmt: skip
    if training:
        launches.elementwise(call, GRADIENT, coefs, x, dy, out)
    else:  # x is not read again, nor its NaN
        launches.elementwise(call, NORMALIZE, coefs, dy, out)
