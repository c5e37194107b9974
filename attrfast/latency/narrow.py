"""Copies of a model that have lost filters, to be timed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attrfast.channels import Discovery
from attrfast.surgery import cut
from attrfast.units import Layer, Units

Inputs = tuple[Sequence[Any], dict[str, Any]]


def narrowed(model: nn.Module, units: Units, removed: torch.Tensor) -> nn.Module:
    """A copy without the units that are gone, (U,) bool."""
    narrow = copy.deepcopy(model)
    cut(narrow, units, removed)
    return narrow


def removable(units: Units, layer: Layer) -> list[int]:
    """The layer's units that may go."""
    return [unit for unit in layer.units if units.frozen[unit] is None]


def rounded(level: int, width: int) -> int:
    """The nearest width that any device likes."""
    block = next((block for block in (32, 16, 8, 4) if 4 * block <= width), 1)
    return min(width, max(1, round(level / block)) * block)


def evenly(units: Units, share: float, whole: set[int]) -> torch.Tensor:
    """(U,) bool, the units that are gone where every layer keeps about a share of its units.

    Args:
        whole: layers (by index) that keep all.
    """
    removed = torch.zeros(len(units), dtype=torch.bool)
    for index, layer in enumerate(units.layers):
        free = removable(units, layer)
        if index not in whole and free:
            removed[free[rounded(round(share * len(free)), len(free)) :]] = True
    return removed


def uncuttable(model: nn.Module, found: Discovery, inputs: Inputs) -> set[int]:
    """Layers (by index) without a half of which the model does not run: its code has sizes written out."""
    units = found.units

    def runs(layers: Sequence[int]) -> bool:
        removed = torch.zeros(len(units), dtype=torch.bool)
        for index in layers:
            free = removable(units, units.layers[index])
            removed[free[max(1, len(free) // 2) :]] = True
        try:
            with torch.no_grad():
                narrowed(model, units, removed)(*inputs[0], **inputs[1])
        except (RuntimeError, ValueError):
            return False
        return True

    everything = range(len(units.layers))
    return set() if runs(everything) else {index for index in everything if not runs([index])}
