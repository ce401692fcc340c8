"""fold for PyTorch tensors: convolutions with PyTorch's and fastbn's batch norms after them."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn.fold import fold
from tests.test_fold import C, normal, seen_layer

torch = pytest.importorskip("torch", reason="folds PyTorch's layers: pip install 'fastbn[torch]'")

pytestmark = pytest.mark.peers


def _theirs(layer: fastbn.BatchNorm, module: Any) -> Any:
    bn = module(C, eps=layer.eps, dtype=torch.float64).eval()
    bn.load_state_dict({key: torch.from_numpy(value) for key, value in layer.state_dict().items()})
    return bn


@pytest.mark.parametrize(
    ("groups", "bias", "theirs"), [(1, True, True), (1, False, False), (2, True, False), (2, False, True)]
)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank: int, transposed: bool, groups: int, bias: bool, theirs: bool) -> None:
    nn = torch.nn
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    conv = kind(4, C, 3, groups=groups, bias=bias, padding=1, stride=2, dtype=torch.float64)
    layer = seen_layer(dtype=np.float64)
    bn = _theirs(layer, getattr(nn, f"BatchNorm{rank}d"))
    weight, shift = fold(bn if theirs else layer, conv.weight, conv.bias, transposed=transposed, groups=groups)
    assert type(weight) is type(shift) is torch.Tensor
    assert not weight.requires_grad
    assert not shift.requires_grad
    x = torch.from_numpy(normal(3, 4, *(7, 6, 5)[:rank]))
    functional = getattr(nn.functional, f"conv_transpose{rank}d" if transposed else f"conv{rank}d")
    got = functional(x, weight, shift, stride=2, padding=1, groups=groups)
    torch.testing.assert_close(got, bn(conv(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype_memory_format_and_rounding_are_those_of_numpy(dtype: str) -> None:
    layer = seen_layer(1e2)
    weight = normal(C, 2, 3, 3).astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    tensor = torch.from_numpy(weight.astype(np.float64)).to(getattr(torch, dtype), memory_format=torch.channels_last)
    w, b = fold(layer, tensor)
    assert w.dtype == b.dtype == tensor.dtype
    assert w.is_contiguous(memory_format=torch.channels_last)
    want, shift = fold(layer, weight)
    np.testing.assert_array_equal(w.double().numpy(), want.astype(np.float64))
    np.testing.assert_array_equal(b.double().numpy(), shift.astype(np.float64))


def test_kinds_may_mix() -> None:
    layer = seen_layer()
    bn = _theirs(layer, torch.nn.BatchNorm1d)
    weight, bias = normal(C, 3), normal(C)
    want = fold(layer, weight, bias)
    got = fold(bn, weight, torch.from_numpy(bias))
    assert type(got[0]) is type(got[1]) is np.ndarray
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["int64", "complex64"])
def test_other_tensors_are_refused(dtype: str) -> None:
    weight = torch.ones((6, 2), dtype=getattr(torch, dtype))
    message = f"weight: given dtype torch.{dtype}, want torch.float16, bfloat16, float32 or float64: convert it first"
    with pytest.raises(TypeError, match=f"^{message}$"):
        fold(seen_layer(), weight)


def test_instance_norms_are_not_batch_norms() -> None:
    with pytest.raises(TypeError, match=r"^bn: given InstanceNorm2d, want a fastbn\.BatchNorm or"):
        fold(torch.nn.InstanceNorm2d(6, track_running_stats=True), np.ones((6, 2)))
