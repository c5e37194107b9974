"""An importance for Torch-Pruning's pruners (Fang et al. 2023), in the place of `GroupTaylorImportance`."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from attrfast.batches import reiterable
from attrfast.engine import CriterionLike, attribute
from attrfast.scores import Scores


class AttributionImportance(tp.importance.Importance):
    """attrfast's scores for the groups of `tp.pruner.BasePruner` and its kin, without a loop of one's own.

        importance = AttributionImportance(model, loader)
        pruner = tp.pruner.BasePruner(model, example, importance=importance, global_pruning=True)
        pruner.step()

    The model is scored when the first group is asked for, and again once it has changed, by pruning or by
    training. What goes with an index of a group is worth the sum over the attrfast units that go with it;
    mostly that is one, whose score counts everything that reads it. A group without a convolution's filters
    (a hidden linear layer's, say) has no score, and is left alone by the pruner.

    Args:
        model: the one that the pruner is given; it must stay the same object.
        loader: `(input, label)` batches.
        criterion, options: as of `attrfast.attribute`. `normalize="l2"`, its default, makes layers comparable
            for global pruning.

    Attributes:
        scores: of the model as it was last seen; None before that.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        criterion: CriterionLike = "attribution",
        **options: Any,
    ) -> None:
        self.model, self.criterion, self.options = model, criterion, options
        self.loader = reiterable(loader)
        self.scores: Scores | None = None
        self._seen: list[tuple[weakref.ref[torch.Tensor], int]] = []

    def __call__(self, group: tp.Group) -> torch.Tensor | None:
        """One score for each index of the group's root: (indices,) on the CPU, or None."""
        scores = self._current()
        names = {module: name for name, module in self.model.named_modules()}
        place = {root: i for i, root in enumerate(group[0].root_idxs)}
        gone: set[tuple[int, int]] = set()  # (place, unit)
        for item in group:
            units = scores.units.outputs.get(names.get(item.dep.layer, ""))
            if units is None or not _removes_outputs(item.dep):
                continue
            for root, channel in zip(item.root_idxs, item.idxs, strict=True):
                unit = int(units[channel])
                if unit >= 0 and root in place:
                    gone.add((place[root], unit))
        if not gone:
            return None
        places, units = torch.tensor(sorted(gone)).unbind(1)
        return scores.importance.new_zeros(len(place)).index_add_(0, places, scores.importance[units])

    def _current(self) -> Scores:
        if self.scores is None or not self._is_as_seen():
            self.scores = attribute(self.model, self.loader, self.criterion, **self.options)
            # A parameter that is trained gets another version, and one that is cut another object.
            self._seen = [(weakref.ref(p), p._version) for p in self.model.parameters()]
        return self.scores

    def _is_as_seen(self) -> bool:
        now = list(self.model.parameters())
        return len(now) == len(self._seen) and all(
            seen() is p and version == p._version
            for p, (seen, version) in zip(now, self._seen, strict=True)
        )


def _removes_outputs(dependency: Any) -> bool:
    """Whether an item of a group takes output channels from its layer (from a batch norm, its only ones)."""
    pruner = dependency.handler.__self__
    return bool(dependency.handler == pruner.prune_out_channels)
