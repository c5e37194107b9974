"""Files that are whole or not there, and tensors as files hold them. Must not know what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file beside its place, and moves it there: it is whole or not there."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    os.replace(beside, path)


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU that safetensors can write: contiguous, and none in another's memory."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
