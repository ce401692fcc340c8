"""Which dtypes are taken: half ones by whoever made them, in either byte order; what goes beside them; bfloat16 by
name.
"""

import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from shapes import DTYPES, HALF, HALF_BACKENDS, every_half_backend, one_half, parameter_dtype

import fastbn
from fastbn.arguments import dtypes
from fastbn.arguments.errors import MissingExtra
from fastbn.cli import main

X = np.arange(24.0).reshape(2, 3, 4)


def test_the_rules() -> None:
    for name in DTYPES:
        dtype = np.dtype(name)
        assert dtypes.supported(dtype)
        assert dtypes.supported(dtype.newbyteorder(">"))
        assert dtypes.supported(dtype.newbyteorder("<"))
        assert dtypes.of_parameters(dtype).name == parameter_dtype(name)
    assert {dtype.name for dtype in dtypes.NATIVE} == set(DTYPES)
    assert all(dtype.isnative for dtype in dtypes.NATIVE)


OTHERS = sorted(
    {value for value in vars(ml_dtypes).values() if isinstance(value, type) and issubclass(value, np.generic)}, key=str
)
OTHERS.remove(ml_dtypes.bfloat16)


@pytest.mark.parametrize("scalar", [*OTHERS, np.void, np.longdouble], ids=lambda scalar: scalar.__name__)
def test_others_of_ml_dtypes_and_of_two_bytes_are_refused(scalar: type) -> None:
    dtype = np.dtype((np.void, 2)) if scalar is np.void else np.dtype(scalar)
    assert not dtypes.supported(dtype)
    message = (
        f"x: given dtype {dtype}, want float16, bfloat16, float32 or float64: convert it first, e.g. "
        f"x.astype('float32')"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fastbn.batch_norm(np.zeros((2, 3), dtype), backend="reference")
    assert not dtypes.small(dtype)
    with pytest.raises(
        TypeError, match=f"^{re.escape(message.replace('float64:', 'float64, or integers of 8 or 16 bits:'))}$"
    ):
        fastbn.moments(np.zeros((2, 3), dtype), backend="reference")


def test_there_are_others() -> None:
    assert {"float8_e5m2", "float8_e4m3fn", "int4"} <= {scalar.__name__ for scalar in OTHERS}


@pytest.mark.parametrize("backend", HALF_BACKENDS)  # in the kernels of the one shape that the default run has of each
@one_half
def test_swapped_bytes_are_values_as_any(dtype: str, backend: str) -> None:
    x = X.astype(dtype)
    swapped = x.astype(x.dtype.newbyteorder(">"))
    assert not swapped.dtype.isnative
    assert swapped.tobytes() != x.tobytes()
    y, m = fastbn.batch_norm(x, backend=backend)
    for given in ((swapped, swapped), (swapped, x), (x, swapped)):
        got, n = fastbn.batch_norm(given[0], backend=backend)
        assert (got.dtype, got.dtype.isnative, got.tobytes()) == (np.dtype(dtype), True, y.tobytes())
        assert (n.mean.tobytes(), n.m2.tobytes()) == (m.mean.tobytes(), m.m2.tobytes())
        dx = fastbn.batch_norm_backward(*given, n, backend=backend)[0]
        assert (dx.dtype.isnative, dx.tobytes()) == (
            True,
            fastbn.batch_norm_backward(x, x, m, backend=backend)[0].tobytes(),
        )


@every_half_backend
def test_one_layer_sees_them_all(backend: str) -> None:
    """float32 parameters go with float16, bfloat16 and float32 x, in turn; the running statistics keep what half would
    lose.
    """
    bn = fastbn.BatchNorm(3, momentum=None, backend=backend)
    means = []
    for dtype in (*HALF, "float32", *HALF):
        x = (X + 1000 * len(means) + 1 / 3).astype(dtype)
        y = bn(x)
        dx = bn.backward(x)
        assert y.dtype == dx.dtype == dtype
        means.append(x.astype(np.float64).mean((0, 2)))
        for array in (bn.gamma, bn.beta, bn.dgamma, bn.dbeta, bn.running_mean, bn.running_var):
            assert array is not None
            assert array.dtype == np.float32
        np.testing.assert_allclose(bn.running_mean, np.mean(means, 0), rtol=1e-6)
        assert bn.eval(backward=True)(x).dtype == bn.backward(x).dtype == dtype
        bn.train()
    assert bn.num_batches_tracked == 5


@pytest.mark.parametrize("dtype", HALF)
def test_a_layer_loads_half_values_into_float32(dtype: str) -> None:
    bn = fastbn.BatchNorm(3)
    state = {key: (value + 0.5).astype(dtype) for key, value in bn.state_dict().items() if key != "num_batches_tracked"}
    bn.load_state_dict(state)
    for key, value in bn.state_dict().items():
        assert value.dtype == ("int64" if key == "num_batches_tracked" else "float32")
        np.testing.assert_array_equal(value, state.get(key, np.zeros(())).astype(np.float64))


# bfloat16 by name: NumPy knows it once ml_dtypes is imported, fastbn before.


def _python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout.strip()


def test_the_name_is_known_before_ml_dtypes_is_imported() -> None:
    code = "import sys, fastbn; assert 'ml_dtypes' not in sys.modules; print(fastbn.explain((4, 3), 'bfloat16'))"
    assert _python(code) == str(fastbn.explain((4, 3), np.dtype(ml_dtypes.bfloat16)))


def test_arrays_are_recognised_where_ml_dtypes_cannot_be_imported() -> None:
    code = (
        "import ml_dtypes, sys, numpy as np; x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)\n"
        "sys.modules['ml_dtypes'] = None\nimport fastbn; print(fastbn.batch_norm(x, eps=1, "
        "backend='reference')[0].dtype)"
    )
    assert _python(code) == "bfloat16"


def test_without_ml_dtypes_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    message = "bfloat16 needs ml_dtypes: pip install 'fastbn[bfloat16]'"
    with pytest.raises(MissingExtra, match=f"^{re.escape(message)}$"):
        fastbn.explain((4, 3), "bfloat16")
    assert main(["explain", "4,3", "bfloat16"]) == 2
    assert capsys.readouterr().err == f"fastbn: {message}\n"


@pytest.mark.parametrize("dtype", HALF)
def test_explain_on_the_command_line(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "4,3", dtype]) == 0
    said = capsys.readouterr().out
    assert said == f"{fastbn.explain((4, 3), dtype)}\n"
    assert said.startswith(f"shape (4, 3), {dtype}, channel axis 1")
