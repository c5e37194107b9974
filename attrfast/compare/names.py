"""Networks and data sets by the names that the command line knows them by."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from attrfast import data, models
from attrfast.data._optional import require
from attrfast.data.loaders import ImageArray, Splits, hold_out
from attrfast.errors import InputError

DATA = ("digits[:PIXELS]", "fashion-mnist[:DIR]", "cifar10:DIR", "flowers102:DIR")
_DIGITS = 16  # pixels: what the networks' poolings need at least, and half of what they were made for


@dataclass(frozen=True)
class NamedData:
    """Opens a data set for a seed; what `compare` takes as its data, in any process.

    Attributes:
        name: `digits`, `digits:PIXELS`, `fashion-mnist`, `fashion-mnist:DIR`, `cifar10:DIR` or
            `flowers102:DIR`.
        images: train on so many images, the classes in their shares; None: on all.
        loader_workers: processes that decode photographs (of Flowers-102 alone).
    """

    name: str
    images: int | None = None
    loader_workers: int = 2

    def __call__(self, seed: int) -> Splits:
        """Raises InputError where the name is unknown or the files are not there."""
        splits = self._splits(seed)
        return splits if self.images is None else limited(splits, self.images, seed)

    def _splits(self, seed: int) -> Splits:
        kind, _, where = self.name.partition(":")
        if kind == "digits":
            if where and not where.isdecimal():
                raise InputError(f"digits:{where} names no number of pixels; use for instance digits:32")
            return data.digits(image_size=int(where or _DIGITS), seed=seed)
        if kind == "fashion-mnist":
            return data.fashion_mnist(where or None, seed=seed)
        if kind not in ("cifar10", "flowers102"):
            raise InputError(f"unknown data {self.name!r}; use one of {', '.join(DATA)}")
        if not where:
            raise InputError(f"{kind} needs the folder with its files: {kind}:DIR")
        if kind == "cifar10":
            return data.cifar10(where, seed=seed)
        return data.flowers102(where, workers=self.loader_workers, seed=seed)


def limited(splits: Splits, images: int, seed: int) -> Splits:
    """The same with so many training images, every class in its share.

    Raises:
        InputError: there are not so many.
    """
    loader = splits.train
    whole: Any = loader.dataset
    if images > len(whole):
        raise InputError(f"there are {len(whole)} training images, not {images}; ask for fewer")
    if images == len(whole):
        return splits
    if isinstance(whole, ImageArray):
        _, chosen = hold_out(whole.labels, images, seed)
        part: Any = copy.copy(whole)
        part.images, part.labels = whole.images[chosen], whole.labels[chosen]
    else:
        # torchvision's Flowers102 has its labels under this name.
        _, chosen = hold_out(torch.as_tensor(whole._labels), images, seed)
        part = Subset(whole, chosen.tolist())
    train = DataLoader(
        part,
        batch_size=loader.batch_size,
        shuffle=True,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator().manual_seed(seed),
    )
    return replace(splits, train=train)


def network(name: str, splits: Splits) -> Callable[[], nn.Module]:
    """The function that builds a network for a data set.

    Args:
        name: one of `attrfast.models`, with `:WIDTH` to multiply its widths (`resnet20:0.5`), or
            `torchvision:NAME`, also `torchvision:NAME:pretrained`.
        splits: for the number of classes and of channels.

    Raises:
        InputError: there is no such network, or it does not take these images.
    """
    kind, _, rest = name.partition(":")
    if kind == "torchvision":
        return _torchvision(rest.partition(":")[0], splits)
    if kind not in models.__all__:
        near = difflib.get_close_matches(kind, models.__all__, n=1, cutoff=0.0)
        raise InputError(
            f"unknown network {name!r}; did you mean {near[0]!r}? Known: {', '.join(models.__all__)}, and "
            f"torchvision:NAME"
        )
    options: dict[str, Any] = {"num_classes": splits.num_classes, "in_channels": splits.image_shape[0]}
    if rest:
        try:
            options["width"] = float(rest)
        except ValueError:
            raise InputError(f"{name!r}: {rest!r} is no width; use for instance {kind}:0.5") from None
    return functools.partial(getattr(models, kind), **options)


def _torchvision(kind: str, splits: Splits) -> Callable[[], nn.Module]:
    library = require("torchvision.models", of="torchvision")
    known = library.list_models(module=library)
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1, cutoff=0.0)
        raise InputError(f"torchvision has no network {kind!r}; did you mean {near[0]!r}?")
    if splits.image_shape[0] != 3:
        raise InputError(
            f"torchvision:{kind} takes images of 3 channels, and these have {splits.image_shape[0]}; "
            f"use one of attrfast's own networks: {', '.join(models.__all__)}"
        )
    return functools.partial(library.get_model, kind, weights=None, num_classes=splits.num_classes)


def pretrained(name: str) -> Callable[[nn.Module], None] | None:
    """What loads ImageNet's weights, for `torchvision:NAME:pretrained`; None for any other name.

    Raises:
        InputError: the name ends in something else.
    """
    kind, _, rest = name.partition(":")
    base, _, ending = rest.partition(":")
    if kind != "torchvision" or not ending:
        return None
    if ending != "pretrained":
        raise InputError(f"{name!r}: {ending!r} is not known; use torchvision:{base}:pretrained")
    return functools.partial(load_imagenet, kind=base)


def load_imagenet(model: nn.Module, kind: str) -> None:
    """Loads torchvision's ImageNet weights, all but those of the last layer.

    torchvision keeps them in its cache, and fetches them when they are not there.

    Raises:
        InputError: they could not be fetched or read.
    """
    library = require("torchvision.models", of="torchvision")
    try:
        known = library.get_model_weights(kind)
        # The first ones, which published results of the time start from; later ones score higher.
        weights = getattr(known, "IMAGENET1K_V1", known.DEFAULT)
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"torchvision's weights of {kind} could not be fetched or read: {error}; put them into its "
            f"cache ({torch.hub.get_dir()}/checkpoints), or leave out `:pretrained`"
        ) from error
    mine = model.state_dict()
    fits = {key: value for key, value in state.items() if mine[key].shape == value.shape}
    missing = sorted(key for key in mine if key not in fits)
    if len({key.rpartition(".")[0] for key in missing}) > 2:  # a last layer, and an auxiliary one
        raise InputError(f"torchvision's weights of {kind} do not fit the network: {missing[:5]}")
    model.load_state_dict(fits, strict=False)
