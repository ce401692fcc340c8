"""convert and revert: what of a model changes (whose kernels run), and what does not (all else)."""

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the bridge to PyTorch: pip install 'fastbn[torch]'")

import fastbn.torch  # noqa: E402

pytestmark = pytest.mark.peers

KINDS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


class Net(torch.nn.Module):  # type: ignore[misc]
    """Three ranks, one module in two places, one without parameters, one without statistics, in a list and in a
    dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.shared = torch.nn.BatchNorm2d(4, momentum=None)
        self.blocks = torch.nn.ModuleList(
            [torch.nn.Sequential(self.shared, torch.nn.ReLU()), torch.nn.BatchNorm2d(4, affine=False)]
        )
        self.more = torch.nn.ModuleDict(
            {"volume": torch.nn.BatchNorm3d(2, track_running_stats=False), "flat": torch.nn.BatchNorm1d(4)}
        )
        self.slim = torch.nn.BatchNorm1d(4, bias=False)

    def forward(self, x: Any) -> Any:
        x = self.blocks[0](self.shared(self.conv(x)))
        x = self.blocks[1](x)
        x = self.more["volume"](x.unflatten(1, (2, 2))).flatten(1, 2)
        return self.slim(self.more["flat"](x.mean((2, 3))))


def _kinds(model: Any) -> list[type]:
    return [type(m) for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def _state(model: Any) -> dict[str, Any]:
    """Everything about a model by name: the objects themselves."""
    found = {
        f"{name} {k}": id(v)
        for name, m in model.named_modules()
        for k, v in vars(m).items()
        if not isinstance(v, bool | float | int)
    }
    flags = {
        f"{name} {k}": v
        for name, m in model.named_modules()
        for k, v in vars(m).items()
        if isinstance(v, bool | float | int)
    }
    tensors = {name: (id(v), v.requires_grad) for name, v in [*model.named_parameters(), *model.named_buffers()]}
    return {**found, **flags, **tensors, **{name: id(m) for name, m in model.named_modules()}}


def test_the_class_changes_and_nothing_else() -> None:
    model = Net()
    model.shared.eval()
    model.more["flat"].weight.requires_grad_(False)
    before = _state(model)
    assert fastbn.torch.convert(model) is model
    assert _state(model) == before
    wanted = [getattr(fastbn.torch, kind.__name__) for kind in _kinds(Net())]
    assert _kinds(model) == wanted
    assert model.blocks[0][0] is model.shared
    assert "fastbn.BatchNorm2d(4" in repr(model)
    fastbn.torch.convert(model)  # once more changes nothing
    assert _kinds(model) == wanted
    assert fastbn.torch.revert(model) is model
    assert _state(model) == before
    assert _kinds(model) == _kinds(Net())
    assert repr(model) == repr(Net())


def test_training_goes_as_before_and_an_optimizer_goes_on() -> None:
    """Five steps of both, converted after the first and reverted before the last: the same losses, parameters and
    statistics.
    """
    torch.manual_seed(0)
    model = Net().double()
    models = [model, copy.deepcopy(model)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in models]
    data = torch.randn(5, 8, 3, 6, 6, dtype=torch.float64) * 3 + 10
    for number, x in enumerate(data):
        if number == 1:
            fastbn.torch.convert(models[1])
            assert fastbn.torch.BatchNorm2d in _kinds(models[1])
        if number == 4:
            fastbn.torch.revert(models[1])
        losses = []
        for m, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = (m(x) - torch.linspace(-1, 1, 4)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    for key, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[key], value, rtol=1e-6, atol=1e-9)
    for m in models:
        m.eval()
    with torch.no_grad():
        torch.testing.assert_close(fastbn.torch.convert(models[1])(data[0]), models[0](data[0]), rtol=1e-6, atol=1e-9)


def test_hooks_of_every_kind_stay() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    seen: list[str] = []

    def note(name: str) -> Any:
        return lambda *arguments, **options: seen.append(name)

    bn = model[0]
    bn.register_forward_pre_hook(note("forward pre"))
    bn.register_forward_hook(note("forward"))
    bn.register_full_backward_pre_hook(note("backward pre"))
    bn.register_full_backward_hook(note("backward"))
    bn.register_state_dict_pre_hook(note("state_dict pre"))
    bn.register_state_dict_post_hook(note("state_dict"))
    bn.register_load_state_dict_pre_hook(note("load pre"))
    bn.register_load_state_dict_post_hook(note("load"))
    bn.weight.register_hook(note("weight"))
    bn.weight.register_post_accumulate_grad_hook(note("accumulated"))

    def use() -> list[str]:
        seen.clear()
        model(torch.randn(4, 2, 3, 3, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(seen)

    before = use()
    assert len(set(before)) == 10
    fastbn.torch.convert(model)
    assert sorted(use()) == sorted(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_a_batch_norm(kind: str) -> None:
    model = getattr(torch.nn, kind)(3)
    assert type(fastbn.torch.convert(model)) is getattr(fastbn.torch, kind)
    assert type(fastbn.torch.revert(model)) is getattr(torch.nn, kind)


class Mine(torch.nn.BatchNorm2d):  # type: ignore[misc]
    pass


class OfOurs(fastbn.torch.BatchNorm2d):  # type: ignore[misc,name-defined]
    def forward(self, input: Any) -> Any:
        return super().forward(input) + 1


def test_subclasses_are_left_alone_and_reported() -> None:
    lazy = torch.nn.LazyBatchNorm2d()
    model = torch.nn.Sequential(
        torch.nn.SyncBatchNorm(2), Mine(2), torch.nn.BatchNorm2d(2), lazy, torch.nn.InstanceNorm2d(2), OfOurs(2)
    )
    kinds = [type(m) for m in model]
    with pytest.warns(
        UserWarning, match=r"left alone.*0 \(torch\.nn\..*SyncBatchNorm\), 1 \(.*Mine\), 3 \(.*LazyBatchNorm2d\)"
    ):
        fastbn.torch.convert(model)
    assert [type(m) for m in model] == [*kinds[:2], fastbn.torch.BatchNorm2d, *kinds[3:]]
    wanted = {"0": torch.nn.SyncBatchNorm, "1": Mine, "3": torch.nn.LazyBatchNorm2d, "5": OfOurs}
    assert fastbn.torch.left_alone(model) == wanted
    with pytest.warns(
        UserWarning, match=r"revert left alone, for .* derived from fastbn's: 5 \(.*\.OfOurs\)$"
    ) as caught:
        assert [type(m) for m in fastbn.torch.revert(model)] == kinds
    assert caught[0].filename == __file__
    x = torch.randn(4, 2, 3, 3)
    with torch.no_grad():
        lazy(x)
        torch.testing.assert_close(model[5](x), torch.nn.BatchNorm2d(2)(x) + 1)
    with pytest.warns(UserWarning, match="left alone"):  # now that it knows its size, it is one of PyTorch's three
        assert type(fastbn.torch.convert(model)[3]) is fastbn.torch.BatchNorm2d
    with pytest.warns(UserWarning, match="the model itself"):
        fastbn.torch.convert(Mine(2))


class FrozenBatchNorm2d(torch.nn.Module):  # type: ignore[misc]
    """As torchvision and detectron2 have it: a batch norm by its name alone."""


class FrozenBatchNormAct2d(torch.nn.Module):  # type: ignore[misc]
    """As timm has it: with modules of its own, none of them a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.act = torch.nn.Identity(), torch.nn.ReLU()


class ConvBatchNorm(torch.nn.Sequential):  # type: ignore[misc]
    """What holds one is none."""


def test_batch_norms_by_their_name_alone_are_reported() -> None:
    model = ConvBatchNorm(FrozenBatchNorm2d(), torch.nn.BatchNorm2d(2), FrozenBatchNormAct2d())
    with pytest.warns(UserWarning, match=r"left alone.*: 0 \(.*FrozenBatchNorm2d\), 2 \(.*FrozenBatchNormAct2d\)$"):
        fastbn.torch.convert(model)
    assert type(model[1]) is fastbn.torch.BatchNorm2d
    assert fastbn.torch.left_alone(model) == {"0": FrozenBatchNorm2d, "2": FrozenBatchNormAct2d}
    assert not fastbn.torch.left_alone(ConvBatchNorm(torch.nn.BatchNorm2d(2), fastbn.torch.SyncBatchNorm(2)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_model_is_reported() -> None:
    scripted = torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)))
    with pytest.warns(UserWarning, match=r"left alone.*: 1 \(torch\.jit\..*ScriptModule\)$"):
        fastbn.torch.convert(scripted)


def test_a_model_without_batch_norms_is_reported_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    with pytest.warns(UserWarning) as caught:
        assert fastbn.torch.convert(model) is model
    assert [str(w.message) for w in caught] == [
        "fastbn.torch.convert found no batch norm in torch.nn.modules.container.Sequential: nothing runs on fastbn's "
        "kernels"
    ]
    assert caught[0].filename == __file__
    for quiet in (fastbn.torch.BatchNorm1d(3), torch.nn.Sequential(fastbn.torch.SyncBatchNorm(3))):
        fastbn.torch.convert(quiet)  # warnings are errors here


def test_every_kind_reverts_to_pytorchs() -> None:
    model = torch.nn.Sequential(*(getattr(torch.nn, kind)(2) for kind in (*KINDS, "SyncBatchNorm")))
    kinds, state = [type(m) for m in model], model.state_dict(keep_vars=True)
    with pytest.warns(UserWarning, match=r"left alone.*: 3 \(torch\.nn\..*SyncBatchNorm\)"):
        fastbn.torch.convert(model)
    model[3] = fastbn.torch.convert_sync_batchnorm(model[3])
    assert [type(m) for m in model] == [getattr(fastbn.torch, kind.__name__) for kind in kinds]
    fastbn.torch.revert(model)
    assert [type(m) for m in model] == kinds
    assert vars(model[3]).keys() == vars(torch.nn.SyncBatchNorm(2)).keys()
    assert all(value is state[key] for key, value in model.state_dict(keep_vars=True).items())
    model.eval()[3](torch.randn(3, 2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "SyncBatchNorm"])
def test_fx_and_script_name_the_remedy(kind: str, training: bool) -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(), getattr(fastbn.torch, kind)(4)).train(training)
    own, again = ("sync", "_sync_batchnorm") if kind == "SyncBatchNorm" else ("modules", "")
    words = rf"given a model with fastbn\.torch\.{own}\.{kind}, .*: call fastbn\.torch\.revert\(model\) first, "
    words += rf"fastbn\.torch\.convert{again}\(model\) afterwards$"
    with pytest.raises(torch.fx.proxy.TraceError, match=r"^torch\.fx: " + words):
        torch.fx.symbolic_trace(model)
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.script: " + words):
        torch.jit.script(model)
    fastbn.torch.revert(model)
    torch.fx.symbolic_trace(model)
    if kind != "SyncBatchNorm":  # which PyTorch can't compile either
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_can_not_be_reverted_is_told_another_remedy() -> None:
    parametrized = fastbn.torch.BatchNorm2d(2)
    torch.nn.utils.parametrize.register_parametrization(parametrized, "weight", torch.nn.Identity())
    for module in (OfOurs(2), parametrized):
        kind, model = type(module), torch.nn.Sequential(torch.nn.ReLU(), module)
        with pytest.warns(UserWarning, match=rf"revert left alone.*: 1 \({kind.__module__}\.{kind.__name__}\)$"):
            fastbn.torch.revert(model)
        words = (
            rf"given a model with {kind.__module__}\.{kind.__name__}, which .*, nor can fastbn\.torch\.revert "
            rf"swap it: remove its param"
        )
        with pytest.raises(RuntimeError, match=r"^torch\.jit\.script: " + words):
            torch.jit.script(model)
        if module is not parametrized:  # which torch.fx takes for one of PyTorch's own, and leaves whole
            with pytest.raises(torch.fx.proxy.TraceError, match=r"^torch\.fx: " + words):
                torch.fx.symbolic_trace(model)
    torch.nn.utils.parametrize.remove_parametrizations(parametrized, "weight")
    assert type(fastbn.torch.revert(parametrized)) is torch.nn.BatchNorm2d


def test_pytorchs_own_conversions_still_know_them() -> None:
    model = fastbn.torch.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2)))
    assert type(torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))[1]) is torch.nn.SyncBatchNorm
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.nn.utils.fuse_conv_bn_eval(model[0], model[1])(x), model(x))


def test_parametrized_and_pruned_parameters_are_used() -> None:
    class Doubled(torch.nn.Module):  # type: ignore[misc]
        def forward(self, weight: Any) -> Any:
            return 2 * weight

    x = torch.randn(4, 2, 3, 3)
    for library in (torch.nn, fastbn.torch):
        bn = library.BatchNorm2d(2)
        torch.nn.utils.parametrize.register_parametrization(bn, "weight", Doubled())
        torch.testing.assert_close(bn(x), 2 * torch.nn.BatchNorm2d(2)(x))
        bn(x).sum().backward()
        assert bn.parametrizations.weight.original.grad is not None


def test_what_is_no_model_is_refused() -> None:
    for call in (fastbn.torch.convert, fastbn.torch.revert, fastbn.torch.left_alone):
        with pytest.raises(TypeError, match=r"model: given dict, want a torch\.nn\.Module"):
            call({})
