"""Residual networks for 32x32 images, in the form given for CIFAR-10.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from attrfast.errors import InputError
from attrfast.models._common import check_sizes, initialise, scaled

Shortcut = Literal["A", "B"]

_STAGES: Final = (16, 32, 64)


class PaddedShortcut(nn.Module):
    """Option A: every second pixel, and constant zeros for the added channels. No weights."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.added = out_channels - in_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) to (N, C + added, H / stride, W / stride)."""
        before = self.added // 2
        channels = (0, 0, 0, 0, before, self.added - before)
        return functional.pad(x[:, :, :: self.stride, :: self.stride], channels)


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Option B: a 1x1 convolution with batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == channels:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PaddedShortcut(in_channels, channels, stride)
        else:
            self.shortcut = _projection(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        out: torch.Tensor = self.relu(residual + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """One convolution, three stages of basic blocks, the mean over positions, a linear layer.

    Args:
        blocks: basic blocks in a stage; the network is 6 * blocks + 2 layers deep.
        num_classes: outputs.
        in_channels: channels of the images.
        width: multiplies the widths 16, 32 and 64 of the stages.
        shortcut: how a block that changes its width leads its input past its convolutions. "A"
            (zero padding, the form of the paper's CIFAR-10 networks) couples the channels of two
            stages to constants, which pins them: attrfast then leaves the stages' own widths whole
            and prunes inside the blocks alone. "B" (1x1 convolution) lets every stage shrink.

    Raises:
        InputError: a size with which no network can be built, or an unknown shortcut.
    """

    def __init__(
        self,
        blocks: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        shortcut: Shortcut = "B",
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
        if blocks < 1:
            raise InputError(f"blocks is {blocks}; a stage needs at least 1")
        if shortcut not in get_args(Shortcut):
            raise InputError(f'shortcut is {shortcut!r}; use "A" (padding) or "B" (1x1 convolution)')
        stages = [scaled(channels, width) for channels in _STAGES]
        self.conv1 = nn.Conv2d(in_channels, stages[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stages[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(stages[0], stages[0], blocks, 1, shortcut)
        self.layer2 = _stage(stages[0], stages[1], blocks, 2, shortcut)
        self.layer3 = _stage(stages[1], stages[2], blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(stages[2], num_classes)
        initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) images to (N, num_classes) logits."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.pool(self.layer3(self.layer2(self.layer1(x))))
        logits: torch.Tensor = self.fc(x.flatten(1))
        return logits


def _stage(
    in_channels: int, channels: int, blocks: int, stride: int, shortcut: Shortcut
) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride, shortcut)
    rest = [BasicBlock(channels, channels, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def resnet20(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, shortcut: Shortcut = "B"
) -> ResNet:
    """ResNet-20 for 32x32 images: 4.1e7 multiply-adds and 2.7e5 parameters.

    Args:
        num_classes, in_channels, width, shortcut: see `ResNet`.
    """
    return ResNet(3, num_classes=num_classes, in_channels=in_channels, width=width, shortcut=shortcut)


def resnet32(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, shortcut: Shortcut = "B"
) -> ResNet:
    """ResNet-32 for 32x32 images: 6.9e7 multiply-adds and 4.7e5 parameters.

    Args:
        num_classes, in_channels, width, shortcut: see `ResNet`.
    """
    return ResNet(5, num_classes=num_classes, in_channels=in_channels, width=width, shortcut=shortcut)


def resnet44(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, shortcut: Shortcut = "B"
) -> ResNet:
    """ResNet-44 for 32x32 images: 9.8e7 multiply-adds and 6.6e5 parameters.

    Args:
        num_classes, in_channels, width, shortcut: see `ResNet`.
    """
    return ResNet(7, num_classes=num_classes, in_channels=in_channels, width=width, shortcut=shortcut)


def resnet56(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, shortcut: Shortcut = "B"
) -> ResNet:
    """ResNet-56 for 32x32 images: 1.26e8 multiply-adds and 8.6e5 parameters.

    Args:
        num_classes, in_channels, width, shortcut: see `ResNet`.
    """
    return ResNet(9, num_classes=num_classes, in_channels=in_channels, width=width, shortcut=shortcut)


def resnet110(
    num_classes: int = 10, in_channels: int = 3, width: float = 1.0, shortcut: Shortcut = "B"
) -> ResNet:
    """ResNet-110 for 32x32 images: 2.5e8 multiply-adds and 1.7e6 parameters.

    Args:
        num_classes, in_channels, width, shortcut: see `ResNet`.
    """
    return ResNet(18, num_classes=num_classes, in_channels=in_channels, width=width, shortcut=shortcut)
