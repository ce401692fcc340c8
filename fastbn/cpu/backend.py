"""Batch normalization of arrays on the host: check, plan, run, put.

`Host` satisfies `fastbn.backends.Backend` by `Passes` over canonical views: the kernels', or the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn.arguments import checks, dtypes, layout, overlap
from fastbn.cpu import threads
from fastbn.statistics import Moments, check_moments, made

Array = NDArray[Any]
Wide = NDArray[np.float64]
Ints = tuple[int, ...]

PIECE = 2**18  # integers widened at a time, to 2 MB of float64: in cache when their moments are taken
PIECE_ROWS = 64  # at least, of an (R, C) array that has so many: merging a piece costs as much as some rows


class Compact(Protocol):
    """Passes with all decided, over C-contiguous arrays of one shape and dtype, of whatever rank."""

    @property
    def forward(self) -> Callable[..., tuple[Array, Moments]]:
        """(x, gamma, beta, eps, out) -> (out, moments)."""

    @property
    def normalize(self) -> Callable[..., Array]:
        """(x, mean, rstd, gamma, beta, out) -> out."""

    @property
    def backward(self) -> Callable[..., tuple[Array, Wide, Wide]]:
        """(dy, x, mean, rstd, gamma, out, training, grads) -> (out, dgamma, dbeta)."""

    @property
    def inference(self) -> Callable[..., None]:
        """`rstd` and `normalize` of the memory at addresses: of x, out, mean, var, gamma and beta; and eps."""


class Passes(Protocol):
    """Passes over canonical views, (N, C, S) or (R, C): of `cpu.passes` and of `reference`.

    x, dy and `out` are of one dtype: float16, bfloat16, float32 or float64. `gamma` and `beta` are float64 beside
    float64 and float32 beside all others, or None. A half result is the float32 one, rounded to nearest even. `out` may
    be x or dy itself. Statistics and sums are float64, (C,).
    """

    def moments(self, x: Array) -> Moments:
        """Count, mean and m2 of each channel."""

    def rstd(self, m2: Wide, count: float, eps: float) -> Wide:
        """1 / sqrt(m2 / count + eps)."""

    def track(self, moments: Moments, freedom: float, weight: float, running_mean: Array, running_var: Array) -> None:
        """Running statistics, of the dtype of parameters, move towards mean and m2 / freedom by `weight`, in place."""

    def normalize(self, x: Array, mean: Wide, rstd: Wide, gamma: Array | None, beta: Array | None, out: Array) -> Array:
        """y = gamma * (x - mean) * rstd + beta."""

    def grad_reduce(self, dy: Array, x: Array, mean: Wide, rstd: Wide) -> tuple[Wide, Wide]:
        """(sum of dy, sum of dy * xhat)."""

    def grad_input(
        self,
        dy: Array,
        x: Array,
        mean: Wide,
        rstd: Wide,
        gamma: Array | None,
        sums: tuple[Wide, Wide] | None,
        count: int,
        out: Array,
    ) -> Array:
        """dx; `sums` None for constant statistics (inference)."""

    def forward(
        self, x: Array, gamma: Array | None, beta: Array | None, eps: float, out: Array
    ) -> tuple[Array, Moments]:
        """moments + normalize, fused: (y, moments)."""

    def backward(
        self,
        dy: Array,
        x: Array,
        mean: Wide,
        rstd: Wide,
        gamma: Array | None,
        out: Array,
        training: bool = True,
        grads: Array | None = None,
    ) -> tuple[Array, Wide, Wide]:
        """grad_reduce + grad_input, fused: (dx, dgamma, dbeta); `grads` (2, C) takes dbeta, dgamma."""

    def compact(self, shape: Ints, dims: Ints, dtype: dtypes.Dtype) -> Compact | None:
        """Of arrays of `shape` that reshape to `dims`; None where that saves nothing."""

    def describe(self, dims: Ints, dtype: dtypes.Dtype) -> str:
        """What runs for a canonical shape, for a person to read."""


class CallPlan:
    """What a call on arrays of one shape, dtype and memory order needs to know: found once, it is half of a small call.

    `compact` is there for C-contiguous arrays whose axes are in canonical order, which need no views.
    """

    __slots__ = ("channels", "compact", "count", "integers", "layout", "parameters")

    def __init__(self, passes: Passes, shape: Ints, strides: Ints, dtype: dtypes.Dtype, axis: int) -> None:
        self.layout = plan = layout.planned(shape, strides, axis, dtype.itemsize)
        self.channels, self.count = plan.channels, plan.count  # values per channel
        self.parameters, self.integers = dtypes.of_parameters(dtype), dtypes.small(dtype)
        ordered = plan.order is None and strides == layout.compact(shape, dtype.itemsize)
        direct = plan.count > 0 and ordered and not self.integers and dtype.isnative
        self.compact = passes.compact(shape, plan.dims, dtype) if direct else None


class Host:
    """Batch normalization of arrays on the host."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self._plan = lru_cache(maxsize=1024)(functools.partial(CallPlan, passes))

    def call_plan(self, x: Array, axis: Any) -> CallPlan:
        """Of a checked array; TypeError or ValueError where its axis can't be."""
        if type(axis) is not int:  # to the cache, 1.0 and True would be 1
            axis = checks.check_axis(x.shape, axis)
        return self._plan(x.shape, x.strides, x.dtype, axis)

    def moments(self, x: ArrayLike, axis: int) -> Moments:
        """`fastbn.moments`."""
        x = checks.as_input(x, integers=True)
        plan = self.call_plan(x, axis)
        if not plan.count:
            return made(0, np.zeros(plan.channels), np.zeros(plan.channels))
        if plan.integers:
            view = plan.layout.view(x)  # in either byte order
            return self._of_integers(layout.view_of(plan.layout, x)[1] if view is None else view)
        return self.passes.moments(layout.view_of(plan.layout, x)[1])

    def _of_integers(self, view: Array) -> Moments:
        """Moments of a canonical view of integers of 8 or 16 bits, which float64 holds exactly.

        A bounded piece at a time, merged in order.
        """
        N, C, S = (*view.shape, 1)[:3]
        inner = min(S, PIECE)
        channels = max(1, min(C, PIECE // (inner * min(N, PIECE_ROWS))))
        outer = min(N, PIECE // (inner * channels))
        wide, parts = np.empty(outer * channels * inner), []
        for c in range(0, C, channels):
            own = view[:, c : c + channels]
            pieces = [own[n : n + outer] for n in range(0, N, outer)]
            if view.ndim == 3:
                pieces = [rows[..., s : s + inner] for rows in pieces for s in range(0, S, inner)]
            found = (self.passes.moments(_copied(piece, wide)) for piece in pieces)
            parts.append(functools.reduce(Moments.merge, found))
        mean, m2 = np.concatenate([m.mean for m in parts]), np.concatenate([m.m2 for m in parts])
        return made(parts[0].count, mean, m2)

    def forward(
        self, x: ArrayLike, gamma: ArrayLike | None, beta: ArrayLike | None, axis: int, eps: float, out: Array | None
    ) -> tuple[Array, Moments]:
        """`fastbn.batch_norm`."""
        x = checks.as_input(x)
        plan = self.call_plan(x, axis)
        given = gamma, beta
        gamma = checks.as_parameter(gamma, plan.channels, plan.parameters, "gamma")
        beta = checks.as_parameter(beta, plan.channels, plan.parameters, "beta")
        eps = checks.check_eps(eps, training=True)
        checks.check_count(x, plan.count)
        if out is not None:
            checks.check_out(out, x, gamma=given[0], beta=given[1])
        if plan.compact is not None and (out is None or out.flags.c_contiguous):
            return plan.compact.forward(x, gamma, beta, eps, plan.layout.empty(x.dtype)[0] if out is None else out)
        if not plan.count:
            return _empty(x, out), made(0, np.zeros(plan.channels), np.zeros(plan.channels))
        where, x_view = layout.view_of(plan.layout, x)
        y, y_view, copy_back = _placed(where, x_view.dtype, out)
        _, m = self.passes.forward(x_view, gamma, beta, eps, y_view)
        return (_copy_back(where, y, y_view) if copy_back else y), m

    def inference(
        self,
        x: ArrayLike,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        axis: int,
        eps: float,
        out: Array | None,
    ) -> Array:
        """`fastbn.batch_norm_inference`."""
        x = checks.as_input(x)
        plan = self.call_plan(x, axis)
        checks.check_running(mean, var)
        given = mean, var, gamma, beta
        mean = checks.as_statistic(mean, plan.channels, "mean")
        var = checks.as_statistic(var, plan.channels, "var")
        gamma = checks.as_parameter(gamma, plan.channels, plan.parameters, "gamma")
        beta = checks.as_parameter(beta, plan.channels, plan.parameters, "beta")
        eps = checks.check_eps(eps, training=False)
        if out is not None:
            checks.check_out(out, x, mean=given[0], var=given[1], gamma=given[2], beta=given[3])
        if not plan.count:
            return _empty(x, out)
        rstd = self.passes.rstd(var, 1.0, eps)
        if plan.compact is not None and (out is None or out.flags.c_contiguous):
            y = plan.layout.empty(x.dtype)[0] if out is None else out
            return plan.compact.normalize(x, mean, rstd, gamma, beta, y)
        where, x_view = layout.view_of(plan.layout, x)
        y, y_view, copy_back = _placed(where, x_view.dtype, out)
        self.passes.normalize(x_view, mean, rstd, gamma, beta, y_view)
        return _copy_back(where, y, y_view) if copy_back else y

    def backward(
        self,
        dy: ArrayLike,
        x: ArrayLike,
        moments: Moments,
        gamma: ArrayLike | None,
        axis: int,
        eps: float,
        out: Array | None,
    ) -> tuple[Array, Array, Array]:
        """`fastbn.batch_norm_backward`."""
        return self._backward(dy, x, moments, None, gamma, axis, eps, out)

    def inference_backward(
        self,
        dy: ArrayLike,
        x: ArrayLike,
        mean: ArrayLike,
        var: ArrayLike,
        gamma: ArrayLike | None,
        axis: int,
        eps: float,
        out: Array | None,
    ) -> tuple[Array, Array, Array]:
        """`fastbn.batch_norm_inference_backward`."""
        checks.check_running(mean, var)
        return self._backward(dy, x, None, (mean, var), gamma, axis, eps, out)

    def _backward(
        self,
        dy: ArrayLike,
        x: ArrayLike,
        moments: Any,
        constants: tuple[ArrayLike, ArrayLike] | None,
        gamma: ArrayLike | None,
        axis: int,
        eps: float,
        out: Array | None,
    ) -> tuple[Array, Array, Array]:
        x = checks.as_input(x)
        dy = checks.check_like(dy, x, "dy")
        plan = self.call_plan(x, axis)
        channels, training, given = plan.channels, constants is None, gamma
        gamma = checks.as_parameter(gamma, channels, plan.parameters, "gamma")
        eps = checks.check_eps(eps, training=training)
        if constants is None:
            check_moments(moments, channels, plan.count)
            checks.check_count(x, plan.count)
            mean, count = checks.as_statistic(moments.mean, channels, "moments.mean"), plan.count
            var_or_m2 = checks.as_statistic(moments.m2, channels, "moments.m2")
        else:
            mean, count = checks.as_statistic(constants[0], channels, "mean"), 1
            var_or_m2 = checks.as_statistic(constants[1], channels, "var")
        if out is not None:
            if constants is None:
                kept = {"moments.mean": moments.mean, "moments.m2": moments.m2}
            else:
                kept = {"mean": constants[0], "var": constants[1]}
            checks.check_out(out, x, dy, gamma=given, **kept)
        grads = np.empty((2, channels), plan.parameters)
        if not plan.count:
            grads[...] = 0
            return _empty(x, out), grads[1], grads[0]
        rstd = self.passes.rstd(var_or_m2, count, eps)
        if (
            plan.compact is not None
            and dy.dtype is x.dtype
            and dy.flags.c_contiguous
            and (out is None or out.flags.c_contiguous)
        ):
            dx = plan.layout.empty(x.dtype)[0] if out is None else out
            plan.compact.backward(dy, x, mean, rstd, gamma, dx, training, grads)
            return dx, grads[1], grads[0]
        where, x_view = layout.view_of(plan.layout, x)
        dx, dx_view, copy_back = _placed(where, x_view.dtype, out)
        dy_view = layout.view_as(where, dy)
        self.passes.backward(dy_view, x_view, mean, rstd, gamma, dx_view, training, grads)
        return _copy_back(where, dx, dx_view) if copy_back else dx, grads[1], grads[0]

    def grad_reduce(
        self, dy: ArrayLike, x: ArrayLike, mean: ArrayLike, var: ArrayLike, axis: int, eps: float
    ) -> tuple[Wide, Wide]:
        """`fastbn.batch_norm_backward_reduce`."""
        dy, x, mean, var, eps, plan = self._part(dy, x, mean, var, axis, eps)
        if not plan.count:
            return np.zeros(plan.channels), np.zeros(plan.channels)
        where, x_view = layout.view_of(plan.layout, x)
        return self.passes.grad_reduce(layout.view_as(where, dy), x_view, mean, self.passes.rstd(var, 1.0, eps))

    def grad_input(
        self,
        dy: ArrayLike,
        x: ArrayLike,
        mean: ArrayLike,
        var: ArrayLike,
        sum_dy: ArrayLike,
        sum_dy_xhat: ArrayLike,
        count: int,
        gamma: ArrayLike | None,
        axis: int,
        eps: float,
        out: Array | None,
    ) -> Array:
        """`fastbn.batch_norm_backward_input`."""
        given = {"mean": mean, "var": var, "sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat, "gamma": gamma}
        dy, x, mean, var, eps, plan = self._part(dy, x, mean, var, axis, eps)
        sums = (
            checks.as_statistic(sum_dy, plan.channels, "sum_dy"),
            checks.as_statistic(sum_dy_xhat, plan.channels, "sum_dy_xhat"),
        )
        count = checks.check_whole(count, plan.count)
        checks.check_count(x, count)
        gamma = checks.as_parameter(gamma, plan.channels, plan.parameters, "gamma")
        if out is not None:
            checks.check_out(out, x, dy, **given)
        if not plan.count:
            return _empty(x, out)
        where, x_view = layout.view_of(plan.layout, x)
        dx, dx_view, copy_back = _placed(where, x_view.dtype, out)
        rstd, dy_view = self.passes.rstd(var, 1.0, eps), layout.view_as(where, dy)
        self.passes.grad_input(dy_view, x_view, mean, rstd, gamma, sums, count, dx_view)
        return _copy_back(where, dx, dx_view) if copy_back else dx

    def _part(
        self, dy: ArrayLike, x: ArrayLike, mean: ArrayLike, var: ArrayLike, axis: int, eps: float
    ) -> tuple[Array, Array, Wide, Wide, float, CallPlan]:
        """What both halves of the backward are given of one part of a batch, checked."""
        x = checks.as_input(x)
        dy = checks.check_like(dy, x, "dy")
        plan = self.call_plan(x, axis)
        checks.check_running(mean, var)
        mean = checks.as_statistic(mean, plan.channels, "mean")
        var = checks.as_statistic(var, plan.channels, "var")
        return dy, x, mean, var, checks.check_eps(eps, training=True), plan

    def track(self, moments: Moments, freedom: float, weight: float, running_mean: Array, running_var: Array) -> None:
        """Running statistics, checked, move towards moments.mean and moments.m2 / freedom by `weight`, in place."""
        self.passes.track(moments, freedom, weight, running_mean, running_var)

    def check_part(
        self,
        x: ArrayLike,
        inputs: tuple[ArrayLike, ...],
        axis: int,
        out: Any,
        parameters: Mapping[str, Any],
        statistics: Mapping[str, Any],
    ) -> tuple[int, dtypes.Dtype]:
        """What a call on one part of a batch would refuse, refused; else (channels, dtype of parameters)."""
        x = checks.as_input(x)
        plan = self.call_plan(x, axis)
        for name, value in parameters.items():
            checks.as_parameter(value, plan.channels, plan.parameters, name)
        if out is not None:
            checks.check_out(out, x, *map(checks.as_input, inputs), **parameters, **statistics)
        return plan.channels, plan.parameters

    def check_features(self, x: ArrayLike, axis: int, channels: int, dtype: dtypes.Dtype) -> Array:
        """The array of an input that goes with a layer's parameters, of so many channels and this dtype."""
        x = checks.as_input(x)
        checks.check_features(x, axis, channels, dtype)
        return x

    def same_memory(self, a: Any, b: Any) -> bool:
        """Whether two arrays are the same elements of memory."""
        return overlap.same_memory(a, b)

    def statistic_copy(self, values: Array) -> Wide:
        """A copy of running statistics in float64."""
        return values.astype(np.float64)

    def parameter_copy(self, values: ArrayLike, dtype: dtypes.Dtype) -> Array:
        """A copy of a layer's gamma, as it is now."""
        # of whose two kinds the plain one's own copy takes half the time
        return values.copy() if type(values) is np.ndarray else np.array(np.asarray(values), dtype)

    def describe(self, dims: Ints, dtype: dtypes.Dtype) -> str:
        """What runs for a canonical shape, for a person to read."""
        return self.passes.describe(dims, dtype)


class Limited:
    """A `Host` whose every call is limited to so many threads."""

    def __init__(self, host: Any, num_threads: Any) -> None:
        self._host, self._num_threads = host, num_threads

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._host, name)

        def run(*given: Any) -> Any:
            with threads.limited(self._num_threads):
                return method(*given)

        return run


def _copied(piece: Array, to: Array) -> Array:
    """The values of a piece, at the beginning of a buffer."""
    copy = to[: piece.size].reshape(piece.shape)
    copy[...] = piece
    return copy


def _placed(plan: layout.Plan, dtype: dtypes.Dtype, out: Array | None) -> tuple[Array, Array, bool]:
    """Where a result goes: what the caller gets, the canonical view that is written, and whether to copy it over."""
    if out is None:
        return *plan.empty(dtype), False
    view = plan.view(out)
    if view is None:  # another memory order than x: compute beside it, then copy
        return out, plan.empty(dtype)[1], True
    return out, view, False


def _copy_back(plan: layout.Plan, out: Array, view: Array) -> Array:
    out[...] = plan.restore(view)
    return out


def _empty(x: Array, out: Array | None) -> Array:
    """The result for an empty x."""
    return np.empty(x.shape, x.dtype.newbyteorder("=")) if out is None else out
