"""The loaders of a comparison, from whatever form the user has them in, and a model measured on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.batches import check_labels, main_output, unpack
from attrfast.compare.records import ClassCount, Measured
from attrfast.compare.settings import Data
from attrfast.cost import cost
from attrfast.data import Splits
from attrfast.errors import InputError
from attrfast.trace import preserved


@dataclass(frozen=True)
class Opened:
    """Loaders for training, for the history and for what is reported; class names where known."""

    train: Iterable[Any]
    val: Iterable[Any]
    test: Iterable[Any]
    classes: tuple[str, ...] | None

    def described(self) -> dict[str, Any]:
        """What tells these loaders from others."""
        return {
            "classes": self.classes,
            **{k: _sizes(getattr(self, k)) for k in ("train", "val", "test")},
        }


def open_loaders(data: Data, seed: int) -> Opened:
    """The loaders for a seed.

    Raises:
        InputError: they are in no form that is known.
    """
    found = data(seed) if callable(data) and not isinstance(data, Splits) else data
    if isinstance(found, Splits):
        return Opened(found.train, found.val, found.test, found.classes)
    if isinstance(found, (tuple, list)) and len(found) == 3:
        for name, loader in zip(("train", "val", "test"), found, strict=True):
            if isinstance(loader, Iterator):
                raise InputError(
                    f"the {name} loader can be read only once (a {type(loader).__name__}); pass a list or "
                    f"a DataLoader"
                )
        return Opened(*found, classes=None)
    raise InputError(
        f"the data must be an attrfast.data.Splits, three loaders (train, val, test), or a function of "
        f"the seed that gives one of these; got {type(found).__name__}"
    )


def _sizes(loader: Iterable[Any]) -> dict[str, Any]:
    items = getattr(loader, "dataset", None)
    return {
        "batches": len(loader) if isinstance(loader, Sized) else None,
        "samples": len(items) if isinstance(items, Sized) else None,
        "batch_size": getattr(loader, "batch_size", None),
    }


def measure(
    model: nn.Module, loader: Iterable[Any], device: torch.device, classes: tuple[str, ...] | None
) -> Measured:
    """Counts right answers by class, multiply-adds and parameters; leaves the model as it was.

    Raises:
        InputError: the loader is empty, or the model does not classify its samples.
    """
    images, right, size = torch.zeros(0), torch.zeros(0), None
    with preserved(model), torch.no_grad():
        model.eval()
        for raw in loader:
            batch = unpack(raw, device)
            logits = main_output(batch.feed(model))
            check_labels(batch, logits)
            labels, hit = batch.labels.long(), logits.argmax(1) == batch.labels
            if size is None:
                images, right = (torch.zeros(logits.shape[1], dtype=torch.int64) for _ in range(2))
                first = next(iter(batch.split(2)))
                size = cost(model, first.args, first.kwargs)
            images += labels.bincount(minlength=len(images)).cpu()
            right += labels[hit].bincount(minlength=len(right)).cpu()
    if size is None:
        raise InputError("the test loader gave no batch; pass a non-empty one")
    names = classes or tuple(str(label) for label in range(len(images)))
    if len(names) < len(images) and int(images[len(names) :].sum()):
        raise InputError(f"the test set has labels above {len(names) - 1}, the last of the classes")
    counts = [
        ClassCount(label, name, int(n), int(hits))
        for label, (name, n, hits) in enumerate(zip(names, images, right, strict=False))
        if n
    ]
    return Measured(tuple(counts), size.macs, size.params)
