"""`AttributionImportance` inside Torch-Pruning's own pruners."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from families import CLASSES, family, images_for, lived_in
from small_networks import Plain
from torch import nn
from torch.nn import functional

import attrfast
from attrfast import models
from attrfast.integrations.torch_pruning import AttributionImportance

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg_small": lambda: lived_in(models.vgg_small(in_channels=3)),
    "resnet20": lambda: lived_in(models.resnet20()),
    "resnext": lambda: family("resnext50_32x4d"),
    "mobilenet_v2": lambda: family("mobilenet_v2"),
    "densenet121": lambda: family("densenet121"),
}


def batch(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return images_for("vgg11_bn", 4), torch.arange(4) % CLASSES


def head(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]


def pruner_of(model: nn.Module, importance: Any, **options: Any) -> tp.pruner.BasePruner:
    options = {"global_pruning": True, "pruning_ratio": 0.3, "max_pruning_ratio": 0.8, **options}
    return tp.pruner.BasePruner(
        model,
        images_for("vgg11_bn", 2),
        importance=importance,
        ignored_layers=head(model),
        # Its default arguments are dictionaries that all pruners would share.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        **options,
    )


def trains_a_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    before = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = functional.cross_entropy(model.train()(images), labels)
    loss.backward()
    optimiser.step()
    model.eval()
    assert bool(torch.isfinite(loss))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_group_is_worth_what_its_units_are_worth(name: str) -> None:
    model = NETWORKS[name]()
    data = [batch(model)]
    scores = attrfast.attribute(model, data, "attribution", progress=False)
    importance = AttributionImportance(model, data, progress=False)
    pruner = pruner_of(model, importance)
    names = {module: name for name, module in model.named_modules()}
    seen = 0
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        root = names[group[0].dep.layer]
        found = importance(group)
        if found is None:
            assert root not in scores
            continue
        seen += 1
        cut = pruner.DG.is_out_channel_pruning_fn
        convs = {names.get(i.dep.layer) for i in group if cut(i.dep.handler)} & set(scores)
        units = {u for conv in convs for u in scores.units.filters[conv].tolist()}
        if root in scores and units == set(scores.units.filters[root].tolist()):
            torch.testing.assert_close(found, scores[root])
            assert torch.equal(found.argsort(stable=True), scores[root].argsort(stable=True))
        else:  # several units an index
            total = float(scores.importance[sorted(units)].sum())
            assert float(found.sum()) == pytest.approx(total, rel=1e-4)
    assert seen > 5


@pytest.mark.parametrize("name", ["vgg_small", "resnet20", "resnext", "mobilenet_v2"])
@pytest.mark.parametrize("globally", [True, False], ids=["global", "local"])
def test_three_steps_give_a_smaller_model_that_trains(name: str, globally: bool) -> None:
    model = NETWORKS[name]()
    images, labels = batch(model)
    importance = AttributionImportance(model, [(images, labels)], progress=False)
    pruner = pruner_of(model, importance, iterative_steps=3, global_pruning=globally)
    sizes = [sum(p.numel() for p in model.parameters())]
    for _ in range(3):
        pruner.step()
        sizes.append(sum(p.numel() for p in model.parameters()))
        assert model(images).shape[0] == len(labels)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0]
    trains_a_step(model, images, labels)


def test_global_pruning_takes_the_lowest_units_of_all() -> None:
    model = lived_in(Plain(16))
    data = [batch(model)]
    scores = attrfast.attribute(model, data, "attribution", progress=False)
    threshold = scores.importance.sort().values[len(scores.importance) * 3 // 10 - 1]
    left = {name: int((scores[name] > threshold).sum()) for name in scores}
    importance = AttributionImportance(model, data, progress=False)
    pruner_of(model, importance, root_module_types=[nn.Conv2d]).step()
    modules = dict(model.named_modules())
    assert {name: modules[name].out_channels for name in left} == left


def test_a_model_is_scored_once_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from attrfast.integrations import torch_pruning

    calls = []
    real = torch_pruning.attribute

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return real(*args, **options)

    monkeypatch.setattr(torch_pruning, "attribute", counted)
    model = lived_in(Plain())
    images, labels = batch(model)
    loader = (pair for pair in [(images, labels)])  # can be read once
    with pytest.warns(UserWarning, match="generator"):
        importance = AttributionImportance(model, loader, "taylor", progress=False, max_batches=1)
    pruner = pruner_of(model, importance, iterative_steps=2)
    for expected in (1, 2):
        pruner.step()
        assert len(calls) == expected
    trains_a_step(model, images, labels)
    group = next(iter(pruner.DG.get_all_groups(pruner.ignored_layers)))
    importance(group)
    importance(group)
    assert len(calls) == 3
    assert calls[0] == {"progress": False, "max_batches": 1}


def test_part_of_a_group_has_the_scores_of_its_indices() -> None:
    model = lived_in(Plain())
    importance = AttributionImportance(model, [batch(model)], progress=False)
    graph = tp.DependencyGraph().build_dependency(model, images_for("vgg11_bn", 2))
    conv = model.features[0]
    some = importance(graph.get_pruning_group(conv, tp.prune_conv_out_channels, idxs=[6, 1, 4]))
    assert importance.scores is not None
    torch.testing.assert_close(some, importance.scores["features.0"][[6, 1, 4]])


def test_scoring_leaves_the_model_and_its_gradients_alone() -> None:
    model = lived_in(Plain())
    before = copy.deepcopy(model.state_dict())
    importance = AttributionImportance(model, [batch(model)], progress=False)
    pruner = pruner_of(model, importance)
    for group in pruner.DG.get_all_groups(pruner.ignored_layers):
        importance(group)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
