"""Costs are those of the published networks, and predictions those of the cut network."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import NETWORKS, Plain
from test_surgery import some_removed
from torchvision.models import get_model

from attrfast import models
from attrfast.channels import discover
from attrfast.cost import CostModel, cost
from attrfast.surgery import cut


@pytest.mark.parametrize(
    ("name", "classes", "macs", "params"),
    [
        ("vgg16", 102, 1.55e10, 1.35e8),
        ("resnet18", 1000, 1.82e9, 1.17e7),
    ],
)
def test_known_networks_at_224(name: str, classes: int, macs: float, params: float) -> None:
    model = get_model(name, weights=None, num_classes=classes)
    got = cost(model, (torch.zeros(1, 3, 224, 224),))
    assert got.macs == pytest.approx(macs, rel=0.005)
    assert got.params == pytest.approx(params, rel=0.005)


def test_small_image_vgg() -> None:
    got = cost(models.vgg16_bn(), (torch.zeros(1, 3, 32, 32),))
    assert got.macs == pytest.approx(3.14e8, rel=0.005)
    assert got.params == pytest.approx(1.47e7, rel=0.005)


@pytest.mark.parametrize("samples", [1, 3, 8])
def test_cost_is_that_of_one_sample(samples: int) -> None:
    model = Plain()
    assert cost(model, (torch.zeros(samples, 3, 16, 16),)) == cost(model, (torch.zeros(1, 3, 16, 16),))


def test_counting_leaves_the_model_as_it_was() -> None:
    model = Plain().train()
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 16, 16)
    state = torch.random.get_rng_state()
    cost(model, (images,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"fixed view"}))
def test_prediction_is_what_the_cut_small_network_costs(name: str, share: float) -> None:
    make, inputs = NETWORKS[name]
    model, example = make(), inputs(2)
    found = discover(model, example)
    removed = some_removed(found.units, share)
    predicted = CostModel(model, found, cost(model, example)).after(removed)
    cut(model, found.units, removed)
    assert predicted == cost(model, example)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet50", 64),
        ("resnext50_32x4d", 64),
        ("densenet121", 64),
        ("googlenet", 64),
        ("mobilenet_v3_small", 64),
        ("efficientnet_b0", 64),
        ("squeezenet1_1", 64),
        ("shufflenet_v2_x0_5", 64),
        ("regnet_y_400mf", 64),
        ("convnext_tiny", 64),
    ],
)
def test_prediction_is_what_the_cut_family_costs(name: str, size: int) -> None:
    options = {"init_weights": False} if name == "googlenet" else {}
    model = get_model(name, weights=None, num_classes=10, **options)
    images = (torch.randn(2, 3, size, size),)
    found = discover(model, images)
    removed = some_removed(found.units, 0.3)
    predicted = CostModel(model, found, cost(model, images)).after(removed)
    cut(model, found.units, removed)
    assert predicted == cost(model, images)
