"""The files of a run. Every one is whole or not there.

settings.toml           repeats the run: `attrfast prune --config settings.toml --out ELSEWHERE`
figures.json            accuracy by class, time and memory, the command, versions
scores.json             of all filters, before pruning
maps.safetensors        an image, and what extreme filters make of it
start.safetensors       the network that is pruned, after training
steps/                  the last step, for going on
weights.safetensors, recipe.json    the pruned network, see `attrfast.load`
report.html, report/    what `attrfast report` makes of these
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from attrfast.errors import InputError
from attrfast.files import copied, replace_file
from attrfast.map_pictures import ExtremeMaps
from attrfast.runs.phases import Phase
from attrfast.scores import Scores

SETTINGS, FIGURES, SCORES, MAPS = "settings.toml", "figures.json", "scores.json", "maps.safetensors"


@dataclass
class Figures:
    """What a run found out so far.

    Attributes:
        command: that repeats the run, as words.
        environment: versions and backends.
        classes: one entry a class of the test set: name, images, and how many of them are right `before`
            and (of a run that is done) `after`.
        phases: time and memory.
        image_class: name of the class of the image that maps were made of.
    """

    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    image_class: str = ""


@dataclass(frozen=True)
class StoredMaps:
    """An image (C, H, W), and maps of some layers' extreme filters."""

    image: torch.Tensor
    layers: list[ExtremeMaps]


class RunFolder:
    """Reads and writes a run under `root`; what is not there is None.

    With `writes=False`, as of a process that leaves writing to another, nothing is written.
    """

    def __init__(self, root: str | Path, *, writes: bool = True) -> None:
        self.root, self.writes = Path(root), writes
        self.steps = self.root / "steps"

    def settings_text(self) -> str | None:
        return self._text(SETTINGS)

    def begin(self, settings: str) -> None:
        self._write(SETTINGS, settings)

    def figures(self) -> Figures | None:
        text = self._text(FIGURES)
        if text is None:
            return None
        try:
            raw = json.loads(text)
            raw["phases"] = [Phase(**row) for row in raw["phases"]]
            return Figures(**raw)
        except (ValueError, TypeError, KeyError) as error:
            raise self._damaged(FIGURES, error) from error

    def save_figures(self, figures: Figures) -> None:
        tree = {**vars(figures), "phases": [vars(row) for row in figures.phases]}
        self._write(FIGURES, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")

    def scores(self) -> dict[str, Any] | None:
        """As `scores_as_json` gave them."""
        text = self._text(SCORES)
        if text is None:
            return None
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise self._damaged(SCORES, error) from error
        return found

    def save_scores(self, scores: Scores) -> None:
        self._write(SCORES, json.dumps(scores_as_json(scores)) + "\n")

    def start(self) -> dict[str, torch.Tensor] | None:
        """The weights before pruning."""
        path = self.root / "start.safetensors"
        try:
            return load_file(path) if path.exists() else None
        except (OSError, SafetensorError) as error:
            raise self._damaged(path.name, error) from error

    def save_start(self, state: dict[str, torch.Tensor]) -> None:
        if not self.writes:
            return
        held = copied(state)
        replace_file(self.root / "start.safetensors", lambda path: save_file(held, path))

    def maps(self) -> StoredMaps | None:
        path = self.root / MAPS
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                told = json.loads(file.metadata()["maps"])
                layers = [_extremes(row, file.get_tensor(f"maps/{row['layer']}")) for row in told]
                return StoredMaps(file.get_tensor("image"), layers)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(MAPS, error) from error

    def save_maps(self, image: torch.Tensor, layers: list[ExtremeMaps]) -> None:
        if not self.writes:
            return
        tensors = {"image": image.detach().cpu().contiguous()}
        told = []
        for seen in layers:
            tensors[f"maps/{seen.layer}"] = torch.stack(list(seen.maps.values()))
            told.append(
                {
                    "layer": seen.layer,
                    "criterion": seen.criterion,
                    "highest": seen.highest,
                    "lowest": seen.lowest,
                    "scores": seen.scores.tolist(),
                    "order": list(seen.maps),
                }
            )
        metadata = {"maps": json.dumps(told)}
        replace_file(self.root / MAPS, lambda path: save_file(tensors, path, metadata))

    def _text(self, name: str) -> str | None:
        try:
            return (self.root / name).read_text()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from error

    def _write(self, name: str, text: str) -> None:
        if not self.writes:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            replace_file(self.root / name, lambda path: path.write_text(text))
        except OSError as error:
            raise InputError(
                f"{self.root / name} can't be written: {error}; give another folder"
            ) from error

    def _damaged(self, name: str, error: Exception) -> InputError:
        return InputError(f"{self.root / name} can't be read ({error}); remove it, or run again")


def _extremes(row: dict[str, Any], maps: torch.Tensor) -> ExtremeMaps:
    return ExtremeMaps(
        layer=row["layer"],
        criterion=row["criterion"],
        highest=tuple(row["highest"]),
        lowest=tuple(row["lowest"]),
        scores=torch.tensor(row["scores"]),
        maps=dict(zip(row["order"], maps, strict=True)),
    )


def scores_as_json(scores: Scores) -> dict[str, Any]:
    """Scores as plain values: by layer one value a unit, and by convolution one value a filter."""
    told = scores.to_dict()
    filters = told.pop("scores")
    return {
        **told,
        "layers": [
            {
                "name": layer.name,
                "convolutions": list(layer.convs),
                "frozen": layer.frozen,
                "raw": scores.raw[list(layer.units)].tolist(),
                "importance": scores.importance[list(layer.units)].tolist(),
            }
            for layer in scores.units.layers
        ],
        "filters": filters,
    }
