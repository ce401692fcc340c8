"""Two networks in plain torch.nn for `bench.resnet`.

ResNet-18 (He et al. 2015) and one of MobileNetV2's kind (Sandler et al. 2018).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

CLASSES = 10


def _quiet(body: nn.Sequential) -> nn.Sequential:
    """A residual branch that begins as nothing (Goyal et al. 2017).

    Else a step magnifies rounding errors tenfold, with any library.
    """
    nn.init.zeros_(next(norm for norm in reversed(body) if isinstance(norm, nn.BatchNorm2d)).weight)
    return body


def _convolved(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, act: Any = nn.ReLU
) -> list[nn.Module]:
    """Convolution, batch normalization, activation."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), *([act(inplace=True)] if act else [])]


class Basic(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = _quiet(
            nn.Sequential(*_convolved(inputs, outputs, 3, stride), *_convolved(outputs, outputs, 3, act=None))
        )
        alike = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if alike else nn.Sequential(*_convolved(inputs, outputs, 1, stride, act=None))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        y: Tensor = self.act(self.body(x) + self.shortcut(x))
        return y


class Inverted(nn.Module):
    """Widened by 1 x 1, 3 x 3 per channel, narrowed by 1 x 1; a shortcut where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int) -> None:
        super().__init__()
        wide = inputs * widen
        first = _convolved(inputs, wide, 1, act=nn.ReLU6) if widen > 1 else []
        depth = _convolved(wide, wide, 3, stride, wide, act=nn.ReLU6)
        self.body = nn.Sequential(*first, *depth, *_convolved(wide, outputs, 1, act=None))
        self.add = inputs == outputs and stride == 1
        if self.add:
            _quiet(self.body)

    def forward(self, x: Tensor) -> Tensor:
        """Images to images."""
        y: Tensor = self.body(x)
        return x + y if self.add else y


def _headed(body: list[nn.Module], features: int) -> nn.Sequential:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, CLASSES))


def resnet18() -> nn.Sequential:
    """ResNet-18: 20 batch normalizations of 64 to 512 channels."""
    body: list[nn.Module] = [*_convolved(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        body += [Basic(inputs, outputs, stride), Basic(outputs, outputs, 1)]
        inputs = outputs
    return _headed(body, inputs)


def mobilenet() -> nn.Sequential:
    """MobileNetV2 at width 1.

    52 batch normalizations of 16 to 1280 channels, most of the time not spent in convolutions.
    """
    body: list[nn.Module] = [*_convolved(3, 32, 3, 2, act=nn.ReLU6)]
    inputs = 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for widen, outputs, repeats, stride in stages:
        for k in range(repeats):
            body.append(Inverted(inputs, outputs, stride if k == 0 else 1, widen))
            inputs = outputs
    return _headed([*body, *_convolved(inputs, 1280, 1, act=nn.ReLU6)], 1280)


NETWORKS = {"ResNet-18": resnet18, "MobileNetV2": mobilenet}
