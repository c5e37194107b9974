"""What sets of photographs share: how they are cut and normalised."""

from __future__ import annotations

from typing import Any

from attrfast.data._optional import require
from attrfast.data.loaders import check_batch_size
from attrfast.errors import InputError

# ImageNet's, because networks for photographs start from weights learned there.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def check_sizes(image_size: int, batch_size: int, eval_batch_size: int, workers: int) -> None:
    """Raises InputError where one is not usable."""
    for size in (batch_size, eval_batch_size):
        check_batch_size(size)
    if image_size < 1 or workers < 0:
        raise InputError(
            f"image_size is {image_size} and workers {workers}; use at least 1 and at least 0"
        )


def transforms(size: int) -> tuple[Any, Any]:
    """The middle of the photograph, and a random cut; both normalised, (3, size, size)."""
    t = require("torchvision.transforms", of="torchvision")
    tail = [t.ToTensor(), t.Normalize(MEAN, STD)]
    plain = t.Compose([t.Resize(round(size * 256 / 224)), t.CenterCrop(size), *tail])
    varied = t.Compose([t.RandomResizedCrop(size), t.RandomHorizontalFlip(), *tail])
    return plain, varied
