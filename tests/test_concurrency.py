"""Scores and pruned networks do not depend on threads: neither on how many compute, nor on which else do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn

import attrfast

CRITERIA = ["attribution", "taylor_fo", "taylor_guided", "apoz"]


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads may be changed."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def network(width: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lived_in(Plain(width)).to(memory_format=torch.channels_last)


def data(size: int = 20) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(6, 3, size, size, generator=generator)
    return [(images.contiguous(memory_format=torch.channels_last), torch.arange(6) % CLASSES)]


def scored(model: nn.Module, criterion: str) -> torch.Tensor:
    return attrfast.attribute(model, data(), criterion, progress=False).importance


class Residual(nn.Module):
    """A block with an addition, strides and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.branch = nn.Sequential(
            *(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24)),
        )
        self.last = nn.Sequential(
            *(nn.Conv2d(24, 24, 3, stride=2, groups=24), nn.ReLU6(), nn.Conv2d(24, CLASSES, 3)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(torch.relu(x + self.branch(x)))


def plain() -> nn.Module:
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, CLASSES, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("build", [plain, Residual])
def test_scores_have_the_same_bits_for_one_to_eight_threads(
    build: Callable[[], nn.Module], threads: None
) -> None:
    """Without linear layers and 1x1 convolutions: PyTorch's own results of those may depend on the number."""
    torch.manual_seed(0)
    model = lived_in(build()).to(memory_format=torch.channels_last)
    found = {}
    for count in range(1, 9):
        torch.set_num_threads(count)
        found[count] = torch.stack([scored(model, name) for name in CRITERIA])
    assert all(torch.equal(found[1], scores) for scores in found.values())


def test_models_that_are_scored_in_several_threads_do_not_mix() -> None:
    models = [network(4 + turn % 3, turn) for turn in range(4)]
    jobs = [(model, name) for model in models for name in CRITERIA]
    alone = [scored(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: scored(*job), jobs * 2))
    for expected, got in zip(alone * 2, together, strict=True):
        assert torch.equal(expected, got)


def test_one_model_may_be_scored_by_several_threads() -> None:
    model = network(5)
    alone = {name: scored(model, name) for name in CRITERIA}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda name: (name, scored(model, name)), CRITERIA * 3))
    for name, got in together:
        assert torch.equal(alone[name], got)


@pytest.mark.parametrize(
    "region", [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_pruning_inside_a_region_gives_the_model_of_outside(region: Any) -> None:
    options: dict[str, Any] = {"keep_ratio": 0.6, "finetune": 1, "progress": False}
    model, batches = network(4), data()
    outside = attrfast.prune(model, batches, **options)
    with region:
        inside = attrfast.prune(model, batches, **options)
    left, right = outside.model.state_dict(), inside.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
