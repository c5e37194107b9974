"""How many samples `stop="confident"` reads of Fashion-MNIST, and which filters it would have chosen by all.

Every network is trained for a few epochs; the score matrix of the whole training set is measured once, and then
read in several random orders, as a shuffled loader would give it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attrfast import data
from attrfast.batches import unpack
from attrfast.channels import discover
from attrfast.confidence import Groups, Looks
from attrfast.criteria import REDUCTIONS, get_criterion
from attrfast.names import network
from attrfast.objective import Objective
from attrfast.scores import normalized
from attrfast.tiers import Runner
from attrfast.units import Units
from benchmarks import machine
from benchmarks.training import train

NETWORKS = ("vgg_small", "resnet20", "resnet18")
FEWER, SAME = 5.0, 0.98  # times fewer samples, and the share of the chosen filters that is the same
_BATCH = 64


def measure(name: str, criterion: str, *, epochs: int, orders: int) -> dict[str, Any]:
    """Samples read and filters chosen in several orders of the training set.

    Args:
        name: a network of `attrfast.models` or torchvision.
        criterion: what it is scored by.
        epochs: of training before.
        orders: how many.
    """
    torch.manual_seed(0)
    splits = data.fashion_mnist(val_size=100, batch_size=_BATCH, seed=0)
    model = _RepeatsChannels() if name == "resnet18" else network(name, splits)()
    train(model, splits.train, epochs)
    model.eval()
    matrix, units = _score_matrix(model, splits.train, criterion)
    importance = functools.partial(_importance, criterion, units)
    whole = importance(matrix.sum(0, dtype=torch.float64)[None], len(matrix))[0]
    rows = []
    for seed in range(orders):
        order = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(seed))
        looks = Looks(units, importance, confidence=0.95, lowest=None, seed=seed)
        groups = Groups(len(units), matrix.device)
        total = torch.zeros(len(units), dtype=torch.float64)
        for part in order.split(_BATCH):
            groups.add(matrix[part])
            total += matrix[part].sum(0, dtype=torch.float64)
            looks.look(total, groups, groups.samples / len(matrix))
            if looks.settled:
                break
        read = importance(total[None], groups.samples)[0]
        chosen, right = (set(t.argsort()[: looks.lowest].tolist()) for t in (read, whole))
        undecided = 0 if looks.undecided is None else int(looks.undecided.sum())
        rows.append({"samples": groups.samples, "same": len(chosen & right), "undecided": undecided})
    return {
        "samples": len(matrix),
        "units": len(units),
        "lowest": looks.lowest,
        "criterion": criterion,
        "epochs": epochs,
        "orders": rows,
        "machine": machine.facts(),
    }


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
