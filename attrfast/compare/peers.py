"""Torch-Pruning's own pruners, on the footing of `prune`: the same budget, steps and fine-tuning.

What is compared is the importance and the ranking of Torch-Pruning (Fang et al. 2023, "DepGraph: Towards
Any Structural Pruning"), with its defaults and ranked over all layers. The loop around it is that of
`attrfast.pruner`: score, cut, fine-tune, measure. As there, convolutions' filters are what is removed,
and the last step takes no more than the budget needs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from itertools import islice, pairwise
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

from attrfast.batches import Batch, main_output, unpack
from attrfast.channels import discover
from attrfast.compare.footing import Footing, Pruned
from attrfast.cost import Cost, cost
from attrfast.errors import ModelError, TargetError
from attrfast.evaluate import evaluate
from attrfast.finetune import fine_tune
from attrfast.history import Step
from attrfast.seeding import seeded

_IMPORTANCES = {
    "tp_magnitude": tp.importance.MagnitudeImportance,
    "tp_group_taylor": tp.importance.GroupTaylorImportance,
}


def prune_by_peer(model: nn.Module, footing: Footing, peer: str) -> Pruned:
    """Makes a model smaller by one of Torch-Pruning's importances.

    Args:
        model: left as it is.
        footing: what all methods share.
        peer: `"tp_magnitude"` or `"tp_group_taylor"`.

    Raises:
        TargetError: Torch-Pruning removes nothing more, and the budget is not met.
        ModelError: Torch-Pruning fails on this network.
    """
    loop = _Loop(copy.deepcopy(model).to(footing.device), footing, peer)
    while loop.now.macs > loop.limit:
        loop.step()
    if footing.final_finetune is not None and len(loop.history) > 1:
        loop.tune(footing.final_finetune, len(loop.history))
        loop.history[-1] = loop.row({}, (0.0, 0.0, 0.0), again=True)
    epochs = footing.epochs(len(loop.history) - 1)
    return Pruned(loop.model, tuple(loop.history), None, epochs, "max_macs reached")


class _Loop:
    """A model that Torch-Pruning makes smaller, step by step."""

    def __init__(self, model: nn.Module, footing: Footing, peer: str) -> None:
        self.model, self.footing, self.peer = model, footing, peer
        with seeded(footing.seed, [footing.train], footing.device):
            self.example = _example(footing.train, footing.device)
        units = discover(model, self.example.args, self.example.kwargs).units
        self.names = list(units.filters)
        frozen = [layer.convs for layer in units.layers if layer.frozen is not None]
        self.whole_layers = {name for convs in frozen for name in convs}
        self.whole = self.now = self.cost_of(model)
        self.filters = sum(self.widths(model).values())
        self.limit = math.floor(footing.budget * self.whole.macs)
        self.count = footing.filters_per_step or max(1, math.ceil(self.filters / 16))
        self.history: list[Step] = []
        self.history.append(self.row({}, (0.0, 0.0, 0.0)))

    def cost_of(self, model: nn.Module) -> Cost:
        return cost(model, self.example.args, self.example.kwargs)

    def widths(self, model: nn.Module) -> dict[str, int]:
        modules = dict(model.named_modules())
        return {name: int(modules[name].out_channels) for name in self.names}

    def step(self) -> None:
        """Scores, cuts and tunes, with the seeds that `prune` has in this step."""
        number, before = len(self.history), self.widths(self.model)
        times = [time.perf_counter()]
        if self.peer == "tp_group_taylor":
            with seeded(self.footing.seed + 2 * number, [self.footing.train], self.footing.device):
                self.gather_gradients()
        times.append(time.perf_counter())
        self.model = self.cut(sum(before.values()))
        times.append(time.perf_counter())
        self.tune(self.footing.finetune, number)
        times.append(time.perf_counter())
        after = self.widths(self.model)
        removed = {name: before[name] - after[name] for name in before if after[name] < before[name]}
        scoring, cutting, tuning = (b - a for a, b in pairwise(times))
        self.history.append(self.row(removed, (scoring, cutting, tuning)))

    def gather_gradients(self) -> None:
        """Gradients of the mean cross-entropy, summed over batches, in eval mode."""
        self.model.eval()
        self.model.zero_grad(set_to_none=True)
        for raw in islice(self.footing.train, self.footing.max_batches):
            batch = unpack(raw, self.footing.device)
            loss = functional.cross_entropy(main_output(batch.feed(self.model)), batch.labels.long())
            torch.autograd.backward(loss)
        for parameter in self.model.parameters():
            if parameter.grad is None:  # the loss does not depend on it
                parameter.grad = torch.zeros_like(parameter)

    def cut(self, filters: int) -> nn.Module:
        """The model without `count` of its filters, or without fewer if those meet the budget."""
        low, high = 0, min(self.count, filters)
        smaller, size = self.without(high / filters)
        while size == self.now and high > 1:
            # A layer of which all filters are among the lowest is passed over: fewer may remove more.
            high //= 2
            smaller, size = self.without(high / filters)
        if size == self.now:
            raise TargetError(
                f"Torch-Pruning removes nothing more at {self.now.macs / self.whole.macs:.1%} of the "
                f"multiply-adds, where the budget is {self.footing.budget:.1%}"
            )
        if size.macs <= self.limit:
            while high - low > 1:  # the least number that is enough lies in (low, high]
                middle = (low + high) // 2
                other, other_size = self.without(middle / filters)
                if other_size.macs <= self.limit:
                    high, smaller, size = middle, other, other_size
                else:
                    low = middle
        self.now = size
        return smaller

    def without(self, share: float) -> tuple[nn.Module, Cost]:
        """A copy without this share of its filters, and its cost."""
        smaller = copy.deepcopy(self.model)
        for parameter, original in zip(smaller.parameters(), self.model.parameters(), strict=True):
            if original.grad is not None:
                parameter.grad = original.grad.clone()
        modules = dict(smaller.named_modules())
        try:
            pruner = tp.pruner.BasePruner(
                smaller,
                _positional(self.example),
                importance=_IMPORTANCES[self.peer](),
                global_pruning=True,
                pruning_ratio=share,
                ignored_layers=[modules[name] for name in self.whole_layers],
                root_module_types=[tp.ops.TORCH_CONV],
                # Its default arguments are dictionaries that all pruners would share.
                in_channel_groups={},
                out_channel_groups={},
                num_heads={},
            )
            pruner.step()
            size = self.cost_of(smaller)
        except Exception as error:
            raise ModelError(
                f"Torch-Pruning can't prune this network: {type(error).__name__}: {error}; leave "
                f"{self.peer} out"
            ) from error
        smaller.zero_grad(set_to_none=True)
        return smaller, size

    def tune(self, how: Any, number: int) -> None:
        seed = self.footing.seed + 2 * number + 1
        fine_tune(
            self.model, self.footing.train, how, step=number, device=self.footing.device, seed=seed
        )

    def row(
        self, removed: dict[str, int], seconds: tuple[float, float, float], *, again: bool = False
    ) -> Step:
        with seeded(self.footing.seed, [self.footing.val], self.footing.device):
            seen = evaluate(self.model, self.footing.val, device=self.footing.device)
        if again:
            last = self.history[-1]
            removed = last.removed
            seconds = (last.seconds_scoring, last.seconds_cutting, last.seconds_tuning)
        left = sum(self.widths(self.model).values())
        return Step(
            step=len(self.history) - again,
            phi=left / self.filters,
            filters=left,
            top1=seen.top1,
            loss=seen.loss,
            macs=self.now.macs,
            params=self.now.params,
            macs_pruned_percent=100 * (1 - self.now.macs / self.whole.macs),
            params_pruned_percent=100 * (1 - self.now.params / self.whole.params),
            removed=removed,
            seconds_scoring=seconds[0],
            seconds_cutting=seconds[1],
            seconds_tuning=seconds[2],
        )


def _example(loader: Iterable[Any], device: torch.device) -> Batch:
    return next(iter(unpack(next(iter(loader)), device).split(2)))


def _positional(batch: Batch) -> Any:
    return batch.kwargs or (batch.args[0] if len(batch.args) == 1 else batch.args)
