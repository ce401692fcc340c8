"""The simulated GPU on hard data, within the limits of `tolerances`; the compiled kernels:
`tests/cuda/ptx/test_hard_data.py`.
"""

import numpy as np
import published
import pytest
from tolerances import check

from tests.cuda.simulated import gpu


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(4, 2, 6, 6), (40, 6)])
def test_accuracy_at_any_mean(shape: tuple[int, ...], offset: float) -> None:
    x = (np.random.default_rng(1).standard_normal(shape) + offset).astype(np.float32)
    _held(x)


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-18, 1e13, 1e30, 1e37])
@pytest.mark.parametrize("shape", [(4, 2, 6, 6), (40, 6)])
def test_accuracy_at_any_scale(shape: tuple[int, ...], scale: float) -> None:
    _held((np.random.default_rng(2).standard_normal(shape) * scale).astype(np.float32))


@pytest.mark.parametrize("where", [0, 1, 5])
@pytest.mark.parametrize("shape", [(4, 2, 6, 6), (40, 6)])
def test_accuracy_beside_an_outlier(shape: tuple[int, ...], where: int) -> None:
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    x[where % shape[0]] = 1e6
    _held(x)


@pytest.mark.parametrize("shape", [(8, 2, 6, 6), (64, 6), (4, 2, 53)])
def test_accuracy_where_both_ends_are_atypical(shape: tuple[int, ...]) -> None:
    x = (np.random.default_rng(4).standard_normal(shape) + 1e5).astype(np.float32)
    for ends in (np.s_[[0, -1]], np.s_[..., [0, -1]], np.s_[: shape[0] // 2]):
        padded = x.copy()
        padded[ends] = 0.0
        _held(padded)


@pytest.mark.parametrize("shape", [(8, 2, 6, 6), (64, 6), (4, 2, 53)])
def test_sums_that_only_float64_holds(shape: tuple[int, ...]) -> None:
    x, dy = np.random.default_rng(5).standard_normal(shape).astype(np.float32), np.full(shape, 2e37, np.float32)
    dy[0] *= -1
    s = published.statistics(x, 1)
    want = published.gradients(dy, x, s.mean, s.var, None, 1, 1e-5, True)
    terms = np.abs(dy.astype(np.float64)).sum(tuple(a for a in range(x.ndim) if a != 1))
    found = gpu.batch_norm_backward_reduce(dy, x, s.mean, s.var, 1, 1e-5, backend="cuda")
    for got, wanted in zip(found, (want.dbeta, want.dgamma), strict=True):
        assert (np.abs(got - wanted) <= 1e-6 * terms).all()


def _held(x: np.ndarray) -> None:
    """mean, var and y within the project's limits."""
    y, m = gpu.batch_norm(x, None, None, 1, 1e-5, None, backend="cuda")
    s = published.statistics(x, 1)
    hat = np.abs(published.xhat(x, s.mean, s.var, 1, 1e-5))
    check("mean", "float32", m.mean, s.mean, np.maximum(np.abs(s.mean), np.sqrt(s.var)))
    check("var", "float32", m.var(), s.var, s.var)
    check("y", "float32", y, published.normalized(x, s.mean, s.var, None, None, 1, 1e-5), np.maximum(1, hat))


@pytest.mark.parametrize("shape", [(4, 2, 6, 6), (40, 6)])
def test_a_constant_channel_gives_beta(shape: tuple[int, ...]) -> None:
    for value in (0.0, 1e7 / 3, -1e-30):
        beta = np.linspace(-1, 1, shape[1]).astype(np.float32)
        y, m = gpu.batch_norm(np.full(shape, value, np.float32), None, beta, 1, 1e-5, None, backend="cuda")
        assert (np.moveaxis(y, 1, -1) == beta).all()
        assert (m.m2 == 0).all()
