"""Scales that leave the range of float32: a coefficient that is infinite or subnormal there takes no digit of a result
that is a number.
"""

from typing import NamedTuple

import numpy as np
import published
import pytest
from shapes import COMPACT

import fastbn
from fastbn.cpu import passes as cpu


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
    near = (
        np.abs(got[number].astype(np.float64) - want[number])
        <= 3e-6 * np.broadcast_to(size, want.shape)[number] + 2e-45
    )
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


Arrays = list[np.ndarray]


def _all(x: np.ndarray, dy: np.ndarray, gamma: np.ndarray) -> Arrays:
    """What every function gives."""
    with np.errstate(all="ignore"):
        y, m = fastbn.batch_norm(x, gamma)
        sums = fastbn.batch_norm_backward_reduce(dy, x, m.mean, m.var())
        found = [
            y,
            m.mean,
            m.m2,
            *sums,
            fastbn.batch_norm_backward_input(dy, x, m.mean, m.var(), *sums, m.count, gamma),
        ]
        found += fastbn.batch_norm_backward(dy, x, m, gamma)
        found += fastbn.batch_norm_inference_backward(dy, x, m.mean, m.var(), gamma)
        return [*found, fastbn.batch_norm_inference(x, m.mean, m.var(), gamma)]


@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 9, 5, 40), (40, 33), (67, 4), (4, 6, 3, 3)], ids=str)
def test_a_channel_beyond_float32_leaves_the_others_their_bits(shape: tuple[int, ...], layout: str) -> None:
    rng, channel = np.random.default_rng(0), shape[1] // 2
    x, dy = (COMPACT[layout](rng.standard_normal(shape).astype(np.float32), 1) for _ in range(2))
    gamma, others = np.ones(shape[1], np.float32), np.arange(shape[1]) != channel
    healthy = _all(x, dy, gamma)
    for factor, weight, slope in (
        (1e31, 1.0, 1.0),
        (1e-42, 1.0, 1.0),
        (np.nan, 1.0, 1.0),
        (1e-3, 3.4e38, 1.0),
        (1.0, 1.0, 1e32),
    ):
        other_x, other_dy, other_gamma = x.copy(order="K"), dy.copy(order="K"), gamma.copy()
        other_x[:, channel] *= np.float32(factor)
        other_dy[:, channel] *= np.float32(slope)
        other_gamma[channel] = weight
        for got, want in zip(_all(other_x, other_dy, other_gamma), healthy, strict=True):
            axis = 1 if got.ndim > 1 else 0
            assert got.compress(others, axis).tobytes() == want.compress(others, axis).tobytes()


@pytest.mark.parametrize("layout", ["C", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 3), (2, 3, 340), (67, 3, 2)], ids=str)
def test_sums_that_only_float64_holds(shape: tuple[int, ...], layout: str) -> None:
    rng, others = np.random.default_rng(0), tuple(a for a in range(len(shape)) if a != 1)
    values, slope = rng.standard_normal(shape).astype(np.float32), np.full(shape, 2e37, np.float32)
    slope[0] *= -1
    x, dy, gamma = COMPACT[layout](values, 1), COMPACT[layout](slope, 1), np.full(3, 1e-10, np.float32)
    m = fastbn.moments(x)
    sums = fastbn.batch_norm_backward_reduce(dy, x, m.mean, m.var())
    wanted = published.gradients(slope, values, m.mean, m.var(), gamma, 1, 1e-5, True)
    terms = np.abs(slope.astype(np.float64)).sum(others).max()
    np.testing.assert_allclose(sums[0], wanted.dbeta, rtol=0, atol=1e-6 * terms)
    np.testing.assert_allclose(sums[1], wanted.dgamma, rtol=0, atol=1e-6 * terms)
    with np.errstate(over="ignore"):
        dx = fastbn.batch_norm_backward(dy, x, m, gamma)[0]
    np.testing.assert_allclose(dx, wanted.dx, rtol=0, atol=3e-6 * np.abs(wanted.dx).max())


@pytest.mark.parametrize("shape", [(40, 5), (3, 5, 40), (2, 5, 9, 40)], ids=str)
def test_inference_by_addresses(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, (mean, var) = (rng.standard_normal(shape) * 1e-41).astype(np.float32), np.zeros((2, 5), np.float32)
    y, eps = np.empty_like(x), 1e-80
    dims = (shape[0], 5, x[0, 0].size) if x.ndim > 2 else shape
    cpu.compact(shape, dims, x.dtype).inference(*(a.ctypes.data for a in (x, y, mean, var)), 0, 0, eps)
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
