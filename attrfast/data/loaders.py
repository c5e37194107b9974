"""Images in memory, loaders over them, and the splits that every data helper returns.

Knows nothing of files or of particular data sets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from attrfast.errors import InputError

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Splits:
    """Loaders of `(images, labels)` batches and what one must know of the images.

    Attributes:
        train: shuffled (and augmented where asked); for training, scoring and fine-tuning.
        val: held out of the training set; for choosing when to stop.
        test: for the figure that is reported.
        classes: names of the classes, in the order of the labels.
        image_shape: (C, H, W) of one image.
        mean, std: the normalisation, one number a channel, for pixels from 0 to 1.
    """

    train: DataLoader[Any]
    val: DataLoader[Any]
    test: DataLoader[Any]
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def shard(self, rank: int, size: int, seed: int = 0) -> Splits:
        """What one of several processes reads: every `size`-th image; the test images stay whole.

        Shards differ in length by one image at most, and share none.

        Args:
            rank, size: which process, of how many.
            seed: of the order in which training images come.
        """

        def part(loader: DataLoader[Any]) -> DataLoader[Any]:
            whole: Any = loader.dataset
            return over(loader, torch.arange(rank, len(whole), size), seed)

        return replace(self, train=part(self.train), val=part(self.val))


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a batch of training images.

    Attributes:
        shift: each image is moved by up to this many pixels each way; zeros come in at the edges.
        flip: each image is mirrored left to right with probability one half.
    """

    shift: int = 0
    flip: bool = False

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(N, C, H, W) to the same shape, a new tensor where anything changes."""
        count, _, height, width = images.shape
        if self.shift:
            padded = functional.pad(images, [self.shift] * 4)
            top, left = torch.randint(2 * self.shift + 1, (2, count, 1), generator=generator)
            row = top + torch.arange(height)
            column = left + torch.arange(width)
            sample = torch.arange(count)[:, None, None]
            # Indices on both sides of a slice put the channel last.
            moved = padded[sample, :, row[:, :, None], column[:, None, :]]
            images = moved.permute(0, 3, 1, 2).contiguous()
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images


class ImageArray(Dataset[Batch]):
    """Images and labels in memory, cut into batches by one indexing operation.

    Items are asked for by batches: a loader over it gets a list of indices and returns the batch,
    which makes worker processes superfluous.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        mean, std: one number a channel, for pixels scaled to 0..1 by `peak`.
        peak: the pixel value that means white.
        augment: changes to make, or None.
        seed: of the random numbers behind `augment`.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        peak: float = 255.0,
        augment: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if len(images) != len(labels):
            raise InputError(f"{len(images)} images but {len(labels)} labels; there must be one each")
        self.images = images
        self.labels = labels
        scale = torch.tensor(std).view(1, -1, 1, 1)
        self.factor = 1.0 / (peak * scale)
        self.offset = -torch.tensor(mean).view(1, -1, 1, 1) / scale
        self.augment = augment
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """One image (C, H, W) and its label ()."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Images (B, C, H, W) float32 and labels (B,) int64."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.augment is not None:
            images = self.augment(images, self.generator)
        return torch.addcmul(self.offset, images.float(), self.factor), self.labels[chosen]


def array_loader(data: ImageArray, batch_size: int, *, shuffle: bool, seed: int) -> DataLoader[Any]:
    """A loader over images in memory, with a random state of its own."""
    check_batch_size(batch_size)
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=shuffle,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(seed),
    )


def over(loader: DataLoader[Any], chosen: torch.Tensor, seed: int) -> DataLoader[Any]:
    """The same loader over some of its images, by their indices (int64)."""
    whole: Any = loader.dataset
    if isinstance(whole, ImageArray):
        part: Any = copy.copy(whole)
        part.images, part.labels = whole.images[chosen], whole.labels[chosen]
    else:
        part = Subset(whole, chosen.tolist())
    return DataLoader(
        part,
        batch_size=loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler) and len(chosen) > 0,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(seed),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch size below 1."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1")


def hold_out(labels: torch.Tensor, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a held-out subset at random, with every class in its share (to within one image).

    Args:
        labels: (N,) labels of the whole set.
        size: images in the subset.
        seed: the same seed draws the same subset.

    Returns:
        Indices of what remains and of the subset, both ascending.

    Raises:
        InputError: the size is below 1, or nothing would remain.
    """
    if not 1 <= size < len(labels):
        raise InputError(
            f"cannot hold out {size} of {len(labels)} images; hold out at least one and leave at "
            f"least one"
        )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Every image gets its rank within its class as a fraction of the class; ordered by that, any
    # run of images has the classes in their shares.
    order = torch.empty(len(labels))
    for label in set(labels.tolist()):
        members = shuffled[labels[shuffled] == label]
        order[members] = (torch.arange(len(members)) + 0.5) / len(members)
    mixed = shuffled[order[shuffled].argsort(stable=True)]
    return mixed[size:].sort().values, mixed[:size].sort().values


def array_splits(
    train: Batch,
    test: Batch,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    peak: float = 255.0,
    val_size: int,
    batch_size: int,
    eval_batch_size: int,
    augment: Augmentation | None,
    seed: int,
) -> Splits:
    """Loaders over sets in memory; `val_size` images of the training set are held out."""
    images, labels = train
    kept, held = hold_out(labels, val_size, seed)

    def loader(data: Batch, size: int, changes: Augmentation | None, shuffle: bool) -> Any:
        array = ImageArray(*data, mean=mean, std=std, peak=peak, augment=changes, seed=seed)
        return array_loader(array, size, shuffle=shuffle, seed=seed)

    channels, height, width = images.shape[1:]
    return Splits(
        train=loader((images[kept], labels[kept]), batch_size, augment, True),
        val=loader((images[held], labels[held]), eval_batch_size, None, False),
        test=loader(test, eval_batch_size, None, False),
        classes=tuple(classes),
        image_shape=(channels, height, width),
        mean=tuple(mean),
        std=tuple(std),
    )
