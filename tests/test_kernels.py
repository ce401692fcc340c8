"""Every kernel and every branch of a schedule at small shapes, against the reference.

The constants of the schedule are made small, so that parts, pieces of rows, folds and column groups all occur; run once compiled, and
once as plain Python (NUMBA_DISABLE_JIT=1), where every line of a kernel must have run.
"""

import numpy as np
import pytest

from fastbn import config, ready, reference
from fastbn.backends import cpu, routes, schedule
from fastbn.kernels import welford

SHAPES = {
    (2, 3, 7): "rows shorter than a vector",
    (3, 2, 16): "rows of one vector",
    (2, 2, 150): "all unrolled steps and a tail",
    (5, 1, 33): "one channel",
    (1, 20, 64): "one row a channel",
    (700, 2, 5): "many short rows",
    (300, 9, 8): "short rows, several tiles",
    (9, 3): "fewer columns than a vector",
    (130, 4): "rows folded, two tiles",
    (2300, 3): "folded, rows left over",
    (40, 70): "a panel and a tail",
    (131, 200): "several panels, an odd number of rows",
    (105, 320): "wider than panels, an even and an odd tile",
    (600, 64): "whole panels, several tiles",
}
SETTINGS = {
    "default": {},
    "parts": {"SERIAL_BYTES": 0, "SLAB_BYTES": 0, "PART_BYTES": 256, "TASKS": 4, "BLOCK": 4},
    "along": {"SERIAL_BYTES": 0, "PART_BYTES": 256, "BLOCK_BYTES": 0, "ALONG_BYTES": 0, "LINEAR": 0},
    "fused": {"SERIAL_BYTES": 0, "SLAB_BYTES": 2**30, "PART_BYTES": 2048, "TASKS": 1, "BLOCK": 4},
    "stream": {"SERIAL_BYTES": 0, "STREAM_BYTES": 0, "TASKS": 1, "BLOCK": 8},
}
LIMIT = {"float32": 2e-6, "float64": 1e-12}


@pytest.fixture(params=SETTINGS, autouse=True)
def constants(request, monkeypatch):
    for name, value in SETTINGS[request.param].items():
        monkeypatch.setattr(config if hasattr(config, name) else schedule, name, value)
    caches = (
        schedule.first,
        schedule.last,
        routes.of,
        routes.fused,
        cpu._forward,
        cpu._backward,
        cpu._normalize,
        cpu._inference,
        ready._ready,
    )
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def aligned(shape, dtype, offset=0):
    """Memory on a 64-byte boundary, or `offset` elements behind one: also parts of one."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 160, np.uint8)
    start = -raw.ctypes.data % 64 + int(offset * np.dtype(dtype).itemsize)
    return raw[start : start + size].view(dtype).reshape(shape)


def apart(array, offset):
    """The same values with a row or channel of ones between any two of them, and all that memory."""
    N, C = array.shape[:2]
    memory = aligned((N, C + 1, *array.shape[2:]), array.dtype, offset)
    memory[...] = 1
    memory[:, :C] = array
    return memory[:, :C], memory


def placed(shape, dtype, where):
    """A result to be: with gaps, or so many elements behind a 64-byte boundary."""
    return apart(np.zeros(shape, dtype), 3)[0] if where == "gaps" else aligned(shape, dtype, where)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def data(shape, dtype):
    rng = np.random.default_rng(7)
    C = shape[1]
    x = (rng.normal(size=shape) + 50).astype(dtype)
    return x, rng.normal(size=shape).astype(dtype), rng.normal(size=C).astype(dtype), rng.normal(size=C).astype(dtype)


@pytest.mark.parametrize("where", [0, 3, 0.25, "gaps"], ids=["aligned", "unaligned", "between elements", "gaps"])
def test_forward(data, dtype, where):
    x, _, gamma, beta = data
    y, expected = placed(x.shape, dtype, where), np.empty(x.shape)
    m = cpu.forward(x, gamma, beta, 1e-5, y)[1]
    truth = reference.forward(x, gamma, beta, 1e-5, expected)[1]
    assert m.count == truth.count
    np.testing.assert_allclose(m.mean, truth.mean, rtol=1e-7 if dtype == "float32" else 1e-14)
    np.testing.assert_allclose(m.m2, truth.m2, rtol=1e-6 if dtype == "float32" else 1e-11)
    np.testing.assert_allclose(y, expected, rtol=0, atol=5 * LIMIT[dtype])
    separate = placed(x.shape, dtype, where)
    again = cpu.moments(x)
    cpu.normalize(x, again.mean, again.rstd(1e-5), gamma, beta, separate)
    assert again.mean.tobytes() == m.mean.tobytes()
    assert again.m2.tobytes() == m.m2.tobytes()
    assert separate.tobytes() == y.tobytes()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", [0, 3, 0.25, "gaps"], ids=["aligned", "unaligned", "between elements", "gaps"])
def test_backward(data, dtype, training, where):
    x, dy, gamma, _ = data
    m = reference.moments(x)
    rstd = m.rstd(1e-5)
    dx, expected = placed(x.shape, dtype, where), np.empty(x.shape)
    _, dgamma, dbeta = cpu.backward(dy, x, m.mean, rstd, gamma, dx, training)
    truth = reference.backward(dy, x, m.mean, rstd, gamma, expected, training)
    scale = np.sqrt(m.count)
    np.testing.assert_allclose(dx, expected, rtol=0, atol=5 * LIMIT[dtype])
    np.testing.assert_allclose(dgamma / scale, truth[1] / scale, rtol=0, atol=5 * LIMIT[dtype])
    np.testing.assert_allclose(dbeta / scale, truth[2] / scale, rtol=0, atol=LIMIT[dtype])
    sums = cpu.grad_reduce(dy, x, m.mean, rstd)
    separate = placed(x.shape, dtype, where)
    cpu.grad_input(dy, x, m.mean, rstd, gamma, sums if training else None, m.count, separate)
    assert sums[0].tobytes() == dbeta.tobytes()
    assert sums[1].tobytes() == dgamma.tobytes()
    grads = np.empty((2, x.shape[1]), dtype)
    cpu.backward(dy, x, m.mean, rstd, gamma, dx, training, grads)
    assert grads.tobytes() == np.stack(sums).astype(dtype).tobytes()
    assert separate.tobytes() == dx.tobytes()


@pytest.mark.parametrize("gaps", [("x",), ("out",), ("x", "dy", "out")], ids="+".join)
@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "unaligned"])
def test_gaps_change_no_bit_and_stay_as_they_are(data, dtype, offset, gaps):
    x, dy, gamma, beta = data
    m = reference.moments(x)
    rstd, sums = m.rstd(1e-5), (np.ones(x.shape[1]), np.full(x.shape[1], 2.0))
    some = {"x": x, "dy": dy, "out": np.zeros_like(x)}
    seen = {name: apart(array, offset) if name in gaps else (array, array) for name, array in some.items()}
    near_x, near_dy, out = (array for array, _ in seen.values())
    want = aligned(x.shape, dtype)
    calls = (
        lambda x, dy, out: cpu.normalize(x, m.mean, rstd, gamma, beta, out),
        lambda x, dy, out: cpu.grad_input(dy, x, m.mean, rstd, gamma, sums, m.count, out),
        lambda x, dy, out: cpu.grad_input(dy, x, m.mean, rstd, gamma, None, m.count, out),
    )
    for call in calls:
        call(x, dy, want)
        call(near_x, near_dy, out)
        np.testing.assert_array_equal(out, want)
        for name in gaps:
            assert (seen[name][1][:, x.shape[1] :] == 1).all()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("offset", [0, 3, 0.25], ids=["aligned", "unaligned", "between elements"])
def test_inference_by_addresses(data, dtype, offset, affine):
    x, _, gamma, beta = data
    mean, var = np.linspace(49, 51, x.shape[1]).astype(dtype), np.linspace(0.5, 2, x.shape[1]).astype(dtype)
    here, y, want = aligned(x.shape, dtype, offset), aligned(x.shape, dtype, offset), aligned(x.shape, dtype, offset)
    here[...] = x
    parameters = (gamma, beta) if affine else (None, None)
    addresses = (0 if array is None else array.ctypes.data for array in (here, y, mean, var, *parameters))
    cpu.compact("inference", x.shape, x.shape, x.dtype)(*addresses, 1e-5)
    cpu.normalize(here, mean.astype(float), cpu.rstd(var.astype(float), 1.0, 1e-5), *parameters, want)
    assert y.tobytes() == want.tobytes()


def test_parameters_are_optional(data, dtype):
    x, dy, gamma, _ = data
    y, expected = np.empty_like(x), np.empty(x.shape)
    m = cpu.forward(x, None, None, 1e-5, y)[1]
    reference.forward(x, None, None, 1e-5, expected)
    np.testing.assert_allclose(y, expected, rtol=0, atol=5 * LIMIT[dtype])
    dx, unscaled = np.empty_like(x), np.empty_like(x)
    cpu.backward(dy, x, m.mean, m.rstd(1e-5), None, unscaled)
    cpu.backward(dy, x, m.mean, m.rstd(1e-5), np.ones_like(gamma), dx)
    assert unscaled.tobytes() == dx.tobytes()


@pytest.mark.parametrize("scale", [1e-18, 1e30, 0.0])
def test_float32_beyond_the_range_of_its_squares(shape, scale):
    x = (np.random.default_rng(3).normal(size=shape) * scale).astype(np.float32)
    m, truth = cpu.moments(x), reference.moments(x)
    np.testing.assert_allclose(m.m2, truth.m2, rtol=1e-6)
    np.testing.assert_allclose(m.mean, truth.mean, rtol=1e-5, atol=1e-7 * scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_channel(data, bad):
    x = data[0]
    clean, y = np.empty_like(x), np.empty_like(x)
    cpu.forward(x, None, None, 1e-5, clean)
    spoilt = x.shape[1] - 1
    x[-1, spoilt] = bad
    m = cpu.forward(x, None, None, 1e-5, y)[1]
    assert not np.isfinite(m.m2[spoilt])
    assert np.isnan(y[:, spoilt]).all()
    assert y[:, :spoilt].tobytes() == clean[:, :spoilt].tobytes()


def test_a_block_of_rounding_errors_has_no_negative_variance():
    assert welford.block(3.0, 10.0, 1.0, 0.3) == (10.0 + 1.0 / 3.0, 0.0)
    assert np.isnan(welford.block(3.0, 10.0, 1.0, np.nan)[1])
