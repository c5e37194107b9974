"""Which filters are left, as text: a 1 or a 0 for each filter of a convolution."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def to_text(gates: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of each convolution's gate (filters,) bool."""
    return {name: "".join("01"[kept] for kept in gate.tolist()) for name, gate in gates.items()}


def from_text(bits: str) -> torch.Tensor:
    """(filters,) bool of one convolution."""
    return torch.tensor([bit == "1" for bit in bits])
