"""Masks by scores behave as `torch.nn.utils.prune`'s own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn
from torch.nn.utils import prune

import attrfast
from attrfast import InputError
from attrfast.integrations.prune import (
    AttributionStructured,
    attribution_global,
    attribution_structured,
)


def scored() -> tuple[nn.Module, attrfast.Scores]:
    torch.manual_seed(0)
    model = lived_in(Plain())
    batch = torch.randn(4, 3, 16, 16), torch.arange(4) % CLASSES
    return model, attrfast.attribute(model, [batch], "attribution", progress=False)


def masked(module: nn.Module, name: str = "weight") -> set[int]:
    tensor = getattr(module, name).detach()
    return set(torch.nonzero(tensor.flatten(1).abs().sum(1) == 0).flatten().tolist())


def lowest(scores: torch.Tensor, count: int) -> set[int]:
    return set(scores.argsort()[:count].tolist())


@pytest.mark.parametrize(("amount", "count"), [(3, 3), (0.5, 4), (0, 0), (1.0, 8)])
def test_the_lowest_filters_are_masked(amount: float, count: int) -> None:
    model, scores = scored()
    conv = model.features[0]
    before = conv.weight.detach().clone()
    found = attribution_structured(conv, "weight", amount, scores, layer="features.0")
    assert found is conv
    assert masked(conv) == lowest(scores["features.0"], count)
    assert torch.equal(conv.weight_orig, before)
    prune.remove(conv, "weight")
    assert isinstance(conv.weight, nn.Parameter)
    assert masked(conv) == lowest(scores["features.0"], count)
    assert not prune.is_pruned(model)


def test_it_is_what_ln_structured_does_with_the_same_scores() -> None:
    model, scores = scored()
    ours, theirs = model.features[4], nn.Conv2d(8, 16, 3, bias=False)
    spread = scores["features.4"].view(-1, 1, 1, 1).expand_as(theirs.weight)
    for amount in (5, 0.2):  # the second time of those that are left
        attribution_structured(ours, "weight", amount, scores["features.4"])
        prune.ln_structured(theirs, "weight", amount, n=1, dim=0, importance_scores=spread)
    assert torch.equal(ours.weight_mask, theirs.weight_mask)
    assert masked(ours) == lowest(scores["features.4"], 7)


def test_it_goes_together_with_other_methods() -> None:
    model, scores = scored()
    conv = model.features[4]
    prune.l1_unstructured(conv, "weight", 0.3)
    holes = conv.weight_mask == 0
    attribution_structured(conv, "weight", 4, scores["features.4"])
    assert bool((conv.weight_mask[holes] == 0).all())
    assert masked(conv) == lowest(scores["features.4"], 4)
    kinds = [type(method) for method in next(iter(conv._forward_pre_hooks.values()))]
    assert kinds == [prune.L1Unstructured, AttributionStructured]


def test_biases_and_transposed_convolutions() -> None:
    conv = nn.ConvTranspose2d(3, 5, 2)
    scores = torch.tensor([0.3, 0.1, 0.5, 0.2, 0.4])
    attribution_structured(conv, "weight", 2, scores)
    attribution_structured(conv, "bias", 2, scores)
    expected = torch.tensor([1.0, 0, 1, 0, 1])
    assert torch.equal(conv.bias_mask, expected)
    assert torch.equal(conv.weight_mask, expected.view(1, 5, 1, 1).expand(3, 5, 2, 2))


def test_masked_models_train() -> None:
    model, scores = scored()
    attribution_global(model, 0.4, scores)
    before = {i: masked(model.features[i]) for i in (0, 4, 7)}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.randn(4, 3, 16, 16)).square().sum().backward()
    optimiser.step()
    model(torch.randn(4, 3, 16, 16))
    assert {i: masked(model.features[i]) for i in (0, 4, 7)} == before


def test_the_lowest_of_all_layers_together() -> None:
    model, scores = scored()
    attribution_global(model, 12, scores)
    values = {
        (name, i): v
        for name in scores
        for i, v in enumerate(scores[name].tolist())
        if i != int(scores[name].argmax())
    }
    expected = sorted(values, key=lambda key: values[key])[:12]
    found = {(name, i) for name in scores for i in masked(model.get_submodule(name))}
    assert found == set(expected)
    attribution_global(model, 20, scores)  # the twelve are among them
    assert sum(len(masked(model.get_submodule(name))) for name in scores) == 20
    attribution_global(model, 40 - 3, scores)
    assert all(len(masked(m)) == m.out_channels - 1 for m in map(model.get_submodule, scores))


@pytest.mark.parametrize("amount", [-1, -0.5, 1.5, "half", True, float("nan")])
def test_amounts_without_meaning(amount: Any) -> None:
    model, scores = scored()
    with pytest.raises(InputError, match="amount must be"):
        attribution_structured(model.features[0], "weight", amount, scores["features.0"])
    with pytest.raises(InputError, match="amount must be"):
        attribution_global(model, amount, scores)


def test_what_does_not_belong_together() -> None:
    model, scores = scored()
    conv = model.features[0]
    for call, named in (
        (lambda: attribution_structured(conv, "weight", 9, scores["features.0"]), "8 are left"),
        (lambda: attribution_structured(conv, "weight", 2, scores["features.4"]), r"expected \(8,\)"),
        (lambda: attribution_structured(conv, "weight", 2, scores), "layer must be"),
        (lambda: attribution_structured(conv, "gain", 2, scores["features.0"]), "no parameter 'gain'"),
        (
            lambda: attribution_structured(
                nn.ConvTranspose2d(4, 4, 1, groups=2), "weight", 1, torch.ones(4)
            ),
            "grouped transposed",
        ),
        (lambda: attribution_global(model, 38, scores), "at most 37"),
        (lambda: attribution_global(nn.Sequential(), 3, scores), "no 'features.0'"),
    ):
        with pytest.raises(InputError, match=named):
            call()
    assert not prune.is_pruned(model)
