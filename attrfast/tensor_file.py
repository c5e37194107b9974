"""One safetensors file that holds tensors and what is to be said about them, with a checksum over both.

Must not know what the tensors mean. Nothing is unpickled or run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from attrfast import schema
from attrfast.errors import InputError
from attrfast.files import copied, replace_file


def write(path: str | Path, kind: str, tensors: Mapping[str, torch.Tensor], about: Any) -> Path:
    """Writes a file; it is whole or not there.

    Args:
        path: the file; its folder is made.
        kind: what the file is, in words, and its version.
        tensors: of any shapes and dtypes.
        about: whatever JSON can hold.

    Raises:
        InputError: the file can't be written.
    """
    path = Path(path)
    held = copied(tensors)
    text = json.dumps(about, allow_nan=False)
    metadata = {"kind": kind, "about": text, "checksum": _checksum(held, text)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda beside: save_file(held, beside, metadata))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be written: {error}; give another path") from error
    return path


def read(path: str | Path, kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors and what is said about them.

    Raises:
        InputError: the file is missing, of another kind, or not what was written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be read: {error}") from error
    if metadata.get("kind") != kind:
        raise InputError(f"{path} is of the kind {metadata.get('kind')!r}, not {kind!r}")
    text = metadata.get("about", "")
    if metadata.get("checksum") != _checksum(tensors, text):
        raise InputError(f"{path} is not what was written (its checksum differs): copy it once more")
    try:
        return tensors, schema.parsed(text)
    except InputError as error:
        raise InputError(f"{path} can't be read: what it says about its tensors: {error}") from error


def _checksum(tensors: Mapping[str, torch.Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
