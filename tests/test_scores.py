"""attrfast's scores are what an independent float64 computation of their definition gives."""

from __future__ import annotations

import pytest
import torch
from definition import CRITERIA, importance, layer_error, score_matrix
from families import CLASSES, FAMILIES, family, images_for, lived_in
from small_networks import CLASSES as SMALL_CLASSES
from small_networks import NETWORKS
from torch import nn

import attrfast

# Relative to a layer's norm: what the issue of exactness allows (measured: about 1e-15 and 1e-6).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def small(
    name: str, samples: int, dtype: torch.dtype
) -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor]:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = lived_in(make()).to(dtype)
    return model, tuple(x.to(dtype) for x in inputs(samples)), torch.randint(SMALL_CLASSES, (samples,))


def batches(
    inputs: tuple[torch.Tensor, ...], labels: torch.Tensor, sizes: list[int]
) -> list[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    parts = [x.split(sizes) for x in (*inputs, labels)]
    return [(tuple(part[:-1]), part[-1]) for part in zip(*parts, strict=True)]


def assert_scores(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    criterion: str,
    sizes: list[int],
    tolerance: float,
) -> None:
    scores = attrfast.attribute(
        model, batches(inputs, labels, sizes), criterion=criterion, progress=False
    )
    objective, guided, reduce = CRITERIA[criterion]
    matrix = score_matrix(model, inputs, labels, scores.units, objective, guided=guided)
    expected = importance(matrix, scores.units, reduce)
    assert layer_error(scores.importance, expected, scores.units) <= tolerance
    assert float(expected.abs().max()) > 0
    assert scores.samples == len(labels)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NETWORKS)
def test_small_network_in_float64(name: str, criterion: str) -> None:
    model, inputs, labels = small(name, 5, torch.float64)
    assert_scores(model, inputs, labels, criterion, [2, 3], TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", FAMILIES)
def test_family_in_float64(name: str) -> None:
    images, labels = images_for(name, 3).double(), torch.tensor([1, 7, 3]) % CLASSES
    assert_scores(
        family(name).double(), (images,), labels, "attribution", [2, 1], TOLERANCE[torch.float64]
    )


@pytest.mark.parametrize("criterion", ["taylor", "taylor_guided"])
@pytest.mark.parametrize(
    "name", ["vgg11_bn", "resnet18", "mobilenet_v2", "squeezenet1_1", "densenet121"]
)
def test_family_by_other_criteria(name: str, criterion: str) -> None:
    images, labels = images_for(name, 3).double(), torch.tensor([1, 7, 3])
    assert_scores(family(name).double(), (images,), labels, criterion, [3], TOLERANCE[torch.float64])


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", FAMILIES)
def test_family_in_float32(name: str, form: torch.memory_format) -> None:
    """To the bound, or to float64's where rounding puts a value on the other side of a switching point.

    A ReLU or a maximum that switches changes plain float32 autograd by as much as 2e-2.
    """
    model = family(name).to(memory_format=form)
    images, labels = images_for(name, 3).to(memory_format=form), torch.tensor([1, 7, 3])
    error = error_of(model, images, labels)
    if error > TOLERANCE[torch.float32]:
        assert error <= 2e-2
        assert error_of(model.double(), images.double(), labels) <= TOLERANCE[torch.float64]


def error_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    scores = attrfast.attribute(model, [(images, labels)], criterion="attribution", progress=False)
    objective, _, reduce = CRITERIA["attribution"]
    matrix = score_matrix(model, (images,), labels, scores.units, objective)
    return layer_error(scores.importance, importance(matrix, scores.units, reduce), scores.units)


@pytest.mark.parametrize("criterion", ["taylor", "attribution"])
@pytest.mark.parametrize("name", NETWORKS)
def test_small_network_in_float32(name: str, criterion: str) -> None:
    model, inputs, labels = small(name, 5, torch.float32)
    assert_scores(model, inputs, labels, criterion, [5], TOLERANCE[torch.float32])
