"""What fastbn.dask takes, and refuses in the documented words: integers, absurd options."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from absurd import ABSURD, TAKEN, refused

import fastbn

da = pytest.importorskip("dask.array", reason="a bridge to dask: pip install 'fastbn[dask]'")
bridge = pytest.importorskip("fastbn.dask")

pytestmark = pytest.mark.peers

X = np.random.default_rng(0).integers(0, 255, (20, 3, 7), np.uint8, endpoint=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", ">i2"])
@pytest.mark.parametrize("chunks", [(20, 3, 7), (6, 2, 4), ((0, 19, 1), (3,), (7,))])
def test_moments_of_integers(dtype: str, chunks: Any) -> None:
    x = X.astype(dtype)
    m = bridge.moments(da.from_array(x, chunks)).compute(scheduler="synchronous")
    want = fastbn.moments(x.astype(np.float64), backend="reference")
    assert m.count == want.count
    np.testing.assert_allclose(m.mean, want.mean, rtol=1e-12)
    np.testing.assert_allclose(m.m2, want.m2, rtol=1e-12)


def test_integers_are_not_normalized() -> None:
    array = da.from_array(X, (4, 3, 7))
    with pytest.raises(
        TypeError,
        match=r"^array: given dtype uint8, want float16, bfloat16, float32 or float64: convert it first, "
        r"e.g. arr",
    ):
        bridge.normalize(array, fastbn.moments(X))
    with pytest.raises(
        TypeError,
        match=r"^array: given dtype int64, .* or integers of 8 or 16 bits: convert it first, e.g. "
        r"array.astype\('fl",
    ):
        bridge.moments(array.astype(np.int64))


ARRAY = da.from_array(X.astype(np.float32), (4, 3, 7))
CALLS: dict[str, Callable[..., Any]] = {
    "moments": lambda **given: bridge.moments(ARRAY, **given),
    "normalize": lambda **given: bridge.normalize(ARRAY, fastbn.moments(X), **given),
}


@pytest.mark.parametrize(("name", "argument"), [("moments", "axis"), ("normalize", "axis"), ("normalize", "eps")])
def test_absurd_arguments(name: str, argument: str) -> None:
    for absurd, value in ABSURD.items():
        if absurd not in TAKEN[argument]:
            refused(lambda value=value: CALLS[name](**{argument: value}), argument, absurd, [])
