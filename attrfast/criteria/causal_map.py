"""The criterion `causal_map`: how far a filter's map agrees with the class's Grad-CAM map.

Our reading of "agreement with causal features" in the public abstract of the paper "Convolution network
pruning based on the evaluation of the importance of characteristic attributions", Scientia Sinica
Informationis 2021(1):13-26, doi 10.1360/SSI-2020-0186, whose full formulas are not public. Grad-CAM:
Selvaraju et al. 2017, Grad-CAM: Visual Explanations from Deep Networks, eq. 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attrfast.batches import Batch
from attrfast.channels import Discovery
from attrfast.criteria.base import register_criterion
from attrfast.criteria.gradient import Attribution
from attrfast.errors import NumericalError
from attrfast.feature_maps import FeatureMaps, Forward, Place, by_channel
from attrfast.matrix import RowsError
from attrfast.units import Units

# Gradients are multiplied by this, as small ones vanish in fp16; a cosine does not see it.
_SCALE = 1024.0


def grad_cam(maps: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """The Grad-CAM map: ReLU(sum_k alpha_k A_k), alpha_k the mean over positions of dJ/dA_k.

    Args:
        maps: A, (N, C, P), the feature maps of one layer.
        grads: (N, C, P), the gradient of J there.

    Returns:
        (N, P).

    Source: Selvaraju et al. 2017, eq. 1 and 2.
    """
    return torch.einsum("nc,ncp->np", grads.mean(2), maps).relu()


def agreement(maps: torch.Tensor, causal: torch.Tensor) -> torch.Tensor:
    """Cosine between ReLU of every map and the causal map; 0 where one of them is zero.

    Args:
        maps: (N, C, P).
        causal: (N, P), not negative.

    Returns:
        (N, C), in [0, 1].
    """
    # By their largest values first: squares of small numbers would vanish.
    positive, causal = _by_largest(maps.relu()), _by_largest(causal)
    dot = torch.einsum("ncp,np->nc", positive, causal)
    norms = positive.norm(dim=2) * causal.norm(dim=1, keepdim=True)
    return torch.where(norms == 0, 0.0, dot / norms)  # what is not finite stays so


def _by_largest(x: torch.Tensor) -> torch.Tensor:
    largest = x.amax(-1, keepdim=True)
    return x / torch.where(largest > 0, largest, 1.0)


@register_criterion("causal_map")
class CausalMap(Attribution):
    """mean_n cos(ReLU(A_c), ReLU(sum_k alpha_k A_k)): agreement of a filter's map with Grad-CAM's.

    A are the layer's feature maps where they are read, before pooling (`attrfast.feature_maps`), k runs
    over the layer's channels there, and alpha_k is the mean over positions of the gradient of the
    labelled class's logit with respect to A_k. A sample whose positive map or Grad-CAM map is zero counts
    as 0. A unit with several channels, or with several such places (a residual stage, a module that is
    called several times), gets the mean over all of them. On a map of one position the cosine is 1 where
    both are positive. One forward and one backward pass a batch serve all layers.

    Args:
        target: whose logit, see `Attribution`.

    Our reading of the abstract of doi 10.1360/SSI-2020-0186, with Selvaraju et al. 2017, eq. 1 and 2.
    """

    def own_pass(
        self,
        model: nn.Module,
        found: Discovery,
        *,
        objective: Callable[[Any, Batch], torch.Tensor],
        forward: Forward,
        seed: int,
        progress: bool,
    ) -> _Agreement:
        return _Agreement(FeatureMaps(model, found), objective, forward)


class _Agreement:
    """Sums of cosines over samples."""

    def __init__(
        self,
        feature_maps: FeatureMaps,
        objective: Callable[[Any, Batch], torch.Tensor],
        forward: Forward,
    ) -> None:
        self.feature_maps, self.objective, self.forward = feature_maps, objective, forward
        self.total = torch.zeros(len(feature_maps.units), dtype=torch.float64)
        self.samples = 0

    def add(self, batch: Batch) -> None:
        try:
            mean = self._mean_over_places(batch)
        except RowsError:
            if batch.samples == 1:
                raise
            for part in batch.split(1):
                self.add(part)
            return
        # A GPU is asked once, at the end, so that no batch waits for it.
        if mean.device.type == "cpu":
            self._check(mean, f"in the batch after {self.samples} samples")
        self.total = self.total.to(mean.device) + mean
        self.samples += batch.samples

    def _mean_over_places(self, batch: Batch) -> torch.Tensor:
        """(U,) the mean over the places of each unit, summed over the batch's samples."""
        units = self.feature_maps.units
        with torch.enable_grad():
            captured = self.feature_maps.capture(batch, self.forward)
            total = self.objective(captured.output, batch)
        sums = torch.zeros(len(units), dtype=torch.float64, device=total.device)
        counts = torch.zeros(len(units), dtype=torch.float64)
        first = []  # where gradients end, after all other maps
        for place, x in captured.maps.items():
            counts += torch.bincount(place.units[place.units >= 0], minlength=len(units))
            # What is computed without gradients is no cause of the decision.
            if x.requires_grad:
                reader = _Reader(place, units, x.detach(), batch.samples, sums)
                x.register_hook(reader)  # type: ignore[no-untyped-call]
                if x.is_leaf:
                    first.append(x)
        del captured  # so that maps are freed on the way
        torch.autograd.grad(total * _SCALE, first, allow_unused=True)
        return sums / counts.clamp(min=1).to(sums.device)

    def importance(self) -> torch.Tensor:
        mean = self.total.cpu() / self.samples
        self._check(mean, "in one of the batches")
        return mean

    def _check(self, values: torch.Tensor, where: str) -> None:
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"a feature map or its gradient is not finite {where}; check the data and the weights, or "
                f"leave out amp_dtype"
            )


class _Reader:
    """Adds the cosines at one place when its gradient comes, which is then no longer needed.

    Args:
        x: the map, in the layout that the model gives it.
        sums: (U,), what is added to.
    """

    def __init__(
        self, place: Place, units: Units, x: torch.Tensor, samples: int, sums: torch.Tensor
    ) -> None:
        self.place, self.units, self.samples, self.sums = place, units, samples, sums
        self.x = by_channel(x, place.dim, samples)

    def __call__(self, g: torch.Tensor) -> None:
        dtype = torch.promote_types(g.dtype, torch.float32)
        maps, grads = (
            t.to(dtype).flatten(2) for t in (self.x, by_channel(g, self.place.dim, self.samples))
        )
        for members, channels in _layers_at(self.place, self.units):
            part, slope = maps, grads
            if channels is not None:
                part, slope = part[:, channels], slope[:, channels]
            cosines = agreement(part, grad_cam(part, slope)).sum(0).to(self.sums.dtype)
            self.sums.index_add_(0, members.to(self.sums.device), cosines)


def _layers_at(place: Place, units: Units) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """For every layer with channels at a place: the unit of each, and which they are (None: all)."""
    layer = torch.where(place.units >= 0, units.layer_of[place.units.clamp(min=0)], -1)
    for index in torch.unique(layer).tolist():
        if index >= 0:
            channels = torch.nonzero(layer == index).flatten()
            whole = len(channels) == len(layer)
            yield place.units[channels], None if whole else channels
