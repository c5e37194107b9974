"""The folder of a comparison: a file for every start and for every cell, whole or not there.

starts/NETWORK/seed-0.json, seed-0.safetensors
cells/NETWORK/METHOD/0.4-seed-0.json
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from attrfast.compare.records import (
    Cell,
    CellKey,
    Start,
    StartKey,
    as_json,
    cell_from_json,
    start_from_json,
)
from attrfast.files import copied, replace_file

log = logging.getLogger(__name__)

_Record = TypeVar("_Record", Start, Cell)


class Folder:
    """Reads and writes the records of a comparison under `root`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def cell_path(self, key: CellKey) -> Path:
        name = f"{key.budget:g}-seed-{key.seed}.json"
        return self.root / "cells" / _name(key.network) / _name(key.method) / name

    def start_path(self, key: StartKey) -> Path:
        return self.root / "starts" / _name(key.network) / f"seed-{key.seed}.json"

    def save_cell(self, cell: Cell) -> None:
        write_json(self.cell_path(cell.key), as_json(cell))

    def cell(self, key: CellKey) -> Cell | None:
        """The cell, or None where it is not there or damaged."""
        return _read(self.cell_path(key), cell_from_json)

    def save_start(self, start: Start, weights: dict[str, torch.Tensor]) -> None:
        """Writes the weights first: where the record is, they are."""
        path = self.start_path(start.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = copied(weights)
        replace_file(path.with_suffix(".safetensors"), lambda beside: save_file(tensors, beside))
        write_json(path, as_json(start))

    def start(self, key: StartKey) -> Start | None:
        """The start, or None where it is not there or damaged."""
        return _read(self.start_path(key), start_from_json)

    def weights(self, key: StartKey) -> dict[str, torch.Tensor] | None:
        """The trained weights, on the CPU; None where they are not there or damaged."""
        path = self.start_path(key).with_suffix(".safetensors")
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            log.info("%s can't be read (%s): trained again", path, error)
            return None


def write_json(path: Path, tree: Any) -> None:
    """Writes a file beside its place and moves it there; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tree, indent=1) + "\n"
    replace_file(path, lambda beside: beside.write_text(text))


def _read(path: Path, build: Callable[[dict[str, Any]], _Record]) -> _Record | None:
    try:
        return build(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        log.warning("%s is damaged (%s): computed again", path, error)
        return None


def _name(part: str) -> str:
    """A name as one part of a path; different names stay different."""
    quoted = quote(part, safe=" ,+=@()[]")
    return "%2E" + quoted[1:] if quoted.startswith(".") else quoted
