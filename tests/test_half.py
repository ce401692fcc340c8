"""float16 and bfloat16: the bits are those of the float32 result rounded to nearest even, the statistics are float32's
own.
"""

import platform
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import published
import pytest
from processes import compiled, run
from shapes import COMPACT, HALF, Case, draw, every_half_and_backend, one_half
from tolerances import check, rounding, scales

import fastbn

EPS = 1e-5

SHAPES = (
    Case((3, 4, 21), 1, "rows with a tail"),
    Case((4, 6, 7, 7), 1, "short rows, S = 49"),
    Case((2, 3, 40, 41), 1, "rows longer than a block"),
    Case((9, 5), 1, "rank 2: fewer columns than a vector"),
    Case((130, 70), 1, "rank 2: a panel and a tail"),
    Case((1, 6, 33), 1, "N = 1"),
    Case((40, 1, 9), 1, "C = 1"),
)
Bits = dict[str, Any]


def _results(x: np.ndarray, dy: np.ndarray, gamma: Any, beta: Any, backend: str) -> Bits:
    """What every public function gives."""
    y, m = fastbn.batch_norm(x, gamma, beta, backend=backend)
    alone = fastbn.moments(x, backend=backend)
    mean, var = m.mean + 0.25, m.var() * 1.5  # constants that are not those of x
    found = {"mean": m.mean, "m2": m.m2, "mean alone": alone.mean, "m2 alone": alone.m2, "y": y}
    found["y at inference"] = fastbn.batch_norm_inference(x, mean, var, gamma, beta, backend=backend)
    found |= zip(("dx", "dgamma", "dbeta"), fastbn.batch_norm_backward(dy, x, m, gamma, backend=backend), strict=True)
    backward = fastbn.batch_norm_inference_backward(dy, x, mean, var, gamma, backend=backend)
    found |= {f"{name} at inference": value for name, value in zip(("dx", "dgamma", "dbeta"), backward, strict=True)}
    bn = fastbn.BatchNorm(x.shape[1], backend=backend)
    bn.gamma, bn.beta = gamma, beta
    found |= {"y of the layer": bn(x), "dx of the layer": bn.backward(dy)}
    return found | {"running mean": bn.running_mean, "running var": bn.running_var}


def _bit_for_bit(case: Case, dtype: str, layout: str, affine: bool, backend: str) -> None:
    x, dy, gamma, beta = draw(case, dtype)
    x, dy = COMPACT[layout](x, 1), COMPACT[layout](dy, 1)
    parameters = (gamma, beta) if affine else (None, None)
    half = _results(x, dy, *parameters, backend)
    wide = _results(x.astype(np.float32), dy.astype(np.float32), *parameters, backend)
    assert half.keys() == wide.keys()
    for name, want in wide.items():
        if name.partition(" ")[0] in ("y", "dx"):
            want = want.astype(dtype)
        assert half[name].dtype == want.dtype, name
        assert half[name].tobytes() == want.tobytes(), f"{case}: {name}"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", COMPACT)
@every_half_and_backend
def test_bit_for_bit_the_float32_result_converted(dtype: str, layout: str, affine: bool, backend: str) -> None:
    for case in SHAPES:
        _bit_for_bit(case, dtype, layout, affine, backend)


@one_half
def test_one_shape_bit_for_bit(dtype: str) -> None:
    """What the default run has of each half type's kernels."""
    _bit_for_bit(Case((9, 21), 1, "a vector and a tail"), dtype, "C", True, "cpu")


def _float32(bits: Any) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


@np.errstate(invalid="ignore")  # signaling NaN among the bit patterns
def _to_round(dtype: str) -> np.ndarray:
    """float32 values at, between and around all values of a half dtype: every one, every tie, the neighbours of
    both.
    """
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    every = np.sort(every[np.isfinite(every)].astype(np.float64))
    last = ml_dtypes.finfo(dtype)
    step = np.ldexp(1.0, int(last.maxexp) - int(last.nmant) - 1)
    beyond = float(last.max) + step * np.array([0.5, 1.0])  # the tie with infinity, then beyond it
    exact = np.concatenate([every, (every[1:] + every[:-1]) / 2, beyond, -beyond])
    values = exact[np.abs(exact) <= np.finfo(np.float32).max].astype(np.float32)
    around = [np.nextafter(values, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([values, *around, _float32([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00001, 0x7F800001])])


@np.errstate(invalid="ignore")
def _nearest_even(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded by the definition, from float64 arithmetic alone: to a multiple of the unit in the last place, ties to an
    even one.
    """
    info = ml_dtypes.finfo(dtype)
    wide = values.astype(np.float64)
    exponent = np.maximum(np.frexp(wide)[1] - 1, int(info.minexp))
    unit = np.ldexp(1.0, exponent - int(info.nmant))
    rounded = np.where(np.isfinite(wide), np.rint(wide / unit) * unit, wide)
    return np.where(np.abs(rounded) > float(info.max), np.copysign(np.inf, rounded), rounded)


def test_the_values_to_round_hold_ties_subnormals_and_overflow() -> None:
    for dtype, least in (("float16", 60_000), ("bfloat16", 60_000)):
        values, info = _to_round(dtype), ml_dtypes.finfo(dtype)
        want = _nearest_even(values, dtype)
        with np.errstate(invalid="ignore"):
            error = np.abs(values.astype(np.float64) - want)
        unit = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - 1, int(info.minexp)) - int(info.nmant))
        assert np.count_nonzero(error == unit / 2) > least
        assert np.count_nonzero((want != 0) & (np.abs(want) < float(info.tiny))) > 200
        assert np.count_nonzero(np.isinf(want) & np.isfinite(values)) >= 2
        assert np.isnan(want).any()


def _same_values(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_array_equal(got.astype(np.float64), want)


@pytest.mark.parametrize("channels_last", [True, False])
@every_half_and_backend
def test_every_tie_subnormal_and_overflow_is_rounded_to_nearest_even(
    dtype: str, channels_last: bool, backend: str
) -> None:
    """With x = 0 and constants 0 and 1, y is beta; with dy = 1, dx is gamma: any float32 can be sent through the
    rounding, in silence.
    """
    values = _to_round(dtype)
    want = np.repeat(_nearest_even(values, dtype)[:, None], 3, 1)
    shape = (3, values.size) if channels_last else (values.size, 3)
    axis = 1 if channels_last else 0
    zero, mean, var = np.zeros(shape, dtype), np.zeros(values.size), np.ones(values.size)
    y = fastbn.batch_norm_inference(zero, mean, var, None, values, axis, 0.0, backend=backend)
    _same_values(np.moveaxis(y, axis, 0), want)
    dx = fastbn.batch_norm_inference_backward(np.ones_like(zero), zero, mean, var, values, axis, 0.0, backend=backend)[
        0
    ]
    _same_values(np.moveaxis(dx, axis, 0), want)


@every_half_and_backend
def test_training_overflows_and_poisons_in_silence(dtype: str, backend: str) -> None:
    """Warnings are errors here: Inf and NaN in y, dx and the gradients come without one."""
    x = np.array([[1, 2], [3, 4], [5, 7]], dtype)
    big = np.array([3e38, -3e38], np.float32)
    y, m = fastbn.batch_norm(x, big, None, backend=backend)
    sign = np.sign(x.astype(np.float64) - m.mean) * np.sign(big)
    _same_values(y, _nearest_even(fastbn.batch_norm(x.astype(np.float32), big, backend=backend)[0], dtype))
    assert (np.sign(y.astype(np.float64)) == sign).all()
    assert np.isinf(y.astype(np.float64)).any()
    dy = np.full(x.shape, float(ml_dtypes.finfo(dtype).max), dtype)
    dx, dgamma, dbeta = fastbn.batch_norm_inference_backward(dy, x, m.mean, m.var(), big, backend=backend)
    assert np.isinf(dx.astype(np.float64)).all()
    assert np.isfinite(dgamma).all() or dtype == "bfloat16"
    # a sum of three of the largest: beyond float32 only there
    np.testing.assert_array_equal(np.isinf(dbeta), dtype == "bfloat16")
    x[1, 0] = np.nan
    assert np.isnan(fastbn.batch_norm(x, big, backend=backend)[0].astype(np.float64))[:, 0].all()


# where the dtype still has steps below 1
OFFSETS = {"float16": (0.0, 3.0, 100.0, 1000.0), "bfloat16": (0.0, 3.0, 30.0, 100.0)}


@pytest.mark.parametrize("layout", COMPACT)
@every_half_and_backend
def test_within_the_limits_of_the_same_half_data(dtype: str, layout: str, backend: str) -> None:
    for offset in OFFSETS[dtype]:
        for case in SHAPES:
            x, dy, gamma, beta = draw(case, dtype, offset=offset)
            x, dy = COMPACT[layout](x, 1), COMPACT[layout](dy, 1)
            stats = published.statistics(x, 1)
            given = stats.mean, stats.var
            y, m = fastbn.batch_norm(x, gamma, beta, eps=EPS, backend=backend)
            found = {"mean": m.mean, "var": m.var(), "y": y}
            wanted = {"mean": stats.mean, "var": stats.var, "y": published.normalized(x, *given, gamma, beta, 1, EPS)}
            found |= zip(
                ("dx", "dgamma", "dbeta"),
                fastbn.batch_norm_backward(dy, x, m, gamma, eps=EPS, backend=backend),
                strict=True,
            )
            wanted |= published.gradients(dy, x, *given, gamma, 1, EPS, True)._asdict()
            natural = scales(dy, x, *given, gamma, beta, 1, EPS, True)
            for quantity, got in found.items():
                check(quantity, dtype, got, wanted[quantity], getattr(natural, quantity))


@pytest.mark.parametrize("dtype", HALF)
def test_the_rounding_allowed_is_half_a_unit(dtype: str) -> None:
    """The limit has teeth: the nearest value passes, either neighbour fails."""
    want = np.random.default_rng(0).standard_normal(2000) * np.logspace(-8, 3, 2000)
    nearest = want.astype(np.float32).astype(dtype)
    check("y", dtype, nearest, want)
    for side in (-np.inf, np.inf):
        neighbour = np.nextafter(nearest, np.array(side, dtype))
        assert (np.abs(neighbour.astype(np.float64) - want) > rounding("y", neighbour))[
            np.abs(want) > 1e-3
        ].mean() > 0.99


@every_half_and_backend
def test_a_constant_channel_gives_exactly_beta_rounded(dtype: str, backend: str) -> None:
    values = np.array([7.0 / 3, -1000.0, 2.0**-14, 60000.0]).astype(dtype)
    beta = np.linspace(-1, 1, 4).astype(np.float32) / 3
    for shape in ((5, 4), (3, 4, 50)):
        x = np.empty(shape, dtype)
        x[...] = values.reshape(-1, *(1,) * (len(shape) - 2))
        y, m = fastbn.batch_norm(x, None, beta, eps=EPS, backend=backend)
        np.testing.assert_array_equal(m.mean, values.astype(np.float64))
        np.testing.assert_array_equal(m.m2, 0.0)
        np.testing.assert_array_equal(
            np.moveaxis(y, 1, -1).reshape(-1, 4), np.broadcast_to(beta.astype(dtype), (x.size // 4, 4))
        )


@every_half_and_backend
def test_running_moments_of_half_chunks_are_those_of_the_whole(dtype: str, backend: str) -> None:
    x = draw(Case((40, 3, 11), 1, "chunks"), dtype, offset=30.0)[0]
    r = fastbn.RunningMoments(3, backend=backend)
    for chunk in (x[:7], x[7:7], x[7:8], x[8:].astype(np.float64)):  # of mixed dtypes
        r.update(chunk)
    whole = published.statistics(x, 1)
    assert r.count == whole.count
    check("mean", dtype, r.mean, whole.mean, np.maximum(np.abs(whole.mean), np.sqrt(whole.var)))
    check("var", dtype, r.var(), whole.var, whole.var)


ALL_BITS = """
    import numpy as np, fastbn
    x = np.arange(65536, dtype=np.uint16).view(np.float16)
    wrong = 0
    for shape in ((64, 1024), (1, 4, 16384)):  # on columns, on rows
        z, one = x.reshape(shape), np.ones(shape[1])
        for gamma in (1.0, 0.5, 3.0, 1e-3, 1e4, -2.0, 1 / 3, 6e-8):
            y = fastbn.batch_norm_inference(z, 0 * one, one, np.full(shape[1], gamma, "f4"), eps=0.0)
            with np.errstate(all="ignore"):
                want = (z.astype("f4") * np.float32(gamma) + np.float32(0)).astype("f2")
            number = ~np.isnan(want)
            wrong += int((y.view("u2")[number] != want.view("u2")[number]).sum() + (~np.isnan(y[~number])).sum())
    print(wrong)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 6, 10, 7, 7)).astype("f2")
    y, m = fastbn.batch_norm(x)
    found = [y, m.mean, m.m2, *fastbn.batch_norm_backward(dy, x, m)]
    y, m = fastbn.batch_norm(x.astype("f4"))
    wanted = [y.astype("f2"), m.mean, m.m2, *fastbn.batch_norm_backward(dy.astype("f4"), x.astype("f4"), m)]
    wanted[3] = wanted[3].astype("f2")
    print([bool((a == b).all()) for a, b in zip(found, wanted)])
    """


@compiled
@pytest.mark.process
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the names are of x86 processors")
@pytest.mark.parametrize("cpu", ["generic", "nehalem"])
def test_every_half_on_processors_without_a_conversion(cpu: str, tmp_path: Path) -> None:
    """65,536 patterns, 8 factors: the bits of NumPy's conversion. LLVM's own would abort the process."""
    environment = {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_NUM_THREADS": "1",
        "NUMBA_CACHE_DIR": str(tmp_path / "kernels"),
    }
    out, _ = run(tmp_path / "script.py", ALL_BITS, environment)
    assert out == f"0\n{[True] * 6}\n"


@compiled
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the names are of x86 processors")
def test_which_processors_convert() -> None:
    from numba.core.registry import cpu_target

    from fastbn.cpu.kernels import half

    assert cpu_target.target_context.codegen().magic_tuple()  # LLVM's targets are registered with numba's
    names = {
        "generic": False,
        "nehalem": False,
        "sandybridge": False,
        "ivybridge": True,
        "haswell": True,
        "znver4": True,
    }
    triple = "x86_64-unknown-linux-gnu"
    assert {name: half.converts(triple, name, "") for name in names} == names
    assert half.converts(triple, "generic", "+f16c")
    assert not half.converts(triple, "haswell", "-f16c")
