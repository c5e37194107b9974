"""Accuracy and loss of a model over a loader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from attrfast.batches import Batch, check_labels, main_output, unpack
from attrfast.distributed import Group
from attrfast.errors import InputError
from attrfast.objective import Loss, LossFunction
from attrfast.trace import preserved


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        top1: share of samples whose largest logit is the label's; NaN for a model that does not
            classify (`loss_fn` was given and the output is no matrix of logits).
        loss: mean over samples.
        samples: how many there were.
    """

    top1: float
    loss: float
    samples: int


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    loss_fn: LossFunction | None = None,
    device: torch.device | None = None,
    progress: bool = False,
    group: Group | None = None,
) -> Evaluation:
    """Runs a model over a loader in eval mode, and leaves it as it was.

    Args:
        model: any module that classifies, or one for which `loss_fn` is given.
        loader: iterable of `(input, label)` batches; inputs (N, ...), labels (N,) int64.
        loss_fn: `loss_fn(output, batch)` in place of the cross-entropy.
        device: run there; None: where the model is.
        progress: show a bar when standard error is a terminal.
        group: the processes that each run over a shard, for attrfast's own use; all get what holds for the
            whole.

    Raises:
        InputError: the loader is empty, or a batch or a label is not usable.
    """
    place = device or next(model.parameters()).device
    loss = Loss(loss_fn) if loss_fn is not None else None
    # Sums stay on the device until the end: reading one would stall a GPU on every batch.
    hits = torch.zeros((), dtype=torch.int64, device=place)
    total = torch.zeros((), dtype=torch.float64, device=place)
    samples, classifies = 0, True
    with preserved(model), torch.no_grad():
        model.eval()
        for raw in tqdm(loader, desc="evaluating", leave=False, disable=None if progress else True):
            batch = unpack(raw, place)
            output = batch.feed(model)
            if loss is None:
                logits = main_output(output)
                check_labels(batch, logits)
                total += functional.cross_entropy(
                    logits.to(torch.promote_types(logits.dtype, torch.float32)),
                    batch.labels.long(),
                    reduction="sum",
                )
            else:
                total += loss(output, batch.raw, batch.labels, batch.samples)
            found = _hits(output, batch)
            if found is None:
                classifies = False
            else:
                hits += found
            samples += batch.samples
    shards = (group or Group()).meet("evaluating", (int(hits), float(total), samples, classifies))
    right, summed, count = (sum(shard[i] for shard in shards) for i in range(3))
    if count == 0:
        raise InputError("the loader to evaluate on gave no batch; pass a non-empty one")
    top1 = right / count if all(shard[3] for shard in shards) else float("nan")
    return Evaluation(top1, summed / count, count)


def _hits(output: Any, batch: Batch) -> torch.Tensor | None:
    try:
        logits = main_output(output)
    except InputError:
        return None
    labels = batch.labels
    fits = isinstance(labels, torch.Tensor) and labels.shape == logits.shape[:1] and logits.dim() == 2
    if not fits or labels.is_floating_point():
        return None
    return torch.sum(logits.argmax(1) == labels)
