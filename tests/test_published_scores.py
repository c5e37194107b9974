"""Each reduction is the number that its source's published form gives, derived here in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import attrfast

CLASSES = 5
CONVS = (0, 2, 5)  # positions in `network`


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(10 * 16, CLASSES),
    ).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 3, 16, 16, generator=generator).double(), torch.arange(7) % CLASSES


def maps(
    model: nn.Sequential, keep: tuple[int, ...]
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """What the modules at these positions make, and its gradients; from a mean loss, times its samples."""
    x, labels = batch()
    kept = []
    for index, module in enumerate(model):
        x = module(x)
        if index in keep:
            kept.append(x)
    loss = functional.cross_entropy(x, labels)
    return kept, [g * len(labels) for g in torch.autograd.grad(loss, kept)], loss


def molchanov_2016() -> list[torch.Tensor]:
    """abs(mean over positions of feature map x gradient), mean over samples: their eq. 8."""
    activations, gradients, _ = maps(network(), (1, 3, 6))
    return [(a * g).mean((2, 3)).abs().mean(0) for a, g in zip(activations, gradients, strict=True)]


def molchanov_2019() -> list[torch.Tensor]:
    """Squared gradient of gates of ones behind every ReLU, one sample at a time: their eq. 8."""
    model, (images, labels) = network(), batch()
    totals = [torch.zeros(model[i].out_channels).double() for i in CONVS]
    for image, label in zip(images, labels, strict=True):
        gates = [torch.ones_like(total).requires_grad_() for total in totals]
        x, free = image[None], iter(gates)
        for module in model:
            x = module(x)
            if isinstance(module, nn.ReLU):
                x = x * next(free).view(1, -1, 1, 1)
        loss = functional.cross_entropy(x, label[None])
        for total, g in zip(totals, torch.autograd.grad(loss, gates), strict=True):
            total += g.square() / len(images)
    return totals


def copied_script() -> list[torch.Tensor]:
    """abs of the batch's sum of convolution output x gradient, as in scripts that keep it by hooks."""
    activations, gradients, _ = maps(network(), CONVS)
    return [(a * g).sum((0, 2, 3)).abs() for a, g in zip(activations, gradients, strict=True)]


def weight_gradients() -> list[torch.Tensor]:
    """abs(<W, dJ/dW> + b dJ/db): what a training step gives for nothing."""
    model, (images, labels) = network(), batch()
    functional.cross_entropy(model(images), labels, reduction="sum").backward()
    return [
        ((m.weight * m.weight.grad).sum((1, 2, 3)) + m.bias * m.bias.grad).detach().abs()
        for m in (model[i] for i in CONVS)
    ]


def per_element() -> list[torch.Tensor]:
    """abs(activation x gradient) of every element that the next layer reads, summed, mean over samples."""
    activations, gradients, _ = maps(network(), (1, 4, 7))
    return [(a * g).abs().sum((2, 3)).mean(0) for a, g in zip(activations, gradients, strict=True)]


@pytest.mark.parametrize(
    ("reduction", "derived", "same_scale"),
    [
        (
            "abs_sample",
            molchanov_2016,
            False,
        ),  # a mean over positions: a layer's factor, normalised away
        ("sq_sample", molchanov_2019, True),
        ("signed_batch", copied_script, True),
        ("signed_batch", weight_gradients, True),
        ("abs_element", per_element, True),
    ],
)
def test_a_reduction_is_its_source(
    reduction: str, derived: Callable[[], list[torch.Tensor]], same_scale: bool
) -> None:
    model = network()
    scores = attrfast.attribute(model, [batch()], "taylor", reduction=reduction, progress=False)
    expected = derived()
    raw = [scores.raw[row] for row in scores.units.filters.values()]
    assert [len(r) for r in raw] == [6, 8, 10]
    for name, mine, theirs in zip(scores, raw, expected, strict=True):
        assert torch.equal(mine.argsort(), theirs.argsort())
        torch.testing.assert_close(scores[name], theirs / theirs.norm(), rtol=1e-10, atol=1e-14)
        if same_scale:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-16)


def test_the_four_are_different_numbers() -> None:
    ranks = {
        reduction: attrfast.attribute(network(), [batch()], reduction=reduction, progress=False)
        .importance.argsort()
        .tolist()
        for reduction in ("abs_sample", "sq_sample", "signed_batch", "abs_element")
    }
    assert len({tuple(rank) for rank in ranks.values()}) == 4
