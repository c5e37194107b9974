"""Files that are whole or not there, and tensors as files hold them. Must not know what is in them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets `write` make a file beside its place, and moves it there: it is whole or not there.

    That holds through a killed process, a full disk and a loss of power: what the file holds is on the disk
    before the name points to it, and the name is before this returns.

    Raises:
        OSError, and what `write` raises: what stood there before still does, and nothing is left beside it.
    """
    replace_files({path: write})


def replace_files(writes: Mapping[Path, Callable[[Path], Any]]) -> None:
    """The same for several files: all are whole before the first of them takes its place, in this order."""
    parts = {path: path.with_name(path.name + ".part") for path in writes}
    try:
        for path, write in writes.items():
            write(parts[path])
            _flush(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    for folder in {path.parent for path in writes}:
        _flush(folder)


def require_writable(folder: Path) -> None:
    """Makes a folder, and tries whether files can be written there.

    Raises:
        OSError: they can't.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    try:
        probe.write_bytes(b"x")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """To the disk. A folder is one where its entries are; Windows opens none, and keeps them by itself."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU that safetensors can write: contiguous, and none in another's memory."""
    return {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
