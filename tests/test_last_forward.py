"""What a layer holds of its last forward, and for how long; which forwards move the running statistics."""

import base64
import copy
import pickle
import re
import weakref
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn.backends import select

rng = np.random.default_rng(0)
X, DY = rng.normal(3, 2, (2, 6, 3, 5)).astype(np.float32)
BEFORE = "backward before forward: call the layer on x first, y = bn(x)"
FAILED = "backward after a forward that raised an error: call the layer again, y = bn(x)"
EVALUATION = (
    "backward after a forward in evaluation, which keeps no x unless asked to: bn.eval(backward=True), then y = bn(x)"
)


def _no_backward(bn: fastbn.BatchNorm, why: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(why)}$"):
        bn.backward(DY)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda bn: pickle.loads(pickle.dumps(bn)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_of_the_layer_without_its_last_batch(how: str, backend: str) -> None:
    bn = fastbn.BatchNorm(3, momentum=None, backend=backend).eval(backward=True)
    size = len(pickle.dumps(bn))
    large = np.repeat(X, 1000, 0)
    for forward in (bn, bn.train()):
        forward(large)
        assert len(pickle.dumps(bn)) < size + 100
    other = COPIES[how](bn)
    _no_backward(other, BEFORE)
    assert bn.backward(large).shape == large.shape  # the layer itself has it still
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[key], value)
    assert (other.training, other.momentum, other.backend) == (True, None, backend)
    np.testing.assert_array_equal(other(X), bn(X))


# Of a layer whose pickles had its last forward, a named tuple of its own, and knew no eval(backward=True).
OLD = (
    "c-nnZy>1gh5I+AKIUq-g5CuXhP2&PlP$1jFMI;Wc2=u4DyFKp-cF)?~i;@D#DH3dHJ5LIyqT&rGcn5e2cmX;(nBB7jl9h~Z?q+vqzWa9Oo7FFmYMwLGO^MQx"
    "=to4yOyrV-x%0xtfsL2&_zXTk&vZn=L(L>5iGslF*kwwIE+kdpS51vh6&wzJ{{Axm!G4)G&p8#k;BYwny0Ug<>f|KD+=^)=`gBUcG!SHZ3Y+y3Of`K9i}^=5"
    "f}US9mFExy!OK5r?&W(LBGZaU{EmtQc}kj6NkxoUO_HXWpfERkT4F*d3n4Nw36&;V;r4zZqKqh-T%Q~hiTiC#&+HoG#)NQAz}$Dl`eB?)+ULc4oe?PsGTjL!"
    "jdP*2EMkp>S;w?QQXVeB_s(HliJ;_P@vG;+x{Gn!^JYWqVCmN*stK@%?2%1p2iwV|x#VV2G77Lqt`0lDq0cE1x8QvL_G)moS`8dd=l?t3T$84sht^%qo*l7M"
    "1y!NzDNXG3nxP`c7%~sTH!fU4ZyU7cS1%mwgYrVQ2i^!D^cni6k^9ZPwf;)MC@`(p>&R&@u;OdPc_B2QB&z($4gBw-c%J<e58K_A&SKmxsT_<p-*P0kwDRqB"
    "k+&{tyQ1O(@d6EJD8rDR#Eggug`kM~e*vN)KU@"
)


def test_older_pickles_are_read_and_their_last_forward_dropped() -> None:
    bn = pickle.loads(zlib.decompress(base64.b85decode(OLD)))
    _no_backward(bn, BEFORE)
    np.testing.assert_allclose(bn.running_mean, [0.2, 0.3], rtol=1e-6)
    bn.training = False  # by hand: eval() would bring what the pickle lacks
    x = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(bn(x), (x - bn.running_mean) / np.sqrt(bn.running_var + bn.eps), rtol=1e-5)
    _no_backward(bn, EVALUATION)
    assert bn.train()(x).shape == (2, 2)
    assert pickle.loads(b"cfastbn.state\n_Saved\n.")._fields == ("x", "statistics", "overwritten", "across")
    assert isinstance(pickle.loads(b"cfastbn.errors\nBackendUnavailable\n(Va\ntR."), fastbn.BackendUnavailable)


class _Slotted(fastbn.BatchNorm):
    __slots__ = ("absent", "tag")


@pytest.mark.parametrize("how", COPIES)
def test_copies_hold_the_slots_of_subclasses(how: str) -> None:
    bn = _Slotted(3)
    bn.tag = "stem"
    other = COPIES[how](bn)
    assert other.tag == "stem"
    assert not hasattr(other, "absent")
    np.testing.assert_array_equal(other.gamma, bn.gamma)


class _Frozen(fastbn.BatchNorm):
    """Its `train` needs what its own constructor makes, and does not call that of the base."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, backend="reference")
        self.frozen = True

    def train(self, mode: bool = True) -> fastbn.BatchNorm:
        self.training = mode and not self.frozen
        return self


def test_subclasses_may_override_train() -> None:
    bn = _Frozen(3).train()
    bn(X)
    assert bn.num_batches_tracked == 0
    _no_backward(bn, EVALUATION)


def _assigned(bn: fastbn.BatchNorm) -> fastbn.BatchNorm:
    bn.training = False
    return bn


# after this, which takes what the layer held before: is x held?
HELD: dict[str, tuple[Callable[[fastbn.BatchNorm], Any], bool]] = {
    "training": (lambda bn: bn.train(), True),
    "eval(backward=True)": (lambda bn: bn.eval(backward=True), True),
    "eval": (lambda bn: bn.eval(), False),
    "eval again": (lambda bn: bn.eval(backward=True).eval(), False),
    "train(False)": (lambda bn: bn.eval(backward=True).train(False), False),
    "training = False": (_assigned, False),
}


@pytest.mark.parametrize("mode", HELD)
@pytest.mark.parametrize("track", [True, False])
def test_evaluation_keeps_x_only_where_asked(mode: str, track: bool, backend: str) -> None:
    bn, set_mode, (before, x) = (
        fastbn.BatchNorm(3, track_running_stats=track, backend=backend),
        HELD[mode],
        (X.copy(), X.copy()),
    )
    bn(before)
    first, last = weakref.ref(before), weakref.ref(x)
    del before
    assert first() is not None
    set_mode[0](bn)(x)
    del x
    assert first() is None
    assert (last() is not None) == set_mode[1]
    if set_mode[1]:
        assert bn.backward(DY).shape == DY.shape
    else:
        _no_backward(bn, EVALUATION)


@pytest.mark.parametrize("backward", [False, True])
def test_an_x_that_was_overwritten_is_let_go(backward: bool, backend: str) -> None:
    bn, x = fastbn.BatchNorm(3, backend=backend), X.copy()
    bn(x, out=None if backward else x)
    if backward:
        bn.backward(DY, out=x)
    held = weakref.ref(x)
    del x
    assert held() is None


def test_a_forward_that_fails_is_never_taken_for_the_one_before(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that refuses its input has changed nothing; one that fails after y has changed no statistics, and says so."""
    bn = fastbn.BatchNorm(3, momentum=None, backend=backend)
    bn(X)
    want, state = bn.backward(DY), bn.state_dict()
    for wrong in ({"x": X[:, :2]}, {"x": X.astype(int)}, {"x": X, "out": np.empty(3, np.float32)}):
        with pytest.raises((TypeError, ValueError)):
            bn(**wrong)
        np.testing.assert_array_equal(bn.backward(DY), want)

    def fails(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(select(backend), "track", fails)
        with pytest.raises(MemoryError):
            bn(2 * X)
    _no_backward(bn, FAILED)
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, state[key])
    bn(X)
    np.testing.assert_array_equal(bn.backward(DY), want)


def test_parameters_that_are_lists_are_the_forwards_too(backend: str) -> None:
    bn = fastbn.BatchNorm(3, backend=backend)
    want = fastbn.BatchNorm(3, backend=backend)
    want.gamma, bn.gamma = np.arange(3, dtype=np.float32), [0, 1, 2]  # type: ignore[assignment] # an array_like
    want(X), bn(X)
    bn.gamma[:] = [9, 9, 9]  # type: ignore[index]
    np.testing.assert_array_equal(bn.backward(DY), want.backward(DY))
    np.testing.assert_array_equal(bn.dgamma, want.dgamma)


SEQUENCES = (
    "call eval call",
    "off call eval call train on call eval call",
    "call off call call eval call reset call on reset call train call",
    "call eval off call train call on call",
    "off reset call eval call",
)  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_tracking_is_switched_as_pytorch_has_it(
    sequence: str, made: bool, momentum: float | None, backend: str
) -> None:
    """`track_running_stats` of a living layer: training moves what there is, or leaves it; evaluation uses what there
    is.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    options: dict[str, Any] = {"momentum": momentum, "track_running_stats": made}
    theirs = torch.nn.BatchNorm1d(3, dtype=torch.float64, **options)
    bn = fastbn.BatchNorm(3, dtype="float64", backend=backend, **options)
    for step, word in enumerate(sequence.split()):
        if word == "call":
            x = (step + 1) * X.astype(np.float64) + step
            np.testing.assert_allclose(
                bn(x), theirs(torch.from_numpy(x)).detach().numpy(), rtol=1e-9, atol=1e-9, err_msg=f"step {step}"
            )
        elif word == "reset":
            if made or not theirs.track_running_stats:  # PyTorch's fails where there is nothing to reset
                bn.reset_running_stats(), theirs.reset_running_stats()
        elif word in ("on", "off"):
            bn.track_running_stats = theirs.track_running_stats = word == "on"
        else:
            getattr(bn, word)(), getattr(theirs, word)()
        state, want = bn.state_dict(), theirs.state_dict()
        assert list(state) == list(want)
        for key, value in want.items():
            np.testing.assert_allclose(state[key], value.numpy(), rtol=1e-12, err_msg=f"{key}, step {step}")
    other = fastbn.BatchNorm(3, dtype="float64", backend=backend, track_running_stats=made)
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.eval()(x), bn.eval()(x))
