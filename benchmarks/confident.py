"""How many samples `stop="confident"` reads of Fashion-MNIST, and what comes of it: filters and accuracy.

Every network is trained for a few epochs; the score matrix of the whole training set is measured once, and then
read in several random orders, as a shuffled loader would give it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import attrfast
from attrfast import data
from attrfast.batches import unpack
from attrfast.channels import discover
from attrfast.confidence import Groups, Looks, lowest_units
from attrfast.criteria import REDUCTIONS, get_criterion
from attrfast.names import network
from attrfast.objective import Objective
from attrfast.scores import normalized
from attrfast.tiers import Runner
from attrfast.units import Units
from benchmarks import machine
from benchmarks.training import train

NETWORKS = ("vgg_small", "resnet20", "resnet18")
MACS = 0.4  # of the multiply-adds are left then
FEWER, SAME = 5.0, 0.98  # times fewer samples, and the share of the chosen filters that is the same
SHARES = (32, 16, 8, 4)  # the lowest so-manieth of the filters is asked about
_BATCH = 64


def measure(name: str, criterion: str, *, epochs: int, orders: int) -> dict[str, Any]:
    """Samples read and filters chosen in several orders of the training set.

    Args:
        name: a network of `attrfast.models`, or "resnet18" for torchvision's.
        criterion: what it is scored by.
        epochs: of training before.
        orders: how many.
    """
    torch.manual_seed(0)
    splits = data.fashion_mnist(val_size=100, batch_size=_BATCH, seed=0)
    model = _made(name, splits)
    train(model, splits.train, epochs)
    model.eval()
    matrix, units = _score_matrix(model, splits.train, criterion)
    importance = functools.partial(_importance, criterion, units)
    whole = importance(matrix.sum(0, dtype=torch.float64)[None], len(matrix))[0]
    asked = []
    for share in SHARES:
        filters = math.ceil(units.total_filters / share)
        right = lowest_units(whole[None], units.size, filters)[0]
        rows = []
        for seed in range(orders):
            looks = Looks(units, importance, confidence=0.95, lowest=filters, seed=seed)
            total, samples = _read(matrix, looks, seed)
            chosen = lowest_units(importance(total[None], samples), units.size, filters)[0]
            same = int(units.size[chosen & right].sum()) / int(units.size[chosen].sum())
            undecided = 0 if looks.undecided is None else int(looks.undecided.sum())
            rows.append({"samples": samples, "same": same, "undecided": undecided})
        asked.append({"lowest": filters, "orders": rows})
    return {
        "samples": len(matrix),
        "filters": units.total_filters,
        "criterion": criterion,
        "epochs": epochs,
        "asked": asked,
        "machine": machine.facts(),
    }


def accuracy(name: str, seed: int, *, epochs: int) -> dict[str, Any]:
    """One trained network, pruned with all samples read in every step and with `stop="confident"`.

    Args:
        name: as of `measure`.
        seed: of the training, the order of the data and the fine-tuning.
        epochs: of training before.
    """
    torch.manual_seed(seed)
    splits = data.fashion_mnist(val_size=100, batch_size=_BATCH, seed=seed)
    model = _made(name, splits)
    train(model, splits.train, epochs)
    rows = {}
    for way, stop in (("everything", None), ("confident", "confident")):
        torch.manual_seed(seed)
        result = attrfast.prune(
            model,
            splits.train,
            val_loader=splits.test,
            max_macs=MACS,
            finetune=0,
            final_finetune=attrfast.FineTune(epochs=1, lr=0.01),
            stop=stop,
            seed=seed,
            progress=False,
        )
        last = result.history[-1]
        rows[way] = {
            "top1": last.top1,
            "before": result.history[0].top1,
            "macs_pruned_percent": last.macs_pruned_percent,
            "samples": sum(step.samples_scored for step in result.history),
        }
    return {"ways": rows, "epochs": epochs, "machine": machine.facts()}


def _made(name: str, splits: data.Splits) -> nn.Module:
    return _RepeatsChannels() if name == "resnet18" else network(name, splits)()


def _read(matrix: torch.Tensor, looks: Looks, seed: int) -> tuple[torch.Tensor, int]:
    """The sum over the samples read in a random order until the filters are settled, and their number."""
    order = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(seed))
    groups = Groups(matrix.shape[1], matrix.device)
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for part in order.split(_BATCH):
        groups.add(matrix[part])
        total += matrix[part].sum(0, dtype=torch.float64)
        looks.look(total, groups, groups.samples / len(matrix))
        if looks.settled:
            break
    return total, groups.samples


class _RepeatsChannels(nn.Module):
    """torchvision's ResNet-18 on images of one channel."""

    def __init__(self) -> None:
        super().__init__()
        import torchvision

        self.inside = torchvision.models.resnet18(num_classes=10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inside(x.expand(-1, 3, -1, -1))
        return out


def _score_matrix(model: nn.Module, loader: Any, criterion: str) -> tuple[torch.Tensor, Units]:
    """What is added up over samples, (N, U) float32, and the units."""
    rule = get_criterion(criterion)
    each = REDUCTIONS[rule.reduction].each
    objective = Objective(rule, None)
    rows, runner = [], None
    for raw in loader:
        batch = unpack(raw, torch.device("cpu"))
        if runner is None:
            found = discover(model, (batch.args[0][:2],))
            runner = Runner(model, found, guided=rule.guided, absolute=False)
        forward: Callable[[], Any] = functools.partial(batch.feed, model)
        (matrix,) = runner.matrices(
            forward, lambda output, batch=batch: objective(output, batch, 0), batch.samples
        )
        rows.append(each(matrix.detach()).to(torch.float32))
    return torch.cat(rows), found.units


def _importance(criterion: str, units: Units, totals: torch.Tensor, samples: int) -> torch.Tensor:
    finish = REDUCTIONS[get_criterion(criterion).reduction].finish
    return normalized(finish(totals, samples), units, "l2")
