"""fastbn.torch.fuse: every kind of layer, and models in evaluation, held against the models as they were."""

import copy
import io
import itertools
import re
from typing import Any

import pytest

pytest.importorskip("torch", reason="fuses PyTorch's models: pip install 'fastbn[torch]'")
import torch
from fusing import TOLERANCE, X, check, left_in, used
from torch import nn

from fastbn.torch import SyncBatchNorm, convert_sync_batchnorm, fuse
from fastbn.torch.fuse import Folded

pytestmark = pytest.mark.peers


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
        ValueError,
        match=r"^x: given rank 3, want 2: the batch norm here was folded into the layer "
        r"before it$",
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
