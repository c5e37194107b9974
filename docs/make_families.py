"""Writes docs/families.md: scores, prunes and trains one network of each torchvision family.

Run from the repository's root: `python docs/make_families.py [name ...]`. Weights and images are
random, so the table shows what attrfast can cut, not how well the cut network does.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model

import attrfast
from attrfast.channels import find_units
from attrfast.errors import AttrfastError
from attrfast.trace import tensors_in

TABLE = Path(__file__).with_name("families.md")
CLASSES, BATCH, KEEP = 10, 4, 0.7

# One network a family, and the height and width at which it is tried.
FAMILIES = {
    "vgg16": 64,
    "vgg16_bn": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 299,  # its auxiliary head needs the full size
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "squeezenet1_1": 64,
    "shufflenet_v2_x1_0": 64,
    "regnet_y_400mf": 64,
    "mnasnet1_0": 64,
    "convnext_tiny": 64,
}

HEAD = f"""# Networks that attrfast prunes

Written by `python docs/make_families.py` with torch {torch.__version__.split("+")[0]}. Each network
of `torchvision.models`, with random weights and {CLASSES} classes, is scored with `taylor` on one
batch of random images, pruned to {KEEP:.0%} of its filters in one step, and then trains one step.
*Whole* are filters that stay because nothing can be cut there without changing what the rest
computes.

| network | images | filters | whole | why | filters left | multiply-adds left | trains |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    name: str
    size: int
    filters: int
    whole: int
    reasons: tuple[str, ...]
    left: str
    macs_left: str
    trains: str

    def __str__(self) -> str:
        cells = (
            f"`{self.name}`",
            f"{self.size}×{self.size}",
            f"{self.filters:,}",
            f"{self.whole:,}",
            "; ".join(self.reasons),
            self.left,
            self.macs_left,
            self.trains,
        )
        return "| " + " | ".join(cells) + " |"


def build(name: str) -> nn.Module:
    """The network with random weights; auxiliary heads where the family has them."""
    # These two warn that their default initialisation, which is slow, will change.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    model: nn.Module = get_model(name, weights=None, num_classes=CLASSES, **options)
    return model


def train_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One step of gradient descent on the sum of the losses of all outputs."""
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = [nn.functional.cross_entropy(logits, labels) for logits in tensors_in(model(images))]
    total = torch.stack(losses).sum()
    total.backward()
    optimiser.step()
    if not torch.isfinite(total):
        raise ArithmeticError(f"the loss is {total.item()}")


def examine(name: str, size: int) -> Line:
    """Scores, prunes and trains one network; errors become part of its row."""
    model = build(name)
    images = torch.randn(BATCH, 3, size, size)
    labels = torch.arange(BATCH) % CLASSES
    units = find_units(model, (images[:2],))
    reasons = Counter(layer.frozen for layer in units.layers if layer.frozen is not None)
    whole = int(sum(n for n, why in zip(units.size, units.frozen, strict=True) if why is not None))
    left = macs_left = trains = "no"
    try:
        result = attrfast.prune(
            model,
            [(images, labels)],
            criterion="taylor",
            keep_ratio=KEEP,
            filters_per_step=units.total_filters,
            progress=False,
        )
        first, last = result.history[0], result.history[-1]
        left, macs_left = f"{last.phi:.0%}", f"{last.macs / first.macs:.0%}"
        train_step(result.model, images, labels)
        trains = "yes"
    except (AttrfastError, RuntimeError, ArithmeticError) as error:
        trains = f"no: {error}".splitlines()[0]
    return Line(name, size, units.total_filters, whole, tuple(reasons), left, macs_left, trains)


def lines(names: list[str]) -> Iterator[Line]:
    for name in names:
        line = examine(name, FAMILIES[name])
        print(line, flush=True)
        yield line


def main() -> None:
    """Prints the rows of the named networks; without names, of all, and writes the table."""
    warnings.simplefilter("ignore")
    chosen = sys.argv[1:]
    rows = "\n".join(map(str, lines(chosen or list(FAMILIES))))
    if not chosen:
        TABLE.write_text(HEAD + rows + "\n")


if __name__ == "__main__":
    main()
