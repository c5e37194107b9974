"""Data sets by name. Must not know which network will see them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Subset

from attrfast import data
from attrfast.data.loaders import ImageArray, Splits, hold_out, over
from attrfast.errors import InputError

KINDS = {
    "digits": "digits[:PIXELS]",
    "fashion-mnist": "fashion-mnist[:DIR]",
    "cifar10": "cifar10:DIR",
    "flowers102": "flowers102:DIR",
    "imagefolder": "imagefolder:DIR",
}
_DIGITS = 16  # pixels: what the networks' poolings need at least, and half of what they were made for


@dataclass(frozen=True)
class NamedData:
    """Opens a data set for a seed; what `compare` takes as its data, in any process.

    Attributes:
        name: `digits`, `digits:PIXELS`, `fashion-mnist`, `fashion-mnist:DIR`, `cifar10:DIR`,
            `flowers102:DIR` or `imagefolder:DIR`.
        images: train on so many images, the classes in their shares; None: on all.
        loader_workers: processes that decode photographs (of Flowers-102 and of folders).
        batch_size: images in a batch of the training loader; None: the data set's own.
        image_size: pixels that photographs are cut to; None: 224.
    """

    name: str
    images: int | None = None
    loader_workers: int = 2
    batch_size: int | None = None
    image_size: int | None = None

    def __call__(self, seed: int) -> Splits:
        """Raises InputError where the name is unknown or the files are not there."""
        splits = self._splits(seed)
        return splits if self.images is None else limited(splits, self.images, seed)

    def _splits(self, seed: int) -> Splits:
        kind, _, where = self.name.partition(":")
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)
            raise InputError(
                f"unknown data {self.name!r}; did you mean {near[0]!r}? Use one of "
                f"{', '.join(KINDS.values())}"
            )
        photographs = kind in ("flowers102", "imagefolder")
        if self.image_size is not None and not photographs:
            raise InputError(f"{kind} has images of one size, and image_size is {self.image_size}")
        options: dict[str, Any] = {"seed": seed}
        if self.batch_size is not None:
            options["batch_size"] = self.batch_size
        if photographs:
            options["workers"] = self.loader_workers
            if self.image_size is not None:
                options["image_size"] = self.image_size
        if kind == "digits":
            if where and not where.isdecimal():
                raise InputError(f"digits:{where} names no number of pixels; use for instance digits:32")
            return data.digits(image_size=int(where or _DIGITS), **options)
        if kind == "fashion-mnist":
            return data.fashion_mnist(where or None, **options)
        if not where:
            raise InputError(f"{kind} needs the folder with its files: {kind}:DIR")
        openers: dict[str, Callable[..., Splits]] = {
            "cifar10": data.cifar10,
            "flowers102": data.flowers102,
            "imagefolder": data.image_folder,
        }
        return openers[kind](where, **options)


def limited(splits: Splits, images: int, seed: int) -> Splits:
    """The same with so many training images, every class in its share.

    Raises:
        InputError: there are not so many.
    """
    whole: Any = splits.train.dataset
    if images > len(whole):
        raise InputError(f"there are {len(whole)} training images, not {images}; ask for fewer")
    if images == len(whole):
        return splits
    labels = whole.labels if isinstance(whole, ImageArray) else _labels(whole)
    _, chosen = hold_out(labels, images, seed)
    return replace(splits, train=over(splits.train, chosen, seed))


def _labels(whole: Any) -> torch.Tensor:
    """(N,) of a data set that decodes its images as they are asked for."""
    if isinstance(whole, Subset):
        return _labels(whole.dataset)[torch.as_tensor(whole.indices)]
    # torchvision's ImageFolder has its labels under the first name, and Flowers102 under the second.
    return torch.as_tensor(whole.targets if hasattr(whole, "targets") else whole._labels)
