"""The control experiment: a pruned architecture, trained from random weights.

Source: Liu et al. 2019, "Rethinking the Value of Network Pruning" (section 3, "Scratch-E": as many epochs
as training, pruning and fine-tuning took together).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from attrfast.batches import unpack
from attrfast.channels import discover
from attrfast.compare.footing import Footing, Pruned
from attrfast.evaluate import evaluate
from attrfast.finetune import FineTune, fine_tune
from attrfast.history import Step
from attrfast.seeding import seeded
from attrfast.surgery import cut

Layer = nn.modules.conv._ConvNd | nn.Linear


def train_from_scratch(
    model: nn.Module,
    footing: Footing,
    *,
    gates: dict[str, torch.Tensor],
    history: tuple[Step, ...],
    epochs: int,
    train: FineTune,
) -> Pruned:
    """Trains an architecture that a method found, with the epochs that the method took in all.

    Args:
        model: the whole network with random weights of its own initialisation; cut in place.
        footing: what all methods share.
        gates: the filters that the method left, by convolution.
        history: the method's.
        epochs: that the method made after the whole network was trained.
        train: how whole networks are trained.

    Raises:
        NumericalError: the loss is not finite.
    """
    narrow(model, footing, gates)
    total = train.epochs + epochs
    how = dataclasses.replace(train, epochs=total)
    fine_tune(model, footing.train, how, step=0, device=footing.device, seed=footing.seed)
    with seeded(footing.seed, [footing.val], footing.device):
        seen = evaluate(model, footing.val, device=footing.device)
    row = dataclasses.replace(history[-1], step=1, top1=seen.top1, loss=seen.loss)
    stopped = f"trained from random weights for {total} epochs"
    return Pruned(model, (history[0], row), gates, total, stopped)


def narrow(model: nn.Module, footing: Footing, gates: dict[str, torch.Tensor]) -> None:
    """Removes filters from an untrained network, and rescales its random weights for the narrower layers.

    Initial weights are drawn with a variance that is inverse to the number of inputs; with fewer inputs
    they are multiplied by sqrt(inputs before / inputs after), so that signals keep their size.
    """
    with seeded(footing.seed, [footing.train], footing.device):
        batch = next(iter(unpack(next(iter(footing.train)), footing.device).split(2)))
    units = discover(model, batch.args, batch.kwargs).units
    removed = torch.zeros(len(units), dtype=torch.bool)
    for name, gate in gates.items():
        removed[units.filters[name][~gate]] = True
    inputs = {name: _inputs(module) for name, module in _layers(model)}
    cut(model, units, removed)
    with torch.no_grad():
        for name, module in _layers(model):
            module.weight.mul_(math.sqrt(inputs[name] / _inputs(module)))


def _layers(model: nn.Module) -> list[tuple[str, Layer]]:
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _inputs(module: Layer) -> int:
    """How many channels one output of a layer reads."""
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.in_channels // module.groups
