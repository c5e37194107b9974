"""Oxford Flowers-102 through torchvision: 8,189 photographs in 102 classes, read as needed."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.utils.data import DataLoader

from attrfast.data._optional import require
from attrfast.data._photographs import MEAN, STD, check_sizes, transforms
from attrfast.data._torchvision import opened
from attrfast.data.loaders import Splits


def flowers102(
    root: str | os.PathLike[str],
    *,
    download: bool = False,
    image_size: int = 224,
    batch_size: int = 32,
    eval_batch_size: int = 64,
    augment: bool = True,
    workers: int = 2,
    seed: int = 0,
) -> Splits:
    """Opens Flowers-102 with its official split into 1,020, 1,020 and 6,149 images.

    Args:
        root: folder that holds `flowers-102`, or shall hold it.
        download: fetch the set when it is not there.
        image_size: height and width in pixels that photographs are scaled and cut to.
        batch_size, eval_batch_size: images in a batch of the training and of the other loaders.
        augment: random cuts and mirroring of training images; otherwise the middle is cut out.
        workers: processes that decode photographs; 0 decodes in the calling one.
        seed: of the shuffling and, with workers, of the augmentation (without, torchvision draws
            from the global random state).

    Raises:
        BackendError: torchvision is not installed.
        InputError: the set is not there or damaged, or a size is unusable.
    """
    check_sizes(image_size, batch_size, eval_batch_size, workers)
    require("scipy.io", of="scipy")  # torchvision reads the labels with it
    dataset = require("torchvision.datasets", of="torchvision").Flowers102
    plain, varied = transforms(image_size)

    def loader(split: str, transform: Any, size: int, fetch: bool) -> DataLoader[Any]:
        data = opened(dataset, root, download=fetch, split=split, transform=transform)
        return DataLoader(
            data,
            batch_size=size,
            shuffle=split == "train",
            num_workers=workers,
            generator=torch.Generator().manual_seed(seed),
        )

    train = loader("train", varied if augment else plain, batch_size, download)
    return Splits(
        train=train,
        val=loader("val", plain, eval_batch_size, False),
        test=loader("test", plain, eval_batch_size, False),
        classes=tuple(train.dataset.classes),  # type: ignore[attr-defined]
        image_shape=(3, image_size, image_size),
        mean=MEAN,
        std=STD,
    )
