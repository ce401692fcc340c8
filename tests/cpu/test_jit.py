"""The tables of the kernels' arguments: complete, in order, and of types that there are."""

import inspect

import numpy as np
import pytest
from numba import float32

from fastbn.cpu import backend as cpu  # noqa: F401  # registers the kernels
from fastbn.cpu.kernels import jit

LINES = {"x": "x2 (N, C)", "y": "y2 like x"}


def copy(x, y):  # type: ignore[no-untyped-def]  # typed by numba
    """y = x."""
    y[...] = x


def test_a_table_says_what_each_argument_is_in_the_order_of_the_body() -> None:
    made = jit.Kernel(copy, dict(reversed(LINES.items())) | jit.SHARED)
    assert list(made.arguments) == ["x", "y"]
    assert str(made).splitlines() == [
        "test_jit.copy: y = x.",
        "    x                 x2 (N, C)",
        "    y                 y2 like x",
    ]


def test_an_argument_without_a_line_and_a_line_without_an_argument_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^test_jit\.copy: no line says what y is$"):
        jit.Kernel(copy, {"x": "x2"})
    before = list(jit.KERNELS)
    with pytest.raises(TypeError, match=r"^test_jit\.copy: no argument stream, work$"):
        jit.kernel(LINES, work="w1", stream="b")(copy)
    assert before == jit.KERNELS


@pytest.mark.parametrize("kernel", jit.KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_has_one_of_known_types(kernel: jit.Kernel) -> None:
    assert tuple(kernel.arguments) == tuple(inspect.signature(kernel._body).parameters)
    assert all(jit._argument(line.split()[0], float32) for line in kernel.arguments.values())
    assert np.all([line.split()[0].isalnum() for line in kernel.arguments.values()])
