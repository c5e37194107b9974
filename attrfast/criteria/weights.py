"""The criteria that need no data: norms and distances of weights, and chance."""

from __future__ import annotations

import torch
from torch import nn

from attrfast.criteria.base import Criterion, register_criterion
from attrfast.units import Units


def filter_rows(module: nn.Module) -> torch.Tensor:
    """Weights of a convolution or linear module, one row a filter: (filters, ...) -> (filters, rest).

    A transposed convolution stores its filters in dimension 1, group by group.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    weight = weight.detach().to(torch.float64)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        groups = module.groups
        split = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)  # (G, out/G, in/G, k...)
        return split.reshape(module.out_channels, -1)
    return weight.flatten(1)


class WeightNorm(Criterion):
    """p-norm of the weights of all the filters of a unit, biases and batch norms left out.

    Source: Li et al. 2016, Pruning Filters for Efficient ConvNets, section 3.1 (p = 1).
    """

    needs_data = False
    power = 1

    def from_weights(self, model: nn.Module, units: Units, seed: int) -> torch.Tensor:
        total = torch.zeros(len(units), dtype=torch.float64)
        for name, mapping in units.filters.items():
            rows = filter_rows(model.get_submodule(name)).cpu()
            total.index_add_(0, mapping, rows.abs().pow(self.power).sum(1))
        return total.pow(1 / self.power)


@register_criterion("l1")
class L1(WeightNorm):
    """Sum of absolute weights of the unit's filters (Li et al. 2016)."""

    power = 1


@register_criterion("l2")
class L2(WeightNorm):
    """Euclidean norm of the weights of the unit's filters."""

    power = 2


@register_criterion("fpgm")
class FPGM(Criterion):
    """Sum of Euclidean distances from the unit's filters to all filters of their convolutions.

    A filter near the geometric median of its convolution is one that the others can replace. Biases and
    batch norms are left out.

    Source: He et al. 2019, Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration, eq. 6 (g(x) = sum_j ||x - F_j||, the lowest go).
    """

    needs_data = False

    def from_weights(self, model: nn.Module, units: Units, seed: int) -> torch.Tensor:
        total = torch.zeros(len(units), dtype=torch.float64)
        for name, mapping in units.filters.items():
            rows = filter_rows(model.get_submodule(name)).cpu()
            # Distances from products of rows would lose the digits of those that are near each other.
            distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
            total.index_add_(0, mapping, distances.sum(1))
        return total


@register_criterion("random")
class Random(Criterion):
    """Uniform in [0, 1), by the seed alone: what any other criterion must beat."""

    needs_data = False

    def from_weights(self, model: nn.Module, units: Units, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(units), generator=generator, dtype=torch.float64)
