"""Network slimming: scales of batch norms as importance, kept small by their absolute values.

Source: Liu et al. 2017, Learning Efficient Convolutional Networks through Network Slimming (ICCV).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from attrfast.criteria.base import register_criterion
from attrfast.criteria.factors import require_batch_norms, without_batch_norm
from attrfast.criteria.trained import Learnt, Phase, TrainedCriterion, Trainee
from attrfast.errors import InputError
from attrfast.units import Units


@register_criterion("bn_scale")
@dataclass
class BNScale(TrainedCriterion):
    """|gamma| of the unit's batch norms, added up where a unit has several.

    By default the scales are read as they are. With `sparsity` above 0, every step of pruning first
    trains the model with the subgradient of sparsity * |gamma| added to the gradient of the scales. The
    paper ranks without dividing by layers' norms: `prune(..., normalize=None)`. `prune` leaves layers
    without batch norms whole.

    Args:
        sparsity: weight of the scales' absolute values (the paper takes 1e-4 or 1e-5); 0: no training.

    Source: Liu et al. 2017, eq. 1 with g(s) = |s|.
    """

    sparsity: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sparsity >= 0:
            raise InputError(f"sparsity must be at least 0, got {self.sparsity!r}")
        self.trains = self.sparsity > 0

    def unscorable(self, model: nn.Module, units: Units) -> dict[str, str]:
        return without_batch_norm(model, units)

    def from_weights(self, model: nn.Module, units: Units, seed: int) -> torch.Tensor:
        """(U,) sums of |gamma|.

        Raises:
            ModelError: a layer's filters have no batch norm; it is named.
        """
        total = torch.zeros(len(units), dtype=torch.float64)
        for name, row in require_batch_norms(model, units, self.name).items():
            scale = model.get_submodule(name).weight
            assert isinstance(scale, torch.Tensor)
            mine = row >= 0
            total.index_add_(0, row[mine], scale.detach().cpu().double().abs()[mine])
        return total

    def begin(self, trainee: Trainee) -> Phase:
        return _Slimming(self, trainee)


class _Slimming(Phase):
    """Adds the subgradient to the scales of all units that may go."""

    def __init__(self, options: BNScale, trainee: Trainee) -> None:
        self.options, self.trainee = options, trainee
        free = trainee.free
        self.scales: list[tuple[nn.Parameter, torch.Tensor]] = []
        for name, row in require_batch_norms(trainee.model, trainee.units, options.name).items():
            scale = trainee.model.get_submodule(name).weight
            assert isinstance(scale, nn.Parameter)
            pressed = (row >= 0) & free[row.clamp(min=0)]
            self.scales.append((scale, pressed.to(scale.device)))

    def after_backward(self) -> None:
        for scale, pressed in self.scales:
            if scale.grad is not None:
                scale.grad += self.options.sparsity * scale.detach().sign() * pressed

    def finish(self) -> Learnt:
        importance = self.options.from_weights(self.trainee.model, self.trainee.units, 0)
        return Learnt(importance.clamp(min=1e-30))  # a scale of zero leaves the shift, so not nothing
