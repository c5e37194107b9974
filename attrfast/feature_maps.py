"""Feature maps: where they lie in a forward pass, and their values in a batch.

A *place* is a map that a reader reads, followed back through pooling, dropout, flattening and averaging
to where it was last computed: in most networks the output of a ReLU. Reading it there keeps the positions
that the reader may not see any more (a linear layer behind global pooling reads one number a channel).
Several readers of one map have one place; a layer that is called several times, or whose sum is taken up
again by later blocks, has several. As for S, a depthwise convolution of the same unit is no reader.

Must not know what is made of the maps. No hook is set and nothing is written to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.batches import Batch
from attrfast.channels import Discovery
from attrfast.errors import ModelError
from attrfast.following import Follower, PlanMismatchError
from attrfast.graph import is_reader
from attrfast.map_statistics import channels_in
from attrfast.matrix import RowsError
from attrfast.trace import Call, CallMode, State, Trace, is_silent, trace
from attrfast.units import reader_weights

# Besides pooling: calls that choose, move or average positions and leave every channel by itself.
_POSITIONS_ONLY = frozenset(
    """
    mean nanmean sum amax amin max min dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_alpha_dropout flatten view reshape unflatten permute transpose swapaxes swapdims movedim
    moveaxis squeeze unsqueeze contiguous clone getitem narrow select chunk split tensor_split unbind pad
    interpolate upsample to type_as float double half bfloat16
    """.split()
)

Forward = Callable[[Batch], Any]


class OtherCallsError(ModelError):
    """The model made other calls than the recorded ones."""


@dataclass(frozen=True, eq=False)
class Place:
    """One map of a recorded pass.

    Attributes:
        value: its number in the record.
        call: index of the call that makes it.
        dim: which of its dimensions holds channels.
        units: (C,) int64, the unit of each channel, -1 for none.
        overwritten: whether a later call may change its memory.
    """

    value: int
    call: int
    dim: int
    units: torch.Tensor
    overwritten: bool


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded pass and its places, by the numbers of their values, in the order of the pass."""

    record: Trace
    places: dict[int, Place]


@dataclass(frozen=True)
class Captured:
    """What one batch gave.

    Attributes:
        output: the model's.
        recording: of a pass that makes the same calls.
        maps: place -> its map, in the layout that the model gives it; where gradients are recorded, the
            output is a function of it.
    """

    output: Any
    recording: Recording
    maps: dict[Place, torch.Tensor]


class FeatureMaps:
    """Maps of all layers of a model.

    Args:
        model: in eval mode, left as it is.
        found: its units, and a recorded pass. A batch that leads the model another way is recorded anew.
    """

    def __init__(self, model: nn.Module, found: Discovery) -> None:
        self.model, self.units = model, found.units
        self.weights = reader_weights(model, found.units)
        self.recordings = [_recording(found.record, found.channels, self.weights)]

    def capture(self, batch: Batch, forward: Forward) -> Captured:
        """Runs the model on one batch, once.

        Raises:
            OtherCallsError: two passes over the same batch make different calls.
            ModelError: the model keeps activations in a way of its own (checkpointing).
        """
        for recording in self.recordings:
            try:
                return self._capture(recording, batch, forward)
            except OtherCallsError:
                continue
        record = trace(self.model, batch.args, batch.kwargs)
        recording = _recording(record, channels_in(self.model, self.units, record), self.weights)
        self.recordings.append(recording)
        return self._capture(recording, batch, forward)

    def _capture(self, recording: Recording, batch: Batch, forward: Forward) -> Captured:
        maps: dict[Place, torch.Tensor] = {}

        def keep(place: Place, x: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and not x.requires_grad:
                x.requires_grad_()
            maps[place] = x
            return x.clone() if place.overwritten else x

        end = len(recording.record.calls)
        output = self.run(batch, forward, recording, recording.places, keep, end)
        return Captured(output, recording, maps)

    def run(
        self,
        batch: Batch,
        forward: Forward,
        recording: Recording,
        places: dict[int, Place],
        visit: Callable[[Place, torch.Tensor], torch.Tensor],
        end: int,
    ) -> Any:
        """Runs the model; at every one of the places it goes on with what `visit` makes of the map.

        Args:
            end: so many of the recorded calls must be made again. What comes after them is free; after
                all of them, nothing may come.

        Raises:
            OtherCallsError: the model makes other calls.
            ModelError: the model keeps activations in a way of its own (checkpointing).
        """
        try:
            # A recomputed part would not meet its places again, and gradients would silently be wrong.
            with (
                torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTED),
                _MapMode(self.model, recording.record, places, visit, end) as mode,
            ):
                output = forward(batch)
        except PlanMismatchError as error:
            raise OtherCallsError(
                f"the model makes other calls than in an earlier pass: {error}. If its way depends on "
                f"chance, make it fixed in eval mode"
            ) from error
        except RuntimeError as error:
            if _CHECKPOINTED in str(error):
                raise ModelError(_CHECKPOINTED) from error
            raise
        if mode.index < mode.end:
            raise OtherCallsError(
                f"the model ends after {mode.index} calls, and made {mode.end} in an earlier pass"
            )
        return output


_CHECKPOINTED = (
    "the model checkpoints its activations, or moves them away with saved_tensors_hooks, and feature maps "
    "can't be followed through that; turn it off, or use a criterion such as 'attribution'"
)


def by_channel(x: torch.Tensor, dim: int, samples: int) -> torch.Tensor:
    """A map as (N, C, positions...), without a copy.

    Args:
        x: in the layout that the model gives it.
        dim: which of its dimensions holds channels.
        samples: N. A single sample may have several rows; they are positions then.

    Raises:
        RowsError: its rows can't be told apart by sample.
    """
    if dim == 0 or x.shape[0] != samples:
        if samples != 1:
            raise RowsError(
                f"a layer sees a batch of {x.shape[0]} where the model was given {samples} samples"
            )
        x, dim = x.unsqueeze(0), dim + 1
    return x.movedim(dim, 1)


def as_given(maps: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `by_channel`: `maps` in the layout of x."""
    return maps.movedim(1, dim + maps.dim() - x.dim()).reshape(x.shape)


def _recording(
    record: Trace, channels: dict[int, tuple[int, torch.Tensor]], weights: dict[str, str]
) -> Recording:
    makers = {value: call for call in record.calls for value in call.outputs}
    overwritten = _overwritten(record)
    values: set[int] = set()
    for call in record.calls:
        if is_reader(call, weights):
            values.update(_origin(v, makers, channels) for v in call.inputs if v in channels)
    places = {}
    for value in sorted(values):
        dim, row = channels[value]
        places[value] = Place(value, makers[value].index, dim, row, value in overwritten)
    return Recording(record, places)


def _origin(value: int, makers: dict[int, Call], channels: dict[int, tuple[int, torch.Tensor]]) -> int:
    """Where a map that is read was last computed."""
    while True:
        call = makers[value]
        passes = call.name in _POSITIONS_ONLY or ("pool" in call.name and "unpool" not in call.name)
        sources = set(call.inputs)
        if not passes or len(sources) != 1 or not sources <= channels.keys():
            return value
        (value,) = sources


def _overwritten(record: Trace) -> set[int]:
    """Values whose memory a later call changes, through whatever view of it."""
    home: dict[int, int] = {}
    for call in record.calls:
        # Whether such a call copies may depend on the values' layout; then this names one too many.
        if call.name in _POSITIONS_ONLY or call.name in ("detach", "get:data", "expand", "alias"):
            for out in call.outputs:
                home[out] = home.get(call.inputs[0], call.inputs[0]) if call.inputs else out
    changed = {home.get(c.overwrites, c.overwrites) for c in record.calls if c.overwrites is not None}
    return {v for v in range(len(record.shapes)) if home.get(v, v) in changed}


class _MapMode(CallMode):
    """Runs a recorded pass again and shows its places to `visit`.

    Whatever the pass did not make itself (parameters, inputs) is detached: only maps get gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Trace,
        places: dict[int, Place],
        visit: Callable[[Place, torch.Tensor], torch.Tensor],
        end: int,
    ) -> None:
        super().__init__()
        self.places, self.visit, self.end = places, visit, end
        state = State(model)
        self.frozen = state.frozen
        self.foreign: list[torch.Tensor] = []  # kept, so that their ids stay theirs
        # A call that gives back a parameter gives back its alias.
        aliases = {id(alias): state.names[i] for i, alias in state.frozen.items()}
        self.follower = Follower(state.names | aliases, record.calls)

    @property
    def index(self) -> int:
        return self.follower.index

    def _detached(self, tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            foreign = self.index < self.end and self.follower.numbering.values.get(tree) is None
            if foreign and tree.requires_grad and id(tree) not in self.frozen:
                self.foreign.append(tree)
                self.frozen[id(tree)] = tree.detach()
            return self.frozen.get(id(tree), tree)
        if type(tree) in (list, tuple):
            return type(tree)(self._detached(item) for item in tree)
        return tree

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        args = tuple(self._detached(a) for a in args)
        kwargs = {key: self._detached(value) for key, value in kwargs.items()}
        if is_silent(name) or self.index == self.end < len(self.follower.calls):
            return func(*args, **kwargs)
        call = self.follower.meet(name, args, kwargs)
        out = func(*args, **kwargs)
        made = self.follower.leave(call, out, args, kwargs)
        place = self.places.get(call.outputs[0]) if call.outputs else None
        if place is None or out is not made[0]:
            return out
        given = self.visit(place, out)
        self.follower.numbering.values.put(given, place.value)
        return given
