"""What tests of our own convolutions share: networks, what a pass launches, and the scores of float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

import attrfast

Tensor = torch.Tensor
LAST = torch.channels_last
Batches = list[tuple[Tensor, Tensor]]


def block(
    reads: int, makes: int, size: int, activation: nn.Module | None = None, **options: int
) -> nn.Sequential:
    convolution = nn.Conv2d(reads, makes, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(makes), activation or nn.Identity())


def trained_statistics(build: Callable[[], nn.Module]) -> tuple[nn.Module, Batches]:
    """A network of a body that makes 24 channels, channels-last, and a batch of it."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5))
    net = nn.Sequential(build(), head).to(memory_format=LAST)
    images = torch.randn(6, 3, 16, 15).contiguous(memory_format=LAST)
    net(images)  # batch norms have statistics
    return net.eval(), [(images, torch.arange(6) % 5)]


def launches_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every launch of a pass will be for."""
    made: list[str] = []

    def note(name: str) -> None:
        real = getattr(module, name)

        def noted(*args: object, **kwargs: object) -> object:
            made.append("transposed" if kwargs.get("transposed") else name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    note("convolve")
    note("gradient")
    return made


def assert_scores_of_float64(net: nn.Module, data: Batches, criterion: str) -> None:
    got = attrfast.attribute(net, data, criterion, progress=False)
    wide = [(images.double(), labels) for images, labels in data]
    want = attrfast.attribute(copy.deepcopy(net).double(), wide, criterion, progress=False)
    assert (got.importance - want.importance).norm() <= 1e-5 * want.importance.norm()
