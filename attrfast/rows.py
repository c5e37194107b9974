"""Takes samples out of a batch, whatever containers it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def rows(tree: Any, samples: int, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of a batch or of a model's output.

    Args:
        tree: tensors (samples, ...) and lists with one entry a sample, in nested containers; anything
            else is taken to belong to all samples and kept.
        samples: how many samples the whole has.
    """
    return _picked(tree, samples, lambda item: item[start:stop])


def chosen(tree: Any, samples: int, index: torch.Tensor) -> Any:
    """The samples with the numbers `index` (int64) of a batch; see `rows`."""

    def pick(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return item[index]
        return type(item)(item[i] for i in index.tolist())

    return _picked(tree, samples, pick)


def repeated(tree: Any, samples: int, count: int) -> Any:
    """The first `count` samples of a batch that is repeated as often as need be; see `rows`."""
    times = -(-count // samples)

    def pick(item: Any) -> Any:
        return (torch.cat([item] * times) if isinstance(item, torch.Tensor) else item * times)[:count]

    return _picked(tree, samples, pick)


def _picked(tree: Any, samples: int, pick: Callable[[Any], Any]) -> Any:
    if isinstance(tree, torch.Tensor):
        return pick(tree) if tree.dim() and tree.shape[0] == samples else tree
    if isinstance(tree, dict):
        return type(tree)({k: _picked(v, samples, pick) for k, v in tree.items()})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_picked(item, samples, pick) for item in tree))
    if isinstance(tree, (list, tuple)):
        if tree and len(tree) == samples and not any(isinstance(i, torch.Tensor) for i in tree):
            return pick(tree)
        return type(tree)(_picked(item, samples, pick) for item in tree)
    return tree
