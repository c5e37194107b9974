"""Fashion-MNIST: 70,000 grey images of 28x28 pixels in ten classes, read from IDX files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from attrfast.data.idx import read_idx
from attrfast.data.loaders import Augmentation, Batch, Splits, array_splits
from attrfast.errors import InputError

DEBIAN_ROOT: Final = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = (0.2860,), (0.3530,)
CLASSES: Final = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def fashion_mnist(
    root: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 128,
    eval_batch_size: int = 500,
    val_size: int = 5000,
    augment: bool = False,
    seed: int = 0,
) -> Splits:
    """Opens Fashion-MNIST: 10,000 test images, `val_size` for validation, the rest for training.

    Args:
        root: folder with the four files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
            `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, each plain or with `.gz`.
            Default: where Debian's package dataset-fashion-mnist puts them.
        batch_size, eval_batch_size: images in a batch of the training and of the other loaders.
        val_size: images held out of the training set.
        augment: shift training images by up to 2 pixels and mirror them.
        seed: of the validation split, the shuffling and the augmentation.

    Raises:
        InputError: a file is missing or damaged, or a size is unusable.
    """
    folder = DEBIAN_ROOT if root is None else Path(root)
    return array_splits(
        _read(folder, "train"),
        _read(folder, "t10k"),
        classes=CLASSES,
        mean=MEAN,
        std=STD,
        val_size=val_size,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        augment=Augmentation(shift=2, flip=True) if augment else None,
        seed=seed,
    )


def _read(folder: Path, part: str) -> Batch:
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64 of one part."""
    image_file = _find(folder, f"{part}-images-idx3-ubyte")
    label_file = _find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(image_file), read_idx(label_file).long()
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
        raise InputError(
            f"{image_file} and {label_file} do not belong together: shapes "
            f"{tuple(images.shape)} and {tuple(labels.shape)}"
        )
    if len(labels) and int(labels.max()) >= len(CLASSES):
        raise InputError(f"{label_file} has label {int(labels.max())}; Fashion-MNIST has 0 to 9")
    return images.unsqueeze(1), labels


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise InputError(
        f"Fashion-MNIST's {name}[.gz] is not in {folder}; `apt install dataset-fashion-mnist` puts "
        f"it in {DEBIAN_ROOT}, or give the folder that holds it as `root`"
    )
