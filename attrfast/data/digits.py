"""The handwritten digits inside scikit-learn: 1,797 grey images of 8x8 pixels, no download."""

from __future__ import annotations

import torch
from torch.nn import functional

from attrfast.data._optional import require
from attrfast.data.loaders import Augmentation, Splits, array_splits, hold_out
from attrfast.errors import InputError

MEAN, STD = (0.3053,), (0.3760,)  # of the 8x8 images, white at 1
_PEAK = 16  # the set's pixels go from 0 to 16
_TEST = 360


def digits(
    *,
    image_size: int = 8,
    batch_size: int = 64,
    eval_batch_size: int = 256,
    val_size: int = 180,
    augment: bool = False,
    seed: int = 0,
) -> Splits:
    """Opens the digits: 360 test images, `val_size` for validation, the rest for training.

    The set has no official split; the test images are the same for every `seed`.

    Args:
        image_size: height and width in pixels; other sizes than 8 are interpolated.
        batch_size, eval_batch_size: images in a batch of the training and of the other loaders.
        val_size: images held out of the training set.
        augment: shift training images by up to an eighth of their size.
        seed: of the validation split, the shuffling and the augmentation.

    Raises:
        BackendError: scikit-learn is not installed.
        InputError: an unusable size.
    """
    if image_size < 8:
        raise InputError(f"image_size is {image_size}; the digits are 8 pixels wide, use 8 or more")
    bunch = require("sklearn.datasets", of="scikit-learn").load_digits()
    pixels = torch.from_numpy(bunch.images).float().unsqueeze(1)
    if image_size != 8:
        pixels = functional.interpolate(pixels, image_size, mode="bilinear", antialias=True)
    # To 240 levels, so that interpolated values keep their fractions in a byte.
    images = (pixels * 15).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    rest, test = hold_out(labels, _TEST, seed=0)
    return array_splits(
        (images[rest], labels[rest]),
        (images[test], labels[test]),
        classes=[str(digit) for digit in range(10)],
        mean=MEAN,
        std=STD,
        peak=_PEAK * 15,
        val_size=val_size,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        augment=Augmentation(shift=image_size // 8) if augment else None,
        seed=seed,
    )
