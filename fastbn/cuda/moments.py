"""Statistics on a GPU: what `Device.moments` gives, running statistics, and copies of what is (C,)."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.arguments import layout, scalars
from fastbn.cuda import buffers, grids, launches
from fastbn.cuda.buffers import Buffer, geometries, pair
from fastbn.cuda.checks import as_input, as_moment, check_parameter, check_statistic
from fastbn.cuda.kernels import finish
from fastbn.cuda.launches import Call, Place, Queue, fresh, pointer
from fastbn.cuda.views import DOUBLE
from fastbn.statistics import Moments, made


class DeviceMoments(Moments):
    """Moments whose mean and m2 are arrays on a GPU, of the kind of x, float64; so is what its methods return."""

    def _of_m2(self, kernel: Any, root: int = 0, **values: float) -> Any:
        """What a kernel makes of m2, a channel per thread."""
        m2 = as_moment(self.m2, "moments.m2")
        program = launches.program(_each, geometries(m2, None), kernel, root, *values)
        with Queue(m2, None) as queue:
            result = buffers.empty(m2.shape, (0,), "float64", m2)
            queue.run(program, (m2, buffers.address(result)), *values.values())
        return result

    def _var_or_std(self, ddof: float, root: bool) -> Any:
        ddof = scalars.check_ddof(ddof)
        freedom = float(self.count - ddof) if self.count > ddof else np.nan
        return self._of_m2(finish.var_or_std, int(root), freedom=freedom)

    def var(self, ddof: float = 0) -> Any:
        """Variance of each channel: see `Moments.var`."""
        return self._var_or_std(ddof, False)

    def std(self, ddof: float = 0) -> Any:
        """Standard deviation of each channel: see `Moments.std`."""
        return self._var_or_std(ddof, True)

    def rstd(self, eps: float) -> Any:
        """1 / sqrt(var + eps) of each channel: see `Moments.rstd`."""
        eps = scalars.check_eps(eps, training=False)
        return self._of_m2(finish.rstd, count=float(self.count or np.nan), eps=eps)

    def merge(self, other: Moments) -> DeviceMoments:
        """Moments of both groups of values together, on the same GPU; neither is changed: see `Moments.merge`."""
        if not isinstance(other, DeviceMoments):
            raise TypeError(f"merge: given {type(other).__name__}, want moments that are on the GPU too")
        own = as_moment(self.mean, "moments.mean"), as_moment(self.m2, "moments.m2")
        theirs = as_moment(other.mean, "other.mean"), as_moment(other.m2, "other.m2")
        if not own[0].shape == own[1].shape == theirs[0].shape == theirs[1].shape:
            raise ValueError(f"merge: given {theirs[0].size} channels, want {own[0].size}, as many as on the left")
        program = launches.program(_join, geometries(*own, *theirs, None))
        with Queue(own[1], None, mean=own[0], other=theirs[0], other_m2=theirs[1]) as queue:
            address, mean, m2 = pair(own[1].size, "float64", own[1])
            queue.run(program, (*own, *theirs, address), float(self.count), float(other.count))
        return made(self.count + other.count, mean, m2, DeviceMoments)


def _each(call: Call, m2: Buffer, result: None, kernel: Any, root: int, *names: str) -> None:
    given: dict[str, Any] = {name: call.value(k) for k, name in enumerate(names)}
    given |= {"m2": pointer(m2), "root": root, "C": m2.size, "result": fresh(2, m2.shape, "float64")}
    call.launch(kernel, DOUBLE, grids.blocks(m2.size), given)


def _join(call: Call, mean: Buffer, m2: Buffer, other_mean: Buffer, other_m2: Buffer, result: None) -> None:
    C = m2.size
    rows = [Place(5, 8 * C * k, (8 * C * k, 8 * C * (k + 1)), DOUBLE) for k in range(2)]
    given: dict[str, Any] = {"count": call.value(0), "mean": pointer(mean), "m2": pointer(m2)}
    given |= {"other_count": call.value(1), "other_mean": pointer(other_mean), "other_m2": pointer(other_m2)}
    given |= {"C": C, "result": rows[0], "result_m2": rows[1]}
    call.launch(finish.join_moments, DOUBLE, grids.blocks(C), given)


def track(moments: Moments, freedom: float, weight: float, running_mean: Any, running_var: Any) -> None:
    """Running statistics move towards moments.mean and moments.m2 / freedom by `weight`, in place, on the GPU."""
    mean, m2 = as_moment(moments.mean, "moments.mean"), as_moment(moments.m2, "moments.m2")
    running_mean, running_var = as_input(running_mean, "running_mean"), as_input(running_var, "running_var")
    program = launches.program(_track, geometries(mean, m2, running_mean, running_var))
    with Queue(mean, None, m2=m2, running_mean=running_mean, running_var=running_var) as queue:
        queue.run(program, (mean, m2, running_mean, running_var), freedom, weight)


def _track(call: Call, mean: Buffer, m2: Buffer, running_mean: Buffer, running_var: Buffer) -> None:
    C = mean.size
    check_statistic(running_mean, C, "running_mean")
    check_parameter(running_var, C, running_mean.dtype, "running_var")
    given = {"mean": pointer(mean), "m2": pointer(m2), "freedom": call.value(0), "weight": call.value(1), "C": C}
    given |= {"running_mean": pointer(running_mean), "running_var": pointer(running_var)}
    call.launch(finish.track, running_mean.storage, grids.blocks(C), given)


def statistic_copy(values: Any) -> Any:
    """A copy of (C,) statistics in float64, queued before what changes them next."""
    buffer = as_input(values, "statistics")
    return _copy(buffer, _widen, "float64")


def parameter_copy(values: Any) -> Any:
    """A copy of (C,) parameters, queued before what changes them next."""
    buffer = as_input(values, "gamma")
    return _copy(buffer, _same, buffer.dtype)


def _copy(buffer: Buffer, write: Any, dtype: str) -> Any:
    program = launches.program(write, geometries(buffer, None))
    with Queue(buffer, None) as queue:
        result = buffers.empty(buffer.shape, (0,), dtype, buffer)
        queue.run(program, (buffer, buffers.address(result)))
    return result


def _widen(call: Call, values: Buffer, result: None) -> None:
    C = values.size
    check_statistic(values, C, "statistics")
    given = {"values": pointer(values), "C": C, "result": fresh(2, (C,), "float64")}
    call.launch(finish.widen, DOUBLE, grids.blocks(C), given, values.dtype)


def _same(call: Call, values: Buffer, result: None) -> None:
    launches.copy(call, values, buffers.stand_in((values.shape, layout.compact(values.shape), values.dtype, 0), 2))
