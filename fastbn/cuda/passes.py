"""The passes on canonical views, each a few launches; nothing comes back to the host."""

from __future__ import annotations

from typing import Any

from fastbn.cuda import grids, views
from fastbn.cuda.buffers import Buffer
from fastbn.cuda.kernels import apply, columns, finish, fused, jit, rows
from fastbn.cuda.launches import Call, pointer
from fastbn.cuda.views import DOUBLE, Flat, Reduction, View, pad_of

Given = dict[str, Any]  # what a kernel takes, by name: see `fastbn.cuda.kernels.arguments`
Kernels = tuple[jit.Kernel, jit.Kernel]

# for positions of 32 and of 64 bits
NORMALIZE = apply.normalize, apply.normalize_long
GRADIENT = apply.gradient, apply.gradient_long
# on rows and on columns
MOMENTS = rows.moments_rows, columns.moments_columns
SUMS = rows.sums_rows, columns.sums_columns
FORWARD = fused.forward_rows, fused.forward_columns
BACKWARD = fused.backward_rows, fused.backward_columns


def moments(call: Call, x: View, stats: Any) -> None:
    """Mean and m2 of each channel into `stats` (2, C)."""
    _reduce(call, MOMENTS, 3, finish.finish_moments, views.reduction(x), x, _arrays(x) | {"stats": stats})


def forward(call: Call, x: View, gamma: Buffer | None, beta: Buffer | None, eps: Any, out: View, stats: Any) -> None:
    """Moments into `stats` (2, C), and y."""
    reduction = views.fused_reduction(out, x)
    given = _arrays(x, out=out) | _affine(x, gamma, beta) | {"eps": eps, "stats": stats}
    if reduction.whole:
        _fused(call, FORWARD, reduction, x, given)
        return
    flat = views.flat(x, out)
    given |= _coefs(call, 3, x, flat)
    _reduce(call, MOMENTS, 3, finish.finish_forward, reduction, x, given)
    _elementwise(call, NORMALIZE, flat, given, x, out)


def inference(
    call: Call, x: View, mean: Buffer, var: Buffer, gamma: Buffer | None, beta: Buffer | None, eps: Any, out: View
) -> None:
    """The forward with given statistics."""
    flat = views.flat(x, out)
    given = _arrays(x) | _affine(x, gamma, beta) | {"eps": eps} | _coefs(call, 3, x, flat)
    mean, var = _alike(call, mean, var)
    given |= {"mean": pointer(mean), "var": pointer(var)}
    call.launch(finish.normalize_coefs, x.buffer.computed, grids.blocks(x.C), given, mean.dtype)
    _elementwise(call, NORMALIZE, flat, given, x, out)


def backward(
    call: Call,
    dy: View,
    x: View,
    mean: Buffer,
    var_or_m2: Buffer,
    count: float,
    eps: Any,
    gamma: Buffer | None,
    out: View,
    training: bool,
    grads: Any,
) -> None:
    """dx, and the sums of dy and dy * xhat into `grads` (2, C); the variance is var_or_m2 / count."""
    reduction = views.fused_reduction(out, x, dy)
    mean, var_or_m2 = _alike(call, mean, var_or_m2)
    given = _sums(dy, x, mean, var_or_m2, count, eps, out) | _affine(x, gamma) | {"grads": grads}
    if training and reduction.whole:
        _fused(call, BACKWARD, reduction, x, given, mean.dtype)
        return
    flat = views.flat(x, dy, out) if training else views.flat(dy, out)
    given |= _coefs(call, 4 if training else 3, x, flat)
    given |= {"training": int(training), "sums": call.take(2 * x.C, DOUBLE)}
    _reduce(call, SUMS, 2, finish.finish_backward, reduction, x, given, mean.dtype)
    if training:
        _elementwise(call, GRADIENT, flat, given, x, dy, out)
    else:  # x is not read again, nor its NaN
        _elementwise(call, NORMALIZE, flat, given, dy, out)


def grad_reduce(call: Call, dy: View, x: View, mean: Buffer, var: Buffer, eps: Any, sums: Any) -> None:
    """Sums of dy and dy * xhat into `sums` (2, C)."""
    computed, table = x.buffer.computed, {"columns": 1, "copies": 1, "pad": pad_of(x.C)}
    spare = {"coefs": call.take(4 * pad_of(x.C), computed), "grads": call.take(2 * x.C, computed)}  # not read
    mean, var = _alike(call, mean, var)
    given = _sums(dy, x, mean, var, 1.0, eps) | _affine(x, None) | table | spare | {"training": 1, "sums": sums}
    _reduce(call, SUMS, 2, finish.finish_backward, views.reduction(x, dy), x, given, mean.dtype)


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
    flat = views.flat(x, dy, out)
    given = _arrays(x) | _affine(x, gamma) | {"eps": eps, "values": values} | _coefs(call, 4, x, flat)
    mean, var = _alike(call, mean, var)
    given |= {"mean": pointer(mean), "var": pointer(var)}
    given |= {"sum_dy": pointer(_wide(call, sums[0])), "sum_dy_xhat": pointer(_wide(call, sums[1]))}
    call.launch(finish.gradient_coefs, x.buffer.computed, grids.blocks(x.C), given, mean.dtype)
    _elementwise(call, GRADIENT, flat, given, x, dy, out)


def _arrays(x: View, dy: View | None = None, out: View | None = None) -> Given:
    given = {"x": pointer(x.buffer), "N": x.N, "C": x.C, "S": x.S, "sn": x.outer, "sc": x.inner, "base": x.base}
    if dy is not None:
        given |= {"dy": pointer(dy.buffer), "dn": dy.outer, "dc": dy.inner, "base_dy": dy.base}
    if out is not None:
        given |= {"y": pointer(out.buffer), "dx": pointer(out.buffer)}
        given |= {"yn": out.outer, "yc": out.inner, "base_y": out.base}
    return given


def _sums(dy: View, x: View, mean: Buffer, var_or_m2: Buffer, count: float, eps: Any, out: View | None = None) -> Given:
    own = {"mean": pointer(mean), "m2": pointer(var_or_m2), "count": count, "eps": eps, "values": float(x.N * x.S)}
    return _arrays(x, dy, out) | own


def _affine(x: View, gamma: Buffer | None, beta: Buffer | None = None) -> Given:
    return {
        "gamma": pointer(x.buffer if gamma is None else gamma),  # an absent one is never read
        "beta": pointer(x.buffer if beta is None else beta),
        "affine": (gamma is not None) + 2 * (beta is not None),
    }


def _coefs(call: Call, number: int, x: View, flat: Flat) -> Given:
    columns, copies, pad = flat.table
    return {"coefs": call.take(number * pad, x.buffer.computed), "columns": columns, "copies": copies, "pad": pad}


def _reduce(
    call: Call,
    kernels: Kernels,
    numbers: int,
    finishing: jit.Kernel,
    reduction: Reduction,
    x: View,
    given: Given,
    statistic: str = "float64",
) -> None:
    """Statistics of each part of each channel, so many numbers, in float64; and what merges and uses them."""
    given = given | {"partial": call.take(numbers * reduction.entries * x.C, DOUBLE), "entries": reduction.entries}
    if (grid := reduction.rows) is not None:
        call.launch(kernels[0], x.buffer.storage, grid.blocks(x.C), given | grid._asdict(), statistic)
    elif (cut := reduction.columns) is not None:
        steps = {"step": cut.fold * x.outer, "step_dy": cut.fold * given.get("dn", 0), "aligned": reduction.even}
        call.launch(kernels[1], x.buffer.storage, cut.blocks, given | cut._asdict() | steps, statistic)
    across = grids.finish(reduction.entries, x.C)
    call.launch(finishing, x.buffer.storage, -(-x.C // across), given | {"across": across}, statistic)


def _fused(
    call: Call, kernels: Kernels, reduction: Reduction, x: View, given: Given, statistic: str = "float64"
) -> None:
    """Statistics and result in one launch."""
    if (grid := reduction.rows) is not None:
        call.launch(kernels[0], x.buffer.storage, x.C, given | grid._asdict(), statistic)
    elif (cut := reduction.columns) is not None:
        steps = {"R": x.N, "step": x.outer, "step_dy": given.get("dn", 0), "step_y": given["yn"]}
        own = steps | {"across": cut.across, "aligned": reduction.even}
        call.launch(kernels[1], x.buffer.storage, cut.blocks, given | own, statistic)


def _elementwise(call: Call, kernels: Kernels, flat: Flat, given: Given, *arrays: View) -> None:
    """An elementwise pass over inputs and, last, the result, with the coefficients that are given."""
    x, grid = arrays[0], flat.grid
    names = [("x", "sn", "sc", "xd"), *[("dy", "dn", "dc", "dd")] * (len(arrays) - 2), ("y", "yn", "yc", "yd")]
    given = given | grid._asdict() | {"aligned": flat.aligned}
    for k, (array, outer, inner, step) in enumerate(names):
        given |= {array: pointer(arrays[k].buffer), outer: flat.steps[2 * k], inner: flat.steps[2 * k + 1]}
        given[step] = grid.steps[k]
    given["dx"] = given["y"]
    call.launch(kernels[x.N * x.C * x.S >= grids.LONG], x.buffer.storage, grid.blocks(grids.THREADS), given)


def _alike(call: Call, mean: Buffer, var: Buffer) -> tuple[Buffer, Buffer]:
    """Given statistics in one dtype: float64 where they are of two."""
    if mean.dtype == var.dtype:
        return mean, var
    return _wide(call, mean), _wide(call, var)


def _wide(call: Call, values: Buffer) -> Buffer:
    """Statistics in float64."""
    if values.dtype == "float64":
        return values
    wide = call.take_like(values, "float64", (1,))
    given = {"values": pointer(values), "C": values.size, "result": pointer(wide)}
    call.launch(finish.widen, DOUBLE, grids.blocks(values.size), given, values.dtype)
    return wide
