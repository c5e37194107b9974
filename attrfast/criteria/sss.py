"""Data-driven sparse structure selection: sparse factors on filters and residual blocks.

Source: Huang & Wang 2018, Data-Driven Sparse Structure Selection for Deep Neural Networks (ECCV).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.criteria.base import register_criterion
from attrfast.criteria.factors import at_readers, fold_into_output, fold_into_readers, scaled
from attrfast.criteria.trained import Learnt, Phase, TrainedCriterion, Trainee
from attrfast.errors import InputError


def soft_threshold(z: torch.Tensor, alpha: float) -> torch.Tensor:
    """S_alpha(z) = sign(z) * max(|z| - alpha, 0), the proximal operator of alpha * |z|."""
    return z.sign() * (z.abs() - alpha).clamp(min=0)


@torch.no_grad()
def apg_step(
    factors: torch.Tensor,
    velocity: torch.Tensor,
    grad: torch.Tensor,
    *,
    lr: float,
    momentum: float,
    gamma: float,
) -> None:
    """One accelerated proximal gradient step on loss + gamma * |factors|, in place.

        z = lambda - lr * grad
        v = S_{lr * gamma}(z) - lambda + momentum * v
        lambda = S_{lr * gamma}(z) + momentum * v

    Args:
        factors, velocity, grad: (F,) lambda, v, and the gradient of the loss at lambda.

    Here lambda is the point ahead, where the gradient is taken, as in Nesterov's method written for
    stochastic training. A factor at zero with no velocity stays there exactly while |grad| <= gamma.

    Source: Huang & Wang 2018, section 3.3, the last three updates (APG with z taken at the point ahead),
    which are those of the authors' code.
    """
    nearest = soft_threshold(factors - lr * grad, lr * gamma)
    velocity.mul_(momentum).add_(nearest - factors)
    factors.copy_(nearest + momentum * velocity)


@register_criterion("sss")
@dataclass
class SSS(TrainedCriterion):
    """|lambda|: a sparse factor on what is read of each unit, and one on each residual branch.

    Factors begin at 1 in every step of pruning. They are trained together with the weights: the weights
    by SGD with Nesterov's momentum, the factors by `apg_step`. Those that end at exactly zero are
    removed, and with a branch's factor the whole branch. A factor that meets no gradient needs about
    (1 - momentum) / (lr * gamma) batches to fall from 1 to 0.

    The factor of a unit stands where its readers take it in: after batch norm and activation, and one
    for all filters of a residual stage, so that a zero is the removal itself. The factor of a branch
    stands on the output of its last layer. Factors are compared between layers as they are (`normalize`
    is not applied).

    Args:
        gamma: weight of the factors' absolute values, beside the mean loss. If gamma times the number of
            units is above the loss of guessing, it may pay to let all factors go to zero.
        blocks: whether residual branches have factors. A branch can go where a module's own forward pass
            adds it and torch.fx can record that; see `attrfast.residual`.
    """

    gamma: float = 1e-3
    blocks: bool = True

    per_layer = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0:
            raise InputError(f"gamma must be at least 0, got {self.gamma!r}")

    def begin(self, trainee: Trainee) -> Phase:
        return _Selection(self, trainee)


class _Selection(Phase):
    """One phase: factors of units and branches, and their velocities."""

    def __init__(self, options: SSS, trainee: Trainee) -> None:
        self.options, self.trainee = options, trainee
        self.branches = tuple(trainee.branches) if options.blocks else ()
        self.free = trainee.free.to(trainee.device)
        ones = torch.ones(len(trainee.units), dtype=trainee.dtype, device=trainee.device)
        self.units = nn.Parameter(ones)
        self.of_branches = nn.Parameter(ones.new_ones(len(self.branches)))
        self.velocities = [torch.zeros_like(f) for f in (self.units, self.of_branches)]

    def around_forward(self) -> contextlib.AbstractContextManager[Any]:
        model = self.trainee.model
        outputs = {
            f"{branch.last}.weight": factor
            for branch, factor in zip(self.branches, self.of_branches, strict=True)
        }
        return scaled(model, at_readers(model, self.trainee.units, self.units), outputs)

    def after_step(self, lr: float) -> None:
        how = self.options
        for factors, velocity in zip((self.units, self.of_branches), self.velocities, strict=True):
            if factors.grad is not None:
                apg_step(factors, velocity, factors.grad, lr=lr, momentum=how.momentum, gamma=how.gamma)
                factors.grad = None
        with torch.no_grad():
            self.units[~self.free] = 1  # these must stay, and so must what they compute

    def finish(self) -> Learnt:
        model, factors = self.trainee.model, self.units.detach()
        fold_into_readers(model, self.trainee.units, factors)
        idle = []
        for branch, factor in zip(self.branches, self.of_branches.detach(), strict=True):
            fold_into_output(model.get_submodule(branch.last), factor)
            if float(factor) == 0:
                idle.append(branch)
        return Learnt(factors.abs().cpu().double(), tuple(idle))
