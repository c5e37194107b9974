"""The criteria that read feature maps alone, and need no gradient.

Both are measured on the maps of a unit: its channels in the outputs of ReLUs (of every call, whoever makes
it), or, where no ReLU follows, in what its readers read. A unit with several maps (a layer that is called
twice, filters that go together, ReLUs of several blocks on one residual stage) has their mean. A statistic
must not know where its maps come from.
"""

from __future__ import annotations

import torch

from attrfast.criteria.base import Criterion, register_criterion
from attrfast.map_statistics import share_not_zero


class ActivationCriterion(Criterion):
    """Base class: one number a feature map, averaged over the maps of a unit and over samples.

        @attrfast.register_criterion("mean_activation")
        class MeanActivation(ActivationCriterion):
            def statistic(self, maps):
                return maps.flatten(2).mean(2)

    The forward pass is shared with the other criteria of the call.
    """

    def statistic(self, maps: torch.Tensor) -> torch.Tensor:
        """One number for each sample and channel.

        Args:
            maps: (N, C, positions...) in the model's dtype; (N, C) where a layer has no positions.

        Returns:
            (N, C), floating.
        """
        raise NotImplementedError(f"the criterion {self.name!r} defines no statistic")


@register_criterion("apoz")
class APoZ(ActivationCriterion):
    """1 - APoZ: the share of a map's positions, over all samples, that are not exactly zero.

    The source removes filters of a high average percentage of zeros; one minus that share makes a low
    score an unimportant filter.

    Source: Hu, Peng, Tai and Tang 2016, Network Trimming: A Data-Driven Neuron Pruning Approach towards
    Efficient Deep Architectures, eq. 1.
    """

    statistic = staticmethod(share_not_zero)  # which kernels count while they make a map


@register_criterion("hrank")
class HRank(ActivationCriterion):
    """Mean over samples of the rank of a filter's feature map.

    The rank is that of `torch.linalg.matrix_rank` in float64 with its default tolerance: the number of
    singular values above max(H, W) * 2.2e-16 times the largest. A map of more than two dimensions is
    a matrix with its first as rows, one of a single dimension a matrix of one row, and the output of a
    layer without positions a matrix of one element. Singular values of every map of every sample take
    longer than the forward pass itself; the source finds that a few batches (`max_batches`) are enough.

    Source: Lin et al. 2020, HRank: Filter Pruning using High-Rank Feature Map, section 3.2.
    """

    def statistic(self, maps: torch.Tensor) -> torch.Tensor:
        channels, *positions = maps.shape[1:]
        rows = positions[0] if len(positions) > 1 else 1
        columns = maps.shape[2:].numel() // max(1, rows)
        return torch.stack([_ranks(sample.reshape(channels, rows, columns)) for sample in maps])


def _ranks(matrices: torch.Tensor) -> torch.Tensor:
    """(C,) ranks of the matrices (C, H, W), in float64; a sample at a time, to bound the memory."""
    # torch finds no singular values of a matrix that is not finite; the caller tells of those.
    wide = matrices.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
    rank: torch.Tensor = torch.linalg.matrix_rank(wide)
    return rank.to(torch.float64)
