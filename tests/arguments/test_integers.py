"""Statistics of integers of 8 and 16 bits, as images have them: against exact arithmetic, in bounded memory, in every
layout.
"""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

import fastbn
from fastbn.cpu import backend as host

# Float64 holds every value. What merges of pieces round: of the mean, relative to the largest value there is; of m2,
# where that is 4e5 deviations from zero, as one channel's is (2e-14 elsewhere).
MEAN, M2 = 2e-15, 1e-11
DTYPES = ("uint8", "int8", "uint16", "int16", ">u2", ">i2")


def _draw(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of the whole range, the ends among them, and one channel that is nearly constant."""
    info = np.iinfo(dtype)
    x = np.random.default_rng(0).integers(info.min, info.max, shape, endpoint=True).astype(dtype)
    flat = x.reshape(-1)
    flat[:1], flat[-1:] = info.min, info.max
    if x.ndim > 1 and x.shape[1] > 1:
        x[:, 1] = info.max
        x[:1, 1] = info.max - 1
    return x


def _check(m: fastbn.Moments, x: np.ndarray, axis: int) -> None:
    """Count, mean and m2 by sums of Python's integers: n * sum(x^2) - sum(x)^2 is exact."""
    others = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    wide, n = x.astype(np.int64), x.size // x.shape[axis]
    sums, squares = (values.sum(others).tolist() for values in (wide, wide * wide))
    assert (type(m.count), m.count) == (int, n)
    limit = MEAN * max(abs(int(np.iinfo(x.dtype).min)), np.iinfo(x.dtype).max)
    np.testing.assert_allclose(m.mean, [s / n for s in sums], rtol=0, atol=limit)
    np.testing.assert_allclose(
        m.m2, [(n * q - s * s) / n for s, q in zip(sums, squares, strict=True)], rtol=M2, atol=n * limit**2
    )


SHAPES = ((6, 5), (4, 3, 7), (1, 2, 1), (3, 1, 9), (2, 3, 4, 5), (5, 300), (40, 70, 3))
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "every second": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "cropped": lambda x: np.pad(x, 1)[(slice(1, -1),) * x.ndim],
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", [host.PIECE, 60, 1])
def test_exact_in_every_layout(dtype: str, piece: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, in many, value by value."""
    monkeypatch.setattr(host, "PIECE", piece)
    for shape in SHAPES if piece > 1 else SHAPES[:4]:
        x = _draw(dtype, shape)
        for layout in LAYOUTS.values():
            for axis in range(-1, x.ndim):
                given = layout(x)
                given.flags.writeable = False
                _check(fastbn.moments(given, axis, backend=backend), x, axis)


@pytest.mark.parametrize("shape", [(0, 3), (4, 3, 0), (0, 1, 5)])
def test_empty(shape: tuple[int, ...], backend: str) -> None:
    m = fastbn.moments(np.zeros(shape, np.uint8), backend=backend)
    assert m.count == 0
    assert not m.mean.any()
    assert not m.m2.any()


def test_running_moments_take_them_beside_floats(backend: str) -> None:
    x = _draw("uint8", (12, 3, 5))
    seen = fastbn.RunningMoments(3, backend=backend)
    for chunk in (x[:5], x[5:5], x[5:8].astype(np.uint16), x[8:].astype(np.float64)):
        seen.update(chunk)
    _check(seen.moments, x, 1)


def test_nothing_larger_than_a_piece_is_made() -> None:
    """In pieces that stay in the cache: 16 MB of images, with 2 MB of float64 at a time."""
    x = np.zeros((64, 3, 288, 288), np.uint8)
    fastbn.moments(x[:1])
    tracemalloc.start()
    try:
        fastbn.moments(x)
        assert tracemalloc.get_traced_memory()[1] < 1.2 * 8 * host.PIECE
    finally:
        tracemalloc.stop()


def test_the_same_bits_on_any_number_of_threads() -> None:
    x = _draw("uint16", (50, 3, 4000))
    one, two = (fastbn.moments(x, num_threads=n) for n in (1, 2))
    assert (one.mean.tobytes(), one.m2.tobytes()) == (two.mean.tobytes(), two.m2.tobytes())


def test_nothing_else_takes_them() -> None:
    x = _draw("uint8", (4, 3))
    for act in (
        lambda: fastbn.batch_norm(x),
        lambda: fastbn.BatchNorm(3)(x),
        lambda: fastbn.BatchNorm(3).recalibrate([x], progress=False),
    ):
        with pytest.raises(
            TypeError,
            match=r"^(batches: batch 0: )?x: given dtype uint8, want float16, .* or float64: convert it first",
        ):
            act()
