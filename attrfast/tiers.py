"""Runs one batch by the fast tier, or by the call tier where that can't.

Both give the same score matrix. Must not know about loaders, criteria or reductions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attrfast.buffers import Buffers
from attrfast.channels import Discovery
from attrfast.fused import PlanMismatchError, PlanMode
from attrfast.graph import Plan, make_plan
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.taps import TapMode
from attrfast.units import reader_weights

log = logging.getLogger(__name__)


class Runner:
    """Score matrices of a model, batch by batch.

    Args:
        model: in eval mode.
        found: its units, and its recorded forward pass.
        guided: guided gradients at every ReLU.
        absolute: sums of abs(x * g); these are not conserved, so they are read at the readers alone.
        fused: whether the fast tier may run.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Discovery,
        *,
        guided: bool,
        absolute: bool,
        fused: bool = True,
    ) -> None:
        self.model, self.units = model, found.units
        self.guided, self.absolute = guided, absolute
        self.device = next(model.parameters()).device
        self.weights = reader_weights(model, found.units)
        count = len(found.units)
        self.columns = {
            name: Columns(row, count, self.device) for name, row in found.units.inputs.items()
        }
        state = {name: p for p, name in _state(model)}
        self.readers = {id(state[w]): self.columns[name] for w, name in self.weights.items()}
        self.plan: Plan | None = None
        if fused and not absolute:
            self.plan = make_plan(found, self.weights, guided=guided)
        self.values: dict[int, Columns] = {}
        self.buffers = Buffers() if self.device.type == "cpu" else None
        self.folded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if self.plan is not None:
            taps = {*self.plan.through, *self.plan.branch, *(v for _, v in self.plan.into.values())}
            self.values = {
                v: Columns(self.plan.channels[v][1], count, self.device) for v in sorted(taps)
            }

    def run(
        self,
        forward: Callable[[], Any],
        objective: Callable[[Any], torch.Tensor],
        samples: int,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """The score matrix (samples, U) of one batch.

        Args:
            forward: runs the model and returns its output.
            objective: of the output: 0-d, summed over samples.
            scale: gradients are multiplied by it on the way, and S divided by it.
        """
        if self.plan is not None:
            try:
                return self._run(forward, objective, samples, scale, self.plan)
            except PlanMismatchError as mismatch:
                log.debug("the call tier runs from here on: %s", mismatch)
                self.plan = None
        return self._run(forward, objective, samples, scale, None)

    def _run(
        self,
        forward: Callable[[], Any],
        objective: Callable[[Any], torch.Tensor],
        samples: int,
        scale: float,
        plan: Plan | None,
    ) -> torch.Tensor:
        matrix = ScoreMatrix(len(self.units), samples, device=self.device, absolute=self.absolute)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        mode: TapMode | PlanMode
        if plan is None:
            mode = TapMode(self.model, self.readers, matrix, anchor, guided=self.guided)
        else:
            mode = PlanMode(
                self.model,
                plan,
                self.values,
                matrix,
                anchor,
                self.folded,
                guided=self.guided,
                buffers=self.buffers,
            )
        with mode:
            output = forward()
        total = objective(output)
        del output
        if plan is None:
            with mode:  # a checkpointed part of the model runs again during the backward pass
                torch.autograd.grad(total * scale, anchor, allow_unused=True)
        else:
            torch.autograd.grad(total * scale, anchor, allow_unused=True)
        return matrix.values.div_(scale)


def _state(model: nn.Module) -> list[tuple[torch.Tensor, str]]:
    return [(t, name) for name, t in (*model.named_parameters(), *model.named_buffers())]
