"""Runs a batch in segments, where memory does not hold what its backward pass needs.

The last segment's calls run with gradients after all calls before it ran without; what it reads of theirs has
a gradient then, and the segment before it starts again from the model's input. So activations are kept of one
segment at a time, and every segment takes a part of a forward pass more. That is checkpointing (Griewank and
Walther, "Algorithm 799: Revolve", ACM TOMS 26(1), 2000; Chen et al., "Training deep nets with sublinear memory
cost", 2016) for a model that is known by its calls alone. Must not know when memory is full.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast import random_state
from attrfast.following import Follower, PlanMismatchError
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.taps import TapMode
from attrfast.trace import Trace, is_silent, shown, state_names

_grad = shown(torch.autograd.grad)


@dataclass(frozen=True)
class Boundary:
    """A place between two calls.

    Attributes:
        call: index of the call after it.
        live: values that were made before it and are read after it.
    """

    call: int
    live: frozenset[int]


def boundaries(record: Trace) -> list[Boundary]:
    """Where a pass may be cut: where no call after it writes into a value that was made before it."""
    makers: dict[int, int] = {}
    last: dict[int, int] = {}
    written: dict[int, int] = {}
    for call in record.calls:
        for value in call.inputs:
            last[value] = call.index
        for value in call.outputs:
            makers.setdefault(value, call.index)
        if call.overwrites is not None:
            written[call.overwrites] = call.index
    end = len(record.calls)
    last |= dict.fromkeys(record.results, end)
    found = []
    for index in range(1, end):
        live = {v for v, made in makers.items() if made < index <= last.get(v, -1)}
        if all(written.get(value, -1) < index for value in live):
            found.append(Boundary(index, frozenset(live)))
    return found


def spread(record: Trace, places: Sequence[Boundary], count: int) -> list[Boundary]:
    """Of the places, those that part a pass into segments which make about as many bytes each.

    Args:
        count: of segments; there may be fewer.
    """
    size = [shape.numel() * each for shape, each in zip(record.shapes, record.itemsizes, strict=True)]
    made = [0, *itertools.accumulate(sum(size[v] for v in call.outputs) for call in record.calls)]
    chosen: list[Boundary] = []
    for part in range(1, count):
        goal = made[-1] * part / count
        best = min(places, key=lambda place: abs(made[place.call] - goal), default=None)
        if best is not None and best not in chosen:
            chosen.append(best)
    return sorted(chosen, key=lambda place: place.call)


class _EnoughError(BaseException):
    """Ends a forward pass where its segment ends. A model's own `except Exception` lets it through."""


class _SegmentMode(TapMode):
    """Runs the calls of one segment with taps and gradients, those before it without, and none after it.

    Attributes:
        leaves: value -> the tensor from before the segment that it may have a gradient for.
        made: value -> the tensor of the segment that is read after it.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Trace,
        start: Boundary,
        stop: Boundary | None,
        readers: dict[int, Columns],
        matrix: ScoreMatrix,
        anchor: torch.Tensor,
        *,
        guided: bool,
    ) -> None:
        super().__init__(model, readers, matrix, anchor, guided=guided)
        self._follower = Follower(state_names(model), record.calls)
        self._start, self._stop = start, stop
        self.leaves: dict[int, torch.Tensor] = {}
        self.made: dict[int, torch.Tensor] = {}
        self.over = False

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.over:  # a part that is checkpointed by the model itself runs again
            return super().meet(func, name, args, kwargs)
        if is_silent(name):
            return func(*args, **kwargs)
        call = self._follower.meet(name, args, kwargs)
        if self._stop is not None and call.index == self._stop.call:
            raise _EnoughError
        inside = call.index >= self._start.call
        if inside:
            for leaf in self.leaves.values():
                if leaf.is_floating_point() and not leaf.requires_grad:
                    leaf.requires_grad_()
            out = super().meet(func, name, args, kwargs)
        else:
            with torch.no_grad():
                out = func(*args, **kwargs)
        for value, tensor in zip(
            call.outputs, self._follower.leave(call, out, args, kwargs), strict=True
        ):
            if not inside and value in self._start.live:
                self.leaves[value] = tensor
            elif inside and self._stop is not None and value in self._stop.live:
                self.made[value] = tensor
        return out


def in_segments(
    model: nn.Module,
    record: Trace,
    cuts: Sequence[Boundary],
    readers: dict[int, Columns],
    new_matrix: Callable[[], ScoreMatrix],
    forward: Callable[[], Any],
    objectives: Callable[[Any], Sequence[torch.Tensor]],
    scale: float,
    *,
    guided: bool,
    device: torch.device,
) -> list[torch.Tensor]:
    """The score matrices (N, U) of one batch for several objectives, as `attrfast.tiers.Runner.matrices`.

    Args:
        record: of the model's calls.
        cuts: where it is parted, in order.
        readers: id of a reader's weight -> the columns of its inputs.
        new_matrix: makes an empty score matrix.

    Raises:
        PlanMismatchError: the model makes other calls than those of the record.
    """
    anchor = torch.zeros((), device=device, requires_grad=True)
    random = random_state.now([], device)
    starts = [Boundary(0, frozenset()), *cuts]
    found: list[torch.Tensor] = []
    # Of every objective: value -> its gradient, from the segments behind it.
    grads: list[dict[int, torch.Tensor]] = []
    for start, stop in reversed(list(zip(starts, [*cuts, None], strict=True))):
        matrix = new_matrix()
        mode = _SegmentMode(model, record, start, stop, readers, matrix, anchor, guided=guided)
        random_state.restore(random, [], device)
        totals: list[torch.Tensor] | None = None
        try:
            with mode:
                output = forward()
        except _EnoughError:
            pass
        else:
            if stop is not None:
                raise PlanMismatchError(f"the model made no call {stop.call}")
            totals = [total * scale for total in objectives(output)]
            del output
            found = [matrix.take() for _ in totals]
            grads = [{} for _ in totals]
        mode.over = True
        for index, known in enumerate(grads):
            ends = _ends(mode.made, known) if totals is None else ([totals[index]], None)
            if not ends[0]:
                continue
            with mode:
                got = _grad(
                    ends[0],
                    [anchor, *mode.leaves.values()],
                    ends[1],
                    retain_graph=index + 1 < len(grads),
                    allow_unused=True,
                )
            found[index] += matrix.take()
            for value in mode.made:
                known.pop(value, None)
            for value, g in zip(mode.leaves, got[1:], strict=True):
                if g is not None:
                    known[value] = known[value] + g if value in known else g
    return [each.div_(scale) for each in found]


def _ends(
    made: dict[int, torch.Tensor], known: dict[int, torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Tensors of a segment, and their gradients as far as there are any."""
    values = [value for value, tensor in made.items() if value in known and tensor.requires_grad]
    return [made[value] for value in values], [known[value] for value in values]
