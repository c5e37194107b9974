"""Masks of whole filters by scores, in the manner of `torch.nn.utils.prune`.

Masked filters stay in the model as zeros; `attrfast.prune` and Torch-Pruning take them out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from attrfast.errors import InputError
from attrfast.scores import Scores

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class AttributionStructured(prune.BasePruningMethod):
    """Masks the filters with the lowest scores; as every structured method, it ranks those that are left.

    Args:
        amount: how many filters to mask: a count, or a share in [0, 1] of those that are left.
        dim: the dimension of the tensor that holds filters.

    Scores come in by `importance_scores`, of the tensor's shape, alike within a filter.
    """

    PRUNING_TYPE = "structured"

    def __init__(self, amount: int | float, dim: int = 0) -> None:
        _checked(amount)
        self.amount, self.dim = amount, dim

    def compute_mask(self, t: torch.Tensor, default_mask: torch.Tensor) -> torch.Tensor:
        """`default_mask` without the lowest filters.

        Args:
            t: scores, of the shape of what is pruned.
            default_mask: like t.

        Raises:
            InputError: more filters are to go than there are.
        """
        filters = t.shape[self.dim]
        count = self.amount if isinstance(self.amount, int) else round(self.amount * filters)
        if count > filters:
            raise InputError(f"amount is {count} filters, and {filters} are left; ask for fewer")
        scores = t.movedim(self.dim, 0)
        while scores.dim() > 1:
            scores = scores.amax(-1)
        lowest = torch.argsort(scores, stable=True)[:count]
        return default_mask.clone().index_fill_(self.dim, lowest, 0)


def attribution_structured(
    module: nn.Module,
    name: str,
    amount: int | float,
    scores: Scores | torch.Tensor,
    *,
    layer: str | None = None,
) -> nn.Module:
    """Masks the filters of a module with the lowest scores, as `prune.ln_structured` does by norms.

    `prune.remove(module, name)` makes it permanent; another call masks some of those that are left.

    Args:
        module: a convolution or linear layer; gets `name + "_orig"` and `name + "_mask"`.
        name: the parameter, `"weight"` or `"bias"`.
        amount: a count of filters, or a share in [0, 1] of those that are left.
        scores: (filters,), or the `Scores` of the model, together with `layer`.
        layer: the module's name there.

    Returns:
        The module.

    Raises:
        InputError: scores and module don't belong together, or the amount has no meaning.
    """
    if isinstance(scores, Scores):
        if layer is None or layer not in scores:
            raise InputError(
                f"layer must be the module's name in the scores, one of {list(scores)}, got {layer!r}"
            )
        scores = scores[layer]
    tensor = getattr(module, name, None)
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"a {type(module).__name__} has no parameter {name!r}")
    dim = int(isinstance(module, _TRANSPOSED) and tensor.dim() > 1)
    if dim and getattr(module, "groups", 1) != 1:
        raise InputError(
            "a grouped transposed convolution has no dimension of filters; mask its bias, or call "
            "attrfast.prune, which takes filters out of it"
        )
    if scores.shape != (tensor.shape[dim],):
        raise InputError(
            f"scores has shape {tuple(scores.shape)}, expected ({tensor.shape[dim]},), one a filter"
        )
    shape = [1] * tensor.dim()
    shape[dim] = -1
    # In float64, so that no two scores become equal.
    spread = scores.detach().to(tensor.device, torch.float64).view(shape).expand_as(tensor)
    prune_by: Any = AttributionStructured.apply  # torch leaves it untyped
    prune_by(module, name, amount, dim, importance_scores=spread)
    return module


def attribution_global(
    model: nn.Module, amount: int | float, scores: Scores, name: str = "weight"
) -> nn.Module:
    """Masks the filters with the lowest scores of all layers together; each keeps one at least.

    Args:
        model: the one that was scored.
        amount: a count of filters, or a share in [0, 1] of the scored ones. Filters that are masked
            already count, being the first to go where the scores say so.
        scores: of the model, normalised so that layers can be compared (`attribute` does).
        name: the parameter.

    Returns:
        The model.

    Raises:
        InputError: the amount has no meaning, or a scored layer is not in the model.
    """
    _checked(amount)
    total = sum(len(scores[layer]) for layer in scores)
    count = amount if isinstance(amount, int) else round(amount * total)
    if count > total - len(scores):
        raise InputError(
            f"amount is {count} of {total} filters, of which {len(scores)} layers keep one each; ask "
            f"for at most {total - len(scores)}"
        )
    modules = dict(model.named_modules())
    if missing := [layer for layer in scores if layer not in modules]:
        raise InputError(f"the model has no {missing[0]!r}; score the model that is pruned")
    best = {layer: int(scores[layer].argmax()) for layer in scores}
    ranked = sorted(
        (value, layer, index)
        for layer in scores
        for index, value in enumerate(scores[layer].tolist())
        if index != best[layer]
    )
    lowest: dict[str, list[int]] = {}
    for _, layer, index in ranked[:count]:
        lowest.setdefault(layer, []).append(index)
    for layer, indices in lowest.items():
        module = modules[layer]
        mask = getattr(module, f"{name}_mask", None)
        keep = torch.ones(len(scores[layer]), dtype=torch.float64)
        keep[indices] = 0
        if mask is not None:
            left = mask.flatten(1).any(1).cpu() if mask.dim() > 1 else mask.cpu() != 0
            indices = [index for index in indices if left[index]]
        attribution_structured(module, name, len(indices), keep)
    return model


def _checked(amount: Any) -> None:
    whole = isinstance(amount, int) and not isinstance(amount, bool)
    share = isinstance(amount, float) and math.isfinite(amount) and amount <= 1
    if not (whole or share) or amount < 0:
        raise InputError(
            f"amount must be a count of filters, or a share as a float in [0, 1], got {amount!r}"
        )
