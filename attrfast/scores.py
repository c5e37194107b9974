"""What an importance pass gives back: one value a unit, read filter by filter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from attrfast import ops
from attrfast.errors import InputError
from attrfast.units import Units

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

    def __repr__(self) -> str:
        return (
            f"Scores({self.criterion}, {len(self)} convolutions, {self.units.total_filters} filters in "
            f"{len(self.units)} units, {self.samples} samples)"
        )


def normalized(raw: torch.Tensor, units: Units, kind: str | None) -> torch.Tensor:
    """Divides the importance of each unit by that of its layer.

    Args:
        raw: (U,) floating, on the CPU.
        kind: `"l2"`: the layer's Euclidean norm (the paper's); `"mean"` or `"max"` of its absolute
            values; None: nothing is divided.

    Returns:
        (U,); a layer that is zero everywhere stays zero.

    Raises:
        InputError: another kind.
    """
    if kind not in NORMALIZATIONS:
        raise InputError(f"normalize must be one of {NORMALIZATIONS}, got {kind!r}")
    if kind is None:
        return raw.clone()
    order = torch.argsort(units.layer_of, stable=True)
    counts = torch.bincount(units.layer_of, minlength=len(units.layers))
    offsets = torch.zeros(len(units.layers) + 1, dtype=torch.int64)
    offsets[1:] = counts.cumsum(0)
    out = torch.empty_like(raw)
    out[order] = ops.segment_normalize(raw[order], offsets, kind)
    return out
