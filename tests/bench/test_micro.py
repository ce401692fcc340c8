"""Micro-benchmarks: `pytest tests/bench/test_micro.py -n 0 --benchmark-enable` times them, a plain run checks them."""

import numpy as np
import pytest

import fastbn

SHAPES = [(32, 64), (2, 16, 8, 8), (8, 64, 28, 28)]


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def arrays(request):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=request.param).astype(np.float32) for _ in range(3))


def test_forward(benchmark, arrays):
    x, out, _ = arrays
    y, m = benchmark(fastbn.batch_norm, x, out=out)
    assert y is out
    assert m.count == x.size // x.shape[1]


def test_backward(benchmark, arrays):
    x, dy, out = arrays
    m = fastbn.moments(x)
    dx, _, dbeta = benchmark(fastbn.batch_norm_backward, dy, x, m, out=out)
    assert dx is out
    np.testing.assert_allclose(dbeta, np.moveaxis(dy, 1, -1).reshape(-1, x.shape[1]).sum(0), atol=1e-2)


def test_inference(benchmark, arrays):
    x, out, _ = arrays
    mean, var = np.zeros(x.shape[1]), np.ones(x.shape[1])
    y = benchmark(fastbn.batch_norm_inference, x, mean, var, out=out)
    np.testing.assert_allclose(y, x, rtol=1e-4)


def test_moments(benchmark, arrays):
    x = arrays[0]
    m = benchmark(fastbn.moments, x)
    np.testing.assert_allclose(m.mean, np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).mean(0), atol=1e-5)


def test_layer_both_ways(benchmark, arrays):
    x, dy, _ = arrays
    layer = fastbn.BatchNorm(x.shape[1])

    def both():
        layer(x)
        return layer.backward(dy)

    assert benchmark(both).shape == x.shape
