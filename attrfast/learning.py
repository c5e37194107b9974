"""Trains a model by a criterion that trains, and gives what it learnt. Must not know what is removed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from attrfast.batches import unpack
from attrfast.criteria import Learnt, TrainedCriterion, Trainee
from attrfast.errors import ModelError, NumericalError
from attrfast.finetune import FineTune, fine_tune
from attrfast.objective import LossFunction
from attrfast.residual import ResidualBranch
from attrfast.seeding import seeded
from attrfast.units import Units


def learn(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: TrainedCriterion,
    *,
    units: Units,
    branches: Sequence[ResidualBranch],
    step: int,
    loss_fn: LossFunction | None,
    device: torch.device,
    seed: int,
    progress: bool = False,
) -> Learnt:
    """One phase of training, in place; the model alone computes afterwards what was learnt.

    Args:
        model: on `device`.
        loader: can be read several times.
        units: the model's units; those that must stay are frozen.
        branches: residual branches that may go as a whole.
        seed: of the batches, and of what the criterion draws.
        progress: show a bar when standard error is a terminal.

    Raises:
        ModelError: a layer can't be trained by this criterion, or nothing can be trained at all.
        NumericalError: the loss, a parameter or an importance is not finite.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(
            f"the criterion {criterion.name!r} trains the model, and all of its parameters have "
            f"requires_grad=False; set it for those that may be trained"
        )

    def samples() -> int:
        with seeded(seed, [loader], device):
            return sum(unpack(batch, device).samples for batch in loader)

    how = FineTune(
        epochs=criterion.epochs,
        lr=criterion.lr,
        momentum=criterion.momentum,
        weight_decay=criterion.weight_decay,
        schedule=criterion.schedule,
    )
    phase = criterion.begin(Trainee(model, units, branches, samples))
    try:
        fine_tune(
            model,
            loader,
            how,
            step=step,
            loss_fn=loss_fn,
            device=device,
            seed=seed,
            phase=phase,
            bar=f"training by {criterion.name}" if progress else None,
        )
        learnt = phase.finish()
    finally:
        phase.close()
    for name, tensor in (*model.named_parameters(), ("importance", learnt.importance)):
        if not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"{name} is not finite after training by the criterion {criterion.name!r} in step {step}; "
                f"lower its lr ({criterion.lr:g})"
            )
    return learnt
