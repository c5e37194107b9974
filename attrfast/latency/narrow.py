"""Copies of a model that have lost filters, to be timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from attrfast.channels import Discovery
from attrfast.surgery import cut
from attrfast.units import Units

Inputs = tuple[Sequence[Any], dict[str, Any]]


def narrowed(model: nn.Module, units: Units, removed: torch.Tensor) -> nn.Module:
    """A copy without the units that are gone, (U,) bool."""
    narrow = copy.deepcopy(model)
    cut(narrow, units, removed)
    return narrow


def cut_to(units: Units, keep: Callable[[int, int], int]) -> torch.Tensor:
    """(U,) bool, the units that are gone where layers keep the first of those that may go.

    Args:
        keep: of a layer, by its index and how many of its units may go; layers without any are not asked.
    """
    removed = torch.zeros(len(units), dtype=torch.bool)
    for index, layer in enumerate(units.layers):
        free = [unit for unit in layer.units if units.frozen[unit] is None]
        if free:
            removed[free[keep(index, len(free)) :]] = True
    return removed


def rounded(level: int, width: int) -> int:
    """The nearest width that any device likes."""
    block = next((block for block in (32, 16, 8, 4) if 4 * block <= width), 1)
    return min(width, max(1, round(level / block)) * block)


def evenly(units: Units, share: float, whole: set[int]) -> torch.Tensor:
    """(U,) bool, the units that are gone where every layer keeps about a share of its units.

    Args:
        whole: layers (by index) that keep all.
    """

    def keep(index: int, width: int) -> int:
        return width if index in whole else rounded(round(share * width), width)

    return cut_to(units, keep)


def uncuttable(model: nn.Module, found: Discovery, inputs: Inputs) -> set[int]:
    """Layers (by index) without a half of which the model does not run: its code has sizes written out."""
    units = found.units

    def runs(layers: Sequence[int]) -> bool:
        removed = cut_to(units, lambda index, width: max(1, width // 2) if index in layers else width)
        try:
            with torch.no_grad():
                narrowed(model, units, removed)(*inputs[0], **inputs[1])
        except (RuntimeError, ValueError):
            return False
        return True

    everything = range(len(units.layers))
    return set() if runs(everything) else {index for index in everything if not runs([index])}
