"""Cuts a batch into parts by samples, whatever containers it is made of."""

from __future__ import annotations

from typing import Any

import torch


def rows(tree: Any, samples: int, which: slice | torch.Tensor) -> Any:
    """Some samples of a batch or of a model's output.

    Args:
        tree: tensors (samples, ...) and lists with one entry a sample, in nested containers; anything
            else is taken to belong to all samples and kept.
        samples: how many samples the whole has.
        which: a slice, or the numbers of the samples (int64).
    """
    if isinstance(tree, torch.Tensor):
        return tree[which] if tree.dim() and tree.shape[0] == samples else tree
    if isinstance(tree, dict):
        return type(tree)({k: rows(v, samples, which) for k, v in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(rows(item, samples, which) for item in tree))
    if isinstance(tree, (list, tuple)):
        if tree and len(tree) == samples and not any(isinstance(i, torch.Tensor) for i in tree):
            if isinstance(which, slice):
                return tree[which]
            return type(tree)(tree[i] for i in which.tolist())
        return type(tree)(rows(item, samples, which) for item in tree)
    return tree
