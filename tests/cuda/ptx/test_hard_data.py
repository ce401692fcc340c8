"""The accuracy promised, held by the CUDA kernels as executed from their PTX: the CPU's table of hard data, and the
CPU's limits.

That the data catch poor statistics, `test_accuracy` shows.
"""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import published
import pytest
from tolerances import check, excess, scales

from tests.test_accuracy import EPS, NAMES, Problem

pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")
pytest.importorskip("nvidia", reason="needs nvidia-nvvm, or a CUDA toolkit")

from fastbn.cuda.kernels import gpu

if gpu.SIMULATED:
    pytest.skip("the simulator and the compiler can't share a process", allow_module_level=True)

import fastbn
from tests.cuda.ptx import driver

pytestmark = [pytest.mark.ptx, pytest.mark.peers]

DEVICE = driver.device("sm_90a")
PLACES = {"C": "first", "channels_last": "last"}  # layouts
# What the grids make of them, with the channels first and last.
SHAPES = (
    (8, 24, 14, 14),  # one launch; columns in parts
    (64, 8, 7, 7),  # many short rows
    (3, 5, 17, 13),  # no whole groups
    (2, 2, 150, 151),  # parts of a channel; two columns, folded
    (150, 37),  # one launch, a channel to a column
    (20000, 3),  # folded, parts
    (5, 200),  # few rows
)
WAYS = [(shape, layout) for shape in SHAPES for layout in PLACES if len(shape) > 2 or layout == "C"]
# Whose squares overflow in float32, at once or once summed; are subnormal; or vanish, as 1e-38 nearly does itself. Then
# channels are read again in float64, by one thread in one launch, by many in three.
SCALES = (1e-38, 1e-25, 1e-18, 1e13, 1e17, 1e30)


@pytest.fixture(autouse=True)
def device() -> Iterator[driver.Device]:
    with DEVICE:
        yield DEVICE


def placed(values: np.ndarray, layout: str) -> Any:
    return DEVICE.array(values, "float32", "x", PLACES[layout] if values.ndim > 2 else "first")


def parameter(values: np.ndarray) -> Any:
    return DEVICE.array(values, "float32", "a parameter")


def held(p: Any, layout: str) -> None:
    """Every quantity of a problem within its limit."""
    x, dy = placed(p.x, layout), placed(p.dy, layout)
    gamma, beta = parameter(p.gamma), parameter(p.beta)
    y, m = fastbn.batch_norm(x, gamma, beta, eps=EPS)
    found = {"mean": m.mean, "var": m.var(), "y": y}
    wanted = {"mean": p.stats.mean, "var": p.stats.var, "y": p.y} | p.gradients._asdict()
    found |= dict(zip(("dx", "dgamma", "dbeta"), fastbn.batch_norm_backward(dy, x, m, gamma, eps=EPS), strict=True))
    found["constant y"] = fastbn.batch_norm_inference(x, m.mean, m.var(), gamma, beta, eps=EPS)
    wanted["constant y"] = p.y
    beyond = {}
    for name, got in found.items():
        quantity = name.rpartition(" ")[2]
        beyond[name] = excess(quantity, np.float32, got.get(), wanted[name], getattr(p.scales, quantity))
    assert {name: share for name, share in beyond.items() if not share <= 1} == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "layout"), WAYS, ids=str)
def test_within_the_limits(shape: tuple[int, ...], layout: str, name: str) -> None:
    held(Problem(shape, name), layout)


class Scaled:
    """Noise of a standard deviation, dy of 1."""

    def __init__(self, shape: tuple[int, ...], scale: float) -> None:
        rng = np.random.default_rng(3)
        self.x = (rng.standard_normal(shape) * scale).astype(np.float32)
        self.dy = rng.standard_normal(shape).astype(np.float32)
        self.gamma, self.beta = (rng.uniform(0.5, 1, shape[1]).astype(np.float32) for _ in range(2))
        self.stats = published.statistics(self.x, 1)
        given = self.stats.mean, self.stats.var
        self.y = published.normalized(self.x, *given, self.gamma, self.beta, 1, EPS)
        self.gradients = published.gradients(self.dy, self.x, *given, self.gamma, 1, EPS, True)
        self.scales = scales(self.dy, self.x, *given, self.gamma, self.beta, 1, EPS, True)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("shape", "layout"), WAYS, ids=str)
def test_any_scale(shape: tuple[int, ...], layout: str, scale: float) -> None:
    held(Scaled(shape, scale), layout)


# std of x, mean and std of dy, of which float32 has no sum
SUMS = {"sum of dy": (1.0, 2e37, 1.0), "products": (1e4, 0.0, 1e36)}


@pytest.mark.parametrize("of", SUMS)
@pytest.mark.parametrize(("shape", "layout"), WAYS, ids=str)
def test_sums_beyond_float32(shape: tuple[int, ...], layout: str, of: str) -> None:
    """dx is right where the sums of the backward only fit float64, and so are those that fit the dtype of the
    parameters.
    """
    rng = np.random.default_rng(6)
    spread, mean, noise = SUMS[of]
    x = (rng.standard_normal(shape) * spread).astype(np.float32)
    dy = (rng.standard_normal(shape) * (mean / 10 or noise) + mean).astype(np.float32)
    s = published.statistics(x, 1)
    given = s.mean, s.var, None, 1, EPS, True
    want = published.gradients(dy, x, *given)
    scale = scales(dy, x, s.mean, s.var, None, None, 1, EPS, True)
    placed_x, placed_dy = placed(x, layout), placed(dy, layout)
    found = fastbn.batch_norm_backward(placed_dy, placed_x, fastbn.batch_norm(placed_x, eps=EPS)[1], eps=EPS)
    check("dx", np.float32, found[0].get(), want.dx, scale.dx)
    for name, got in zip(("dgamma", "dbeta"), found[1:], strict=True):
        wanted = getattr(want, name)
        if (np.abs(wanted) < np.finfo(np.float32).max).all():
            check(name, np.float32, got.get(), wanted, getattr(scale, name))
        else:
            assert not np.isnan(got.get()).any()
    sums = fastbn.batch_norm_backward_reduce(placed_dy, placed_x, *map(parameter, (s.mean, s.var)), eps=EPS)
    for name, got in zip(("dbeta", "dgamma"), sums, strict=True):
        check(name, np.float32, got.get(), getattr(want, name), getattr(scale, name))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "layout"), [*WAYS, ((5, 2, 70), "C")], ids=str)
def test_nan_and_inf_stay_in_their_channel(shape: tuple[int, ...], layout: str, dtype: str, value: float) -> None:
    """The statistics of theirs are NaN in every function, as the reference has them."""
    clean = np.random.default_rng(7).standard_normal(shape)
    poisoned = clean.copy()
    poisoned[(shape[0] - 1, 1, *(n // 2 for n in shape[2:]))] = value
    others = np.arange(shape[1]) != 1
    found = []
    for values in (clean, poisoned):
        x = DEVICE.array(values, dtype, "x", PLACES[layout] if values.ndim > 2 else "first")
        dy = DEVICE.array(clean, dtype, "dy", PLACES[layout] if values.ndim > 2 else "first")
        y, m = fastbn.batch_norm(x, eps=EPS)
        n = fastbn.moments(x)
        dx, dgamma, _ = fastbn.batch_norm_backward(dy, x, m, eps=EPS)
        whole = [np.moveaxis(each.get(), 1, 0) for each in (y, dx)]
        found.append([*whole, *(each.get() for each in (m.mean, m.m2, n.mean, n.m2, dgamma))])
    for before, after in zip(*found, strict=True):
        np.testing.assert_array_equal(after[others], before[others])
        assert np.isnan(after[1]).all()


@pytest.mark.parametrize(
    ("shape", "layout"), [((4, 24, 24, 24), "C"), ((4, 24, 24, 24), "channels_last"), ((150, 37), "C")], ids=str
)
def test_a_constant_channel_costs_no_more(shape: tuple[int, ...], layout: str) -> None:
    """It is not read again: in one launch one thread would read all of it."""
    noise = np.random.default_rng(8).standard_normal(shape)
    counts = []
    for constant in (None, 1.0, 0.0, -1e-3):
        values = noise.copy()
        if constant is not None:
            values[:, 1] = constant
        x = placed(values, layout)
        before = sum(machine.executed.total() for machine in DEVICE.machines.values())
        fastbn.batch_norm(x, eps=EPS)
        counts.append(sum(machine.executed.total() for machine in DEVICE.machines.values()) - before)
    assert max(counts) <= 1.001 * min(counts)


@pytest.mark.parametrize(("shape", "layout"), WAYS, ids=str)
def test_a_constant_channel_gives_exactly_beta(shape: tuple[int, ...], layout: str) -> None:
    p = Problem(shape, "constant 1e7/3")
    x = placed(p.x, layout)
    y, m = fastbn.batch_norm(x, parameter(p.gamma), parameter(p.beta), eps=EPS)
    np.testing.assert_array_equal(m.mean.get(), np.float32(1e7 / 3).astype(np.float64))
    np.testing.assert_array_equal(m.m2.get(), 0.0)
    np.testing.assert_array_equal(
        y.get(), np.broadcast_to(p.beta.reshape(-1, *(1,) * (p.x.ndim - 2)), p.x.shape).astype(np.float64)
    )


BULKS = {"zeros": (0.0, 0.0), "all alike": (1 / 3, 0.0), "normal": (10.0, 1.0), "offset 1e5": (1e5, 1.0)}  # mean, std


def judged(values: np.ndarray, layout: str, where: object) -> None:
    """Variance and y of values, in one layout."""
    stats = published.statistics(values, 1)
    y, m = fastbn.batch_norm(placed(values, layout), eps=EPS)
    check("var", np.float32, m.var().get(), stats.var, stats.var)
    hat = published.xhat(values, stats.mean, stats.var, 1, EPS)
    error = np.abs(y.get() - hat) / np.maximum(1.0, np.abs(hat))
    assert error.max() <= 1e-6, (where, layout, error.max())
    DEVICE.space.keep([])


@pytest.mark.parametrize("bulk", BULKS)
@pytest.mark.parametrize(
    ("shape", "size"), [((48, 17), 1e5), ((33, 33), 1e2), ((24, 5, 3, 3), 10.0), ((10, 3, 20, 20), 1e5)], ids=str
)
def test_an_outlier_in_every_row(shape: tuple[int, ...], size: float, bulk: str) -> None:
    """Wherever the values that a shift is made of are taken: one row far from the others."""
    rng = np.random.default_rng(0)
    mean, std = BULKS[bulk]
    usual = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    for row in range(shape[0]):
        values = usual.copy()
        values[row] = rng.uniform(size, 2 * size, shape[1:])
        for layout in PLACES if len(shape) > 2 else ["C"]:
            judged(values, layout, row)


LARGE = {"scale 1e13": (0.0, 1e13), "scale 1e17": (0.0, 1e17), "scale 1e30": (0.0, 1e30)}


@pytest.mark.parametrize("bulk", BULKS | LARGE)
@pytest.mark.parametrize("shape", [(48, 17), (1100, 3), (2100, 40), (8, 3, 20, 20), (2, 2, 65, 66)], ids=str)
def test_where_the_ends_are_not_like_the_others(shape: tuple[int, ...], bulk: str) -> None:
    """Two of the first, the middle and the last value of a channel are far away, or all: no shift or unit of these
    alone will do.
    """
    rng = np.random.default_rng(0)
    mean, std = (BULKS | LARGE)[bulk]
    usual = (mean + std * rng.standard_normal(shape)).astype(np.float32)
    flat = np.moveaxis(usual, 1, -1).reshape(-1, shape[1])
    count = len(flat)
    ends = (0, count // 2, count - 1)
    for far in (0.0, 1e-9, 1e5)[: 2 if bulk in LARGE else None]:
        for chosen in (*combinations(ends, 2), ends):
            values = flat.copy()
            values[list(chosen)] = far * (1 + 1e-3 * rng.standard_normal((len(chosen), shape[1])))
            x = np.moveaxis(values.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
            for layout in PLACES if len(shape) > 2 else ["C"]:
                judged(np.ascontiguousarray(x), layout, (far, chosen))
