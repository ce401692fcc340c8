"""What kernels are by themselves: their names, their arguments, and what their compiler finds when it is first
asked.
"""

import importlib

import numpy as np
import pytest

from fastbn.cuda.kernels import apply, gpu, jit, rows
from fastbn.cuda.kernels.arguments import ARGUMENTS, described


def test_no_two_kernels_have_one_name_in_errors() -> None:
    names = [kernel.name for kernel in jit.KERNELS]
    assert len(set(names)) == len(names)
    assert {apply.normalize_long.name, apply.gradient.name} <= set(names)


def test_numpy_lacks_no_name_that_numba_cuda_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np, "row_stack", raising=False)  # as in NumPy 2.5
    importlib.reload(gpu)
    np.testing.assert_array_equal(np.row_stack(([1, 2], [3, 4])), [[1, 2], [3, 4]])  # noqa: NPY201


def test_sizes_and_positions_of_a_row_take_64_bits() -> None:
    for kernel in (rows.moments_rows, rows.sums_rows):
        names = kernel.body.__code__.co_varnames[: len(kernel.arguments)]
        given = dict(zip(names, kernel.arguments, strict=True))
        assert {given[name] for name in ("N", "S", "sn", "sc", "slots", "rest", "chunk", "chunk_rest")} == {"i8"}, (
            kernel.name
        )


def test_every_argument_of_a_kernel_is_described() -> None:
    """A parameter without a line, or with a type alone, and a line without a parameter are refused at import."""

    def body(x: object, S: object, mine: object) -> None: ...

    assert described(body, {"S": "i4", "mine": "f its own"}) == {
        "x": ARGUMENTS["x"],
        "S": "i4 values of a channel in an image",
        "mine": "f its own",
    }
    for lines in ({}, {"mine": "f"}):
        with pytest.raises(TypeError, match=r"^kernel body: no line says what mine is$"):
            described(body, lines)
    with pytest.raises(TypeError, match=r"^kernel body: lines for other, y, which are no parameters$"):
        described(body, {"mine": "f its own", "other": "f of another", "y": "x"})
    with pytest.raises(TypeError, match="mine"):
        jit.kernel()(body)
    named = {name for kernel in jit.KERNELS for name in kernel.body.__code__.co_varnames[: len(kernel.arguments)]}
    assert set(ARGUMENTS) <= named  # none that no kernel has
