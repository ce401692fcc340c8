"""The CUDA backend: the passes on canonical views, each a few launches; nothing comes back to the host."""

from __future__ import annotations

from typing import Any

from fastbn.cuda import grids, launches, views
from fastbn.cuda.buffers import STORED, Buffer
from fastbn.cuda.kernels import apply, finish, fused
from fastbn.cuda.launches import Call, pointer
from fastbn.cuda.views import View, kind_of, pad_of

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
    partial, across = launches.partial_moments(call, x, plan), grids.finish(plan.entries, x.C)
    call.launch(
        finish.finish_moments, STORED[x.buffer.dtype], -(-x.C // across), partial, plan.entries, x.C, across,
        pointer(x.buffer), x.N, x.S, x.outer, x.inner, stats,
    )  # fmt: skip


def forward(call: Call, x: View, gamma: Buffer | None, beta: Buffer | None, eps: Any, out: View, stats: Any) -> None:
    """Moments into `stats` (2, C), and y."""
    plan = views.sized_for(out, x)
    if plan.whole:
        _whole_forward(call, x, _parameters(x, gamma, beta), eps, out, stats, plan)
        return
    flat = views.flat(x, out)
    coefs = call.take(3 * flat.table[2], kind_of(x))
    partial, across = launches.partial_moments(call, x, plan), grids.finish(plan.entries, x.C)
    call.launch(
        finish.finish_forward, STORED[x.buffer.dtype], -(-x.C // across), partial, plan.entries, x.C, across,
        pointer(x.buffer), x.N, x.S, x.outer, x.inner, eps, *_parameters(x, gamma, beta), *flat.table, stats, coefs,
    )  # fmt: skip
    launches.elementwise(call, NORMALIZE, flat, coefs, x, out)


def inference(
    call: Call, x: View, mean: Buffer, var: Buffer, gamma: Buffer | None, beta: Buffer | None, eps: Any, out: View
) -> None:
    """The forward with given statistics."""
    kind, flat = kind_of(x), views.flat(x, out)
    coefs = call.take(3 * flat.table[2], kind)
    mean, var = launches.alike(call, mean, var)
    call.launch(
        finish.normalize_coefs, kind, launches.threads(x.C), pointer(mean), pointer(var), eps,
        *_parameters(x, gamma, beta), x.C, *flat.table, coefs, statistic=mean.dtype,
    )  # fmt: skip
    launches.elementwise(call, NORMALIZE, flat, coefs, x, out)


def backward(
    call: Call,
    dy: View,
    x: View,
    mean: Buffer,
    spread: Buffer,
    count: float,
    eps: Any,
    gamma: Buffer | None,
    out: View,
    training: bool,
    grads: Any,
) -> None:
    """dx, and the sums of dy and dy * xhat into `grads` (2, C); the variance is spread / count."""
    plan = views.sized_for(out, x, dy)
    mean, spread = launches.alike(call, mean, spread)
    if training and plan.whole:
        _whole_backward(call, dy, x, mean, spread, count, eps, gamma, out, grads, plan)
        return
    flat = views.flat(x, dy, out) if training else views.flat(dy, out)
    coefs, sums = call.take((4 if training else 3) * flat.table[2], kind_of(x)), call.take(2 * x.C, STORED["float64"])
    _finish_sums(call, dy, x, mean, spread, count, eps, gamma, training, flat.table, (sums, grads, coefs), plan)
    if training:
        launches.elementwise(call, GRADIENT, flat, coefs, x, dy, out)
    else:  # x is not read again, nor its NaN
        launches.elementwise(call, NORMALIZE, flat, coefs, dy, out)


def _finish_sums(
    call: Call,
    dy: View,
    x: View,
    mean: Buffer,
    spread: Buffer,
    count: float,
    eps: Any,
    gamma: Buffer | None,
    training: bool,
    table: tuple[int, int, int],
    found: tuple[Any, Any, Any],
    plan: views.Sized,
) -> None:
    """Sums of dy and dy * xhat (2, C) in float64 and as parameters, and coefficients of the elementwise pass."""
    partial, across = launches.partial_sums(call, dy, x, mean, plan), grids.finish(plan.entries, x.C)
    weight, _, affine = _parameters(x, gamma)
    call.launch(
        finish.finish_backward, STORED[x.buffer.dtype], -(-x.C // across), partial, plan.entries, x.C, across,
        pointer(x.buffer), pointer(dy.buffer), x.N, x.S, x.outer, x.inner, dy.outer, dy.inner,
        pointer(mean), pointer(spread), count, eps, float(x.N * x.S), weight, affine, int(training), *table, *found,
        statistic=mean.dtype,
    )  # fmt: skip


def grad_reduce(call: Call, dy: View, x: View, mean: Buffer, var: Buffer, eps: Any, sums: Any) -> None:
    """Sums of dy and dy * xhat into `sums` (2, C)."""
    plan, kind = views.sized(x, dy), kind_of(x)
    coefs, grads = call.take(4 * pad_of(x.C), kind), call.take(2 * x.C, kind)
    mean, var = launches.alike(call, mean, var)
    _finish_sums(call, dy, x, mean, var, 1.0, eps, None, True, (1, 1, pad_of(x.C)), (sums, grads, coefs), plan)


def grad_input(
    call: Call,
    dy: View,
    x: View,
    mean: Buffer,
    var: Buffer,
    eps: Any,
    sums: tuple[Buffer, Buffer],
    values: Any,
    gamma: Buffer | None,
    out: View,
) -> None:
    """dx, from the sums of dy and dy * xhat over `values` per channel."""
    kind, flat = kind_of(x), views.flat(x, dy, out)
    coefs = call.take(4 * flat.table[2], kind)
    mean, var = launches.alike(call, mean, var)
    sums = launches.wide(call, sums[0]), launches.wide(call, sums[1])
    weight, _, affine = _parameters(x, gamma)
    call.launch(
        finish.gradient_coefs, kind, launches.threads(x.C), pointer(mean), pointer(var), eps, *map(pointer, sums),
        values, weight, affine,
        x.C, *flat.table, coefs, statistic=mean.dtype,
    )  # fmt: skip
    launches.elementwise(call, GRADIENT, flat, coefs, x, dy, out)


def _whole_forward(
    call: Call, x: View, parameters: tuple[Any, Any, int], eps: Any, out: View, stats: Any, plan: views.Sized
) -> None:
    """Statistics and y in one launch."""
    given, stored = (pointer(x.buffer), pointer(out.buffer), *parameters, eps), STORED[x.buffer.dtype]
    if (grid := plan.rows) is not None:
        call.launch(
            fused.forward_rows, stored, x.C, *given, x.N, x.C, x.S, x.outer, x.inner, out.outer, out.inner, x.base,
            out.base,
            grid.slots, grid.rest, grid.step_n, grid.step_v, grid.chunk, grid.chunk_rest, stats,
        )  # fmt: skip
    elif (cut := plan.columns) is not None:
        call.launch(
            fused.forward_columns, stored, cut.blocks, *given, x.N, x.C, x.outer, out.outer, cut.across, plan.even,
            stats,
        )  # fmt: skip


def _whole_backward(
    call: Call,
    dy: View,
    x: View,
    mean: Buffer,
    spread: Buffer,
    count: float,
    eps: Any,
    gamma: Buffer | None,
    out: View,
    grads: Any,
    plan: views.Sized,
) -> None:
    """Sums and dx in one launch."""
    weight, _, affine = _parameters(x, gamma)
    arrays = pointer(x.buffer), pointer(dy.buffer), pointer(out.buffer), pointer(mean), pointer(spread)
    given, stored = (*arrays, count, eps, float(x.N * x.S), weight, affine), STORED[x.buffer.dtype]
    if (grid := plan.rows) is not None:
        call.launch(
            fused.backward_rows, stored, x.C, *given, x.N, x.C, x.S, x.outer, x.inner, dy.outer, dy.inner, out.outer,
            out.inner,
            x.base, dy.base, out.base, grid.slots, grid.rest, grid.step_n, grid.step_v, grid.chunk, grid.chunk_rest,
            grads,
            statistic=mean.dtype,
        )  # fmt: skip
    elif (cut := plan.columns) is not None:
        call.launch(
            fused.backward_columns, stored, cut.blocks, *given, x.N, x.C, x.outer, dy.outer, out.outer, cut.across,
            plan.even,
            grads, statistic=mean.dtype,
        )  # fmt: skip
