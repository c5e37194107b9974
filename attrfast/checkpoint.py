"""Steps of a pruning run on disk, so that a run that was cut off goes on where it stopped.

A step is two files: the weights (safetensors) and what is needed to rebuild the layers around them
(JSON), which is written last and names the other. Each is whole or not there, and carries a checksum; nothing
is unpickled. What lies between two steps is `attrfast.epochs`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attrfast import gate_text, schema, state_tree, tensor_file
from attrfast.errors import InputError
from attrfast.files import replace_file
from attrfast.history import Step, row_from_json
from attrfast.residual import ResidualBranch

FORMAT, VERSION = "attrfast checkpoint", 2
STATE, _WEIGHTS = "pruning.json", "weights-{run}-{step:03d}.safetensors"
_KIND = "attrfast step 1"
_MODEL, _RANDOM = "model.", "random"


@dataclasses.dataclass
class Checkpoint:
    """A run after one of its steps.

    Attributes:
        fingerprint: of the original model and the settings, see `fingerprint`.
        history: rows so far.
        gates: convolution -> (filters,) bool.
        weights: the pruned model's parameters and buffers.
        taken: residual branches that are gone, in this order.
        random: of all random generators, see `attrfast.random_state`.
    """

    fingerprint: str
    history: list[Step]
    gates: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    taken: Sequence[ResidualBranch] = ()
    random: dict[str, Any] = dataclasses.field(default_factory=dict)


def fingerprint(model: nn.Module, settings: dict[str, Any]) -> str:
    """A hash of a model's values and of the settings of a run, the same in every process."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = tensor.detach().cpu().contiguous().flatten()
        digest.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    digest.update(_described(settings).encode())
    return digest.hexdigest()


def _described(item: Any) -> str:
    """Like `repr`, without the addresses that change from process to process."""
    if isinstance(item, dict):
        return "{" + ", ".join(f"{key}: {_described(value)}" for key, value in item.items()) + "}"
    if isinstance(item, (list, tuple)):
        return "[" + ", ".join(map(_described, item)) + "]"
    if item is None or isinstance(item, (bool, int, float, str, torch.dtype)):
        return repr(item)
    kind = item if hasattr(item, "__qualname__") else type(item)
    name = f"{kind.__module__}.{kind.__qualname__}"
    inside = {} if kind is item or isinstance(item, nn.Module) else getattr(item, "__dict__", {})
    return name + _described(inside)


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the state after the last row of the history.

    Raises:
        InputError: it can't be written; the step before it is still there.
    """
    step = checkpoint.history[-1].step
    # The run's name keeps the last step of another run readable until this one's is whole.
    weights = folder / _WEIGHTS.format(run=checkpoint.fingerprint[:8], step=step)
    tensors = {_MODEL + name: tensor for name, tensor in checkpoint.weights.items()}
    about = {
        "fingerprint": checkpoint.fingerprint,
        "step": step,
        "random": state_tree.packed(checkpoint.random, _RANDOM, tensors),
    }
    state = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": checkpoint.fingerprint,
        "weights": weights.name,
        "history": [dataclasses.asdict(row) for row in checkpoint.history],
        **gates_as_json(checkpoint.gates, checkpoint.taken),
    }
    try:
        tensor_file.write(weights, _KIND, tensors, about)
        replace_file(folder / STATE, lambda path: path.write_text(schema.sealed(state)))
    except (InputError, OSError) as error:
        raise InputError(
            f"step {step} can't be written in {folder}: {error.__cause__ or error}; make room there, and "
            f"resume=True goes on from the step before, or from the start where there is none"
        ) from error
    for old in folder.glob("weights-*.safetensors*"):  # and parts that a killed process left
        if old.name != weights.name:
            old.unlink(missing_ok=True)


def gates_as_json(gates: Mapping[str, torch.Tensor], taken: Sequence[ResidualBranch]) -> dict[str, Any]:
    """Which filters and residual branches are left."""
    return {
        "gates": gate_text.to_text(gates),
        "taken": [dataclasses.asdict(branch) for branch in taken],
    }


def gates_from_json(raw: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], list[ResidualBranch]]:
    """What `gates_as_json` gave.

    Raises:
        InputError: it is no such thing.
    """
    gates = schema.mapping(raw.get("gates"), "gates")
    taken = []
    for i, row in enumerate(schema.sequence(raw.get("taken"), "taken")):
        where = f"taken[{i}]"
        branch = schema.mapping(row, where)
        modules = schema.sequence(branch.get("modules"), f"{where}.modules")
        taken.append(
            ResidualBranch(
                schema.text(branch.get("owner"), f"{where}.owner"),
                schema.text(branch.get("last"), f"{where}.last"),
                tuple(schema.text(name, f"{where}.modules") for name in modules),
            )
        )
    return {
        name: gate_text.from_text(schema.bits(told, f"gates[{name!r}]")) for name, told in gates.items()
    }, taken


def progress(file: Path) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """The history and the gates in a file `STATE`, without the weights.

    Raises:
        InputError: something else stands there.
    """
    try:
        raw = _state(file)
        return _history(raw), gates_from_json(raw)[0]
    except (InputError, OSError) as error:
        raise InputError(f"{file} can't be read: {error}") from error


def load(folder: Path, expected: str) -> Checkpoint | None:
    """The run's last step, or None where there is none yet.

    Raises:
        InputError: the files belong to another model or to other settings, or are damaged.
    """
    if not (folder / STATE).exists():
        return None
    try:
        raw = _state(folder / STATE)
        told, history = schema.text(raw["fingerprint"], "fingerprint"), _history(raw)
        gates, taken = gates_from_json(raw)
        weights = folder / schema.file_name(raw["weights"], "weights")
        tensors, about = tensor_file.read(weights, _KIND)
        about = schema.mapping(about, "what the weights say")
        if (about.get("fingerprint"), about.get("step")) != (told, history[-1].step):
            raise InputError(f"{weights.name} belongs to another step or run")
        random = schema.mapping(state_tree.unpacked(about.get("random"), tensors), "random")
    except (InputError, OSError) as error:
        raise InputError(
            f"the checkpoint in {folder} can't be read: {error}; remove it, or choose another output_dir"
        ) from error
    if told != expected:
        raise foreign(folder)
    held = {name.removeprefix(_MODEL): t for name, t in tensors.items() if name.startswith(_MODEL)}
    return Checkpoint(told, history, gates, held, taken, random)


def foreign(folder: Path) -> InputError:
    """What is raised where the files are of another run."""
    return InputError(
        f"the checkpoint in {folder} belongs to another model or other settings; choose another "
        f"output_dir, or call with resume=False to start again"
    )


def _state(file: Path) -> dict[str, Any]:
    needed = ("fingerprint", "weights", "history", "gates", "taken")
    return schema.unsealed(file.read_bytes(), FORMAT, VERSION, needed)


def _history(raw: Mapping[str, Any]) -> list[Step]:
    rows = schema.sequence(raw["history"], "history")
    history = [row_from_json(row, f"history[{i}]") for i, row in enumerate(rows)]
    if not history or [row.step for row in history] != list(range(len(history))):
        raise InputError("history must have the steps 0, 1, 2, ... in this order")
    return history
