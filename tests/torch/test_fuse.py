"""fastbn.torch.fuse: every kind of layer, and models in evaluation, held against the models as they were; what is more
than a pair, or not PyTorch's arithmetic, is left alone.
"""

import copy
import io
import itertools
import re
from typing import Any

import pytest

pytest.importorskip("torch", reason="fuses PyTorch's models: pip install 'fastbn[torch]'")
import torch
from torch import nn

from fastbn.torch import SyncBatchNorm, convert_sync_batchnorm, fuse
from fastbn.torch.fuse import Folded

pytestmark = pytest.mark.peers

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def used(model: Any, dtype: Any = torch.float64) -> Any:
    """The model in evaluation, with statistics and parameters as after some training."""
    for module in model.modules():
        if isinstance(module, NORMS):
            if module.running_mean is not None:
                module.running_mean.normal_(0.5)
                module.running_var.uniform_(0.3, 3.0)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.to(dtype).eval()


def left_in(model: Any) -> list[str]:
    """The names of the batch norms that are still there."""
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def check(model: Any, *inputs: Any, left: tuple[str, ...] = ()) -> Any:
    """The fused model gives what the model gives, which is as it was, and has the batch norms `left` and no other."""
    before = copy.deepcopy(model.state_dict())
    want = model(*inputs)
    fused = fuse(model)
    assert left_in(fused) == list(left)
    relative = TOLERANCE[inputs[0].dtype]
    torch.testing.assert_close(fused(*inputs), want, rtol=relative, atol=relative * float(want.detach().abs().max()))
    assert type(fused) is type(model)
    assert not any(module.training for module in fused.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    return fused


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


CONVOLUTIONS = [(f"Conv{t}{rank}d", rank) for t in ("", "Transpose") for rank in (1, 2, 3)]
SETTINGS = itertools.cycle(
    [
        (True, True, torch.float32),
        (True, False, torch.float64),
        (False, True, torch.float64),
        (False, False, torch.float32),
    ]
)
LAYERS = [(*conv, groups, *next(SETTINGS)) for conv, groups in itertools.product(CONVOLUTIONS, (1, 2, 4))]


@pytest.mark.parametrize(("kind", "rank", "groups", "bias", "affine", "dtype"), LAYERS, ids=str)
def test_every_convolution(kind: str, rank: int, groups: int, bias: bool, affine: bool, dtype: Any) -> None:
    conv = getattr(nn, kind)(4, 8, 3, stride=2, padding=2, dilation=2, groups=groups, bias=bias)
    model = used(nn.Sequential(conv, getattr(nn, f"BatchNorm{rank}d")(8, affine=affine, eps=1e-3), nn.ReLU()), dtype)
    fused = check(model, torch.randn(3, 4, *(9, 8, 7)[:rank], dtype=dtype))
    assert fused[0].bias.shape == (8,)
    assert isinstance(fused[1], Folded if rank == 1 else nn.Identity)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_linear(affine: bool, bias: bool, dtype: Any) -> None:
    model = used(
        nn.Sequential(nn.Linear(5, 7, bias=bias), nn.BatchNorm1d(7, affine=affine), nn.Sigmoid(), nn.Linear(7, 2)),
        dtype,
    )
    check(model, torch.randn(6, 5, dtype=dtype))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    model = used(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4)))
    check(model, torch.randn(2, 3, 6, 5, dtype=torch.float64))


def test_large_means_and_small_variances_lose_nothing_in_float32() -> None:
    """Where float32 steps would: the folded weights are right to their own rounding."""
    model = used(nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4, eps=0.0)), torch.float32)
    model[1].running_mean.fill_(1e4)
    model[1].running_var.fill_(1e-4)
    wide = copy.deepcopy(model).double()
    want = fuse(wide)
    got = fuse(model)
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=6.1e-8, atol=0)


class Block(nn.Module):
    """As in a residual network: pairs written out in forward, not in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Any) -> Any:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.down(x))


class Network(nn.Module):
    """Blocks, a head, and a batch norm before any layer, which has nothing to be folded into."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.stem = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)])
        self.blocks = nn.Sequential(block(), block())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 6), nn.BatchNorm1d(6))

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        for module in self.stem:
            x = module(x)
        return self.head(self.blocks(x))


def test_a_residual_network() -> None:
    model = used(Network())
    fused = check(model, X, left=("first",))
    assert len(left_in(model)) == 9
    assert [p.requires_grad for p in fused.parameters()] == [True] * len(list(fused.parameters()))
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), fused(X))
    again = fuse(fused)
    assert torch.equal(again(X), fused(X))


class Untraceable(Block):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        return y if y.sum() > 1e9 else y * 1.0


class Depends(nn.Module):
    """What it calls depends on numbers: no graph is right for all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pair = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Untraceable(), Block())

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        x = self.pair(x) if x.sum() > -1e9 else x
        return self.blocks(x)


def test_what_can_not_be_traced_is_searched_part_by_part() -> None:
    check(used(Depends()), X, left=("pair", "blocks.2.bn1", "blocks.2.bn2"))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Any, skip: Any = None) -> Any:
        y = self.conv(x)
        if skip is None:
            y = y + x
        return self.bn2(self.conv2(self.bn(y)))


def test_optional_arguments_are_taken_both_ways() -> None:
    model = used(Optional())
    fused = check(model, X, left=("bn",))
    torch.testing.assert_close(fused(X, X), model(X, X), rtol=1e-12, atol=1e-12)


def test_a_batch_norm_of_another_axis_is_refused_not_wrong() -> None:
    """After a Linear on (N, L, features) a BatchNorm1d takes L for its channels, which only the input tells."""
    model = used(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    model(x)
    with pytest.raises(
        ValueError, match=r"^x: given rank 3, want 2: the batch norm here was folded into the layer before it$"
    ):
        fuse(model)(x)
    check(
        used(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(3))), torch.randn(2, 3, 5, dtype=torch.float64), left=("1",)
    )


def test_tracing_leaves_nothing_behind() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), None

        def forward(self, x: Any) -> Any:
            self.last = self.net(x)
            return self.last

    model = used(Remembers())
    fused = fuse(model)
    assert fused.last is None
    assert model.last is None
    assert fused.net[0].weight.data_ptr() != model.net[0].weight.data_ptr()


def test_frozen_weights_stay_frozen() -> None:
    model = used(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in fuse(model).parameters())


def test_channels_last_weights_stay_so() -> None:
    model = used(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    assert fuse(model)[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_training_mode_is_refused() -> None:
    message = "model: given in training mode, where batch norms use their batch's statistics: call model.eval() first"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        fuse(Network())
    with pytest.raises(TypeError, match=r"^model: given function, want a torch\.nn\.Module$"):
        fuse(used)


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, SyncBatchNorm])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(3, 4), (5, 3)), (nn.Conv1d(3, 4, 2), (5, 3, 6)), (nn.ConvTranspose2d(3, 4, 2), (2, 3, 5, 6))],
    ids=str,
)
def test_synchronized_batch_norms(layer: Any, shape: tuple[int, ...], norm: Any) -> None:
    fused = check(used(nn.Sequential(layer, norm(4))), torch.randn(shape, dtype=torch.float64))
    assert isinstance(fused[1], Folded)
    with pytest.raises(ValueError, match=rf"want {len(shape)}: the batch norm here was folded"):
        fused[1](torch.randn(4, *shape))


def test_a_model_converted_to_synchronized_ones() -> None:
    """As one trains it, and then serves it."""
    model = used(convert_sync_batchnorm(Network()))
    check(model, X, left=("first",))


# What is left alone


class Wired(nn.Module):
    """A convolution and a batch norm, used in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        if way == "two names":
            self.other = self.bn
        if way == "a plain list":
            self.both = [[self.conv, self.bn]]

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        if self.way == "output used twice":
            return self.bn(y) + y
        if self.way == "output returned too":
            return torch.stack([self.bn(y), y])
        if self.way == "layer called twice":
            return self.bn(self.conv(y))
        if self.way == "norm called twice":
            return self.bn(self.bn(y))
        if self.way == "weight used elsewhere":
            return self.bn(y) + self.conv.weight.sum()
        if self.way == "something between":
            return self.bn(torch.relu(y))
        if self.way == "two names":
            return self.other(y)
        if self.way == "a plain list":
            return self.both[0][1](self.both[0][0](x))
        raise AssertionError(self.way)


WAYS = [
    "output used twice",
    "output returned too",
    "layer called twice",
    "norm called twice",
    "weight used elsewhere",
    "something between",
]


@pytest.mark.parametrize("way", WAYS)
def test_pairs_that_are_more_than_a_pair_are_left_alone(way: str) -> None:
    check(used(Wired(way)), X, left=("bn",))


def test_a_module_of_two_names_is_left_alone() -> None:
    check(used(Wired("two names")), X, left=("bn",))


def test_what_a_plain_list_refers_to_still_belongs_together() -> None:
    model = used(Wired("a plain list"))
    torch.testing.assert_close(fuse(model)(X), model(X), rtol=1e-12, atol=1e-12)


class Standardized(nn.Conv2d):
    def forward(self, x: Any) -> Any:
        return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Activated(nn.BatchNorm2d):
    def forward(self, x: Any) -> Any:
        return torch.relu(super().forward(x))


class Scaled(nn.Conv2d):
    def _conv_forward(self, x: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(x, weight * 2, bias)


class Plain(nn.Conv2d):
    """Another initialization, the same arithmetic."""


class Own(nn.BatchNorm2d):
    """As fastbn's own subclasses are: a forward of fastbn's that computes what PyTorch's does."""

    def forward(self, x: Any) -> Any:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


Own.__module__ = "fastbn.torch.modules"


@pytest.mark.parametrize("conv", [Standardized, Scaled])
def test_subclasses_with_arithmetic_of_their_own_are_left_alone(conv: Any) -> None:
    check(used(nn.Sequential(conv(3, 4, 1), nn.BatchNorm2d(4))), X, left=("1",))
    check(used(nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4))), X, left=("1",))


def test_subclasses_with_pytorchs_or_fastbns_arithmetic_are_folded() -> None:
    check(used(nn.Sequential(Plain(3, 4, 1), Own(4), nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4))), X)


def _hooked(model: Any) -> None:
    model[1].register_forward_hook(lambda module, inputs, y: y * 2)


def _hooked_before(model: Any) -> None:
    model[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))


def _parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model[0])


def _parametrized_bias(model: Any) -> None:
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())


def _computed(model: Any) -> None:
    """A weight that is no parameter: who made it may make another."""
    weight = model[0].weight.detach() * 2
    del model[0].weight
    model[0].weight = weight


def _pruned(model: Any) -> None:
    from torch.nn.utils import prune

    with torch.no_grad():  # PyTorch does not copy a model whose weight is the result of a product that has a gradient
        prune.l1_unstructured(model[0], "weight", 0.5)


def _patched(model: Any) -> None:
    inner = model[1].forward
    model[1].forward = lambda x: inner(x) * 2


def _training(model: Any) -> None:
    model[1].train()
    model[1].momentum = 0.0


@pytest.mark.parametrize(
    "change", [_hooked, _hooked_before, _parametrized, _parametrized_bias, _computed, _pruned, _patched, _training]
)
def test_changed_modules_are_left_alone(change: Any) -> None:
    model = used(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    change(model)
    fused = fuse(model)
    assert left_in(fused) == ["1"]
    torch.testing.assert_close(fused(X), model(X), rtol=1e-12, atol=1e-12)


def test_batch_norms_without_running_statistics_are_left_alone() -> None:
    check(used(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))), X, left=("1",))
