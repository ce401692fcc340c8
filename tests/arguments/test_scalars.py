"""Arguments that are one value: whatever is given in their place, the documented error names them and nothing has
changed.
"""

import inspect
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from absurd import ABSURD, TAKEN, refused

import fastbn
import fastbn.fold
from fastbn.batchnorm import OPTIONS
from fastbn.distributed import Exchange

SHAPE = (4, 3, 5)


def _good(dtype: str = "float32") -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(dtype)
    row = np.ones(3, dtype)
    m = fastbn.moments(x, backend="reference")
    return {
        "x": x, "dy": x.copy(), "mean": row, "var": row.copy(), "gamma": row.copy(), "beta": row.copy(),
        "sum_dy": row.copy(),
        "sum_dy_xhat": row.copy(), "moments": m, "count": 20, "out": x.copy(), "axis": 1, "eps": 1e-5, "shape": SHAPE,
        "num_features": 3,
        "m2": row.copy(), "chunk": x, "other": m, "bn": fastbn.BatchNorm(3), "weight": np.ones((3, 2), "f4"),
        "device": "cpu", "mode": True,
        "state": fastbn.BatchNorm(3).state_dict(), "num_threads": 1, "batches": [x],
    }  # fmt: skip


LAYER, SEEN, M = fastbn.BatchNorm(3), fastbn.RunningMoments(3), fastbn.moments(_good()["x"], backend="reference")
CALLS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(fastbn, name)
        for name in fastbn.__all__
        if callable(getattr(fastbn, name)) and name != "BackendUnavailable"
    },
    "fold": fastbn.fold.fold,
    **{
        f"{type(owner).__name__}.{name}": method
        for owner in (LAYER, SEEN, M)
        for name, method in inspect.getmembers(owner, inspect.ismethod)
        if not name.startswith("_")
    },
}
# Arrays, and what holds them: of other tests. `stream` is refused for arrays on the host whatever it is.
OTHERS = {
    "x",
    "dy",
    "mean",
    "var",
    "gamma",
    "beta",
    "sum_dy",
    "sum_dy_xhat",
    "moments",
    "out",
    "m2",
    "chunk",
    "other",
    "bn",
    "weight",
    "bias",
}
OTHERS |= {"batches"}
# What a layer is not yet told: whether a name will be registered, and the rank of x.
LATER = {"backend": ("word", "digits", "empty word"), "axis": ("negative",)}


def _parameters(call: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(call).parameters if name not in ("args", "kwargs")]


CASES = [(name, argument) for name, call in CALLS.items() for argument in _parameters(call) if argument not in OTHERS]


def test_every_argument_is_known() -> None:
    assert {argument for _, argument in CASES} <= TAKEN.keys()
    assert len(CALLS) > 25
    assert {"load_state_dict", "to", "train"} <= {name.partition(".")[2] for name, _ in CASES}


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_absurd_arguments(name: str, argument: str) -> None:
    call = CALLS[name]
    for absurd, value in ABSURD.items():
        if absurd in TAKEN[argument] or (name in ("BatchNorm", "RunningMoments") and absurd in LATER.get(argument, ())):
            continue
        good = {key: given for key, given in _good().items() if key in _parameters(call)}
        given = good | {argument: value}
        if argument == "stream":
            given.pop("num_threads")
        refused(lambda given=given: call(**given), argument, absurd, [*good.values(), LAYER, SEEN, M])


X = _good()["x"]
USED = {
    "forward": {*OPTIONS} - {"affine"},
    "state_dict": {"num_batches_tracked"},
    "folded_affine": {"eps"},
    "fold": {"eps", "num_batches_tracked"},
    "reset_parameters": {*OPTIONS} - {"num_batches_tracked"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_absurd_attributes(name: str) -> None:
    """What the constructor refuses is refused where it is used after it was assigned, before anything is computed."""
    acts: dict[str, Callable[[fastbn.BatchNorm], Any]] = {
        "forward": lambda bn: bn(X),
        "recalibrate": lambda bn: bn.recalibrate([X], progress=False),
        "reset_parameters": lambda bn: bn.reset_parameters(),
        "state_dict": lambda bn: bn.state_dict(),
        "folded_affine": lambda bn: bn.folded_affine(),
        "fold": lambda bn: fastbn.fold.fold(bn, np.ones((3, 2))),
    }
    for act, call in acts.items():
        for absurd, value in ABSURD.items():
            if (
                absurd in TAKEN[name]
                or name not in USED.get(act, OPTIONS)
                or (act == "reset_parameters" and absurd in LATER.get(name, ()))
            ):
                continue
            bn = fastbn.BatchNorm(3, backend="reference", momentum=None)
            setattr(bn, name, value)
            refused(lambda call=call, bn=bn: call(bn), name, f"{absurd}, {act}", [bn])


@pytest.mark.parametrize("name", ["num_features", "axis", "backend", "num_threads"])
def test_absurd_attributes_of_running_moments(name: str) -> None:
    for absurd, value in ABSURD.items():
        if absurd not in TAKEN[name]:
            seen = fastbn.RunningMoments(3)
            setattr(seen, name, value)
            refused(lambda seen=seen: seen.update(X), name, absurd, [seen])


def test_evaluation_looks_at_what_it_uses_and_attributes_become_what_they_should_be() -> None:
    bn = fastbn.BatchNorm(3, backend="reference").eval()
    bn.momentum = "x"
    bn(X)
    for name in ("eps", "axis", "num_threads", "training", "num_features"):
        other = fastbn.BatchNorm(3, backend="reference").eval()
        setattr(other, name, [])
        refused(lambda other=other: other(X), name, "list", [other])
    bn.momentum, bn.training, bn.num_batches_tracked = np.float32(0.5), np.bool_(True), np.array(7)
    bn(X)
    assert (type(bn.momentum), bn.momentum, bn.training, type(bn.num_batches_tracked), bn.num_batches_tracked) == (
        float,
        0.5,
        True,
        int,
        8,
    )


class _Ranks:
    """A communicator of nobody's."""


def test_absurd_communicators() -> None:
    for absurd, value in (ABSURD | {"unknown": _Ranks()}).items():
        for make in (lambda c: fastbn.BatchNorm(3, comm=c), lambda c: Exchange(c, 3), SEEN.reduce)[value is None :]:
            refused(lambda make=make, value=value: make(value), "comm", absurd, [SEEN])


@pytest.mark.parametrize("one", [1, np.int8(1), np.uint64(1), np.array(1), np.bool_(True), True])
def test_numbers_of_every_kind_are_taken(one: Any) -> None:
    """Also those of arrays without axes: what np.load gives."""
    x = _good()["x"]
    flag = isinstance(one, bool | np.bool_)
    if flag:
        bn = fastbn.BatchNorm(3, affine=one, track_running_stats=one)
        assert (bn.affine, bn.track_running_stats) == (True, True)
        return
    bn = fastbn.BatchNorm(3, axis=one, momentum=one, eps=one, num_threads=one, unbiased_running_var=one)
    kinds = (
        {type(getattr(bn, name)) for name in ("axis", "num_threads")},
        {type(bn.eps), type(bn.momentum)},
        type(bn.unbiased_running_var),
    )
    assert kinds == ({int}, {float}, bool)
    np.testing.assert_array_equal(fastbn.moments(x, one, num_threads=one).mean, fastbn.moments(x).mean)
    bn.num_batches_tracked = one
    bn(x.astype(np.float32))
    assert (type(bn.num_batches_tracked), bn.num_batches_tracked) == (int, 2)
    assert M.var(one).tobytes() == M.var(1).tobytes()
    for real in (Fraction(1), Decimal(1), np.float16(1), np.array(1.0), np.longdouble(1)):
        assert fastbn.batch_norm(x, eps=real)[0].tobytes() == fastbn.batch_norm(x, eps=one)[0].tobytes()
