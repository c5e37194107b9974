"""Variational pruning: a Gaussian posterior on the saliency of every channel.

Source: Zhao et al. 2019, Variational Convolutional Neural Network Pruning (CVPR). From the paper: batch
norm rewritten as saliency * (x_hat + shift), so that a channel of no saliency vanishes; the posterior
N(mean, std^2) of each saliency; a zero-mean Gaussian prior that draws it to zero; training by the
reparameterised lower bound; pruning where mean and standard deviation are both below a threshold. Our
reading, because the full paper was not at hand: the prior's standard deviation is a fixed option; one
saliency is drawn for a batch; the thresholds' values; one saliency for all batch norms of a unit (which
it multiplies twice where two follow each other, around a depthwise convolution); and the ranking by
sqrt(mean^2 + std^2) where a budget asks for more than the thresholds give.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.criteria.base import register_criterion
from attrfast.criteria.factors import (
    fold_into_readers,
    of_channels,
    require_batch_norms,
    scaled,
    without_batch_norm,
)
from attrfast.criteria.trained import Learnt, Phase, TrainedCriterion, Trainee
from attrfast.units import Units

_SMALLEST = 1e-2  # of a saliency at the start: shifts are divided by it


def gaussian_kl(mean: torch.Tensor, log_std: torch.Tensor, prior_std: float) -> torch.Tensor:
    """KL(N(mean, std^2) || N(0, prior_std^2)), element by element.

    log(prior_std / std) + (std^2 + mean^2) / (2 prior_std^2) - 1/2
    """
    log_ratio = log_std - torch.log(torch.tensor(prior_std, dtype=log_std.dtype, device=log_std.device))
    return -log_ratio + (torch.exp(2 * log_ratio) + (mean / prior_std).square() - 1) / 2


@register_criterion("variational")
@dataclass
class Variational(TrainedCriterion):
    """sqrt(mean^2 + std^2) of the unit's saliency; zero where both are below their thresholds.

    The highest of a layer stays in any case.

    In every step of pruning, batch norms compute saliency * (sign * x_hat + shift) with the saliency
    drawn anew for every batch. Minimised is the mean loss plus the KL divergence from the prior, divided
    by the number of samples. At the end the means take the saliencies' place.

    A unit with several batch norms has one saliency, whose mean begins at the root mean square of their
    scales; what is left of each scale (its sign, where there is one batch norm) stays as it is. Standard
    deviations begin at the prior's. Layers without batch norms stay whole.
    Saliencies are compared between layers as they are (`normalize` is not applied).

    Args:
        prior_std: standard deviation of the prior; the smaller, the more saliencies fall to zero.
        max_mean, max_std: a unit goes if |mean| and std of its posterior are both below these. The
            posterior of a saliency that the data say nothing about has the prior's standard deviation,
            so max_std lies above prior_std.

    Source: Zhao et al. 2019, section 3; the module's docstring says what is our reading.
    """

    prior_std: float = 0.05
    max_mean: float = 0.05
    max_std: float = 0.1

    per_layer = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("prior_std", "max_mean", "max_std")

    def unscorable(self, model: nn.Module, units: Units) -> dict[str, str]:
        return without_batch_norm(model, units)

    def begin(self, trainee: Trainee) -> Phase:
        return _Posterior(self, trainee)


class _Posterior(Phase):
    """One phase: means and standard deviations of all saliencies, trained by the same optimizer."""

    def __init__(self, options: Variational, trainee: Trainee) -> None:
        self.options, self.trainee = options, trainee
        self.free = trainee.free.to(trainee.device)
        rows = require_batch_norms(trainee.model, trainee.units, options.name)
        self.rows = {
            n: r for n, r in rows.items() if bool(((r >= 0) & trainee.free[r.clamp(min=0)]).any())
        }
        self.norms = {name: _batch_norm(trainee.model, name) for name in self.rows}
        self.samples = trainee.samples()
        start = self._start()
        self.mean = nn.Parameter(start)
        self.log_std = nn.Parameter(torch.full_like(start, options.prior_std).log())
        self.parameters = (self.mean, self.log_std)
        self.flags = [(norm.weight, norm.weight.requires_grad) for norm in self.norms.values()]
        self._divide()

    @torch.no_grad()
    def _start(self) -> torch.Tensor:
        """(U,) root mean square of each unit's scales."""
        device, dtype = self.trainee.device, self.trainee.dtype
        total = torch.zeros(len(self.trainee.units), dtype=dtype, device=device)
        count = torch.zeros_like(total)
        for name, row in self.rows.items():
            row = row.to(device)
            mine = row >= 0
            scale = self.norms[name].weight.detach().to(dtype)
            total.index_add_(0, row[mine], scale[mine].square())
            count.index_add_(0, row[mine], torch.ones_like(scale)[mine])
        return (total / count.clamp(min=1)).sqrt().clamp(min=_SMALLEST)

    def _factor(self, saliency: torch.Tensor, name: str) -> torch.Tensor:
        """(channels,) saliency of a batch norm's channels: one where the unit has to stay."""
        return of_channels(torch.where(self.free, saliency, 1.0), self.rows[name])

    @torch.no_grad()
    def _divide(self) -> None:
        """Takes the saliencies' means out of the batch norms, whose scales are then left alone."""
        for name, norm in self.norms.items():
            factor = self._factor(self.mean, name).to(norm.weight.dtype)
            norm.weight.div_(factor)
            norm.bias.div_(factor)
            norm.weight.requires_grad_(False)

    def around_forward(self) -> contextlib.AbstractContextManager[Any]:
        noise = torch.randn_like(self.mean)
        saliency = self.mean + self.log_std.exp() * noise
        outputs = {f"{name}.weight": self._factor(saliency, name) for name in self.rows}
        return scaled(self.trainee.model, None, outputs)

    def penalty(self) -> torch.Tensor:
        divergence = gaussian_kl(self.mean, self.log_std, self.options.prior_std)
        return divergence[self.free].sum() / self.samples

    @torch.no_grad()
    def finish(self) -> Learnt:
        options, mean, std = self.options, self.mean.detach(), self.log_std.detach().exp()
        importance = (mean.square() + std.square()).sqrt()
        gone = self.free & (mean.abs() < options.max_mean) & (std < options.max_std)
        for layer in self.trainee.units.layers:
            mine = list(layer.units)
            if bool(gone[mine].all()):  # without any, nothing would pass the layer
                gone[mine[int(importance[mine].argmax())]] = False
        self.close()
        fold_into_readers(self.trainee.model, self.trainee.units, (~gone).to(self.trainee.dtype))
        return Learnt(torch.where(gone, 0.0, importance).cpu().double())

    @torch.no_grad()
    def close(self) -> None:
        """Puts the means back into the batch norms."""
        for name, norm in self.norms.items():
            factor = self._factor(self.mean, name).to(norm.weight.dtype)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
        for weight, flag in self.flags:
            weight.requires_grad_(flag)
        self.norms = {}


def _batch_norm(model: nn.Module, name: str) -> nn.modules.batchnorm._BatchNorm:
    module = model.get_submodule(name)
    assert isinstance(module, nn.modules.batchnorm._BatchNorm)
    return module
