"""What a folder tells of a run: made by `attrfast prune`, or by `prune(output_dir=...)` and `result.save`.

Must not know how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attrfast.checkpoint import STATE, progress
from attrfast.errors import InputError
from attrfast.history import Step, row_from_json
from attrfast.runs.folder import Figures, RunFolder, StoredMaps
from attrfast.saving import RECIPE, read_recipe


@dataclass(frozen=True)
class Gathered:
    """A run; what its folder does not hold is None or empty.

    Attributes:
        root: the folder.
        criterion, stopped: as of `attrfast.PruneResult`; `stopped` is None for a run that is not done.
        history: rows.
        gates: convolution -> (filters,) bool.
        settings: TOML that repeats the run.
        figures, scores, maps: see `attrfast.runs.folder`.
    """

    root: Path
    criterion: str | None
    stopped: str | None
    history: list[Step]
    gates: dict[str, torch.Tensor]
    settings: str | None
    figures: Figures
    scores: dict[str, Any] | None
    maps: StoredMaps | None


def gather(root: str | Path) -> Gathered:
    """Reads the folder of a run.

    Raises:
        InputError: it holds none, or a file in it is damaged.
    """
    folder = RunFolder(root)
    path = folder.root
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; give one that `attrfast prune` made")
    criterion = stopped = None
    scores = folder.scores()
    if (path / RECIPE).exists():
        recipe = read_recipe(path)
        criterion, stopped = recipe.criterion, recipe.stopped
        history, gates = [row_from_json(row) for row in recipe.history], recipe.gates
    else:
        found = next((p for p in (folder.steps / STATE, path / STATE) if p.exists()), None)
        if found is None:
            raise InputError(
                f"{path} holds no step of a run yet: neither {RECIPE}, which `result.save` writes, nor "
                f"{STATE}, which `prune(output_dir=...)` writes"
            )
        history, gates = progress(found)
        criterion = None if scores is None else scores["criterion"]
    return Gathered(
        root=path,
        criterion=criterion,
        stopped=stopped,
        history=history,
        gates=gates,
        settings=folder.settings_text(),
        figures=folder.figures() or Figures(),
        scores=scores,
        maps=folder.maps(),
    )
