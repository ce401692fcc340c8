"""float16 and bfloat16 beside PyTorch with float32 parameters: y and dx one unit in the last place apart at most.

Except its gradients of channels-last memory: PyTorch takes their sums in the half precision of dy.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from shapes import COMPACT, HALF, Case, draw, every_half_and_backend
from tolerances import TOLERANCE, check, rounding, scales

import fastbn

torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install 'fastbn[peers]'")

pytestmark = pytest.mark.peers

CASES = (
    Case((33, 5), 1, "rank 2"),
    Case((4, 5, 9), 1, "rank 3"),
    Case((4, 5, 7, 6), 1, "rank 4, short rows"),
    Case((2, 3, 40, 41), 1, "rank 4, long rows"),
)
EPS = 1e-5
SLACK = 8.0  # PyTorch's statistics are float32


def _tensor(array: np.ndarray) -> Any:
    """The same memory as a tensor; PyTorch does not know ml_dtypes."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _array(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def _near(quantity: str, ours: np.ndarray, theirs: np.ndarray, scale: np.ndarray) -> None:
    """Both have rounded a float32 value: half a unit each, and what the values before may differ by."""
    assert ours.dtype == theirs.dtype
    error = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    limit = (
        TOLERANCE[quantity, "float32"].relative * SLACK * scale + rounding(quantity, ours) + rounding(quantity, theirs)
    )
    assert (error <= limit).all(), f"{quantity}: {np.max(error / limit):.3g} times what is allowed"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_one_shape_beside_torch(dtype: str, training: bool) -> None:
    _beside_torch(CASES[:1], dtype, "C", 3.0, training, "cpu")


@pytest.mark.full
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
@pytest.mark.parametrize("layout", ["C", "channels_last"])
@every_half_and_backend
def test_beside_torch(dtype: str, layout: str, offset: float, training: bool, backend: str) -> None:
    _beside_torch(CASES, dtype, layout, offset, training, backend)


def _beside_torch(cases: Any, dtype: str, layout: str, offset: float, training: bool, backend: str) -> None:
    for case in cases:
        x, dy, gamma, beta = draw(case, dtype, offset=offset)
        x, dy = COMPACT[layout](x, 1), COMPACT[layout](dy, 1)
        bn = fastbn.BatchNorm(case.shape[1], EPS, backend=backend)
        bn = bn if training else bn.eval(backward=True)
        bn.gamma, bn.beta = gamma, beta
        bn.running_mean, bn.running_var = gamma * np.float32(offset), beta**2 + 1

        x_t, weight, bias, mean, var = (_tensor(a.copy("K")) for a in (x, gamma, beta, bn.running_mean, bn.running_var))
        for leaf in (x_t, weight, bias):
            leaf.requires_grad_()
        m = fastbn.moments(x, backend=backend)
        statistics = (m.mean, m.var()) if training else (bn.running_mean.astype(float), bn.running_var.astype(float))
        y_t = torch.nn.functional.batch_norm(x_t, mean, var, weight, bias, training, 0.1, EPS)
        y_t.backward(_tensor(dy))
        y = bn(x)
        dx = bn.backward(dy)

        natural = scales(dy, x, *statistics, gamma, beta, 1, EPS, training)
        condition = 1.0 + offset / np.sqrt(statistics[1] + EPS).min()  # of float32 statistics, for PyTorch
        _near("y", y, _array(y_t), condition * natural.y)
        sums = (
            float(ml_dtypes.finfo(dtype).eps) / (TOLERANCE["dx", "float32"].relative * SLACK)
            if layout == "channels_last"
            else 0.0
        )
        _near("dx", dx, _array(x_t.grad), (condition + sums) * natural.dx)
        for name, found, leaf in (("dgamma", bn.dgamma, weight), ("dbeta", bn.dbeta, bias)):
            assert found is not None
            check(name, dtype, found, _array(leaf.grad), getattr(natural, name), SLACK * (condition + sums))
        check("mean", dtype, bn.running_mean, _array(mean), 1.0 + np.abs(_array(mean)), SLACK)
        check("var", dtype, bn.running_var, _array(var), 1.0 + _array(var), SLACK * condition)
