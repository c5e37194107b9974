"""Weighs what a filter is worth against what it costs. Must not know how either is found."""

from __future__ import annotations

import torch

_LEAST = 1e-3  # of the mean saving: what saves nothing is not divided by nothing


def per_second(importance: torch.Tensor, savings: torch.Tensor) -> torch.Tensor:
    """Importance (U,) for every second that a unit costs, in units of the mean unit's seconds.

    Taking the lowest first gives up the least importance for a time saved, as in filling a knapsack. A
    negative importance (a unit that does harm) is multiplied, so that of two such units the slower goes
    first; an importance of zero stays zero.

    Args:
        importance: (U,).
        savings: (U,) seconds, not negative.
    """
    mean = savings.mean()
    if not mean > 0:
        return importance
    cost = (savings / mean).clamp(min=_LEAST).to(importance)
    return torch.where(importance >= 0, importance / cost, importance * cost)
