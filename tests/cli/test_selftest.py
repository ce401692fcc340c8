"""The `check` command must pass on a right backend and fail on a wrong one, naming the functions that rest on what is
wrong.
"""

import sys

import numpy as np
import pytest
from shapes import DTYPES, HALF

from fastbn import reference
from fastbn.cli import main, selftest
from fastbn.statistics import Moments

SHAPES = selftest.SHAPES  # before the fixture makes them small
SMALL = ((4, 6, 5, 5), (40, 7))


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(selftest, "SHAPES", SMALL)


def failing(capsys):
    """Names of the functions whose line says FAILED; every function has a line."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("  ok", "  FAILED"))]
    assert [line[:30].strip() for line in lines] == list(selftest.CHECKS)
    return {line[:30].strip() for line in lines if line.endswith("FAILED")}


@pytest.mark.parametrize(
    "dtypes", [("float32", "float64"), pytest.param(DTYPES, marks=pytest.mark.full)], ids=["wide", "every dtype"]
)
@pytest.mark.parametrize("shapes", [SMALL, ((8, 16, 28, 28),)], ids=["serial", "parallel"])
def test_every_backend_passes(shapes, dtypes, backend, capsys, monkeypatch):
    monkeypatch.setattr(selftest, "SHAPES", shapes)
    monkeypatch.setattr(selftest, "DTYPES", dtypes)
    assert main(["check", "--backend", backend]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("  ok\n") == len(selftest.CHECKS) == 8
    assert f"backend {backend}, 8 of 8 functions within their limits" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_is_no_error(dtype):
    """All values, negative powers of two among them, where NumPy's spacing of float16 is that of the smaller
    neighbours.
    """
    exact = np.random.default_rng(0).standard_normal(2000)
    exact = np.concatenate([exact, (1 + exact * 1e-4)[:200], (-1 - np.abs(exact) * 1e-4)[:200]])
    rounded = exact.astype(np.float32).astype(dtype)
    assert selftest.error(rounded, exact) <= 1e-7
    assert selftest.error(np.nextafter(rounded, np.array(np.inf, dtype)), exact) > 1e-4


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_held_to_its_rounding(dtype, serve, capsys, monkeypatch):
    """One unit in the last place too much, in one value."""

    def forward(x, gamma, beta, eps, out):
        y, m = reference.forward(x, gamma, beta, eps, out)
        y[0, 0] = np.nextafter(y[0, 0], np.ones((), dtype))
        return y, m

    monkeypatch.setattr(selftest, "DTYPES", (dtype,))
    serve(forward=forward)
    assert main(["check", "--backend", "cpu"]) == 1
    assert failing(capsys) == {"batch_norm", LAYER}
    serve(forward=_nan)
    assert main(["check", "--backend", "cpu"]) == 1
    assert failing(capsys) == {"batch_norm", LAYER}


def test_bfloat16_is_left_out_where_it_cannot_be_made(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert {case.x.dtype.name for case in selftest.cases()} == set(DTYPES) - {"bfloat16"}
    assert main(["check", "--backend", "reference"]) == 0
    assert "bfloat16 was left out, it needs ml_dtypes: pip install 'fastbn[bfloat16]'" in capsys.readouterr().out


def _moments(x):
    m = reference.moments(x)
    return Moments(m.count, m.mean, m.m2 * (1 + 3e-6))


def _one_channel(x):
    m = reference.moments(x)
    m.mean[-1] += 3e-6 * np.abs(m.mean[-1]) + 1e-5
    return m


def _normalize(x, mean, rstd, gamma, beta, out):
    reference.normalize(x, mean, rstd, gamma, beta, out)
    out[-1, ..., -1] += 1e-5
    return out


def _nan(x, gamma, beta, eps, out):
    y, m = reference.forward(x, gamma, beta, eps, out)
    y[0, 0] = np.nan
    return y, m


def _naive(x, gamma, beta, eps, out):
    """E[x^2] - E[x]^2 in the dtype of x: right at offset 0."""
    axes = (0, 2) if x.ndim == 3 else (0,)
    mean = x.mean(axes, dtype=x.dtype)
    var = np.maximum(np.square(x).mean(axes, dtype=x.dtype) - np.square(mean), 0)
    m = Moments(x.size // mean.size, mean.astype(float), var.astype(float) * (x.size // mean.size))
    return reference.normalize(x, m.mean, m.rstd(eps), gamma, beta, out), m


def _backward(*args):
    dx, dgamma, dbeta = reference.backward(*args)
    args[-1][1] *= 1 + 1e-4  # what callers of the public functions get
    return dx, dgamma * (1 + 1e-4), dbeta


def _raises(*args):
    raise ZeroDivisionError("kernel broke")


LAYER = "BatchNorm, training"


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        ({}, set()),
        ({"moments": _moments}, {"moments", "RunningMoments"}),
        ({"moments": _one_channel}, {"moments", "RunningMoments"}),
        ({"normalize": _normalize}, {"batch_norm_inference", "BatchNorm, evaluation"}),
        ({"forward": _nan}, {"batch_norm", LAYER}),
        ({"forward": _naive}, {"batch_norm", LAYER}),
        (
            {"backward": _backward},
            {"batch_norm_backward", "batch_norm_inference_backward", LAYER, "BatchNorm, evaluation"},
        ),
        ({"forward": _raises}, {"batch_norm", LAYER}),
    ],
    ids=["right", "var", "mean of one channel", "one value of y", "NaN", "naive variance", "dgamma", "raises"],
)
def test_a_wrong_backend_fails_by_name(replaced, expected, serve, capsys):
    serve(**replaced)
    assert main(["check", "--backend", "cpu"]) == (1 if expected else 0)
    assert failing(capsys) == expected


def test_a_failure_says_where(serve, capsys, monkeypatch):
    monkeypatch.setattr(selftest, "DTYPES", ("float32", "float64"))  # those at an offset of 1e6
    serve(forward=_naive, moments=_raises)
    assert main(["check", "--backend", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "    var, float" in out
    assert "offset 1e+06" in out
    assert "    ZeroDivisionError: kernel broke, float32, shape (4, 6, 5, 5), channels first, offset 0" in out
    assert "4 of 8 functions within their limits" in out
    assert "python -m fastbn info" in out


def test_an_unknown_backend_is_bad_input(capsys):
    assert main(["check", "--backend", "gpu"]) == 2
    assert "backend='gpu' can't be served" in capsys.readouterr().err


def test_cases_hold_every_dtype_memory_order_and_offset():
    cases = list(selftest.cases())
    assert len(cases) == len(SMALL) * 2 * (2 * 3 + 2 * 2)  # half precision at two offsets
    innermost = [case.x.strides[1] == case.x.itemsize for case in cases]
    assert sum(innermost) == len(cases) // 2
    assert {str(case.x.dtype) for case in cases} == set(DTYPES)
    assert all(case.dy.strides == case.x.strides for case in cases)


def test_the_real_shapes_reach_every_kernel():
    """Serial and parallel, fused and in two passes, folded and not: the branches of the CPU backend's schedule."""
    from fastbn.cpu import schedule

    first, columns = set(), set()
    for shape in SHAPES:
        n, c, s = shape[0], shape[1], int(np.prod(shape[2:]))
        for itemsize in (4, 8):
            views = [(n * s, c, 1), *([(n, c, s)] if s > 1 else [])]  # channels last, channels first
            for r, _, width in views:
                if width == 1 or schedule.short(r, width, itemsize):
                    cut = schedule.of_columns(r, c, width, itemsize, True)
                    columns.add((width > 1, cut.parallel, cut.parts == 1, cut.fold == 1))
                else:
                    plan = schedule.of_rows(r, c, width, itemsize)
                    first.add((plan.parallel, plan.parts == 1))
    assert first >= {(False, True), (True, True), (True, False)}
    last = {cut[1:] for cut in columns if not cut[0]}
    assert last >= {(False, True, True), (True, True, True), (True, False, True), (True, False, False)}
    assert {cut[1:3] for cut in columns if cut[0]} >= {(False, True), (True, True)}  # short rows of channels first
