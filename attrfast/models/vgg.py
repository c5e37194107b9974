"""VGG-style networks for small images: 3x3 convolutions with batch norm, and one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from attrfast.models._common import check_sizes, initialise, scaled

_POOL: Final = 0  # stands between the widths of two stages
_VGG16: Final = (
    *(64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, _POOL),
    *(512, 512, 512, _POOL, 512, 512, 512, _POOL),
)
_SMALL: Final = (32, 32, _POOL, 64, 64, _POOL, 128, 128)


class VGG(nn.Module):
    """Convolutions (`features`), the mean over positions, and a linear layer (`classifier`).

    The mean over positions lets one network take images of any size that survives its poolings.

    Args:
        plan: widths of the convolutions in order, with 0 for a 2x2 max-pooling.
        num_classes: outputs.
        in_channels: channels of the images.
        width: multiplies every convolution's width.

    Raises:
        InputError: a size with which no network can be built.
    """

    def __init__(self, plan: Sequence[int], *, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
        layers: list[nn.Module] = []
        channels = in_channels
        for step in plan:
            if step == _POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            out = scaled(step, width)
            layers += [
                # No bias: the batch norm that follows would subtract it again.
                nn.Conv2d(channels, out, kernel_size=3, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) images to (N, num_classes) logits."""
        features = self.pool(self.features(images))
        logits: torch.Tensor = self.classifier(features.flatten(1))
        return logits


def vgg16_bn(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> VGG:
    """VGG-16 with batch norm and a 512-unit linear head, for 32x32 images.

    With its default sizes 1.47e7 parameters and 3.13e8 multiply-adds in convolutions and the linear
    layer, 3.14e8 with those of the batch norms. Five poolings: images must be at least 32 pixels
    high and wide.

    Args:
        num_classes, in_channels, width: see `VGG`.

    Source: Simonyan and Zisserman 2014, configuration D, as is usual for CIFAR-10.
    """
    return VGG(_VGG16, num_classes=num_classes, in_channels=in_channels, width=width)


def vgg_small(num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> VGG:
    """Six convolutions in three stages: learns digits or Fashion-MNIST on a CPU in minutes.

    2.9e7 multiply-adds at 1x28x28 and 2.9e5 parameters. Two poolings: images must be at least 4
    pixels high and wide.

    Args:
        num_classes, in_channels, width: see `VGG`.
    """
    return VGG(_SMALL, num_classes=num_classes, in_channels=in_channels, width=width)
