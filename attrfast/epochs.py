"""What lies between two steps of a run on disk: a fine-tuning after one of its epochs.

One safetensors file holds the cut model, the optimiser, the scheduler and the random generators, whole or not
there, and is gone with the step. Must not know how a model is trained.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attrfast import schema, state_tree, tensor_file
from attrfast.checkpoint import foreign, gates_as_json, gates_from_json
from attrfast.errors import InputError
from attrfast.residual import ResidualBranch

log = logging.getLogger("attrfast")

FILE = "epoch.safetensors"
_KIND = "attrfast epoch 1"


class Read(NamedTuple):
    """How many samples a ranking comes from, and of how many units it is not sure; None where nobody asked."""

    samples: int = 0
    undecided: int | None = None


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in a run a fine-tuning stands, and what came before it in its step.

    Attributes:
        step: which is not in the history yet.
        final: whether it is the fine-tuning after the last step.
        gates, taken: what is left, see `attrfast.checkpoint.Checkpoint`.
        removed: filters removed in this step, by layer.
        seconds: of scoring and cutting.
        read: for the ranking.
    """

    step: int
    final: bool
    gates: Mapping[str, torch.Tensor]
    taken: tuple[ResidualBranch, ...]
    removed: Mapping[str, int]
    seconds: tuple[float, float]
    read: Read


@dataclasses.dataclass
class EpochKeeper:
    """Keeps one fine-tuning; see `attrfast.finetune.Keeper`.

    Attributes:
        folder: of the run.
        fingerprint: of the run.
        position: of this fine-tuning.
        held: its state after an epoch, where an earlier process came so far.
    """

    folder: Path
    fingerprint: str
    position: Position
    held: Mapping[str, Any] | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The cut model's, as they were kept."""
        assert self.held is not None
        return dict(self.held["model"])

    def load(self) -> Mapping[str, Any] | None:
        return self.held

    def save(self, state: Mapping[str, Any]) -> None:
        """A state that a file can't hold, of an optimiser of the user's, say, is not kept.

        Raises:
            InputError: the file can't be written.
        """
        tensors: dict[str, torch.Tensor] = {}
        try:
            packing = state_tree.packed(state, "state", tensors)
        except TypeError as error:
            log.debug("no epoch of step %d is kept: %s", self.position.step, error)
            return
        about = {
            "fingerprint": self.fingerprint,
            "step": self.position.step,
            "final": self.position.final,
            **gates_as_json(self.position.gates, self.position.taken),
            "removed": dict(self.position.removed),
            "seconds": list(self.position.seconds),
            "read": list(self.position.read),
            "state": packing,
        }
        try:
            tensor_file.write(self.folder / FILE, _KIND, tensors, about)
        except InputError as error:
            raise InputError(
                f"an epoch of step {self.position.step} can't be written in {self.folder}: "
                f"{error.__cause__ or error}; make room there, and resume=True goes on from what was "
                f"written before"
            ) from error


def load(folder: Path, expected: str, *, alone: bool) -> EpochKeeper | None:
    """The fine-tuning in which the run was cut off, or None where there is none of this run.

    Args:
        folder: of the run.
        expected: its fingerprint.
        alone: no step is there, so that a file of another run is a mistake, and not what was left of it.

    Raises:
        InputError: it belongs to another run, or is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        tensors, raw = tensor_file.read(path, _KIND)
        about = schema.mapping(raw, "what it says")
        if about.get("fingerprint") == expected:
            return EpochKeeper(folder, expected, _position(about), _state(about, tensors))
    except InputError as error:
        raise InputError(
            f"the checkpoint in {folder} can't be read: {error}; remove {FILE}, and the run goes on from "
            f"its last step"
        ) from error
    if alone:
        raise foreign(folder)
    return None


def _position(about: Mapping[str, Any]) -> Position:
    gates, taken = gates_from_json(about)
    seconds = schema.sequence(about.get("seconds"), "seconds")
    if len(seconds) != 2 or not isinstance(about.get("final"), bool):
        raise InputError("seconds must be two numbers, and final true or false")
    scoring, cutting = (schema.number(value, "seconds", 0.0) for value in seconds)
    removed = schema.mapping(about.get("removed"), "removed")
    read = schema.sequence(about.get("read"), "read")
    if len(read) != 2:
        raise InputError("read must be how many samples, and how many units are undecided or null")
    samples, undecided = (
        None if value is None and i else schema.count(value, "read", least=0)
        for i, value in enumerate(read)
    )
    return Position(
        step=schema.count(about.get("step"), "step"),
        final=about["final"],
        gates=gates,
        taken=tuple(taken),
        removed={name: schema.count(value, f"removed[{name!r}]") for name, value in removed.items()},
        seconds=(scoring, cutting),
        read=Read(samples or 0, undecided),
    )


def _state(about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    state = schema.mapping(state_tree.unpacked(about.get("state"), tensors), "state")
    schema.count(state.get("epoch"), "epoch")
    for name in ("model", "optimizer", "scaler", "random"):
        schema.mapping(state.get(name), name)
    return state


def forget(folder: Path) -> None:
    """Once its step is whole."""
    (folder / FILE).unlink(missing_ok=True)
