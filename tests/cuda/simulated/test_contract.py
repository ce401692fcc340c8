"""The contract of every public function on the simulated GPU, as `tests/test_contract.py` holds it for the host's
backends.
"""

from typing import Any

import numpy as np
import pytest
from shapes import DTYPES, LAYOUTS, Case, memory_order

from tests import test_contract as contract
from tests.test_contract import WHOLE, inputs, verify, written

CALLS = contract.CALLS
WRITING = contract.WRITING
DTYPES = [dtype for dtype in DTYPES if dtype != "bfloat16"]  # which numba's arrays do not know
# a GPU's arrays are aligned and native
ON_GPU = [name for name in LAYOUTS if name not in ("unaligned", "packed", "big_endian")]
OUT = ["C", "Fortran", "channels_last", "crop", "strided", "reversed"]

CASES = (
    Case((9, 5), 1, "channels last, a group and a half"),
    Case((41, 3), 1, "few channels: rows folded, one left over"),
    Case((21, 16), 1, "channels last in whole groups, read four rows at a time"),
    Case((5, 3, 3, 3), 1, "short rows of odd size as columns"),
    Case((5, 2, 4, 4), 1, "short rows in whole groups"),
    Case((2, 3, 5, 5), 1, "rows whose first boundary is elsewhere each time"),
    Case((3, 2, 6, 8), 1, "rows in whole groups, several parts of a channel"),
    Case((3, 2, 4, 5), 0, "channels outermost"),
    Case((2, 2, 3, 2, 2, 3), -4, "rank 6 and a negative axis"),
    Case((3, 7), 1, "channels last, in one launch"),
    Case((2, 8), 1, "channels last in whole groups, in one launch"),
    Case((2, 3, 5), 1, "rows of odd size, in one launch"),
    Case((2, 2, 8), 1, "rows in whole groups, in one launch"),
    Case((2, 1), 1, "the smallest training batch"),
)
FEW = (CASES[0], CASES[5], Case((2, 3, 4, 5), -1, "channels innermost in C order"))
every_call = pytest.mark.parametrize("call", CALLS)
every_writing_call = pytest.mark.parametrize("call", WRITING)


@every_call
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_function_on_every_shape(call: str, dtype: str) -> None:
    for case in CASES:
        i = inputs(case, dtype)
        before = [array.tobytes() for array in i[:6]]
        verify(CALLS[call](i, "cuda"), i)
        assert [array.tobytes() for array in i[:6]] == before, f"{case}: an input changed"


@every_call
def test_every_arrangement(call: str) -> None:
    for case in FEW:
        for arrangement in ON_GPU:
            i = inputs(case, "float32", arrangement)
            found = CALLS[call](i, "cuda")
            verify(found, i)
            for name in set(WHOLE).intersection(found):
                assert 0 in i.x.strides or memory_order(found[name]) == memory_order(i.x), (
                    f"{case}: {name} in another memory order than x"
                )


@pytest.mark.parametrize("call", ["batch_norm_backward", "batch_norm_inference_backward"])
def test_dy_in_another_arrangement_than_x(call: str) -> None:
    case = Case((3, 2, 4, 5), 1, "four different lengths: no two orders of the axes look alike")
    for arrangement, dy_arrangement in (
        ("C", "channels_last"),
        ("channels_last", "Fortran"),
        ("C", "crop"),
        ("crop", "C"),
    ):
        i = inputs(case, "float32", arrangement, dy_arrangement)
        found = CALLS[call](i, "cuda")
        verify(found, i)
        assert memory_order(written(found)) == memory_order(i.x)


@every_writing_call
def test_out_takes_the_result_and_nothing_beside_it_changes(call: str) -> None:
    for case in FEW:
        for arrangement in ("C", "crop"):
            i = inputs(case, "float32", arrangement)
            want = written(WRITING[call](i, "cuda"))
            for out_arrangement in OUT:
                out, root = contract.writable(np.full(case.shape, -7.0, "float32"), out_arrangement, case.axis)
                before, outside = out.copy(), root.tobytes()
                assert written(WRITING[call](i, "cuda", out)) is out
                np.testing.assert_array_equal(out, want, err_msg=f"{case}: x {arrangement}, out {out_arrangement}")
                out[...] = before
                assert root.tobytes() == outside, f"{case}: wrote beside out, {out_arrangement}"


@every_writing_call
def test_out_may_be_an_input_itself(call: str) -> None:
    for over in ("x", "dy") if "backward" in call else ("x",):
        for case in FEW:
            for arrangement in ("C", "channels_last", "strided"):
                i = inputs(case, "float32", arrangement)
                want = written(WRITING[call](i, "cuda"))
                array, _ = contract.writable(getattr(i, over), arrangement, case.axis)
                assert written(WRITING[call](i._replace(**{over: array}), "cuda", array)) is array
                np.testing.assert_array_equal(array, want, err_msg=f"{case}: {over} {arrangement}")


@every_call
def test_empty_batches(call: str) -> None:
    for case in (Case((0, 3, 4, 4), 1, "N = 0"), Case((2, 3, 0), 1, "S = 0")):
        for name, array in CALLS[call](inputs(case, "float32"), "cuda").items():
            quantity = name.partition(".")[0]
            assert array.shape == (case.shape if quantity in ("y", "dx") else (3,))
            np.testing.assert_array_equal(array, np.full_like(array, np.nan if quantity == "var" else 0.0))


@every_writing_call
def test_gamma_and_beta_each_optional(call: str) -> None:
    for absent in ({"gamma": None}, {"beta": None}, {"gamma": None, "beta": None}):
        i = inputs(CASES[0], "float32")._replace(**absent)
        verify(WRITING[call](i, "cuda"), i)


@pytest.mark.parametrize("call", ["batch_norm_inference", "batch_norm_inference_backward"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_in_either_dtype(call: str, dtype: str) -> None:
    i = inputs(CASES[0], dtype)
    want = CALLS[call](i, "cuda")
    for kinds in (("float64", "float64"), ("float32", "float32"), ("float32", "float64"), ("float64", "float32")):
        given = i._replace(
            mean=i.mean.astype(kinds[0]).astype(np.float32).astype(kinds[0]),
            var=i.var.astype(np.float32).astype(kinds[1]),
        )
        for name, array in CALLS[call](given, "cuda").items():
            np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6)


@every_call
@pytest.mark.parametrize("poisoned", ["x", "dy"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_channel(call: str, poisoned: str, value: float) -> None:
    for case in (CASES[0], CASES[2], CASES[3], CASES[6]):
        clean = inputs(case, "float32")
        array: Any = getattr(clean, poisoned).copy()
        array[(2, 1, 2, 2)[: array.ndim]] = value  # in channel 1
        found = CALLS[call](clean._replace(**{poisoned: array}), "cuda")
        for name, want in CALLS[call](clean, "cuda").items():
            channels = 1 if name in WHOLE else 0
            got, want = np.moveaxis(found[name], channels, 0), np.moveaxis(want, channels, 0)
            others = np.arange(len(want)) != 1
            np.testing.assert_array_equal(got[others], want[others], err_msg=f"{name}: another channel changed")
            reached = {"all": want[1].size, "one": 1, "none": 0}[contract.REACH[poisoned][name]]
            assert np.count_nonzero(~np.isfinite(got[1])) == reached, name
