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

DTYPES = [torch.float32, torch.bfloat16]
_BFLOAT16 = 2.0**-8  # half a unit in the last place


def assert_near(got: Tensor, want: Tensor, scaled: Tensor | float = 0.0, *, atol: float = 8e-6) -> None:
    """Whether sums in float32 are as exact as they can be in the dtype they are stored in.

    Args:
        want: in float64.
        scaled: the sum of the sizes of the products whose weight was rounded after a factor came to it.
        atol: for the sums.
    """
    rounding = _BFLOAT16 if got.dtype == torch.bfloat16 else 0.0
    error = (got.double() - want).abs()
    assert bool((error <= atol + rounding * (want.abs() + scaled)).all()), error.max()


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


def bfloat16_errors(
    net: nn.Module, data: Batches, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, float]:
    """How far scores of a pass in bfloat16 are from those of float64, by norms: ours, and the library's."""
    wide = [(images.double(), labels) for images, labels in data]
    want = attrfast.attribute(copy.deepcopy(net).double(), wide, progress=False).importance

    def error() -> float:
        got = attrfast.attribute(net, data, amp_dtype=torch.bfloat16, progress=False).importance
        return float((got - want).norm() / want.norm())

    ours = error()
    monkeypatch.setattr(module, "DTYPES", DTYPES[:1])
    return ours, error()
