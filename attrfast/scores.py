"""What an importance pass gives back: one value a unit, read filter by filter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attrfast import ops, tensor_file
from attrfast.errors import InputError
from attrfast.units import Layer, Units

_KIND = "attrfast scores 1"

NORMALIZATIONS = ("l2", "mean", "max", None)


@dataclass(frozen=True)
class Scores(Mapping[str, torch.Tensor]):
    """Importance of every unit; `scores["features.0"]` gives it filter by filter.

    Attributes:
        units: the units, U of them.
        importance: (U,) normalised, on the CPU; float64 for a float64 model, else float32.
        raw: (U,) float64, before normalisation.
        samples: how many samples were seen (0 for a criterion that reads weights alone).
        criterion, reduction, normalize: how it was computed.
        by_class: (K, U) the same from the samples of each class alone, normalised class by class; zero for
            a class without samples. None unless `attribute(by_class=True)` was asked for.
        class_samples: (K,) int64, how many samples of each class were seen; None like `by_class`.
        undecided: (U,) bool, units of which it is not sure whether they are among the lowest; none where all
            samples were read. None unless `attribute(stop="confident")` was asked for.
    """

    units: Units
    importance: torch.Tensor
    raw: torch.Tensor
    samples: int
    criterion: str
    reduction: str | None
    normalize: str | None
    by_class: torch.Tensor | None = None
    class_samples: torch.Tensor | None = None
    undecided: torch.Tensor | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        """(filters,) importance of each filter of the convolution `name`: its unit's."""
        return self.importance[self._filters(name)]

    def class_scores(self, name: str) -> torch.Tensor:
        """(K, filters) importance of each filter of the convolution `name`, class by class.

        Raises:
            InputError: the scores were not taken by class.
        """
        if self.by_class is None:
            raise InputError("the scores were not taken by class; call attribute(..., by_class=True)")
        return self.by_class[:, self._filters(name)]

    def _filters(self, name: str) -> torch.Tensor:
        try:
            return self.units.filters[name]
        except KeyError:
            raise KeyError(f"{name!r} is no scored convolution; see list(scores)") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.units.filters)

    def __len__(self) -> int:
        return len(self.units.filters)

    def to_numpy(self) -> dict[str, np.ndarray[Any, Any]]:
        """convolution -> (filters,) importance, in arrays of their own."""
        return {name: self[name].numpy() for name in self}

    def to_dict(self) -> dict[str, Any]:
        """The scores and how they were computed, in plain numbers and text that JSON can hold.

        Returns:
            `scores` (convolution -> one number a filter), `criterion`, `reduction`, `normalize`, `samples`;
            of scores by class `by_class` (convolution -> one list a class) and `class_samples` as well; with
            `stop="confident"` also `undecided` (convolution -> numbers of its filters).
        """
        told: dict[str, Any] = {"scores": {name: self[name].tolist() for name in self}, **self._how()}
        if self.by_class is not None:
            told["by_class"] = {name: self.class_scores(name).tolist() for name in self}
        if self.class_samples is not None:
            told["class_samples"] = self.class_samples.tolist()
        if self.undecided is not None:
            flags = {name: self.undecided[self._filters(name)] for name in self}
            told["undecided"] = {
                name: torch.nonzero(row).flatten().tolist() for name, row in flags.items()
            }
        return told

    def _how(self) -> dict[str, Any]:
        names = ("criterion", "reduction", "normalize", "samples")
        return {name: getattr(self, name) for name in names}

    def save(self, path: str | Path) -> Path:
        """Writes everything to one safetensors file; `Scores.load(path)` reads it again.

        Returns:
            The path.

        Raises:
            InputError: the file can't be written.
        """
        held = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        held |= {"units.layer_of": self.units.layer_of, "units.size": self.units.size}
        about = self._how() | {
            "depthwise": sorted(self.units.depthwise),
            "layers": [dataclasses.asdict(layer) for layer in self.units.layers],
            "frozen": self.units.frozen,
        }
        for role in _MAPS:
            rows = getattr(self.units, role)
            about[role] = list(rows)  # their order is that of the forward pass, which the file loses
            held |= {f"units.{role}.{name}": row for name, row in rows.items()}
        return tensor_file.write(path, _KIND, held, about)

    @staticmethod
    def load(path: str | Path) -> Scores:
        """The scores that `save` wrote; no model is needed, and nothing is unpickled.

        Raises:
            InputError: the file is missing, damaged, or holds something else.
        """
        held, about = tensor_file.read(path, _KIND)
        try:
            maps = {role: {name: held[f"units.{role}.{name}"] for name in about[role]} for role in _MAPS}
            layers = tuple(
                Layer(row["name"], tuple(row["convs"]), tuple(row["units"]), row["frozen"])
                for row in about["layers"]
            )
            units = Units(
                **maps,
                depthwise=frozenset(about["depthwise"]),
                layers=layers,
                layer_of=held["units.layer_of"],
                size=held["units.size"],
                frozen=tuple(about["frozen"]),
            )
            how = {name: about[name] for name in ("criterion", "reduction", "normalize", "samples")}
            found = Scores(units=units, **{name: held.get(name) for name in _TENSORS}, **how)  # type: ignore[arg-type]
            counts = {len(found.importance), len(found.raw), len(units.layer_of), len(units)}
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} holds no whole scores: {error!r} is missing or amiss") from error
        if len(counts) != 1:
            raise InputError(f"{path} contradicts itself: it speaks of {sorted(counts)} units")
        return found

    def __repr__(self) -> str:
        return (
            f"Scores({self.criterion}, {len(self)} convolutions, {self.units.total_filters} filters in "
            f"{len(self.units)} units, {self.samples} samples)"
        )


_TENSORS = ("importance", "raw", "by_class", "class_samples", "undecided")
_MAPS = ("filters", "outputs", "inputs")


def normalized(raw: torch.Tensor, units: Units, kind: str | None) -> torch.Tensor:
    """Divides the importance of each unit by that of its layer.

    Args:
        raw: (..., U) floating, on the CPU.
        kind: `"l2"`: the layer's Euclidean norm (the paper's); `"mean"` or `"max"` of its absolute
            values; None: nothing is divided.

    Returns:
        (..., U), row by row; a layer that is zero everywhere stays zero.

    Raises:
        InputError: another kind.
    """
    if kind not in NORMALIZATIONS:
        raise InputError(f"normalize must be one of {NORMALIZATIONS}, got {kind!r}")
    if kind is None:
        return raw.clone()
    order = torch.argsort(units.layer_of, stable=True)
    sorted_rows = raw[..., order]
    counts = torch.bincount(units.layer_of, minlength=len(units.layers))
    counts = counts.repeat(sorted_rows.numel() // max(1, len(order)))
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
    offsets[1:] = counts.cumsum(0)
    out = torch.empty_like(raw)
    out[..., order] = ops.segment_normalize(sorted_rows.flatten(), offsets, kind).view_as(sorted_rows)
    return out
