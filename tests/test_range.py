"""Scales that leave the range of float32: a coefficient that is infinite or subnormal there takes no digit of a result that is a number."""

from typing import NamedTuple

import numpy as np
import published
import pytest
from shapes import COMPACT

import fastbn
from fastbn.backends import cpu


class Scale(NamedTuple):
    deviation: float  # of x
    gamma: float
    eps: float
    dy: float
    why: str

    def __str__(self) -> str:
        return self.why


SCALES = (
    Scale(1e-41, 1.0, 1e-78, 1.0, "rstd over 3.4e38 by eps, x subnormal"),
    Scale(1e-41, 1.0, 1e-90, 1e-3, "rstd far over 3.4e38"),
    Scale(0.0, 1.0, 1e-78, 1.0, "constant channels: beta"),
    Scale(1.0, 1e38, 1e-5, 1e-3, "a huge gamma, results that overflow beside some that do not"),
    Scale(1e-10, 1e30, 1e-30, 1e-9, "gamma * rstd over 3.4e38"),
    Scale(1e-30, 1e15, 1e-78, 1e-20, "gamma * rstd, with small gradients"),
    Scale(1e37, 1e5, 1e-5, 1e-6, "a subnormal slope of dx"),
    Scale(8e37, 1e3, 1e-5, 1e-4, "deviations that overflow"),
    Scale(1e20, 1e12, 1e-5, 1e-20, "a subnormal slope, small gradients"),
    Scale(1e-20, 1e-25, 1e-45, 1e25, "a slope over 3.4e38"),
    Scale(1e30, 1.0, 1e-5, 1.0, "all in range"),
)
SHAPES = ((6, 5, 7, 3), (2, 3, 9, 40), (40, 5), (4, 70), (67, 4))


def _close(got: np.ndarray, want: np.ndarray, size: np.ndarray | float) -> bool:
    """Within 3e-6 of the size, or what float32 makes of a number that it can't hold."""
    single = want.astype(np.float32)
    number = np.isfinite(single)
    near = np.abs(got[number].astype(np.float64) - want[number]) <= 3e-6 * np.broadcast_to(size, want.shape)[number] + 2e-45
    return bool(near.all()) and np.array_equal(got[~number], single[~number], equal_nan=True)


@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_numbers_stay_numbers(scale: Scale, shape: tuple[int, ...], layout: str) -> None:
    rng, others = np.random.default_rng(0), tuple(a for a in range(len(shape)) if a != 1)
    values = (rng.standard_normal(shape) * scale.deviation).astype(np.float32)
    values[:, -1] = values.flat[0]  # a constant channel
    dy = (rng.standard_normal(shape) * scale.dy).astype(np.float32)
    gamma = (rng.uniform(0.5, 2.0, shape[1]) * scale.gamma).astype(np.float32)
    beta = rng.standard_normal(shape[1]).astype(np.float32)
    mean, var = published.statistics(values, 1)[1:]
    x, dz = COMPACT[layout](values, 1), COMPACT[layout](dy, 1)
    with np.errstate(all="ignore"):
        terms = np.abs(dy.astype(np.float64)) * np.maximum(1.0, np.abs(published.xhat(values, mean, var, 1, scale.eps)))
        for training in (True, False):
            y = published.normalized(values, mean, var, gamma, beta, 1, scale.eps)
            wanted = published.gradients(dy, values, mean, var, gamma, 1, scale.eps, training)
            if training:
                got, m = fastbn.batch_norm(x, gamma, beta, eps=scale.eps)
                found = fastbn.batch_norm_backward(dz, x, m, gamma, eps=scale.eps)
            else:
                got = fastbn.batch_norm_inference(x, mean, var, gamma, beta, eps=scale.eps)
                found = fastbn.batch_norm_inference_backward(dz, x, mean, var, gamma, eps=scale.eps)
            assert _close(got, y, np.abs(y).max(others, keepdims=True))
            assert _close(found[0], wanted.dx, np.abs(wanted.dx).max(others, keepdims=True))
            if training:
                sums = fastbn.batch_norm_backward_reduce(dz, x, m.mean, m.var(), eps=scale.eps)
                dx = fastbn.batch_norm_backward_input(dz, x, m.mean, m.var(), *sums, m.count, gamma, eps=scale.eps)
                assert _close(dx, wanted.dx, np.abs(wanted.dx).max(others, keepdims=True))
            assert _close(found[1], wanted.dgamma, terms.sum(others))
            assert _close(found[2], wanted.dbeta, terms.sum(others))


@pytest.mark.parametrize("shape", [(40, 5), (3, 5, 40), (2, 5, 9, 40)], ids=str)
def test_inference_by_addresses(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, (mean, var) = (rng.standard_normal(shape) * 1e-41).astype(np.float32), np.zeros((2, 5), np.float32)
    y, eps = np.empty_like(x), 1e-80
    dims = (shape[0], 5, x[0, 0].size) if x.ndim > 2 else shape
    cpu.compact("inference", shape, dims, x.dtype)(*(a.ctypes.data for a in (x, y, mean, var)), 0, 0, eps)
    np.testing.assert_array_equal(y, fastbn.batch_norm_inference(x, mean, var, eps=eps))
    assert np.isfinite(y).all()


@pytest.mark.parametrize("shape", [(40, 5), (3, 5, 40)], ids=str)
def test_a_variance_of_zero_and_no_eps(shape: tuple[int, ...]) -> None:
    """1 / 0: a deviation is infinite then, and none is NaN, as in the formula."""
    x = np.zeros(shape, np.float32)
    x[1] = 1.0
    with np.errstate(all="ignore"):
        want = published.normalized(x, np.zeros(5), np.zeros(5), None, None, 1, 0.0)
    np.testing.assert_array_equal(fastbn.batch_norm_inference(x, np.zeros(5), np.zeros(5), eps=0.0), want)
