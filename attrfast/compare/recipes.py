"""The published settings, one name each. They are made for a GPU: see what `Recipe.cost` says.

Networks, data, methods and budgets are those of the published tables. How the networks there were
trained is not known to us; the training here is the usual one for each data set.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from attrfast.compare.published import published
from attrfast.errors import InputError
from attrfast.finetune import FineTune

_METHODS = ("attribution", "taylor_guided", "taylor", "l1")


@dataclass(frozen=True)
class Recipe:
    """A published setting.

    Attributes:
        name: also that of the published table.
        about: network and data.
        network, data: as the command line names them; of the data the kind, without its folder.
        train, finetune: of the whole network, and after every step.
        train_images: in the training set.
        macs: multiply-adds of one image through the whole network.
    """

    name: str
    about: str
    network: str
    data: str
    train: FineTune
    finetune: FineTune
    train_images: int
    macs: float
    methods: tuple[str, ...] = _METHODS

    @property
    def budgets(self) -> tuple[float, ...]:
        """The shares of the multiply-adds that are left in the published rows."""
        return published(self.name).budgets

    @property
    def steps(self) -> int:
        """Steps of a cell at most: each removes a sixteenth of the filters."""
        return 16

    def cost(self) -> str:
        """An upper bound on what the recipe costs for one seed, in words."""
        cells = len(self.methods) * len(self.budgets)
        epochs = self.train.epochs + cells * self.steps * self.finetune.epochs
        passes = cells * self.steps
        # A backward pass costs twice a forward pass in training, and once where weights are frozen.
        total = self.macs * self.train_images * (3 * epochs + 2 * passes)
        return (
            f"{len(self.methods)} methods at {len(self.budgets)} budgets: {cells} cells a seed, each of "
            f"at most {self.steps} steps. At most {epochs} epochs of training and {passes} scoring "
            f"passes over {self.train_images:,} images for every seed, at most {total:.1e} "
            f"multiply-adds without the evaluations; made for a GPU"
        )


def _flowers(kind: str, title: str, macs: float) -> Recipe:
    return Recipe(
        name=f"flowers-{kind}",
        about=f"{title} from ImageNet's weights, Oxford Flowers-102 at 224x224",
        network=f"torchvision:{kind}:pretrained",
        data="flowers102",
        train=FineTune(epochs=60, lr=0.005),
        finetune=FineTune(epochs=5, lr=0.002),
        train_images=1020,
        macs=macs,
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _flowers("vgg16", "VGG-16", 1.55e10),
        _flowers("resnet18", "ResNet-18", 1.81e9),
        _flowers("resnet50", "ResNet-50", 4.09e9),
        Recipe(
            name="cifar10-vgg16",
            about="VGG-16 with batch norm and a linear head, CIFAR-10",
            network="vgg16_bn",
            data="cifar10",
            train=FineTune(epochs=160, lr=0.1, schedule="cosine"),
            finetune=FineTune(epochs=10, lr=0.01),
            train_images=45_000,
            macs=3.13e8,
        ),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: there is none.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise InputError(
            f"there is no recipe {name!r}; did you mean {near[0]!r}? Known: {', '.join(RECIPES)}"
        )
    return RECIPES[name]
