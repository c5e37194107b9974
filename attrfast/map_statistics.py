"""Feature maps of units: where they are, and a mode that measures them while the model runs.

The maps of a unit are its channels in the outputs of ReLUs, one for every call and channel. A unit that no
ReLU follows has its maps where its readers read them. Places belong to calls of a recorded pass, so modules
that are called several times, functional calls and calls in place are all met. Must not know what is
computed from a map, beyond that it is one number; but one such number kernels take while they make the map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from attrfast import ops
from attrfast.flow import Analysis
from attrfast.following import Follower
from attrfast.labels import NONE
from attrfast.matrix import Columns, ScoreMatrix
from attrfast.signatures import CONVOLUTIONS
from attrfast.stages import call_ceiling
from attrfast.trace import Call, CallMode, Param, Trace, argument, is_silent
from attrfast.units import Units, reader_weights

# Maps (N, C, positions...) -> one number a map, (N, C) floating.
Statistic = Callable[[torch.Tensor], torch.Tensor]
ChannelsOf = dict[int, tuple[int, torch.Tensor]]
# Takes how many positions of maps are not zero, (N, C), as `attrfast.reference.affine_relu` counts, and of
# how many.
Counted = Callable[[torch.Tensor, int], None]


def share_not_zero(maps: torch.Tensor) -> torch.Tensor:
    """Share of each map's positions that are not exactly zero: (N, C, positions...) -> (N, C) float64.

    This statistic itself, not one like it, is what `MapMode` has counted while a map is made.
    """
    maps = maps if maps.dim() <= 5 else maps.flatten(4)
    count = ops.backend_for(maps.device).count_nonzero(maps)
    return _share(count, maps.shape[2:].numel())


def _share(count: torch.Tensor, positions: int) -> torch.Tensor:
    return count.to(torch.float64) / max(1, positions)


class Source(Protocol):
    """What a `MapMode` asks of the mode below it, which may make maps in a way of its own."""

    def held(self, x: torch.Tensor) -> torch.Tensor:
        """Of a tensor that the mode below returned: with the values that it stands for."""

    def count_next(self, counted: Counted) -> bool:
        """Whether the call that comes next counts its output, and tells `counted`, then or later."""


@dataclass(frozen=True)
class Place:
    """Maps that one call makes or reads: the dimension that holds channels, and their units."""

    dim: int
    columns: Columns


@dataclass(frozen=True)
class Places:
    """Where the maps of all units are.

    Attributes:
        calls: the recorded calls.
        made: index of a ReLU's call -> place of its output.
        read: index of a reader's call -> place of its input.
        count: (U,) float64, how many maps each unit has; 1 for a unit with none.
    """

    calls: list[Call]
    made: dict[int, Place]
    read: dict[int, Place]
    count: torch.Tensor


def find_places(
    model: nn.Module, units: Units, record: Trace, channels: ChannelsOf, device: torch.device
) -> Places:
    """The places in a recorded pass.

    Args:
        channels: value -> (dimension, unit of each channel), as of `attrfast.channels.Discovery`.
        device: where the model runs.
    """
    many = len(units)
    count = torch.zeros(many + 1, dtype=torch.float64)  # the last one: channels of no unit

    def place(value: int, wanted: torch.Tensor) -> Place | None:
        dim, row = channels.get(value, (0, torch.empty(0, dtype=torch.int64)))
        row = torch.where((row >= 0) & wanted[row], row, NONE)
        if not bool((row >= 0).any()):
            return None
        count.index_add_(0, torch.where(row < 0, many, row), torch.ones(len(row), dtype=count.dtype))
        return Place(dim, Columns(row, many, device))

    def places(
        calls: Sequence[Call], value: Callable[[Call], int], wanted: torch.Tensor
    ) -> dict[int, Place]:
        found = {call.index: place(value(call), wanted) for call in calls}
        return {index: where for index, where in found.items() if where is not None}

    relus = [c for c in record.calls if len(c.outputs) == 1 and call_ceiling(c) is not None]
    made = places(relus, lambda call: call.outputs[0], torch.ones(many + 1, dtype=torch.bool))
    weights = reader_weights(model, units)
    readers = [c for c in record.calls if c.inputs and _weight(c) in weights]
    read = places(readers, lambda call: call.inputs[0], count == 0)
    return Places(record.calls, made, read, count[:-1].clamp(min=1).to(device))


def _weight(call: Call) -> str | None:
    """Name of the weight that a convolution or linear call uses."""
    if call.name not in CONVOLUTIONS and call.name != "linear":
        return None
    weight = argument(call, 1, "weight")
    return weight.name if isinstance(weight, Param) else None


def channels_in(model: nn.Module, units: Units, record: Trace) -> ChannelsOf:
    """Where known units lie in another pass of their model: one that went another way."""
    analysis = Analysis(model)
    analysis.run(record)
    unit_of = [
        int(units.outputs[name][index]) if name in units.outputs else NONE
        for name, index in analysis.labels.makers()
    ]
    row_of = torch.tensor([*unit_of, NONE], dtype=torch.int64)  # the last one: the label NONE
    return {value: (place.dim, row_of[list(place.labels)]) for value, place in analysis.channels.items()}


class MapMode(CallMode):
    """Measures maps during a forward pass, each while it is at hand. Other modes may run below.

    Args:
        names: id -> name of the parameters and buffers of the model whose calls are followed.
        places: where its maps are.
        statistics: what is measured of each map.
        samples: N.
        source: the mode below.

    Raises:
        PlanMismatchError: within the pass, when the model makes another call than the recorded one.
    """

    def __init__(
        self,
        names: dict[int, str],
        places: Places,
        statistics: Sequence[Statistic],
        samples: int,
        source: Source,
    ) -> None:
        super().__init__()
        self.places, self.statistics, self.samples, self.source = places, statistics, samples, source
        self.follower = Follower(names, places.calls)
        device = places.count.device
        self.sums = [ScoreMatrix(len(places.count), samples, device=device) for _ in statistics]

    def means(self) -> list[torch.Tensor]:
        """(N, U) for each statistic: its mean over the maps of each unit."""
        return [matrix.values / self.places.count for matrix in self.sums]

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if is_silent(name):
            return func(*args, **kwargs)
        call = self.follower.meet(name, args, kwargs)
        if call.index in self.places.read:
            self._measure(args[0] if args else kwargs["input"], self.places.read[call.index])
        place = self.places.made.get(call.index)
        counted = place is not None and self._is_counted(place)
        out = func(*args, **kwargs)
        made = self.follower.leave(call, out, args, kwargs)
        if place is not None:
            self._measure(made[0], place, counted)
        return out

    def _is_counted(self, place: Place) -> bool:
        """Whether `share_not_zero`, where it is wanted, comes of the next call itself."""
        wanted = place.dim == 1 and share_not_zero in self.statistics
        return wanted and self.source.count_next(functools.partial(self._add_share, place))

    def _add_share(self, place: Place, count: torch.Tensor, positions: int) -> None:
        for statistic, matrix in zip(self.statistics, self.sums, strict=True):
            if statistic is share_not_zero:
                self._add(matrix, place, _share(count, positions))

    def _measure(self, x: torch.Tensor, place: Place, counted: bool = False) -> None:
        left = [
            (statistic, matrix)
            for statistic, matrix in zip(self.statistics, self.sums, strict=True)
            if not (counted and statistic is share_not_zero)
        ]
        if not left:
            return
        # What is computed here is no call of the model's, for the modes below.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            x = self.source.held(x).detach()
            maps = x.unsqueeze(0) if place.dim == 0 else x.movedim(place.dim, 1)
            for statistic, matrix in left:
                values = statistic(maps)
                if statistic is not share_not_zero:
                    values = values + 0.0 * _total(maps)
                self._add(matrix, place, values)

    def _add(self, matrix: ScoreMatrix, place: Place, values: torch.Tensor) -> None:
        if values.shape[0] != self.samples == 1:  # parts of one sample are maps of their own
            values = values.mean(0, keepdim=True)
        matrix.add_sums(place.columns, values)


def _total(maps: torch.Tensor) -> torch.Tensor:
    """(N, C), not finite where a map is not: a statistic that compares, or counts, hides it."""
    positions, wide = tuple(range(2, maps.dim())), torch.promote_types(maps.dtype, torch.float32)
    return maps.sum(positions, dtype=wide) if positions else maps
