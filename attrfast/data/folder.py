"""Photographs in folders, one folder a class, read through torchvision as needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from attrfast.data._optional import require
from attrfast.data._photographs import MEAN, STD, check_sizes, transforms
from attrfast.data.loaders import Splits, hold_out
from attrfast.errors import InputError


def image_folder(
    root: str | os.PathLike[str],
    *,
    image_size: int = 224,
    batch_size: int = 32,
    eval_batch_size: int = 64,
    val_size: int | None = None,
    augment: bool = True,
    workers: int = 2,
    seed: int = 0,
) -> Splits:
    """Opens `root/train/CLASS/*`, `root/val/CLASS/*` and `root/test/CLASS/*`.

    Of `val` and `test` one may be missing: the other then serves as `test`, which is what is reported, and
    for validation images are held out of `train`.

    Args:
        root: the folder.
        image_size: height and width in pixels that photographs are scaled and cut to.
        batch_size, eval_batch_size: images in a batch of the training and of the other loaders.
        val_size: images held out of `train` where there is no validation set; None: a tenth of them.
        augment: random cuts and mirroring of training images; otherwise the middle is cut out.
        workers: processes that decode photographs; 0 decodes in the calling one.
        seed: of the held-out images, the shuffling and, with workers, of the augmentation (without,
            torchvision draws from the global random state).

    Raises:
        BackendError: torchvision is not installed.
        InputError: a folder is missing, has no images, or has other classes than `train`.
    """
    check_sizes(image_size, batch_size, eval_batch_size, workers)
    there = {
        part: Path(root) / part for part in ("train", "val", "test") if (Path(root) / part).is_dir()
    }
    if "train" not in there or len(there) < 2:
        raise InputError(
            f"{root} must hold the folders train and val or test (or all three), each with one folder a "
            f"class; it has {', '.join(there) or 'none of them'}"
        )
    plain, varied = transforms(image_size)
    train = _opened(there["train"], varied if augment else plain)
    others = {part: _opened(there[part], plain) for part in there if part != "train"}
    for part, found in others.items():
        if found.classes != train.classes:
            differ = sorted(set(found.classes) ^ set(train.classes))
            raise InputError(
                f"{there[part]} and {there['train']} have different classes: {', '.join(differ[:5])}"
            )
    test = others["test"] if "test" in others else others["val"]
    if len(others) == 2:
        kept, val = train, others["val"]
    else:
        size = max(1, len(train) // 10) if val_size is None else val_size
        left, held = hold_out(torch.as_tensor(train.targets), size, seed)
        kept = Subset(train, left.tolist())
        val = Subset(_opened(there["train"], plain), held.tolist())

    def loader(images: Any, size: int, shuffle: bool) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(
            images, batch_size=size, shuffle=shuffle, num_workers=workers, generator=generator
        )

    return Splits(
        train=loader(kept, batch_size, True),
        val=loader(val, eval_batch_size, False),
        test=loader(test, eval_batch_size, False),
        classes=tuple(train.classes),
        image_shape=(3, image_size, image_size),
        mean=MEAN,
        std=STD,
    )


def _opened(folder: Path, transform: Any) -> Any:
    dataset = require("torchvision.datasets", of="torchvision").ImageFolder
    try:
        return dataset(str(folder), transform=transform)
    except (OSError, RuntimeError) as error:  # of no classes, or a class without images
        raise InputError(f"{folder} can't be used: {error}") from error
