"""What all methods of a comparison share, and what each of them gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.criteria import Criterion, TrainedCriterion
from attrfast.finetune import FineTune
from attrfast.history import Step

Tuning = FineTune | Callable[[nn.Module, int], None]


@dataclass(frozen=True)
class Footing:
    """The task: so many multiply-adds may be left, with this data and this fine-tuning.

    Attributes:
        train, val: loaders, for scoring and fine-tuning, and for the history.
        budget: share of the multiply-adds that may be left.
        finetune, final_finetune, filters_per_step, max_batches: as of `attrfast.prune`.
        seed: decides the order of the data, for all methods alike.
    """

    train: Iterable[Any]
    val: Iterable[Any]
    budget: float
    finetune: Tuning
    final_finetune: Tuning | None
    filters_per_step: int | None
    max_batches: int | None
    device: torch.device
    seed: int

    def epochs(self, steps: int, criterion: Criterion | None = None) -> int | None:
        """Passes over the training images of a run of so many steps; None where nothing tells.

        Args:
            criterion: the epochs of one that trains the model in every step count too.
        """
        hows = [self.finetune] * steps
        if self.final_finetune is not None and steps:
            hows.append(self.final_finetune)
        counts = [how.epochs if isinstance(how, FineTune) else None for how in hows]
        known = [count for count in counts if count is not None]
        own = 0
        if isinstance(criterion, TrainedCriterion) and criterion.trains:
            own = criterion.epochs
        return sum(known) + own * steps if len(known) == len(counts) else None


@dataclass(frozen=True)
class Pruned:
    """What a method came to.

    Attributes:
        model: the smaller network, after fine-tuning.
        history: one row a step; row 0 is the whole network.
        gates: convolution -> (filters of the whole network,) bool; None where the method does not tell.
        epochs: passes over the training images; None where a callable fine-tuned.
        stopped: why it ended, in words.
    """

    model: nn.Module
    history: tuple[Step, ...]
    gates: dict[str, torch.Tensor] | None
    epochs: int | None
    stopped: str
