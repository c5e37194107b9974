"""Steps of a pruning run on disk, so that a run that was cut off goes on where it stopped.

A step is two files: the weights (safetensors) and what is needed to rebuild the layers around them
(JSON). Both are written beside their place and moved there, so a file is whole or not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from attrfast import gate_text
from attrfast.errors import InputError
from attrfast.files import copied, replace_file
from attrfast.residual import ResidualBranch
from attrfast.result import Step, row_from_json

STATE, _WEIGHTS = "pruning.json", "weights-{run}-{step:03d}.safetensors"


@dataclasses.dataclass
class Checkpoint:
    """A run after one of its steps.

    Attributes:
        fingerprint: of the original model and the settings, see `fingerprint`.
        history: rows so far.
        gates: convolution -> (filters,) bool.
        weights: the pruned model's parameters and buffers.
        taken: residual branches that are gone, in this order.
    """

    fingerprint: str
    history: list[Step]
    gates: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    taken: list[ResidualBranch] = dataclasses.field(default_factory=list)


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
    """Writes the state after the last row of the history."""
    folder.mkdir(parents=True, exist_ok=True)
    step = checkpoint.history[-1].step
    # The run's name keeps the last step of another run readable until this one's is whole.
    weights = folder / _WEIGHTS.format(run=checkpoint.fingerprint[:8], step=step)
    tensors = copied(checkpoint.weights)
    replace_file(weights, lambda path: save_file(tensors, path))
    state = {
        "fingerprint": checkpoint.fingerprint,
        "weights": weights.name,
        "history": [dataclasses.asdict(row) for row in checkpoint.history],
        "gates": gate_text.to_text(checkpoint.gates),
        "taken": [dataclasses.asdict(branch) for branch in checkpoint.taken],
    }
    text = json.dumps(state, indent=1) + "\n"
    replace_file(folder / STATE, lambda path: path.write_text(text))
    for old in folder.glob("weights-*.safetensors"):
        if old.name != weights.name:
            old.unlink()


def progress(state: dict[str, Any]) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """The history and the gates in what stands in the file `STATE`.

    Raises:
        ValueError, KeyError, TypeError: something else stands there.
    """
    history = [row_from_json(row) for row in state["history"]]
    return history, {name: gate_text.from_text(bits) for name, bits in state["gates"].items()}


def load(folder: Path, expected: str) -> Checkpoint | None:
    """The run's last step, or None where there is none yet.

    Raises:
        InputError: the files belong to another model or to other settings, or are damaged.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text())
        name = str(state["weights"])
        if Path(name).name != name:
            raise ValueError(f"the weights {name!r} lie outside the folder")
        weights = load_file(folder / name)
        history, kept = progress(state)
        taken = [
            ResidualBranch(row["owner"], row["last"], tuple(row["modules"])) for row in state["taken"]
        ]
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise InputError(f"the checkpoint in {folder} can't be read: {error}; remove it") from error
    if state["fingerprint"] != expected:
        raise InputError(
            f"the checkpoint in {folder} belongs to another model or other settings; choose another "
            f"output_dir, or call with resume=False to start again"
        )
    return Checkpoint(state["fingerprint"], history, kept, weights, taken)
