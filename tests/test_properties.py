"""Identities that hold for any input: splits, the inverse, gradients, equivariance, independence."""

from typing import NamedTuple

import numpy as np
import published
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from shapes import every_dtype_and_backend, parameter_dtype

import fastbn

TINY = {"float32": 1e-6, "float64": 1e-13}


@pytest.fixture(params=["cpu", "reference"], scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    """As in conftest, once per module: hypothesis refuses a fixture that it would share between examples."""
    return str(request.param)


class Problem(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    axis: int
    eps: float

    def along(self, values: np.ndarray) -> np.ndarray:
        """Per-channel values to go beside x."""
        shape = [1] * self.x.ndim
        shape[self.axis] = -1
        return np.asarray(values, np.float64).reshape(shape)

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of each channel, in float64."""
        return values.sum(tuple(a for a in range(values.ndim) if a != self.axis), np.float64)


@st.composite
def problems(
    draw: st.DrawFn,
    dtypes: tuple[str, ...] = ("float32", "float64"),
    largest: int = 9,
    scales: tuple[float, ...] = (1e-3, 1.0, 1e3),
) -> Problem:
    """Each channel a shuffled ramp of width about 1 with noise, so that no variance is tiny; then scaled and
    shifted.
    """
    n, channels, s = draw(st.integers(2, largest)), draw(st.integers(1, largest)), draw(st.integers(1, largest))
    shape, axis = draw(
        st.sampled_from([((n, channels, s), 1), ((n, channels), 1), ((channels, n), 0), ((n, s, channels), 2)])
    )
    scale, offset = draw(st.sampled_from(scales)), draw(st.sampled_from([0.0, 1.0, 100.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(dtypes))
    count = int(np.prod(shape)) // channels
    ramps = rng.permuted(np.tile(np.linspace(-1, 1, count), (channels, 1)), axis=1) + 0.1 * rng.standard_normal(
        (channels, count)
    )
    rest = [shape[a] for a in range(len(shape)) if a != axis]
    x = np.moveaxis((scale * (ramps + offset)).reshape(channels, *rest), 0, axis).astype(dtype)
    dy = rng.standard_normal(shape).astype(dtype)
    gamma, beta = (rng.uniform(-2, 2, channels).astype(parameter_dtype(dtype)) for _ in range(2))
    return Problem(x, dy, gamma, beta, axis, draw(st.sampled_from([1e-5, 0.1])) * scale**2)


@given(problems(("float64",), largest=20), st.data())
def test_any_split_in_any_order_has_the_same_statistics(backend: str, p: Problem, data: st.DataObject) -> None:
    cut = 1 if p.axis == 0 else 0
    cuts = sorted(data.draw(st.lists(st.integers(0, p.x.shape[cut]), max_size=6)))  # repeated cuts make empty chunks
    chunks = data.draw(st.permutations(np.split(p.x, cuts, cut)))
    groups = [fastbn.RunningMoments(p.x.shape[p.axis], p.axis, backend) for _ in range(2)]
    for chunk in chunks:
        groups[data.draw(st.integers(0, 1))].update(chunk)
    merged = groups[0].merge(groups[1])
    whole = published.statistics(p.x, p.axis)
    condition = np.maximum(1.0, np.abs(whole.mean) / np.sqrt(whole.var))  # what a merge of means can lose
    assert merged.count == whole.count
    assert (np.abs(merged.mean - whole.mean) <= 1e-12 * np.maximum(np.abs(whole.mean), np.sqrt(whole.var))).all()
    assert (np.abs(merged.var() - whole.var) <= 1e-12 * condition * whole.var).all()


@every_dtype_and_backend
@given(st.lists(st.integers(1, 8), min_size=1, max_size=12), st.data())
def test_any_split_of_exact_data_is_exact(dtype: str, backend: str, ks: list[int], data: st.DataObject) -> None:
    """Pairs m(1 - k/16), m(1 + k/16): every chunk of pairs has mean m exactly, and every sum of squares is
    representable.
    """
    m = np.array([1.0, -64.0, 2048.0])
    rows = np.stack([m * (1 + sign * k / 16) for k in ks for sign in (-1, 1)]).astype(dtype)
    cuts = [2 * at for at in sorted(data.draw(st.lists(st.integers(0, len(ks)), max_size=4)))]
    r = fastbn.RunningMoments(3, backend=backend)
    for chunk in data.draw(st.permutations(np.split(rows, cuts))):
        r.update(chunk)
    np.testing.assert_array_equal(r.mean, m)
    np.testing.assert_array_equal(r.moments.m2, m**2 * (2 * np.square(ks).sum() / 256))


@every_dtype_and_backend
@given(st.data())
def test_merge_with_an_empty_side_is_the_other(dtype: str, backend: str, data: st.DataObject) -> None:
    p = data.draw(problems((dtype,), scales=(1e-3, 1.0, 1e2)))  # float16 ends at 65504
    m = fastbn.moments(p.x, p.axis, backend=backend)
    empty = fastbn.moments(
        np.empty([0 if a != p.axis else n for a, n in enumerate(p.x.shape)], p.x.dtype), p.axis, backend=backend
    )
    for merged in (m.merge(empty), empty.merge(m)):
        assert (merged.count, merged.mean.tobytes(), merged.m2.tobytes()) == (m.count, m.mean.tobytes(), m.m2.tobytes())


@given(problems())
def test_gamma_the_deviation_and_beta_the_mean_give_x_back(backend: str, p: Problem) -> None:
    s = published.statistics(p.x, p.axis)
    gamma, beta = np.sqrt(s.var + p.eps).astype(p.x.dtype), s.mean.astype(p.x.dtype)
    y, m = fastbn.batch_norm(p.x, gamma, beta, p.axis, p.eps, backend=backend)
    again = fastbn.batch_norm_inference(p.x, m.mean, m.var(), gamma, beta, p.axis, p.eps, backend=backend)
    allowed = TINY[p.x.dtype.name] * p.along(np.abs(s.mean) + np.sqrt(s.var) * 3)
    assert (np.abs(y - p.x) <= allowed).all()
    assert (np.abs(again - p.x) <= allowed).all()


@given(problems())
def test_y_has_mean_beta_and_deviation_gamma(backend: str, p: Problem) -> None:
    y, m = fastbn.batch_norm(p.x, p.gamma, p.beta, p.axis, p.eps, backend=backend)
    of_y = published.statistics(y, p.axis)
    shrunk = m.var() / (m.var() + p.eps)
    np.testing.assert_allclose(of_y.mean, p.beta, atol=8 * TINY[p.x.dtype.name])
    np.testing.assert_allclose(of_y.var, np.square(p.gamma.astype(np.float64)) * shrunk, atol=32 * TINY[p.x.dtype.name])


@given(problems())
def test_dx_sums_to_nothing_and_is_orthogonal_to_xhat(backend: str, p: Problem) -> None:
    """What remains of the second identity is eps / (var + eps) of dgamma: the statistics don't quite cancel the
    scale.
    """
    m = fastbn.moments(p.x, p.axis, backend=backend)
    dx, dgamma, _ = fastbn.batch_norm_backward(p.dy, p.x, m, p.gamma, p.axis, p.eps, backend=backend)
    hat = published.xhat(p.x, m.mean, m.var(), p.axis, p.eps)
    rate = np.abs(p.gamma) * m.rstd(p.eps)
    allowed = 4 * TINY[p.x.dtype.name] * rate * m.count * np.abs(p.dy).max()
    assert (np.abs(p.sum(dx)) <= allowed).all()
    remainder = p.gamma * m.rstd(p.eps) * dgamma * p.eps / (m.var() + p.eps)
    assert (np.abs(p.sum(dx * hat) - remainder) <= 2 * allowed).all()


@given(problems(("float64",), largest=4), st.booleans())
def test_gradients_are_the_finite_differences(backend: str, p: Problem, training: bool) -> None:
    s = published.statistics(p.x, p.axis)
    mean, var = s.mean + np.sqrt(s.var), 2 * s.var  # constants at inference, not those of x

    def loss(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> float:
        if training:
            y = fastbn.batch_norm(x, gamma, beta, p.axis, p.eps, backend=backend)[0]
        else:
            y = fastbn.batch_norm_inference(x, mean, var, gamma, beta, p.axis, p.eps, backend=backend)
        return float((p.dy * y).sum())

    if training:
        m = fastbn.moments(p.x, p.axis, backend=backend)
        found = fastbn.batch_norm_backward(p.dy, p.x, m, p.gamma, p.axis, p.eps, backend=backend)
    else:
        found = fastbn.batch_norm_inference_backward(p.dy, p.x, mean, var, p.gamma, p.axis, p.eps, backend=backend)
    arguments = (p.x, p.gamma, p.beta)
    steps = (1e-5 * float(np.sqrt(s.var.min() + p.eps)), 1e-3, 1e-3)  # linear in gamma and beta: any step is exact
    for which, (argument, step) in enumerate(zip(arguments, steps, strict=True)):
        numeric = np.empty_like(argument)
        for at in np.ndindex(argument.shape):
            sides = []
            for sign in (1, -1):
                moved = [array.copy() for array in arguments]
                moved[which][at] += sign * step
                sides.append((loss(*moved), moved[which][at]))
            numeric[at] = (sides[0][0] - sides[1][0]) / (sides[0][1] - sides[1][1])
        size = np.abs(p.dy).sum() * (2 / np.sqrt(s.var.min() + p.eps) if which == 0 else 3)
        np.testing.assert_allclose(found[which], numeric, rtol=0, atol=1e-7 * size)


@given(problems(), st.integers(-20, 20))
def test_a_scale_of_x_changes_the_statistics_and_not_y(backend: str, p: Problem, power: int) -> None:
    scale = 2.0**power  # exact in x and in eps
    y, m = fastbn.batch_norm(p.x, p.gamma, p.beta, p.axis, p.eps, backend=backend)
    scaled, n = fastbn.batch_norm(
        p.x * p.x.dtype.type(scale), p.gamma, p.beta, p.axis, p.eps * scale**2, backend=backend
    )
    tiny = TINY[p.x.dtype.name]
    np.testing.assert_allclose(scaled, y, rtol=tiny, atol=8 * tiny)
    np.testing.assert_allclose(n.mean, scale * m.mean, rtol=tiny, atol=tiny * scale * np.sqrt(m.var().max()))
    np.testing.assert_allclose(n.var(), scale**2 * m.var(), rtol=tiny)


@given(problems(), st.integers(-1000, 1000))
def test_a_shift_of_x_changes_the_mean_only(backend: str, p: Problem, shift: int) -> None:
    x = np.round(p.x * 64 / np.abs(p.x).max()) / 64  # multiples of 1/64 up to 1: every shifted value is exact
    assume(published.statistics(x, p.axis).var.min() > 1e-3)
    y, m = fastbn.batch_norm(x, p.gamma, p.beta, p.axis, 1e-5, backend=backend)
    shifted, n = fastbn.batch_norm(x + x.dtype.type(shift), p.gamma, p.beta, p.axis, 1e-5, backend=backend)
    tiny = TINY[x.dtype.name] * 100
    np.testing.assert_allclose(shifted, y, rtol=0, atol=tiny)
    np.testing.assert_allclose(n.mean, m.mean + shift, rtol=1e-6 if x.dtype == np.float32 else 1e-13, atol=tiny)
    np.testing.assert_allclose(n.var(), m.var(), rtol=tiny)


@given(problems(), st.data())
def test_the_order_of_the_batch_does_not_matter(backend: str, p: Problem, data: st.DataObject) -> None:
    batch = 1 if p.axis == 0 else 0
    order = data.draw(st.permutations(range(p.x.shape[batch])))
    m = fastbn.moments(p.x, p.axis, backend=backend)
    n = fastbn.moments(p.x.take(order, batch), p.axis, backend=backend)
    tiny = TINY[p.x.dtype.name] * np.maximum(1.0, np.abs(m.mean) / m.std())
    assert (np.abs(n.mean - m.mean) <= tiny * m.std()).all()
    assert (np.abs(n.var() - m.var()) <= tiny * m.var()).all()


@every_dtype_and_backend
@given(st.data())
def test_channels_are_independent(dtype: str, backend: str, data: st.DataObject) -> None:
    """Another channel's values change not one bit."""
    p = data.draw(problems((dtype,), scales=(1e-3, 1.0, 1e2)))  # float16 ends at 65504
    touched = data.draw(st.integers(0, p.x.shape[p.axis] - 1))
    others = [c for c in range(p.x.shape[p.axis]) if c != touched]
    window = tuple(touched if a == p.axis else slice(None) for a in range(p.x.ndim))
    x, dy = p.x.copy("K"), p.dy.copy("K")  # the same schedule
    x[window] = x[window] * 3 + 7
    dy[window] *= -2

    def run(x: np.ndarray, dy: np.ndarray) -> list[np.ndarray]:
        y, m = fastbn.batch_norm(x, p.gamma, p.beta, p.axis, p.eps, backend=backend)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, m, p.gamma, p.axis, p.eps, backend=backend)
        return [
            y.take(others, p.axis),
            dx.take(others, p.axis),
            *(array[others] for array in (m.mean, m.m2, dgamma, dbeta)),
        ]

    for before, after in zip(run(p.x, p.dy), run(x, dy), strict=True):
        np.testing.assert_array_equal(after, before)
