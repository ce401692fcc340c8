"""fastbn.torch.SyncBatchNorm in one process, where it is an ordinary batch norm, and the conversion of models."""

import copy
import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import distributed, nn  # noqa: E402 # behind the question whether it is there

from fastbn.torch import SyncBatchNorm, convert_sync_batchnorm, explain  # noqa: E402

pytestmark = pytest.mark.peers

MODULES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def test_the_constructor_is_pytorchs() -> None:
    own, theirs = (list(inspect.signature(cls).parameters.values()) for cls in (SyncBatchNorm, nn.SyncBatchNorm))
    assert [(p.name, p.default) for p in own[:8]] == [(p.name, p.default) for p in theirs[:8]]
    assert isinstance(SyncBatchNorm(3), nn.modules.batchnorm._BatchNorm)
    if "bias" in {p.name for p in theirs}:
        assert SyncBatchNorm(3, bias=False).bias is None
    with pytest.raises(TypeError):
        SyncBatchNorm(3, other=1)


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("rest", [(), (5,), (3, 4), (2, 3, 2)], ids=str)
def test_without_a_group_it_is_ordinary(rest: tuple[int, ...], options: dict[str, Any]) -> None:
    shape = (4, 3, *rest)
    own, theirs = SyncBatchNorm(3, **options), MODULES[len(shape)](3, **options)
    for mode in (True, True, False):
        x = torch.randn(shape, requires_grad=True)
        found, want = (torch.autograd.grad(bn.train(mode)(x).pow(3).sum(), x)[0] for bn in (own, theirs))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        assert explain(own, x).startswith("fastbn's kernels")
    torch.testing.assert_close(own.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-6)
    theirs.load_state_dict(own.state_dict(), strict=True)
    own.load_state_dict(theirs.state_dict(), strict=True)


def _message(module: Any, x: Any) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:  # whatever PyTorch raises
        module(x)
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    "x",
    [torch.ones(4), torch.ones(2, 0, 4), torch.ones(2, 5), torch.ones(1, 3), torch.ones(2, 3, dtype=torch.int64)],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)}",
)
def test_errors_are_pytorchs(x: Any) -> None:
    assert _message(SyncBatchNorm(3), x) == _message(nn.SyncBatchNorm(3), x)


@pytest.mark.parametrize("change", [lambda v: v.long(), lambda v: v[:1], lambda v: v.double(), lambda v: v.repeat(2)])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight"])
def test_tensors_that_do_not_go_with_it_are_refused_before_an_exchange(name: str, change: Any) -> None:
    """As PyTorch refuses them; the ranks' own way is asked here, without ranks."""
    module = SyncBatchNorm(3).requires_grad_(False)
    (module._parameters if name == "weight" else module._buffers)[name] = change(getattr(module, name))
    with pytest.raises(RuntimeError, match=r"scalar type|dtype|should contain|expected|mixed"):
        module._let_pytorch_refuse(torch.ones(4, 3))


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ranks' own way, in a group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(SyncBatchNorm, "_group", lambda self: distributed.group.WORLD)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_numbers_beside_other_ranks() -> None:
    x, want = torch.randn(4, 3), nn.BatchNorm1d(3, momentum=0.25)
    want(x)
    for momentum in (0.25, torch.tensor(0.25), np.array(0.25)):
        module = SyncBatchNorm(3)
        module.momentum = momentum
        module(x)
        torch.testing.assert_close(module.state_dict(), want.state_dict(), rtol=1e-6, atol=1e-6)
    odd = {
        "momentum": ("0.1", torch.tensor([0.1, 0.2]), [0.1], 10**400),
        "eps": ("1e-5", [1e-5], None, np.nan, np.inf, True, 0.0, 10**400),
    }
    for name, value in [(name, value) for name, values in odd.items() for value in values]:
        module = SyncBatchNorm(3)
        setattr(module, name, value)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: given .*(, want|, beyond the largest)"):
            module(x)
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.usefixtures("group")
def test_tensors_without_memory_beside_other_ranks() -> None:
    y = SyncBatchNorm(3)(torch._efficientzerotensor((4, 3)))
    assert torch.equal(y, torch.zeros(4, 3))
    module = SyncBatchNorm(3)
    for given in (torch._to_functional_tensor(torch.ones(4, 3)), torch.ones(4, 3).to_sparse()):
        with pytest.raises(TypeError, match=r"functional tensor, which has no memory|to_dense"):
            module(given)
    assert module.num_batches_tracked == 0


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("first", [True, False])
def test_the_profiler_shows_both_passes(first: bool) -> None:
    """Also of the first layer, whose input needs no gradient."""
    module, x = SyncBatchNorm(3), torch.randn(4, 3, requires_grad=not first)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        module(x).sum().backward()
    shown = {event.key for event in seen.key_averages() if event.key.startswith("fastbn")}
    assert shown == {"fastbn::sync_batch_norm", "fastbn::sync_batch_norm_backward"}


def _model() -> nn.Module:
    class Own(nn.BatchNorm2d):
        """A subclass of the user's."""

    shared = nn.BatchNorm1d(6)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(Own(4, eps=1e-3, momentum=None), nn.InstanceNorm2d(4)),
        nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, track_running_stats=False),
        nn.SyncBatchNorm(4), shared, shared,
    )  # fmt: skip
    model[1].eval()
    model[1].weight.requires_grad_(False)
    model[1].qconfig = "int8"
    return model


def test_a_converted_model_shares_what_it_was_made_of() -> None:
    model = _model()
    before, state = list(model.named_modules(remove_duplicate=False)), model.state_dict(keep_vars=True)
    assert convert_sync_batchnorm(model, process_group="group") is model
    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == [name for name, _ in before]
    for name, old in before:
        new = after[name]
        if not isinstance(old, nn.modules.batchnorm._BatchNorm):
            assert new is old
            continue
        assert type(new) is SyncBatchNorm
        assert new.process_group == "group"
        for attribute in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            assert getattr(new, attribute) is getattr(old, attribute), (name, attribute)
        for attribute in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
            assert getattr(new, attribute) == getattr(old, attribute), (name, attribute)
    assert after["1"].qconfig == "int8"
    assert not after["1"].training
    assert not after["1"].weight.requires_grad
    assert not hasattr(after["4"], "qconfig")
    assert after["7"] is after["8"]
    assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == {
        key: id(value) for key, value in state.items()
    }


def test_converting_as_pytorch_does() -> None:
    """Its classmethod and this one make the same of the same, but for a module in two places."""
    model = _model()[:7]
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    own = SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    names = {nn.SyncBatchNorm: SyncBatchNorm}
    assert [(n, names.get(type(m), type(m)), m.training) for n, m in theirs.named_modules()] == [
        (n, type(m), m.training) for n, m in own.named_modules()
    ]
    for (key, a), (other, b) in zip(theirs.state_dict().items(), own.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b)


def test_one_module_alone_and_again() -> None:
    bn = nn.BatchNorm2d(3)
    first = convert_sync_batchnorm(bn)
    assert type(bn) is nn.BatchNorm2d
    again = convert_sync_batchnorm(first, "group")
    assert (first.process_group, again.process_group) == (None, "group")
    assert first.weight is again.weight is bn.weight
    same = nn.Linear(2, 2)
    assert convert_sync_batchnorm(same) is same


def test_a_subclass_converts_to_itself() -> None:
    class Own(SyncBatchNorm):
        """A subclass of the user's."""

    assert type(Own.convert_sync_batchnorm(nn.BatchNorm1d(2))) is Own


def test_lazy_modules_must_have_seen_their_channels() -> None:
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="given LazyBatchNorm1d without channels yet; want one that has seen a batch"):
        convert_sync_batchnorm(lazy)
    lazy(torch.randn(3, 4))
    assert type(convert_sync_batchnorm(lazy)[0]) is SyncBatchNorm


def test_copies_and_pickles() -> None:
    bn = SyncBatchNorm(3, eps=1e-3, process_group=None)
    bn(torch.randn(4, 3))
    group = bn.process_group = object()
    twin = copy.deepcopy(bn)
    assert twin.process_group is group
    assert twin.weight is not bn.weight
    bn.process_group = None
    for other in (twin, pickle.loads(pickle.dumps(bn))):
        assert type(other) is SyncBatchNorm
        assert other.eps == 1e-3
        assert all(
            torch.equal(a, b) for a, b in zip(other.state_dict().values(), bn.state_dict().values(), strict=True)
        )
