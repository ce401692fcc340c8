"""fold and folded_affine: a batch norm in evaluation as part of the layer before it, for NumPy arrays; tensors:
test_fold_torch.py.
"""

import re
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from launch import python

import fastbn
from fastbn.fold import fold

C = 6


def normal(*shape: int, seed: int = 0) -> Any:
    """The same values in every order of the tests."""
    return np.random.default_rng(seed).standard_normal(shape)


def seen_layer(offset: float = 0.5, dtype: Any = np.float32, **options: Any) -> fastbn.BatchNorm:
    """A layer that has seen values about `offset`, with parameters of its own."""
    layer = fastbn.BatchNorm(C, dtype=dtype, eps=1e-3, **options)
    layer.running_mean[:] = offset + normal(C, seed=1)
    layer.running_var[:] = np.linspace(0.2, 4.0, C)
    if layer.gamma is not None:
        layer.gamma[:], layer.beta[:] = np.linspace(-2.0, 2.0, C), np.linspace(1.0, 3.0, C)
    return layer.eval()


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_folded_affine_is_what_evaluation_does(dtype: str, affine: bool, offset: float) -> None:
    layer = seen_layer(offset, dtype, affine=affine)
    scale, shift = layer.folded_affine()
    assert scale.dtype == shift.dtype == np.float64
    x = (offset + normal(9, C, 5)).astype(dtype)
    y = scale[:, None] * x.astype(np.float64) + shift[:, None]
    np.testing.assert_allclose(layer(x), y, rtol=1e-6, atol=1e-5 if dtype == "float32" else 1e-8)


def test_folded_affine_needs_running_statistics() -> None:
    with pytest.raises(
        ValueError, match=r"^folded_affine: this layer keeps no running statistics, and so has no fixed map$"
    ):
        fastbn.BatchNorm(C, track_running_stats=False).folded_affine()


@pytest.mark.parametrize("parameters", ["both", "none", "gamma", "beta"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix(transposed: bool, bias: bool, parameters: str) -> None:
    layer = seen_layer(dtype=np.float64)
    layer.gamma = layer.gamma if parameters in ("both", "gamma") else None
    layer.beta = layer.beta if parameters in ("both", "beta") else None
    weight, b, x = normal(C, 4), normal(C), normal(7, 4)
    given = weight.T if transposed else weight
    before = given.copy(), b.copy()
    w, shift = fold(layer, given, b if bias else None, transposed=transposed)
    assert w.shape == given.shape
    want = layer(x @ weight.T + (b if bias else 0.0))
    np.testing.assert_allclose(x @ (w if transposed else w.T) + shift, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(given, before[0])
    np.testing.assert_array_equal(b, before[1])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_the_result_is_of_the_weights_dtype_and_rounded_once(dtype: Any) -> None:
    layer = seen_layer(1e2)
    weight, bias = normal(C, 2, 3).astype(dtype), normal(C).astype(np.float32)
    w, shift = fold(layer, np.asfortranarray(weight), bias)
    assert w.dtype == shift.dtype == weight.dtype
    assert w.flags.f_contiguous
    mean, var, gamma, beta = (
        a.astype(np.float64) for a in (layer.running_mean, layer.running_var, layer.gamma, layer.beta)
    )
    scale = gamma / np.sqrt(var + layer.eps)
    step = float(ml_dtypes.finfo(dtype).eps) / 2
    for got, want in ((w, weight.astype(np.float64) * scale[:, None, None]), (shift, (bias - mean) * scale + beta)):
        # of terms to 500, in float64
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=step * 1.01, atol=1e-13)


def test_what_overflows_a_half_is_infinite_without_a_warning() -> None:
    layer = fastbn.BatchNorm(1)
    layer.running_var[:] = 1e-12
    w, _ = fold(layer, np.full((1, 1), 60000, np.float16))
    assert np.isinf(w).all()


FLOATS = "float16, bfloat16, float32 or float64: convert it first, e.g. {0}.astype('float32')"
REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((np.ones((5, 2)),), {}, ValueError, "weight: given shape (5, 2), want (6, in / groups, *kernel) for the 6 "
                                         "channels of bn"),
    ((np.ones(6),), {}, ValueError, "weight: given shape (6,), want (6, in / groups, *kernel) for the 6 channels of "
                                    "bn"),
    ((np.ones((6, 5)),), {"transposed": True}, ValueError,
     "weight: given shape (6, 5), want (in, 6, *kernel) for the 6 channels of bn, as it is transposed"),
    ((np.ones((4, 6, 3)),), {"transposed": True, "groups": 2}, ValueError,
     "weight: given shape (4, 6, 3), want (in, 3, *kernel) for the 6 channels of bn in 2 groups, as it is transposed"),
    ((np.ones((5, 3, 3)),), {"transposed": True, "groups": 2}, ValueError,
     "weight: given shape (5, 3, 3), with 5 inputs along axis 0, want a multiple of 2, the groups"),
    ((np.ones((6, 2)),), {"groups": 4}, ValueError, "groups: given 4, want a number that divides the 6 channels of bn"),
    ((np.ones((6, 2)),), {"groups": 0}, ValueError, "groups: given 0, want a number that divides the 6 channels of bn"),
    ((np.ones((6, 2)),), {"groups": 1.5}, TypeError, "groups: given 1.5, want a positive integer"),
    ((np.ones((6, 2)), np.ones((6, 1))), {}, ValueError, "bias: given shape (6, 1), want (6,), one value per channel "
                                                         "of bn"),
    ((np.ones((6, 2), int),), {}, TypeError, f"weight: given dtype int64, want {FLOATS.format('weight')}"),
    ((np.ones((6, 2)), np.ones(6, int)), {}, TypeError, f"bias: given dtype int64, want {FLOATS.format('bias')}"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "error", "message"), REFUSED)
def test_refused(arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        fold(seen_layer(), *arguments, **options)


def test_only_batch_norms_with_running_statistics_are_folded() -> None:
    message = "bn: given SimpleNamespace, want a fastbn.BatchNorm or a torch.nn.BatchNorm1d, BatchNorm2d or BatchNorm3d"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fold(SimpleNamespace(eps=1e-5), np.ones((6, 2)))
    message = "bn: given one without running statistics (track_running_stats=False), which has no fixed map to fold"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fold(fastbn.BatchNorm(6, track_running_stats=False), np.ones((6, 2)))


def test_numpy_needs_no_torch() -> None:
    code = (
        "import sys, numpy, fastbn; from fastbn.fold import fold; w, b = fold(fastbn.BatchNorm(2, eps=0), "
        "numpy.eye(2))\n"
        "assert (w == numpy.eye(2)).all() and not b.any(); print('torch' in sys.modules)"
    )
    assert python("-c", code) == "False\n"
