"""The kernels that callers use in their own @njit functions."""

import numba
import numpy as np
import pytest
from numba import njit, prange
from tolerances import check

import fastbn
from fastbn import kernels, reference
from fastbn.cpu.kernels import serial
from fastbn.kernels import (
    backward_channels_first,
    backward_channels_last,
    forward_channels_first,
    forward_channels_last,
    moments_channels_last,
    normalize_channels_last,
)

EPS = 1e-5
# Each compiles for 5 to 10 s: compiled, they are of a full run; as plain Python, where every line counts, of each.
compiled = () if numba.config.DISABLE_JIT else pytest.mark.full
every_dtype = pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=compiled)])


@njit(parallel=True, cache=True)
def whitened(groups, y, mean, m2):
    """Each group of samples by its own statistics, one group per thread: what no single call of fastbn does."""
    for g in prange(groups.shape[0]):
        moments_channels_last(groups[g], mean[g], m2[g])
        rstd = 1.0 / np.sqrt(m2[g] / groups.shape[1] + EPS)
        none = np.empty(0, groups.dtype)
        normalize_channels_last(groups[g], mean[g], rstd, none, none, y[g])


@njit(cache=True)
def step(x, dy, gamma, beta, last):
    """A training step of a network whose loop is compiled as a whole."""
    C = gamma.size
    y, dx, mean, m2, sums = np.empty_like(x), np.empty_like(x), np.empty(C), np.empty(C), np.empty((2, C))
    if last:
        flat, flat_dy = x.reshape((-1, C)), dy.reshape((-1, C))
        count = flat.shape[0]
        forward_channels_last(flat, gamma, beta, EPS, y.reshape((-1, C)), mean, m2)
        backward_channels_last(flat_dy, flat, mean, 1.0 / np.sqrt(m2 / count + EPS), gamma, dx.reshape((-1, C)), sums)
    else:
        count = x.size // C
        forward_channels_first(x, gamma, beta, EPS, y, mean, m2)
        backward_channels_first(dy, x, mean, 1.0 / np.sqrt(m2 / count + EPS), gamma, dx, sums)
    return y, dx, mean, m2, sums


@every_dtype
def test_in_a_parallel_function_of_the_caller(dtype):
    groups = np.random.default_rng(0).normal(3.0, 2.0, (6, 40, 19)).astype(dtype)
    y, mean, m2 = np.empty_like(groups), np.empty((6, 19)), np.empty((6, 19))
    whitened(groups, y, mean, m2)
    for g, x in enumerate(groups):
        expected, m = fastbn.batch_norm(x, eps=EPS)
        assert y[g].tobytes() == expected.tobytes()
        assert (mean[g].tobytes(), m2[g].tobytes()) == (m.mean.tobytes(), m.m2.tobytes())


@every_dtype
@pytest.mark.parametrize("last", [False, True])
def test_a_training_step(dtype, last):
    rng = np.random.default_rng(1)
    x, dy = rng.normal(50.0, 2.0, (3, 4, 130)).astype(dtype), rng.normal(size=(3, 4, 130)).astype(dtype)
    C = 130 if last else 4
    gamma, beta = rng.uniform(0.5, 2.0, C).astype(dtype), rng.normal(size=C).astype(dtype)
    y, dx, mean, m2, sums = step(x, dy, gamma, beta, last)
    shape = (-1, C) if last else x.shape
    truth = np.empty(x.reshape(shape).shape)
    m = reference.forward(x.reshape(shape), gamma, beta, EPS, truth)[1]
    check("mean", dtype, mean, m.mean, np.abs(m.mean))
    check("var", dtype, m2, m.m2, m.m2)
    check("y", dtype, y, truth.reshape(x.shape), np.maximum(1.0, np.abs(truth).max()))
    reference.backward(dy.reshape(shape), x.reshape(shape), m.mean, m.rstd(EPS), gamma, truth)
    check("dx", dtype, dx, truth.reshape(x.shape), 10.0)
    exact = reference.grad_reduce(dy.reshape(shape), x.reshape(shape), m.mean, m.rstd(EPS))
    check("dgamma", dtype, sums[1], exact[1], np.abs(dy).sum() / C * 2)
    check("dbeta", "float32", sums[0], exact[0], np.abs(dy).sum() / C)


@every_dtype
def test_the_halves_of_a_forward(dtype):
    x = np.random.default_rng(2).normal(3.0, 2.0, (5, 4, 130)).astype(dtype)
    none, y, mean, m2 = np.empty(0, dtype), np.empty_like(x), np.empty(4), np.empty(4)
    kernels.moments_channels_first(x, mean, m2)
    kernels.normalize_channels_first(x, mean, 1.0 / np.sqrt(m2 / 650 + EPS), none, none, y)
    expected, m = fastbn.batch_norm(x, eps=EPS)
    check("mean", dtype, mean, m.mean, np.abs(m.mean))
    check("var", dtype, m2, m.m2, m.m2)
    check("y", dtype, y, expected, np.maximum(1.0, np.abs(expected).max()))


@np.errstate(all="ignore")  # as the compiled ones are
@pytest.mark.parametrize("last", [pytest.param(last, marks=compiled) for last in (False, True)])
def test_a_training_step_whose_coefficients_leave_float32(last):
    rng = np.random.default_rng(1)
    x, dy = (
        rng.normal(50.0, 0.2, (3, 4, 130)).astype("f4"),
        rng.normal(size=(3, 4, 130)).astype("f4") * np.float32(1e-3),
    )
    C = 130 if last else 4
    gamma, beta = np.full(C, 3e38, "f4"), rng.normal(size=C).astype("f4")
    y, dx, *_ = step(x, dy, gamma, beta, last)
    axis = 2 if last else 1
    expected, m = fastbn.batch_norm(x, gamma, beta, axis, EPS)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(dx, fastbn.batch_norm_backward(dy, x, m, gamma, axis, EPS)[0], rtol=1e-4, atol=1e30)
    assert np.isfinite(y).any()
    tiny, slope = x[0] * np.float32(1e-43), dy[0]
    if last:
        z, dz, normalize, back = (
            tiny.reshape(-1, 4),
            slope.reshape(-1, 4),
            kernels.normalize_channels_last,
            backward_channels_last,
        )
    else:
        z, dz, normalize, back = tiny[None], slope[None], kernels.normalize_channels_first, backward_channels_first
    y, dx, sums, none, constants = (
        np.empty_like(z),
        np.empty_like(z),
        np.empty((2, 4)),
        np.empty(0, "f4"),
        (np.zeros(4), np.full(4, 1e40)),
    )
    normalize(z, *constants, none, none, y)
    np.testing.assert_array_equal(y, (z.astype("f8") * 1e40).astype("f4"))
    back(dz, z, *constants, none, dx, sums)
    others = tuple(a for a in range(z.ndim) if a != 1)
    np.testing.assert_allclose(sums[1], (dz * (z.astype("f8") * 1e40)).sum(others), rtol=1e-12)


def test_names():
    assert kernels.normalize_channels_first is serial.normalize_channels_first
    with pytest.raises(AttributeError, match="no attribute 'moments_channels_middle'"):
        _ = kernels.moments_channels_middle
