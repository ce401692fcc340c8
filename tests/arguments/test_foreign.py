"""Objects that are no arrays of NumPy's: those that have one on the host are taken, all others refused with the way to
one.
"""

import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn.cuda import buffers

ROWS = np.random.default_rng(0).normal(3.0, 2.0, (8, 3)).astype(np.float32)
MASKED = np.ma.masked_greater(np.arange(6.0).reshape(2, 3), 4)


class OnlyDLPack:
    """What array libraries without `__array__` offer."""

    def __init__(self, device: int, array: np.ndarray = ROWS) -> None:
        self.device, self.array = device, array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0


class Offers:
    """An object with some attributes, of a class of this name."""

    def __new__(cls, name: str, **attributes: Any) -> Any:
        return type(name, (), attributes)()


def _refuse(self: Any, *_: Any, **options: Any) -> Any:
    raise RuntimeError("computed elsewhere")


def _raising(error: Exception) -> Any:
    def get(self: Any) -> None:
        raise error

    return property(get)


HOST: dict[str, Any] = {
    "JAX's on the host": Offers(
        "Array", __cuda_array_interface__=_raising(AttributeError()), __array__=lambda s, *a, **k: ROWS
    ),
    "older JAX's": Offers(
        "Array", __cuda_array_interface__=_raising(RuntimeError("no GPU")), __array__=lambda s, *a, **k: ROWS
    ),
    "DLPack on the host": OnlyDLPack(1),
    "DLPack, pinned": OnlyDLPack(3),
    "a buffer": memoryview(ROWS),
    "a list of arrays": list(ROWS),
    "a list": ROWS.astype(float).tolist(),
    "a subclass": ROWS.view(type("Subclass", (np.ndarray,), {})),
    "units": Offers("Quantity", unit="m", __array__=lambda s, *a, **k: ROWS),
}


@pytest.mark.parametrize("name", HOST)
def test_what_has_an_array_on_the_host_is_taken_and_gives_plain_ones(name: str) -> None:
    assert not buffers.on_device(HOST[name])
    m = fastbn.moments(HOST[name], backend="reference")
    np.testing.assert_allclose(m.mean, ROWS.mean(0), rtol=1e-6)
    y, m = fastbn.batch_norm(HOST[name], backend="reference")
    assert (type(y), type(m.mean)) == (np.ndarray, np.ndarray)
    np.testing.assert_allclose(y, fastbn.batch_norm(ROWS, backend="reference")[0], rtol=1e-5)


def _tensor(act: Callable[[Any], Any]) -> Any:
    torch = pytest.importorskip("torch")
    return act(torch)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "None": (lambda: None, "given None, want an array"),
    "a word": (lambda: "a.npy", "given 'a.npy', want an array: numpy.load(...) reads a file"),
    "a dict": (lambda: {"a": ROWS}, "given dict, want an array: one of its values, {0}[...]"),
    "a set": (lambda: {1.0}, "given set, want an array: numpy.stack(list({0})), or a call for each of its arrays"),
    "a generator": (lambda: (row for row in ROWS), "given generator, want an array: numpy.stack(list({0})), or a call "
                                                   "for "),
    "an object": (object, "given object, want an array of float32 or float64"),
    "ragged": (lambda: [[1.0], [1.0, 2.0]], "given ragged or mixed data ("),
    "mixed": (lambda: [[1.0, None], [2.0, 3.0]], "given list, of mixed data, want numbers: numpy.stack of arrays of "
                                                 "one shape, of "),
    "sparse, SciPy's": (lambda: Offers("csr", toarray=lambda s: ROWS), "given csr, a sparse one, want a dense array: "
                                                                       "{0}.toarray()"),
    "sparse, PyData's": (lambda: Offers("COO", todense=lambda s: ROWS), "given COO, a sparse one, want a dense array: "
                                                                        "{0}.todense()"),
    "pandas' nullable": (
        lambda: Offers("Series", to_numpy=lambda s: ROWS, __array__=lambda s, *a, **k: np.array([[1.0, None]] * 2,
        object)),
        "given Series, of which NumPy makes an array of objects: {0}.to_numpy('float32')",
    ),
    "what fails": (
        lambda: Offers("Lazy", __array__=_refuse), "given Lazy, which does not become an array of NumPy (computed "
                                                   "elsewhere)"
    ),
    "on a GPU": (lambda: Offers("Array", __cuda_array_interface__={}), "given an array on a GPU (Array), want a host "
                                                                       "array: copy it to "),
    "DLPack on a GPU": (lambda: OnlyDLPack(2), "given an array on a GPU or another device (OnlyDLPack, device 2 of "
                                               "DLPack): copy it to "),
    "DLPack of no device": (
        lambda: Offers("Odd", __dlpack__=lambda s: None, __dlpack_device__=None),
        "given Odd, whose __dlpack_device__ fails ('NoneType' object is not callable): make it an array of NumPy first",
    ),
    "masked": (lambda: MASKED, "given a masked array, whose mask would be ignored; want a plain array, for example "
                               "{0}.filled(...)"),
    "masked in a list": (lambda: [MASKED, MASKED], "given list with a masked array in it, whose mask would be "
                                                   "ignored; want plain "),
    "masked deep in one": (lambda: [ROWS, ([1.0], [MASKED])], "given list with a masked array in it, whose mask would "
                                                              "be ignored; want "),
    "a tensor with a gradient": (
        lambda: _tensor(lambda torch: torch.ones(2, 3, requires_grad=True)),
        "given Tensor that requires a gradient, which NumPy does not record: {0}.detach(), or a module of "
        "fastbn.torch, such as BatchNorm",
    ),
    "a sparse tensor": (
        lambda: _tensor(lambda torch: torch.ones(2, 3).to_sparse()), "given Tensor, a sparse one, want a dense array: "
                                                                     "{0}.to_dense()"
    ),
    "a tensor without memory": (
        lambda: _tensor(lambda torch: torch.ones(2, 3, device="meta")), "given Tensor, which does not become an array "
                                                                        "of NumPy ("
    ),
}  # fmt: skip


def _takers(value: Any) -> dict[str, Callable[[], Any]]:
    """Every argument that is an array, by the name that its error has."""
    row, one = np.ones(3, np.float32), np.ones(3)
    bn = fastbn.BatchNorm(3, backend="reference")
    return {
        "x": lambda: bn(value),
        "dy": lambda: fastbn.batch_norm_backward(
            value, ROWS, fastbn.moments(ROWS, backend="reference"), backend="reference"
        ),
        "gamma": lambda: fastbn.batch_norm(ROWS, value, backend="reference"),
        "beta": lambda: fastbn.batch_norm(ROWS, row, value, backend="reference"),
        "mean": lambda: fastbn.batch_norm_inference(ROWS, value, row, backend="reference"),
        "var": lambda: fastbn.batch_norm_inference(ROWS, row, value, backend="reference"),
        "sum_dy": lambda: fastbn.batch_norm_backward_input(ROWS, ROWS, row, row, value, one, 8, backend="reference"),
        "m2": lambda: fastbn.Moments(8, one, value),
        "state_dict: weight": lambda: bn.load_state_dict(bn.state_dict() | {"weight": value}),
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.peers if "tensor" in name else ()) for name in REFUSED]
)
def test_what_is_no_array_is_refused_with_the_way_to_one(name: str) -> None:
    make, message = REFUSED[name]
    for argument, act in _takers(make()).items():
        if argument in ("gamma", "beta", "mean", "var") and name == "None":
            continue  # absent, or half of a pair
        if argument == "x" and name == "on a GPU":
            continue  # served there, or declined by its backend
        if argument.startswith("state_dict") and name == "a tensor with a gradient":
            continue  # whose values are taken over
        own = argument.rpartition(": ")[2]  # a remedy is an expression
        with pytest.raises(TypeError, match=f"^{re.escape(f'{argument}: {message.format(own)}')}"):
            act()


@pytest.mark.parametrize("value", [MASKED, np.ma.masked_all((8, 3), np.float32)])
def test_masked_arrays_are_refused_by_all_that_holds_or_takes_results(value: np.ndarray) -> None:
    """`out` would stay masked though the result is in its place."""
    bn, seen = fastbn.BatchNorm(3, backend="reference"), fastbn.RunningMoments(3, backend="reference")
    out = np.ma.masked_all((8, 3), np.float32)
    acts = {"x": lambda: seen.update(value), "mean": lambda: fastbn.Moments(2, value[0], np.ones(3))}
    with pytest.raises(
        TypeError,
        match=r"^out: given a masked array, whose mask would stay as it is; want a plain array, for example out.data$",
    ):
        fastbn.batch_norm(ROWS, out=out, backend="reference")
    for argument, act in acts.items():
        with pytest.raises(
            TypeError, match=f"^{argument}: given a masked array, whose mask would be ignored; want a plain array"
        ):
            act()
    bn.gamma = np.ma.masked_array(np.ones(3, np.float32), [True, False, False])
    with pytest.raises(TypeError, match=r"^gamma: given a masked array"):
        bn(ROWS)
    assert seen.count == bn.num_batches_tracked == 0
    assert out.mask.all()


def test_words_are_no_numbers_in_lists_either() -> None:
    with pytest.raises(TypeError, match=r"^gamma: given dtype <U1, want float32"):
        fastbn.batch_norm(ROWS, ["1", "2", "3"], backend="reference")


@pytest.mark.peers
def test_arrays_of_other_libraries_for_real() -> None:
    """Where they are installed: JAX's, SciPy's sparse ones, PyTorch's of bfloat16."""
    jax = pytest.importorskip("jax.numpy")
    np.testing.assert_array_equal(fastbn.moments(jax.asarray(ROWS)).mean, fastbn.moments(ROWS).mean)
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"^x: given csr_matrix, a sparse one, want a dense array: x.toarray\(\)$"):
        fastbn.moments(sparse.csr_matrix(ROWS))
    torch = pytest.importorskip("torch")
    half = torch.from_numpy(ROWS).bfloat16()
    y, m = fastbn.batch_norm(half.T, axis=0, backend="reference")
    assert (y.dtype.name, y.shape) == ("bfloat16", (3, 8))
    np.testing.assert_array_equal(m.mean, fastbn.moments(half.float().numpy(), backend="reference").mean)


def test_a_name_alone_makes_no_simulated_array() -> None:
    assert not buffers.on_device(types.SimpleNamespace())
