"""Every public function against the float64 reference on this machine: the `check` command.

The reference is called on arrays made canonical here, not by `arguments.layout`: an error there would hide in a
comparison with itself.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import fastbn
from fastbn import reference
from fastbn.arguments import checks, config, dtypes
from fastbn.arguments.errors import MissingExtra
from fastbn.backends import select

Array = NDArray[Any]
Wide = NDArray[np.float64]

DTYPES = ("float16", "bfloat16", "float32", "float64")
OFFSETS = (0.0, 1e4, 1e6)  # in units of the standard deviation
HALF_OFFSETS = (0.0, 1e2)  # where bfloat16 still has steps of half a unit
SHAPES = (  # between them they reach every kernel, serial and parallel
    (4, 6, 5, 5),  # serial
    (2, 3, 24, 24),  # serial, rows too long to be treated as columns
    (24, 70),  # serial, too many columns to fold rows
    (8, 16, 28, 28),  # a channel stays in the cache: fused
    (32, 24, 7, 7),  # rows shorter than a few vectors
    (2, 2, 256, 256),  # few channels with a large slab each: two passes, rows cut in pieces; channels last: rows folded
    (4096, 70),  # channels last: rows in parts
    (64, 1100),  # channels last: columns in groups, fused
)
EPS = config.EPS


def limit(dtype: np.dtype[Any], offset: float) -> float:
    """Largest error allowed, in units of the quantity's scale.

    float32 and half: the promise for every offset up to 1e6. float64: 2e-15 is 9 roundings of the mean, for kernel and
    reference together.
    """
    return 1e-12 + 2e-15 * offset if dtype == np.float64 else 1e-6


def error(actual: Array, expected: Wide, scale: Wide | float = 1.0) -> float:
    """Worst |actual - expected| / scale, beyond what rounding to half precision adds; NaN where either is."""
    off = np.abs(actual.astype(np.float64).reshape(expected.shape) - expected)
    if actual.dtype.itemsize == 2:
        with np.errstate(invalid="ignore", over="ignore"):
            unit = np.spacing(np.abs(actual)).astype(np.float64).reshape(expected.shape)
        off = np.maximum(off - unit / 2, 0.0)
    return float(np.max(off / scale))


class Case:
    """Inputs of one shape, dtype, memory order and offset, and what the reference makes of them in (N, C, S)."""

    def __init__(self, shape: tuple[int, ...], dtype: dtypes.Dtype, channels_last: bool, offset: float) -> None:
        rng = np.random.default_rng(len(shape) + shape[0])
        order = (0, *range(2, len(shape)), 1) if channels_last else tuple(range(len(shape)))
        x, dy = (
            np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))
            for a in ((rng.standard_normal(shape) + offset).astype(dtype), rng.standard_normal(shape).astype(dtype))
        )
        if len(shape) == 2 and not channels_last:  # (N, C) in C order is channels-last memory
            x, dy = np.asfortranarray(x), np.asfortranarray(dy)
        self.x, self.dy = x, dy
        self.parameter_dtype = dtypes.of_parameters(x.dtype)
        self.gamma, self.beta = (
            a.astype(self.parameter_dtype) for a in (rng.uniform(0.5, 2.0, shape[1]), rng.standard_normal(shape[1]))
        )
        self.limit = limit(x.dtype, offset)
        self.label = f"{dtype}, shape {shape}, channels {'last' if channels_last else 'first'}, offset {offset:g}"
        self.wide_x, self.wide_dy = (np.array(a, np.float64, order="C").reshape(*shape[:2], -1) for a in (x, dy))
        self.moments = reference.moments(self.wide_x)

    def forward(self, mean: Wide, var: Wide) -> tuple[Wide, Wide]:
        """y, and its scale: max(1, |gamma * xhat|)."""
        y = reference.normalize(
            self.wide_x, mean, 1 / np.sqrt(var + EPS), self.gamma, self.beta, np.empty_like(self.wide_x)
        )
        return y, np.maximum(1.0, np.abs(y - self.beta[:, None]))

    def backward(
        self, mean: Wide, var: Wide, training: bool
    ) -> tuple[tuple[Wide, Wide, Wide], tuple[Wide, Wide, Wide]]:
        """(dx, dgamma, dbeta), and their scales: max(1, |dx|), and for sums those of the absolute terms."""
        rstd = 1 / np.sqrt(var + EPS)
        results = reference.backward(
            self.wide_dy, self.wide_x, mean, rstd, self.gamma, np.empty_like(self.wide_x), training
        )
        dbeta, dgamma = np.abs(self.wide_dy), np.abs(self.wide_dy * (self.wide_x - mean[:, None]) * rstd[:, None])
        return results, (np.maximum(1.0, np.abs(results[0])), dgamma.sum((0, 2)), dbeta.sum((0, 2)))


class Finding(NamedTuple):
    """One compared quantity."""

    quantity: str
    error: float
    limit: float

    @property
    def ratio(self) -> float:
        """Error in units of its limit; infinite for NaN."""
        return self.error / self.limit if self.error == self.error else np.inf


Findings = Iterator[tuple[str, float]]
# allowed twice as much: after a forward they inherit the error of its variance, through rstd
GRADIENTS = ("dx", "dgamma", "dbeta")


def _statistics(case: Case, m: fastbn.Moments) -> Findings:
    expected = case.moments
    yield "mean", error(m.mean, expected.mean, np.maximum(np.abs(expected.mean), expected.std()))
    yield "var", error(m.var(), expected.var(), expected.var())
    yield "count", float(m.count != expected.count)


def _gradients(case: Case, actual: tuple[Array, Array, Array], mean: Wide, var: Wide, training: bool) -> Findings:
    expected, scales = case.backward(mean, var, training)
    for name, a, e, scale in zip(GRADIENTS, actual, expected, scales, strict=True):
        yield name, error(a, e, scale)


def _moments(case: Case, backend: str | None) -> Findings:
    yield from _statistics(case, fastbn.moments(case.x, backend=backend))


def _batch_norm(case: Case, backend: str | None) -> Findings:
    y, m = fastbn.batch_norm(case.x, case.gamma, case.beta, eps=EPS, backend=backend)
    yield "y", error(y, *case.forward(case.moments.mean, case.moments.var()))
    yield from _statistics(case, m)


def _batch_norm_inference(case: Case, backend: str | None) -> Findings:
    mean, var = case.moments.mean, case.moments.var()
    y = fastbn.batch_norm_inference(case.x, mean, var, case.gamma, case.beta, eps=EPS, backend=backend)
    yield "y", error(y, *case.forward(mean, var))


def _batch_norm_backward(case: Case, backend: str | None) -> Findings:
    results = fastbn.batch_norm_backward(case.dy, case.x, case.moments, case.gamma, eps=EPS, backend=backend)
    yield from _gradients(case, results, case.moments.mean, case.moments.var(), True)


def _batch_norm_inference_backward(case: Case, backend: str | None) -> Findings:
    mean, var = case.moments.mean, case.moments.var()
    results = fastbn.batch_norm_inference_backward(case.dy, case.x, mean, var, case.gamma, eps=EPS, backend=backend)
    yield from _gradients(case, results, mean, var, False)


def _layer(case: Case, backend: str | None) -> fastbn.BatchNorm:
    bn = fastbn.BatchNorm(case.x.shape[1], eps=EPS, dtype=case.parameter_dtype, backend=backend)
    bn.gamma, bn.beta = case.gamma, case.beta
    return bn


def _layer_gradients(case: Case, bn: fastbn.BatchNorm, mean: Wide, var: Wide) -> Findings:
    dx = bn.backward(case.dy)
    assert bn.dgamma is not None and bn.dbeta is not None
    yield from _gradients(case, (dx, bn.dgamma, bn.dbeta), mean, var, bn.training)


def _training(case: Case, backend: str | None) -> Findings:
    bn, m = _layer(case, backend), case.moments
    yield "y", error(bn(case.x), *case.forward(m.mean, m.var()))
    assert bn.running_mean is not None and bn.running_var is not None
    yield "running_mean", error(bn.running_mean, 0.1 * m.mean, np.maximum(0.1 * np.abs(m.mean), 1.0))
    yield "running_var", error(bn.running_var, 0.9 + 0.1 * m.var(ddof=1), 1.0)
    yield from _layer_gradients(case, bn, m.mean, m.var())


def _evaluation(case: Case, backend: str | None) -> Findings:
    bn = _layer(case, backend).eval(backward=True)
    assert bn.running_mean is not None and bn.running_var is not None
    bn.running_mean[...], bn.running_var[...] = case.moments.mean, case.moments.var()
    mean, var = bn.running_mean.astype(np.float64), bn.running_var.astype(np.float64)  # as rounded to the layer's dtype
    yield "y", error(bn(case.x), *case.forward(mean, var))
    yield from _layer_gradients(case, bn, mean, var)


def _running_moments(case: Case, backend: str | None) -> Findings:
    third = case.x.shape[0] // 3
    first, second = (fastbn.RunningMoments(case.x.shape[1], backend=backend) for _ in range(2))
    first.update(case.x[:third]).update(case.x[:0])
    second.update(case.x[third : third + 1]).update(case.x[third + 1 :])
    yield from _statistics(case, first.merge(second).moments)


CHECKS: dict[str, Callable[[Case, str | None], Findings]] = {
    "moments": _moments,
    "batch_norm": _batch_norm,
    "batch_norm_inference": _batch_norm_inference,
    "batch_norm_backward": _batch_norm_backward,
    "batch_norm_inference_backward": _batch_norm_inference_backward,
    "BatchNorm, training": _training,
    "BatchNorm, evaluation": _evaluation,
    "RunningMoments": _running_moments,
}


def installed() -> list[dtypes.Dtype]:
    """The dtypes to check: bfloat16 only where `ml_dtypes` is."""
    found = []
    for name in DTYPES:
        with contextlib.suppress(MissingExtra):
            found.append(checks.check_dtype(name))
    return found


def cases() -> Iterator[Case]:
    """Every shape, dtype, memory order and offset; made anew for each function, one in memory at a time."""
    for shape in SHAPES:
        for dtype in installed():
            for channels_last in (False, True):
                for offset in HALF_OFFSETS if dtype.itemsize == 2 else OFFSETS:
                    yield Case(shape, dtype, channels_last, offset)


def worst(name: str, backend: str | None) -> tuple[Finding, str]:
    """Run one check; its finding that comes closest to the limit or exceeds it most, and the case that showed it."""
    found = Finding("nothing compared", np.inf, 1.0), "no case"
    reached = -1.0
    for case in cases():
        try:
            findings = [
                Finding(q, value, case.limit * (2 if q in GRADIENTS else 1)) for q, value in CHECKS[name](case, backend)
            ]
        except Exception as raised:  # a function that raises has failed its check; the others still run
            message = f"{type(raised).__name__}: {raised}".splitlines()[0]
            return Finding(message, np.inf, case.limit), case.label
        for finding in findings:
            if finding.ratio > reached:
                reached, found = finding.ratio, (finding, case.label)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `check` command."""
    parser.add_argument(
        "--backend", metavar="NAME", help="the backend to check (default: the one that serves host arrays)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the `check` command; 1 where a function fails."""
    select(args.backend)
    start = time.perf_counter()
    print(f"{'function':30} {'worst error':>11} {'limit':>8}")
    failed = 0
    for name in CHECKS:
        finding, label = worst(name, args.backend)
        ok = finding.ratio <= 1
        print(f"{name:30} {finding.error:11.1e} {finding.limit:8.0e}  {'ok' if ok else 'FAILED'}", flush=True)
        if not ok:
            failed += 1
            print(f"    {finding.quantity}, {label}")
    seconds = time.perf_counter() - start
    if len(installed()) < len(DTYPES):
        print("bfloat16 was left out, it needs ml_dtypes: pip install 'fastbn[bfloat16]'")
    served = args.backend or config.BACKEND or "cpu"
    print(f"backend {served}, {len(CHECKS) - failed} of {len(CHECKS)} functions within their limits, {seconds:.1f} s")
    if failed:
        print("Please report this with the output of: python -m fastbn info")
    return 1 if failed else 0
