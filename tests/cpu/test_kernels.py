"""Every kernel and every branch of a schedule at small shapes, against the reference.

The constants of the schedule are made small, so that parts, pieces of rows, folds and column groups all occur; run once
compiled, and once as plain Python (NUMBA_DISABLE_JIT=1), where every line of a kernel must have run.
"""

import itertools
from typing import NamedTuple

import numpy as np
import pytest

from fastbn import reference
from fastbn.cpu import passes as cpu
from fastbn.cpu.kernels import welford

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
# Which shapes each setting walks in a way of its own: other flags in the schedules of the passes. What is not here
# differs from "parts" in how many blocks or channels go together at most.
WALKS = {
    "default": tuple(SHAPES),
    "parts": tuple(SHAPES),
    "along": ((2, 2, 150), (5, 1, 33), (1, 20, 64), (700, 2, 5), (300, 9, 8), (2300, 3), (131, 200), (600, 64)),
    "fused": ((2, 2, 150), (5, 1, 33)),
    "stream": tuple(SHAPES),
}
FLOAT64 = ("default", "stream")  # vectors of half as many elements; the schedules' flags are those of float32
LIMIT = {"float32": 2e-6, "float64": 1e-12}


class Cell(NamedTuple):
    setting: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.setting} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def covered(self) -> bool:
        """Whether no other cell takes this one's place."""
        return self.shape in WALKS[self.setting] and (self.dtype == "float32" or self.setting in FLOAT64)


CELLS = [Cell(*cell) for cell in itertools.product(SETTINGS, SHAPES, LIMIT)]


@pytest.fixture(params=[pytest.param(cell, marks=() if cell.covered else pytest.mark.full) for cell in CELLS], ids=str)
def cell(request, replan):
    replan(**SETTINGS[request.param.setting])
    return request.param


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


PLACES = (0, 3, 0.25, "gaps")  # of a result: on a boundary of vectors, off it, between elements, apart from each other


@pytest.fixture
def data(cell):
    rng = np.random.default_rng(7)
    C = cell.shape[1]
    x = (rng.normal(size=cell.shape) + 50).astype(cell.dtype)
    return x, *(rng.normal(size=n).astype(cell.dtype) for n in (cell.shape, C, C))


def test_forward(data, cell):
    x, _, gamma, beta = data
    limit, expected = LIMIT[cell.dtype], np.empty(x.shape)
    truth = reference.forward(x, gamma, beta, 1e-5, expected)[1]
    for where in PLACES:
        y, separate = placed(x.shape, cell.dtype, where), placed(x.shape, cell.dtype, where)
        m = cpu.forward(x, gamma, beta, 1e-5, y)[1]
        assert m.count == truth.count
        np.testing.assert_allclose(m.mean, truth.mean, rtol=1e-7 if cell.dtype == "float32" else 1e-14)
        np.testing.assert_allclose(m.m2, truth.m2, rtol=1e-6 if cell.dtype == "float32" else 1e-11)
        np.testing.assert_allclose(y, expected, rtol=0, atol=5 * limit, err_msg=str(where))
        again = cpu.moments(x)
        cpu.normalize(x, again.mean, again.rstd(1e-5), gamma, beta, separate)
        assert again.mean.tobytes() == m.mean.tobytes()
        assert again.m2.tobytes() == m.m2.tobytes()
        assert separate.tobytes() == y.tobytes(), where


@pytest.mark.parametrize("training", [True, False])
def test_backward(data, cell, training):
    x, dy, gamma, _ = data
    m = reference.moments(x)
    rstd, scale, limit = m.rstd(1e-5), np.sqrt(m.count), LIMIT[cell.dtype]
    expected, grads = np.empty(x.shape), np.empty((2, x.shape[1]), cell.dtype)
    truth = reference.backward(dy, x, m.mean, rstd, gamma, expected, training)
    sums = cpu.grad_reduce(dy, x, m.mean, rstd)
    for where in PLACES:
        dx, separate = placed(x.shape, cell.dtype, where), placed(x.shape, cell.dtype, where)
        _, dgamma, dbeta = cpu.backward(dy, x, m.mean, rstd, gamma, dx, training)
        np.testing.assert_allclose(dx, expected, rtol=0, atol=5 * limit, err_msg=str(where))
        np.testing.assert_allclose(dgamma / scale, truth[1] / scale, rtol=0, atol=5 * limit)
        np.testing.assert_allclose(dbeta / scale, truth[2] / scale, rtol=0, atol=limit)
        assert (sums[0].tobytes(), sums[1].tobytes()) == (dbeta.tobytes(), dgamma.tobytes())
        cpu.grad_input(dy, x, m.mean, rstd, gamma, sums if training else None, m.count, separate)
        assert separate.tobytes() == dx.tobytes(), where
        cpu.backward(dy, x, m.mean, rstd, gamma, dx, training, grads)
        assert grads.tobytes() == np.stack(sums).astype(cell.dtype).tobytes()
        assert separate.tobytes() == dx.tobytes(), where


@pytest.mark.parametrize("gaps", [("x",), ("out",), ("x", "dy", "out")], ids="+".join)
def test_gaps_change_no_bit_and_stay_as_they_are(data, gaps):
    x, dy, gamma, beta = data
    m = reference.moments(x)
    rstd, sums = m.rstd(1e-5), (np.ones(x.shape[1]), np.full(x.shape[1], 2.0))
    some = {"x": x, "dy": dy, "out": np.zeros_like(x)}
    want = aligned(x.shape, x.dtype)
    calls = (
        lambda x, dy, out: cpu.normalize(x, m.mean, rstd, gamma, beta, out),
        lambda x, dy, out: cpu.grad_input(dy, x, m.mean, rstd, gamma, sums, m.count, out),
        lambda x, dy, out: cpu.grad_input(dy, x, m.mean, rstd, gamma, None, m.count, out),
    )
    for offset in (0, 3):
        seen = {name: apart(array, offset) if name in gaps else (array, array) for name, array in some.items()}
        near_x, near_dy, out = (array for array, _ in seen.values())
        for call in calls:
            call(x, dy, want)
            call(near_x, near_dy, out)
            np.testing.assert_array_equal(out, want)
            for name in gaps:
                assert (seen[name][1][:, x.shape[1] :] == 1).all()


def test_inference_by_addresses(data):
    x, _, gamma, beta = data
    mean, var = np.linspace(49, 51, x.shape[1]).astype(x.dtype), np.linspace(0.5, 2, x.shape[1]).astype(x.dtype)
    for offset in (0, 3, 0.25):
        here, y, want = (aligned(x.shape, x.dtype, offset) for _ in range(3))
        here[...] = x
        for parameters in ((gamma, beta), (None, None)):
            addresses = (0 if array is None else array.ctypes.data for array in (here, y, mean, var, *parameters))
            cpu.compact(x.shape, x.shape, x.dtype).inference(*addresses, 1e-5)
            cpu.normalize(here, mean.astype(float), cpu.rstd(var.astype(float), 1.0, 1e-5), *parameters, want)
            assert y.tobytes() == want.tobytes(), offset


def test_parameters_are_optional(data, cell):
    x, dy, gamma, _ = data
    y, expected = np.empty_like(x), np.empty(x.shape)
    m = cpu.forward(x, None, None, 1e-5, y)[1]
    reference.forward(x, None, None, 1e-5, expected)
    np.testing.assert_allclose(y, expected, rtol=0, atol=5 * LIMIT[cell.dtype])
    dx, unscaled = np.empty_like(x), np.empty_like(x)
    cpu.backward(dy, x, m.mean, m.rstd(1e-5), None, unscaled)
    cpu.backward(dy, x, m.mean, m.rstd(1e-5), np.ones_like(gamma), dx)
    assert unscaled.tobytes() == dx.tobytes()


def test_moments_beyond_the_range_of_their_squares(cell):
    """In float32; float64 is held to the same limits."""
    for scale in (1e-18, 1e30, 0.0):
        x = (np.random.default_rng(3).normal(size=cell.shape) * scale).astype(cell.dtype)
        m, truth = cpu.moments(x), reference.moments(x)
        np.testing.assert_allclose(m.m2, truth.m2, rtol=1e-6)
        np.testing.assert_allclose(m.mean, truth.mean, rtol=1e-5, atol=1e-7 * scale)


def test_nan_and_inf_stay_in_their_channel(data):
    x = data[0]
    clean, y, spoilt = np.empty_like(x), np.empty_like(x), x.shape[1] - 1
    cpu.forward(x, None, None, 1e-5, clean)
    for bad in (np.nan, np.inf, -np.inf):
        x[-1, spoilt] = bad
        m = cpu.forward(x, None, None, 1e-5, y)[1]
        assert not np.isfinite(m.m2[spoilt])
        assert np.isnan(y[:, spoilt]).all()
        assert y[:, :spoilt].tobytes() == clean[:, :spoilt].tobytes()


def test_a_block_of_rounding_errors_has_no_negative_variance():
    assert welford.block(3.0, 10.0, 1.0, 0.3) == (10.0 + 1.0 / 3.0, 0.0)
    assert np.isnan(welford.block(3.0, 10.0, 1.0, np.nan)[1])
