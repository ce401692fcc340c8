"""Every pass over a case's arrays, on the machine and in float64 on the host."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastbn
import fastbn.cuda.moments
from fastbn.cuda import grids
from fastbn.cuda.moments import DeviceMoments
from fastbn.statistics import made

from .arrays import Array, Ints
from .cases import Case
from .driver import Device, plans_forgotten
from .memory import READ, WRITE, Fault

# Of max(1, |value|), or of what a sum is made of. y and dx of half precision: half a unit in the last place, beside
# float32's limit.
LIMIT = {"float32": 1e-6, "float64": 1e-11, "float16": 2.0**-11 + 1e-6, "bfloat16": 2.0**-8 + 1e-6}
STATISTIC = {"float32": 1e-6, "float64": 4e-12, "float16": 1e-6, "bfloat16": 1e-6}
EPS = 1e-5


class Record(NamedTuple):
    case: Case
    what: str
    error: float  # as a share of the limit
    words: str = ""  # of a fault


class Report:
    """What the checks of some cases found."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    @property
    def problems(self) -> list[str]:
        return [
            f"{r.case}: {r.what} {r.words or f'is off by {r.error:.3g} of its limit'}"
            for r in self.records
            if not r.error <= 1
        ]

    def call(self, case: Case, what: str, function: Callable[[], Any]) -> Any:
        """What a call returns; None where it fails."""
        try:
            return function()
        except Exception as error:
            inner = error.__cause__ or error
            self.records.append(Record(case, what, np.inf, f"{type(inner).__name__}: {inner}"))
            return None

    def compare(self, case: Case, what: str, array: Array, want: Any, limit: float, scale: Any = None) -> None:
        """Note the largest difference, and elements that were never written."""
        want = np.asarray(want, np.float64)
        scale = np.maximum(1.0, np.abs(want)) if scale is None else scale
        try:
            found = array.get()
        except Fault as fault:
            self.records.append(Record(case, what, np.inf, str(fault)))
            return
        with np.errstate(all="ignore"):
            same = (found == want) | (np.isnan(found) & np.isnan(want))
            off = np.where(same, 0.0, np.abs(found - want) / (limit * scale))
        self.records.append(Record(case, what, float(np.max(np.where(np.isnan(off), np.inf, off), initial=0.0))))


class Inputs:
    """The arrays of a case, and what they hold."""

    def __init__(self, device: Device, case: Case) -> None:
        rng = np.random.default_rng(case.shape)
        self.device, self.case, self.dtype, self.axis = device, case, case.dtype, case.axis
        shape, layouts = case.shape, case.layouts or (case.layout,) * 3
        self.axes: Ints = tuple(a for a in range(len(shape)) if a != case.axis)
        C = shape[case.axis]
        kind = self.kind = "float64" if case.dtype == "float64" else "float32"
        values = rng.standard_normal(shape) * self.along(rng.uniform(0.5, 2, C)) * case.spread + case.mean
        self.x = device.array(values, case.dtype, "x", layouts[0], case.shifts[0])
        self.dy = device.array(rng.standard_normal(shape) + 0.25, case.dtype, "dy", layouts[1], case.shifts[1])
        self.out_layout = layouts[2]
        self.gamma = device.array(rng.uniform(0.5, 2, C), kind, "gamma", shift=1) if case.affine & 1 else None
        self.beta = device.array(rng.standard_normal(C), kind, "beta", shift=1) if case.affine & 2 else None
        self.X, self.DY = self.x.get(), self.dy.get()
        self.G, self.B = (None if each is None else each.get() for each in (self.gamma, self.beta))
        mean = self.X.mean(self.axes) + rng.standard_normal(C) * 0.1
        var = self.X.var(self.axes) * rng.uniform(0.8, 1.2, C) + 0.01
        self.mean = device.array(mean, case.statistics[0], "mean", shift=1)
        self.var = device.array(var, case.statistics[1], "var", shift=1)
        self.M, self.V = self.mean.get(), self.var.get()
        self.count = self.X.size // C

    def along(self, values: Any) -> Any:
        """Values of each channel beside x."""
        return np.reshape(values, [-1 if a == self.axis else 1 for a in range(len(self.case.shape))])

    def out(self) -> Array | None:
        """Where a result shall go."""
        if "own" in self.case.more:
            return None
        return self.device.empty(self.case.shape, self.dtype, "out", self.out_layout, self.case.shifts[2])

    def gradient_scale(self, dx: Any, rstd: Any) -> Any:
        """What a gradient is made of: gamma * rstd times the largest dy."""
        each = np.abs(rstd * (1.0 if self.G is None else self.G)) * np.abs(self.DY).max(self.axes)
        return np.maximum(np.maximum(1.0, np.abs(dx)), self.along(each))

    @property
    def sums_scale(self) -> Any:
        return np.abs(self.DY).sum(self.axes) + 1.0


def deviation(want: Any) -> Any:
    """The scale of a mean: standard deviations, and a tenth of itself."""
    return np.sqrt(want.var()) + 1e-30 + np.abs(want.mean) * 1e-1


class Passes:
    """All passes over one case, each noted in a report."""

    def __init__(self, device: Device, case: Case, report: Report) -> None:
        self.device, self.case, self.report = device, case, report
        self.of = Inputs(device, case)
        self.limit, self.statistic = LIMIT[case.dtype], STATISTIC[case.dtype]

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        return self.report.call(self.case, what, function)

    def compare(self, what: str, array: Array, want: Any, limit: float, scale: Any = None) -> None:
        self.report.compare(self.case, what, array, want, limit, scale)

    def training(self) -> None:
        """Forward and backward."""
        d = self.of
        y, stats = fastbn.batch_norm(d.X, d.G, d.B, axis=d.axis, backend="reference")
        found = self.call("forward", lambda: fastbn.batch_norm(d.x, d.gamma, d.beta, axis=d.axis, out=d.out()))
        if found is None:
            return
        self.compare("y", found[0], y, self.limit)
        self.compare("mean", found[1].mean, stats.mean, self.statistic, deviation(stats))
        self.compare("m2", found[1].m2, stats.m2, self.statistic, np.maximum(stats.m2, 1e-300))
        want = fastbn.batch_norm_backward(d.DY, d.X, stats, d.G, axis=d.axis, backend="reference")
        back = self.call(
            "backward", lambda: fastbn.batch_norm_backward(d.dy, d.x, found[1], d.gamma, axis=d.axis, out=d.out())
        )
        if back is not None:
            self.gradients("", back, want, d.gradient_scale(want[0], stats.rstd(EPS)))
        if "float32" in self.case.statistics:
            self.single(stats)

    def single(self, stats: Any) -> None:
        """A backward that is given moments in float32, as a caller may have kept them."""
        d = self.of
        mean, m2 = (self.device.array(each, "float32", "moments") for each in (stats.mean, stats.m2))
        m = made(d.count, mean, m2, DeviceMoments)
        stats = fastbn.Moments(d.count, mean.get(), m2.get())
        want = fastbn.batch_norm_backward(d.DY, d.X, stats, d.G, axis=d.axis, backend="reference")
        back = self.call(
            "backward, float32", lambda: fastbn.batch_norm_backward(d.dy, d.x, m, d.gamma, axis=d.axis, out=d.out())
        )
        if back is not None:
            self.gradients("float32 ", back, want, d.gradient_scale(want[0], stats.rstd(EPS)))

    def gradients(self, name: str, found: Any, want: Any, scale: Any) -> None:
        self.compare(f"{name}dx", found[0], want[0], self.limit, scale)
        self.compare(f"{name}dgamma", found[1], want[1], self.statistic, self.of.sums_scale)
        self.compare(f"{name}dbeta", found[2], want[2], self.statistic, self.of.sums_scale)

    def constant(self) -> None:
        """Forward and backward with given statistics, and the backward in two halves."""
        d = self.of
        given = d.mean, d.var
        want = fastbn.batch_norm_inference(d.X, d.M, d.V, d.G, d.B, axis=d.axis, backend="reference")
        y = self.call(
            "inference", lambda: fastbn.batch_norm_inference(d.x, *given, d.gamma, d.beta, axis=d.axis, out=d.out())
        )
        if y is not None:
            self.compare("constant y", y, want, self.limit)
        want = fastbn.batch_norm_inference_backward(d.DY, d.X, d.M, d.V, d.G, axis=d.axis, backend="reference")
        back = self.call(
            "inference backward",
            lambda: fastbn.batch_norm_inference_backward(d.dy, d.x, *given, d.gamma, axis=d.axis, out=d.out()),
        )
        if back is not None:
            self.gradients("constant ", back, want, None)
        sums = fastbn.batch_norm_backward_reduce(d.DY, d.X, d.M, d.V, axis=d.axis, backend="reference")
        found = self.call("reduce", lambda: fastbn.batch_norm_backward_reduce(d.dy, d.x, *given, axis=d.axis))
        if found is None:
            return
        for name, one, other in zip(("sum dy", "sum dy xhat"), found, sums, strict=True):
            self.compare(name, one, other, self.statistic, d.sums_scale)
        count = d.count + 3  # of another rank
        want = fastbn.batch_norm_backward_input(
            d.DY, d.X, d.M, d.V, *sums, count, d.G, axis=d.axis, backend="reference"
        )
        dx = self.call(
            "input",
            lambda: fastbn.batch_norm_backward_input(
                d.dy, d.x, *given, *found, count, d.gamma, axis=d.axis, out=d.out()
            ),
        )
        if dx is not None:
            self.compare("split dx", dx, want, self.limit, d.gradient_scale(want, 1.0 / np.sqrt(d.V + EPS)))

    def moments(self) -> None:
        d, limit = self.of, self.statistic
        want = fastbn.moments(d.X, axis=d.axis, backend="reference")
        found = self.call("moments", lambda: fastbn.moments(d.x, axis=d.axis))
        if found is None:
            return
        self.compare("moments mean", found.mean, want.mean, limit, deviation(want))
        asked: dict[str, Callable[[Any], Any]] = {
            "m2": lambda m: m.m2,
            "var": lambda m: m.var(),
            "var 1": lambda m: m.var(1),
            "std": lambda m: m.std(),
            "rstd": lambda m: m.rstd(EPS),
            "merged m2": lambda m: m.merge(m).m2,
        }
        for name, ask in asked.items():
            value = self.call(f"moments {name}", lambda ask=ask: ask(found))
            if value is not None:
                self.compare(f"moments {name}", value, ask(want), limit, np.maximum(ask(want), 1e-300))
        if "track" in self.case.more:
            self.track(found, want)

    def track(self, found: Any, want: Any) -> None:
        """Running statistics move, and a copy of them in float64."""
        kind, C = self.of.kind, len(want.mean)
        before = np.linspace(0.5, 2, C)
        running = [
            self.device.array(before, kind, name, shift=1, allowed=READ | WRITE)
            for name in ("running mean", "running var")
        ]
        freedom = found.count - 1.0
        self.call("track", lambda: fastbn.cuda.moments.track(found, freedom, 0.1, *running))
        wide = self.call("widen", lambda: fastbn.cuda.moments.statistic_copy(running[0]))
        if wide is not None:
            self.compare("running mean, wide", wide, running[0].get(), 1e-15)
        for array, value in zip(running, (want.mean, want.m2 / freedom), strict=True):
            with np.errstate(over="ignore"):  # the variance of 1e30 is none of float32's numbers
                moved = (0.9 * before + 0.1 * value).astype(kind)
            self.compare(array.memory.name, array, moved, self.statistic)

    def in_place(self) -> None:
        """out is x, or dy."""
        for name in ("forward", "dy", "x"):
            d = self.of = Inputs(self.device, self.case)
            target = (d.dy if name == "dy" else d.x).allow(READ | WRITE)
            want, stats = fastbn.batch_norm(d.X, d.G, d.B, axis=d.axis, backend="reference")
            if name == "forward":
                if self.call(
                    "forward in place", lambda d=d: fastbn.batch_norm(d.x, d.gamma, d.beta, axis=d.axis, out=d.x)
                ):
                    self.compare("y in place", target, want, self.limit)
                continue
            m = self.call("moments", lambda d=d: fastbn.moments(d.x, axis=d.axis))
            dx = fastbn.batch_norm_backward(d.DY, d.X, stats, d.G, axis=d.axis, backend="reference")[0]
            if self.call(
                f"backward in {name}",
                lambda d=d, m=m, out=target: fastbn.batch_norm_backward(d.dy, d.x, m, d.gamma, axis=d.axis, out=out),
            ):
                self.compare(f"dx in {name}", target, dx, self.limit, d.gradient_scale(dx, stats.rstd(EPS)))


def check(device: Device, case: Case, report: Report) -> None:
    """All passes over a case on a device."""
    long = "long" in case.more
    usual = grids.LONG
    try:
        if long:
            grids.LONG = 1
            plans_forgotten()
        with device:
            passes = Passes(device, case, report)
            passes.training()
            passes.constant()
            passes.moments()
            if "in place" in case.more:
                passes.in_place()
    finally:
        if long:
            grids.LONG = usual
            plans_forgotten()


def check_empty(device: Device, dtype: str, report: Report) -> None:
    """Statistics and sums of no values are zeros."""
    case = Case(dtype, (0, 3))
    with device:
        x = device.empty(case.shape, dtype, "x")
        mean, var = (device.array(np.ones(3), "float32", name) for name in ("mean", "var"))
        found: dict[str, tuple[Array, Array]] = {}
        if (m := report.call(case, "moments", lambda: fastbn.moments(x))) is not None:
            found["moments"] = m.mean, m.m2
        if (
            grads := report.call(case, "backward", lambda: fastbn.batch_norm_inference_backward(x, x, mean, var))
        ) is not None:
            found["backward"] = grads[1:]
        if (
            sums := report.call(case, "reduce", lambda: fastbn.batch_norm_backward_reduce(x, x, mean, var))
        ) is not None:
            found["reduce"] = sums
        for what, arrays in found.items():
            for array in arrays:
                report.compare(case, what, array, np.zeros(3), 1e-300)
