"""Weighs what a filter is worth against what it costs. Must not know how either is found."""

from __future__ import annotations

import torch

_LEAST = 1e-3  # of the mean saving: what saves nothing is not divided by nothing


def weighed(importance: torch.Tensor, savings: torch.Tensor, weight: float) -> torch.Tensor:
    """Importance (U,) divided by the seconds that a unit costs, in units of the mean unit's, to a power.

    With a weight of 1, taking the lowest first gives up the least importance for a time saved, as in filling a
    knapsack, if importance adds up over filters. What is normalised in its layer does not: so taken, a narrow
    layer loses as much for two of its four filters as a wide one for two of its hundred. With 0 the time saved
    has no say in what goes. A negative importance (a unit that does harm) is multiplied, so that of two such
    units the slower goes first; an importance of zero stays zero.

    Args:
        importance: (U,).
        savings: (U,) seconds, not negative.
        weight: the power, at least 0.
    """
    mean = savings.mean()
    if not mean > 0 or weight == 0:
        return importance
    cost = (savings / mean).clamp(min=_LEAST).to(importance) ** weight
    return torch.where(importance >= 0, importance / cost, importance * cost)
