"""What kernels are by themselves: their names, their arguments, and what their compiler finds when it is first
asked.
"""

import importlib

import numpy as np
import pytest

from fastbn.cuda.kernels import apply, gpu, jit, rows


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
