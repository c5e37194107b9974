"""Soft filter pruning: filters are set to zero after every epoch, and go on being trained.

Source: He et al. 2018, Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks (IJCAI).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from attrfast.criteria.base import register_criterion
from attrfast.criteria.factors import fold_into_readers
from attrfast.criteria.trained import Learnt, Phase, TrainedCriterion, Trainee
from attrfast.criteria.weights import L2
from attrfast.errors import InputError
from attrfast.units import Units


@register_criterion("soft")
@dataclass
class Soft(TrainedCriterion):
    """Euclidean norm of the unit's filters, whose lowest are set to zero after every epoch.

    After each epoch the share `rate` of every layer's units, those of the lowest norm, has the weights
    and biases of its filters set to zero; the next epoch trains them like all others, so they may come
    back. What is zero after the last epoch has importance zero and is removed.

    Units of several convolutions (residual stages) are ranked by the norm of all their filters.
    Depthwise convolutions are not set to zero: behind a filter that is, they would keep it from coming
    back.

    The learning rate has to be low. What a filter of zeros gives has no variance, so a batch norm behind
    it multiplies its gradient by 1 / sqrt(eps), 316 by default: one step at 0.01 brings it back larger
    than all others, which are then those of the lowest norm.

    Args:
        rate: share of each layer's units that is set to zero, in [0, 1); at least one unit stays.

    Source: He et al. 2018, algorithm 1 and eq. 2 with p = 2.
    """

    lr: float = 0.001
    rate: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < 1:
            raise InputError(f"rate must lie in [0, 1), got {self.rate!r}")

    def begin(self, trainee: Trainee) -> Phase:
        return _Softly(self, trainee)

    def from_weights(self, model: nn.Module, units: Units, seed: int) -> torch.Tensor:
        """The norms as they are now."""
        return L2().from_weights(model, units, seed)


class _Softly(Phase):
    """One phase of soft pruning; the last zeros are those that stay."""

    def __init__(self, options: Soft, trainee: Trainee) -> None:
        self.options, self.trainee = options, trainee
        self.zeroed = torch.zeros(len(trainee.units), dtype=torch.bool)

    def after_epoch(self) -> None:
        model, units = self.trainee.model, self.trainee.units
        norms = self.options.from_weights(model, units, 0)
        self.zeroed = lowest(norms, units, self.trainee.free, self.options.rate)
        set_to_zero(model, units, self.zeroed)

    def finish(self) -> Learnt:
        model, units = self.trainee.model, self.trainee.units
        importance = self.options.from_weights(model, units, 0)
        importance[self.zeroed] = 0
        # A bias or a batch norm may still make something of a filter of zeros: nothing reads it now.
        fold_into_readers(model, units, (~self.zeroed).to(self.trainee.device, self.trainee.dtype))
        return Learnt(importance)


def lowest(norms: torch.Tensor, units: Units, free: torch.Tensor, rate: float) -> torch.Tensor:
    """(U,) bool, the share `rate` (rounded down) of each layer's units that may go, lowest norm first.

    Args:
        norms: (U,).
        free: (U,) bool.
    """
    chosen = torch.zeros(len(units), dtype=torch.bool)
    for layer in units.layers:
        mine = torch.tensor(layer.units)
        count = math.floor(rate * len(mine))
        mine = mine[free[mine]]
        order = torch.argsort(norms[mine], stable=True)
        chosen[mine[order[:count]]] = True
    return chosen


@torch.no_grad()
def set_to_zero(model: nn.Module, units: Units, zeroed: torch.Tensor) -> None:
    """Zeroes weights and biases of the filters of units (U,) bool, in place; depthwise ones stay."""
    for name, row in units.filters.items():
        if name in units.depthwise:
            continue
        module = model.get_submodule(name)
        gone = (row >= 0) & zeroed[row.clamp(min=0)]
        if not bool(gone.any()):
            continue
        weight, bias = module.weight, module.bias
        assert isinstance(weight, torch.Tensor)
        gone = gone.to(weight.device)
        if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
            # (in, out / groups, ...): each group's filters lie beside those of the group before.
            groups = module.groups
            view = weight.reshape(groups, -1, *weight.shape[1:])  # (G, in / G, out / G, ...)
            mask = gone.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            weight.copy_(view.masked_fill(mask, 0).reshape(weight.shape))
        else:
            weight[gone] = 0
        if isinstance(bias, torch.Tensor):
            bias[gone] = 0
