"""Runs one batch by the fast tier, or by the call tier where that can't.

Both give the same score matrix; one forward pass serves any number of objectives, each with a backward pass
of its own. Must not know about loaders, criteria or reductions.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from attrfast import ops
from attrfast.buffers import Buffers
from attrfast.channels import Discovery
from attrfast.errors import ModelError
from attrfast.following import PlanMismatchError
from attrfast.fused import PlanMode
from attrfast.graph import Plan, make_plan
from attrfast.map_statistics import Counted, Source
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.segments import Boundary, boundaries, in_segments, spread
from attrfast.taps import TapMode
from attrfast.trace import State, shown
from attrfast.units import reader_weights

log = logging.getLogger(__name__)

_grad = shown(torch.autograd.grad)  # a mode that is on stays on in what runs again during it

# From the mode that runs the model to one that watches its forward pass.
Watch = Callable[[Source], AbstractContextManager[Any]]


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
        self.state = State(model)
        tensors = self.state.tensors
        self.readers = {id(tensors[w]): self.columns[name] for w, name in self.weights.items()}
        self.record, self.segments = found.record, 1
        self._places: list[Boundary] | None = None
        self.plan: Plan | None = None
        if fused and not absolute:
            joins = ops.backend_for(self.device).has_joined
            self.plan = make_plan(found, self.weights, guided=guided, joins=joins)
        self.values: dict[int, Columns] = {}
        self.buffers = Buffers() if self.device.type == "cpu" else None
        self.folded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.lowered: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        if self.plan is not None:
            taps = {*self.plan.through, *self.plan.branch, *(v for _, v in self.plan.into.values())}
            self.values = {
                v: Columns(self.plan.channels[v][1], count, self.device) for v in sorted(taps)
            }

    def more_segments(self) -> bool:
        """From now on, keeps activations of half as long a part of the pass; False where no part is shorter."""
        if self._places is None:
            self._places = boundaries(self.record)
        if self.segments > len(self._places):
            return False
        self.segments = 2 * self.segments
        log.debug("the pass runs in %d segments from here on", self.segments)
        return True

    def give_back(self) -> None:
        """Gives back memory that is kept from batch to batch."""
        if self.buffers is not None:
            self.buffers.give_back()

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
        (matrix,) = self.matrices(forward, lambda output: [objective(output)], samples, scale)
        return matrix

    def matrices(
        self,
        forward: Callable[[], Any],
        objectives: Callable[[Any], Sequence[torch.Tensor]],
        samples: int,
        scale: float = 1.0,
        watch: Watch | None = None,
    ) -> Iterator[torch.Tensor]:
        """The score matrices (samples, U) of one batch for several objectives.

        The model runs now, once; each backward pass runs when its matrix is asked for.

        Args:
            forward, samples, scale: as of `run`.
            objectives: of the output: any number of 0-d tensors, each summed over samples. With none
                of them the model just runs.
            watch: makes a mode that sees the calls of the forward pass. It is made anew when the pass
                is begun again.

        Raises:
            PlanMismatchError: raised by the mode that `watch` made.
        """
        if self.segments > 1:
            return self._in_segments(forward, objectives, samples, scale, watch)
        if self.plan is not None:
            try:
                return self._forward(forward, objectives, samples, scale, watch, self.plan)
            except PlanMismatchError as mismatch:
                log.debug("the call tier runs from here on: %s", mismatch)
                self.plan = None
        return self._forward(forward, objectives, samples, scale, watch, None)

    def _in_segments(
        self,
        forward: Callable[[], Any],
        objectives: Callable[[Any], Sequence[torch.Tensor]],
        samples: int,
        scale: float,
        watch: Watch | None,
    ) -> Iterator[torch.Tensor]:
        assert self._places is not None
        if watch is not None:
            with torch.no_grad(), watch(_AsTheyAre()):
                output = forward()
            if not torch.is_grad_enabled():  # no objective
                return iter(objectives(output))
        try:
            found = in_segments(
                self.model,
                self.record,
                spread(self.record, self._places, self.segments),
                self.readers,
                functools.partial(self._matrix, samples),
                forward,
                objectives,
                scale,
                guided=self.guided,
                device=self.device,
            )
        except PlanMismatchError as mismatch:
            raise ModelError(
                f"memory does not hold a sample's pass in one piece, and it can't be run in segments, as the "
                f"model goes another way than when it was recorded: {mismatch}. Raise memory_limit, free "
                f"memory, or make the inputs smaller"
            ) from mismatch
        return iter(found)

    def _matrix(self, samples: int) -> ScoreMatrix:
        return ScoreMatrix(len(self.units), samples, device=self.device, absolute=self.absolute)

    def _forward(
        self,
        forward: Callable[[], Any],
        objectives: Callable[[Any], Sequence[torch.Tensor]],
        samples: int,
        scale: float,
        watch: Watch | None,
        plan: Plan | None,
    ) -> Iterator[torch.Tensor]:
        matrix = self._matrix(samples)
        anchor = torch.zeros((), device=self.device, requires_grad=True)
        if self.buffers is not None:
            self.buffers.next_batch()
        mode: TapMode | PlanMode
        if plan is None:
            mode = TapMode(self.model, self.readers, matrix, anchor, guided=self.guided)
        else:
            mode = PlanMode(
                self.state,
                plan,
                self.values,
                matrix,
                anchor,
                self.folded,
                self.lowered,
                guided=self.guided,
                buffers=self.buffers,
            )
        source = mode if isinstance(mode, PlanMode) else _AsTheyAre()
        watching = nullcontext() if watch is None else watch(source)
        with mode, watching:
            output = forward()
        totals = [total * scale for total in objectives(output)]
        # A checkpointed part of the model runs again during the backward pass.
        return _backward(totals, anchor, matrix, scale, mode if plan is None else nullcontext())


class _AsTheyAre:
    """The maps of a model whose calls do what they say."""

    def held(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def count_next(self, counted: Counted) -> bool:
        return False


def _backward(
    totals: list[torch.Tensor],
    anchor: torch.Tensor,
    matrix: ScoreMatrix,
    scale: float,
    mode: AbstractContextManager[Any],
) -> Iterator[torch.Tensor]:
    while totals:
        total = totals.pop(0)
        with mode:
            _grad(total, anchor, allow_unused=True, retain_graph=bool(totals))
        yield matrix.take().div_(scale)
