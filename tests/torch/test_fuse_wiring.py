"""fastbn.torch.fuse leaves alone what is more than a pair, or not PyTorch's arithmetic."""

from typing import Any

import pytest

pytest.importorskip("torch", reason="fuses PyTorch's models: pip install 'fastbn[torch]'")
import torch
from fusing import X, check, left_in, used
from torch import nn

from fastbn.torch import fuse

pytestmark = pytest.mark.peers


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
