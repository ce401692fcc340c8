"""The backward in two halves on the simulated GPU, as `tests/test_functional_split.py` holds it for the
host's backends.
"""

from typing import Any

import numpy as np
import published
import pytest
from shapes import Case, draw

import fastbn
from tests import test_functional_split as split
from tests.cuda.simulated import gpu

split.fastbn = gpu  # the calls below are the same, on arrays of the GPU

CASES = (
    Case((9, 5), 1, "channels last"),
    Case((3, 2, 6, 8), 1, "rows in whole groups, several parts of a channel"),
    Case((2, 3, 5, 5), 1, "rows of odd size"),
    Case((2, 3, 4, 5), -1, "channels innermost"),
)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_parts_give_the_gradients_of_the_whole(dtype: str) -> None:
    for case in CASES:
        x, dy, gamma, _ = draw(case, dtype)
        s = published.statistics(x, case.axis)
        split.verify(x, dy, gamma, case, s, split.in_parts(x, dy, s, gamma, case, "cuda"))


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_sums_and_statistics_in_either_dtype_and_out_over_dy(kind: str) -> None:
    x, dy, gamma, _ = draw(CASES[2], "float32")
    s = published.statistics(x, 1)
    mean, var = s.mean.astype(kind), s.var.astype(kind)
    sums = [values.astype(kind) for values in gpu.batch_norm_backward_reduce(dy, x, mean, var, backend="cuda")]
    want = gpu.batch_norm_backward_input(dy, x, mean, var, *sums, s.count, gamma, backend="cuda")
    split.check(
        "dx", "float32", want, published.gradients(dy, x, s.mean, s.var, gamma, 1, 1e-5, training=True).dx, 10.0
    )
    over = dy.copy()
    assert gpu.batch_norm_backward_input(over, x, mean, var, *sums, s.count, gamma, out=over, backend="cuda") is over
    np.testing.assert_array_equal(over, want)


def _said(call: Any, *given: Any, **options: Any) -> tuple[type[Exception], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(*given, **options)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"mean": None}, {"var": None}, {"axis": 2}], ids=str)
def test_errors_are_those_of_the_host(wrong: dict[str, Any]) -> None:
    x, dy, _, _ = draw(CASES[0], "float32")
    given = {"mean": np.zeros(5), "var": np.ones(5), "axis": 1, "eps": 1e-5} | wrong
    for name, more in (
        ("batch_norm_backward_reduce", ()),
        ("batch_norm_backward_input", (np.zeros(5), np.zeros(5), 9)),
    ):
        statistics = (given["mean"], given["var"], *more)
        where = {"axis": given["axis"], "eps": given["eps"]}
        host = _said(getattr(fastbn, name), dy, x, *statistics, **where)
        assert _said(getattr(gpu, name), dy, x, *statistics, **where, backend="cuda") == host


def test_errors() -> None:
    x, dy, _, _ = draw(CASES[0], "float32")
    zeros, ones = np.zeros(5), np.ones(5)
    with pytest.raises(ValueError, match="count: given 8, want at least 9"):
        gpu.batch_norm_backward_input(dy, x, zeros, ones, zeros, zeros, 8, backend="cuda")
    with pytest.raises(ValueError, match=r"sum_dy_xhat: given shape \(4,\)"):
        gpu.batch_norm_backward_input(dy, x, zeros, ones, zeros, zeros[1:], 9, backend="cuda")
    with pytest.raises(ValueError, match="dy: given shape"):
        gpu.batch_norm_backward_reduce(dy[1:], x, zeros, ones, backend="cuda")
    with pytest.raises(TypeError, match="dy: given dtype float64"):
        gpu.batch_norm_backward_reduce(dy.astype(np.float64), x, zeros, ones, backend="cuda")
