"""The registry and its errors, explain(), and the protocol that every backend satisfies on canonical views."""

import inspect
import os
import pkgutil
from typing import Any

import numpy as np
import published
import pytest
from launch import python
from shapes import DTYPES, every_dtype_and_backend, parameter_dtype
from tolerances import check, scales

import fastbn
from fastbn import backends
from fastbn.backends import Backend, BackendUnavailable, explain, select
from fastbn.cpu.backend import Passes
from fastbn.cuda import buffers

EPS = 1e-5


def _methods(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")]


METHODS, PASSES = _methods(Backend), _methods(Passes)


def test_the_protocols_are_what_the_plan_says() -> None:
    verbs = ["moments", "forward", "inference", "backward", "inference_backward", "grad_reduce", "grad_input", "track"]
    layers = ["check_part", "check_features", "same_memory", "statistic_copy", "parameter_copy"]
    assert [*verbs, *layers, "describe"] == METHODS
    passes = ["moments", "rstd", "track", "normalize", "grad_reduce", "grad_input", "forward", "backward", "compact"]
    assert [*passes, "describe"] == PASSES


@pytest.mark.parametrize("kind", ["cpu.backend.Host", pytest.param("cuda.backend.Device", marks=pytest.mark.peers)])
@pytest.mark.parametrize("method", METHODS)
def test_signatures_are_the_protocols(method: str, kind: str) -> None:
    if kind.startswith("cuda"):
        pytest.importorskip("numba_cuda", reason="needs numba-cuda: pip install 'fastbn[cuda13]'")
    kinds = Backend, pkgutil.resolve_name(f"fastbn.{kind}")
    wanted, found = (inspect.signature(getattr(one, method)).parameters.values() for one in kinds)
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]


@pytest.mark.parametrize("method", PASSES)
def test_signatures_of_passes_are_the_protocols(method: str, backend: str) -> None:
    wanted = list(inspect.signature(getattr(Passes, method)).parameters.values())[1:]  # without self
    found = list(inspect.signature(getattr(select(backend).passes, method)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]


# Canonical views: shape, then how much of the memory around them is left out along each axis.
VIEWS: dict[str, tuple[tuple[int, ...], tuple[slice, ...]]] = {
    "N C S": ((4, 5, 37), np.s_[:, :, :]),
    "N C S, gaps between samples": ((8, 5, 37), np.s_[::2]),
    "N C S, gaps between channels": ((4, 10, 37), np.s_[:, ::2]),
    "N C S, gaps between rows": ((4, 5, 40), np.s_[:, :, 1:38]),
    "N C S, backwards": ((4, 5, 37), np.s_[::-1, ::-1]),
    "N C S, short rows": ((6, 40, 3), np.s_[:, :, :]),
    "N C S, S = 1": ((9, 5, 1), np.s_[:, :, :]),
    "R C": ((37, 70), np.s_[:, :]),
    "R C, gaps between rows": ((37, 80), np.s_[:, 3:73]),
    "R C, every second row": ((74, 20), np.s_[::2]),
    "R C, rows backwards": ((37, 20), np.s_[::-1]),
    "R C, few channels": ((999, 3), np.s_[:, :]),
}


class Drawn:
    """Arrays of one canonical view, and the published results."""

    def __init__(self, view: str, dtype: str) -> None:
        shape, window = VIEWS[view]
        rng = np.random.default_rng(0)
        self.x = (rng.standard_normal(shape) * 2 + 5).astype(dtype)[window]
        self.dy = rng.standard_normal(shape).astype(dtype)[window]
        channels = self.x.shape[1]
        self.gamma, self.beta = (rng.standard_normal(channels).astype(parameter_dtype(dtype)) for _ in range(2))
        self.memory = np.full(shape, -7, dtype)
        self.out = self.memory[window]
        s = published.statistics(self.x, 1)
        self.count, self.mean, self.var, self.rstd = s.count, s.mean, s.var, 1 / np.sqrt(s.var + EPS)
        self.dtype = dtype

    def check(self, quantity: str, found: np.ndarray, gamma: Any, beta: Any, training: bool = True) -> None:
        want = {
            "mean": self.mean,
            "var": self.var,
            "y": published.normalized(self.x, self.mean, self.var, gamma, beta, 1, EPS),
            **published.gradients(self.dy, self.x, self.mean, self.var, gamma, 1, EPS, training)._asdict(),
        }[quantity]
        scale = scales(self.dy, self.x, self.mean, self.var, gamma, beta, 1, EPS, training)
        check(quantity, self.dtype, found, want, getattr(scale, quantity))

    def nothing_beside_out_changed(self) -> None:
        self.out[...] = -7
        assert (self.memory == -7).all()


every_view = pytest.mark.parametrize("view", VIEWS)


def _per_channel(dtype: str, *arrays: np.ndarray, channels: int) -> None:
    for array in arrays:
        assert (array.dtype, array.shape) == (dtype, (channels,))


@every_dtype_and_backend
@every_view
def test_moments_and_forward(view: str, dtype: str, backend: str) -> None:
    d, b = Drawn(view, dtype), select(backend).passes
    for gamma in (d.gamma, None):
        for beta in (d.beta, None):
            y, fused = b.forward(d.x, gamma, beta, EPS, d.out)
            assert y is d.out
            d.check("y", y, gamma, beta)
            for m in (fused, b.moments(d.x)):
                _per_channel("float64", m.mean, m.m2, channels=d.x.shape[1])
                assert m.count == d.count
                d.check("mean", m.mean, None, None)
                d.check("var", m.var(), None, None)
    d.nothing_beside_out_changed()


@every_dtype_and_backend
@every_view
def test_normalize(view: str, dtype: str, backend: str) -> None:
    d, b = Drawn(view, dtype), select(backend).passes
    for gamma in (d.gamma, None):
        for beta in (d.beta, None):
            assert b.normalize(d.x, d.mean, d.rstd, gamma, beta, d.out) is d.out
            d.check("y", d.out, gamma, beta)
    d.nothing_beside_out_changed()


@every_dtype_and_backend
@every_view
def test_gradients_separate_and_fused(view: str, dtype: str, backend: str) -> None:
    d, b = Drawn(view, dtype), select(backend).passes
    sum_dy, sum_dy_xhat = b.grad_reduce(d.dy, d.x, d.mean, d.rstd)
    _per_channel("float64", sum_dy, sum_dy_xhat, channels=d.x.shape[1])
    d.check("dbeta", sum_dy, None, None)
    d.check("dgamma", sum_dy_xhat, None, None)
    for gamma in (d.gamma, None):
        for training in (True, False):
            sums = (sum_dy, sum_dy_xhat) if training else None
            assert b.grad_input(d.dy, d.x, d.mean, d.rstd, gamma, sums, d.count, d.out) is d.out
            d.check("dx", d.out, gamma, None, training)
            d.out[...] = -7
            dx, dgamma, dbeta = b.backward(d.dy, d.x, d.mean, d.rstd, gamma, d.out, training)
            assert dx is d.out
            _per_channel("float64", dgamma, dbeta, channels=d.x.shape[1])
            d.check("dx", dx, gamma, None, training)
            d.check("dgamma", dgamma, None, None)
            d.check("dbeta", dbeta, None, None)
    d.nothing_beside_out_changed()


def test_sums_of_many_parts_and_their_count_give_the_gradient_of_the_whole(backend: str) -> None:
    """What a collective does: reduce on each part, add, then grad_input on each part with the whole count."""
    d, b = Drawn("N C S", "float64"), select(backend).passes
    parts = [slice(0, 1), slice(1, 4)]
    m = b.moments(d.x[parts[0]]).merge(b.moments(d.x[parts[1]]))
    rstd = m.rstd(EPS)
    reduced = [b.grad_reduce(d.dy[part], d.x[part], m.mean, rstd) for part in parts]
    sums = (reduced[0][0] + reduced[1][0], reduced[0][1] + reduced[1][1])
    for part in parts:
        b.grad_input(d.dy[part], d.x[part], m.mean, rstd, d.gamma, sums, m.count, d.out[part])
    d.check("dx", d.out, d.gamma, None)


@pytest.mark.parametrize("over", ["x", "dy"])
@every_view
def test_in_place(view: str, over: str, backend: str) -> None:
    d, b = Drawn(view, "float32"), select(backend).passes
    want_dx = b.backward(d.dy, d.x, d.mean, d.rstd, d.gamma, d.out)[0].copy()
    if over == "x":
        x = d.x.copy("K")  # without the gaps of the view: rows may be summed in another order
        want = b.forward(x, d.gamma, d.beta, EPS, np.empty_like(x))[0]
        np.testing.assert_array_equal(b.forward(x, d.gamma, d.beta, EPS, x)[0], want)
        x = d.x.copy("K")
        b.normalize(x, d.mean, d.rstd, d.gamma, d.beta, x)
        d.check("y", x, d.gamma, d.beta)
    for call in ("fused", "separate"):
        given = {"x": d.x.copy("K"), "dy": d.dy.copy("K")}
        if call == "fused":
            b.backward(given["dy"], given["x"], d.mean, d.rstd, d.gamma, given[over])
        else:
            sums = b.grad_reduce(given["dy"], given["x"], d.mean, d.rstd)
            b.grad_input(given["dy"], given["x"], d.mean, d.rstd, d.gamma, sums, d.count, given[over])
        np.testing.assert_allclose(given[over], want_dx, rtol=1e-5, atol=1e-6)


def test_describe_is_a_text_for_both_kinds(backend: str) -> None:
    for dims in ((32, 64, 3136), (1, 1, 2), (1, 3, 1 << 40), (2, 1), (1 << 40, 3)):
        for dtype in DTYPES:
            assert len(select(backend).describe(dims, np.dtype(dtype))) > 20


@pytest.mark.process
def test_the_contract_holds_with_streaming_stores_too() -> None:
    """The same tests with every store past the cache; in a process of their own, since a wrong alignment ends it."""
    words = ("-m", "pytest", "-q", "-n", "0", "-m", "", "-k", "cpu and out_", "-p", "no:cacheprovider")
    assert " passed" in python(*words, "tests/test_contract.py", FASTBN_STREAM_BYTES="0", PYTEST_ADDOPTS="")


# The registry


REGISTERED = "Registered: cuda: no GPU today; cpu: available; reference: available."


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "declines", lambda: "no GPU today")


def test_the_registry_in_its_order() -> None:
    assert [entry.name for entry in backends.REGISTRY] == ["cuda", "cpu", "reference"]
    assert f"Registered: {'; '.join(backends.availability())}." == REGISTERED


@pytest.mark.skipif(
    bool(os.environ.get("FASTBN_BACKEND")), reason="FASTBN_BACKEND overrides the default that is tested here"
)
def test_a_host_array_goes_to_the_cpu() -> None:
    assert select() is select("cpu")
    assert select().passes.__name__ == "fastbn.cpu.passes"
    assert select("reference").passes.__name__ == "fastbn.reference"


def test_the_requested_backend_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop(*arguments: object) -> None:
        raise Stop

    for name in METHODS:
        monkeypatch.setattr(select(backend), name, stop)
    x = np.ones((4, 3), np.float32)
    m = fastbn.Moments(4, np.zeros(3), np.zeros(3))
    statistics = np.zeros(3, np.float32), np.ones(3, np.float32)
    for call in (
        lambda: fastbn.moments(x, backend=backend),
        lambda: fastbn.batch_norm(x, backend=backend),
        lambda: fastbn.batch_norm_inference(x, *statistics, backend=backend),
        lambda: fastbn.batch_norm_backward(x, x, m, backend=backend),
        lambda: fastbn.batch_norm_inference_backward(x, x, *statistics, backend=backend),
        lambda: fastbn.BatchNorm(3, backend=backend)(x),
        lambda: fastbn.BatchNorm(3, backend=backend).eval()(x),
        lambda: fastbn.RunningMoments(3, backend=backend).update(x),
        lambda: explain((4, 3), backend=backend),
    ):
        with pytest.raises(Stop):
            call()


@pytest.mark.parametrize("name", ["cuda", "gpu", "CPU", "cpu "])
def test_what_cannot_be_served_is_refused_with_all_there_is(name: str) -> None:
    x, out = np.ones((4, 3), np.float32), np.full((4, 3), -7, np.float32)
    for call in (
        lambda: select(name),
        lambda: fastbn.batch_norm(x, out=out, backend=name),
        lambda: fastbn.batch_norm(x[:0], backend=name),
        lambda: fastbn.moments(x, backend=name),
        lambda: fastbn.BatchNorm(3, backend=name)(x),
        lambda: explain((4, 3), backend=name),
    )[: 5 if name == "cuda" else 6]:  # cuda is explained without a GPU too
        with pytest.raises(BackendUnavailable) as caught:
            call()
        assert str(caught.value) == f"backend={name!r} can't be served. {REGISTERED}"
    assert (out == -7).all()


@pytest.mark.parametrize("name", ["cuda", "numpy"])
def test_a_variable_that_cannot_be_served_is_named_at_the_first_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbn.arguments.config.BACKEND", name)
    with pytest.raises(BackendUnavailable) as caught:
        fastbn.moments(np.ones((4, 3)))
    assert str(caught.value) == f"FASTBN_BACKEND={name!r} can't be served. {REGISTERED}"


# explain()


@pytest.mark.parametrize(
    ("shape", "options", "kind", "dims"),
    [
        ((32, 64, 56, 56), {}, "channels_first", (32, 64, 3136)),
        ((32, 64, 56, 56), {"channels_last": True}, "channels_last", (100352, 64)),
        ((32, 56, 56, 64), {"axis": -1}, "channels_last", (100352, 64)),
        ((4096, 256), {}, "channels_last", (4096, 256)),
        ((256, 4096), {"axis": 0}, "channels_first", (1, 256, 4096)),
        ((0, 3, 4), {}, "channels_first", (0, 3, 4)),
        ((1 << 20, 3, 1 << 20), {}, "channels_first", (1 << 20, 3, 1 << 20)),  # need not fit in memory
    ],
)
@pytest.mark.parametrize("dtype", [*DTYPES, np.float64, np.dtype("bfloat16")])
def test_explain(
    shape: tuple[int, ...], options: dict[str, Any], kind: str, dims: tuple[int, ...], dtype: Any, backend: str
) -> None:
    found = explain(shape, dtype, backend=backend, **options)
    assert (found.backend, found.kind, found.dims) == (backend, kind, dims)
    axis = options.get("axis", 1) % len(shape)
    lines = str(found).splitlines()
    assert lines[0] == (
        f"shape {shape}, {np.dtype(dtype)}, channel axis {axis}: {shape[axis]} channels of "
        f"{int(np.prod(shape)) // shape[axis]} values"
    )
    assert kind in lines[1]
    assert " x ".join(map(str, dims)) in lines[1]
    assert lines[2] == f"backend: {backend} (requested)"
    others = [line.strip() for line in lines[lines.index("other backends:") + 1 :]]
    assert others == [line for line in backends.availability() if not line.startswith(backend)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((4,),), ValueError, "x: given rank 1"),
        (((4, 3), "float32", 2), ValueError, "axis: given 2"),
        (((4, 0),), ValueError, "no channels"),
        (((4, 3), "float8_e5m2"), TypeError, "^dtype: given float8_e5m2, want float16, bfloat16, float32 or float64$"),
        (((4, 3), "bfloat8"), TypeError, "^dtype: given 'bfloat8', want float16, bfloat16, float32 or float64$"),
        (((4, 3), ">f4"), TypeError, "^dtype: given >f4, want float16, bfloat16, float32 or float64$"),
        (((4, -3),), ValueError, "-3"),
    ],
)
def test_explain_refuses_what_the_functions_would(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        explain(*arguments)
