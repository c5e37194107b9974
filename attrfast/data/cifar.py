"""CIFAR-10 through torchvision: 60,000 colour images of 32x32 pixels in ten classes."""

from __future__ import annotations

import os
from typing import Any

import torch

from attrfast.data._optional import require
from attrfast.data._torchvision import opened
from attrfast.data.loaders import Augmentation, Batch, Splits, array_splits

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cifar10(
    root: str | os.PathLike[str],
    *,
    download: bool = False,
    batch_size: int = 128,
    eval_batch_size: int = 500,
    val_size: int = 5000,
    augment: bool = True,
    seed: int = 0,
) -> Splits:
    """Opens CIFAR-10: 10,000 test images, `val_size` for validation, the rest for training.

    Args:
        root: folder that holds `cifar-10-batches-py`, or shall hold it.
        download: fetch the set when it is not there.
        batch_size, eval_batch_size: images in a batch of the training and of the other loaders.
        val_size: images held out of the training set.
        augment: shift training images by up to 4 pixels and mirror them, as is usual for CIFAR.
        seed: of the validation split, the shuffling and the augmentation.

    Raises:
        BackendError: torchvision is not installed.
        InputError: the set is not there or damaged, or a size is unusable.
    """
    dataset = require("torchvision.datasets", of="torchvision").CIFAR10
    train = opened(dataset, root, download=download, train=True)
    test = opened(dataset, root, download=False, train=False)
    return array_splits(
        _tensors(train),
        _tensors(test),
        classes=train.classes,
        mean=MEAN,
        std=STD,
        val_size=val_size,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        augment=Augmentation(shift=4, flip=True) if augment else None,
        seed=seed,
    )


def _tensors(data: Any) -> Batch:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64; torchvision keeps them channels-last."""
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets)
