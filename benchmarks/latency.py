"""Pruning to a measured latency: how well it is predicted, what is reached, and at what accuracy.

Random weights and images are enough for the first two. For the third, small networks are
trained on a part of Fashion-MNIST and pruned to a latency, and beside it to the multiply-adds that were
left then, by the same criterion and with as many epochs of fine-tuning in all.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import attrfast
from attrfast import data, models
from attrfast.batches import unpack
from attrfast.channels import discover
from attrfast.evaluate import evaluate
from attrfast.finetune import fine_tune
from attrfast.latency import Gauge
from attrfast.measure import measure
from attrfast.surgery import cut
from attrfast.units import Units
from benchmarks import machine, networks
from benchmarks.training import train

TARGET, SPEEDUP, ERROR = "0.5x", 1.8, 0.10
SMALL_TARGET = "0.55x"  # of the small networks, whose narrow layers can't lose half of their time
WEIGHTS = (0.0, 1.0)
EPOCHS = 14  # of fine-tuning: one after every step, the others at the end
CASES = {
    "ResNet-18, 1×3×224×224": ("resnet18", 1),
    "ResNet-18, 16×3×224×224": ("resnet18", 16),
    "VGG-16-BN, 1×3×32×32": ("vgg16_bn", 1),
    "VGG-16-BN, 64×3×32×32": ("vgg16_bn", 64),
}
_CPU = torch.device("cpu")
_RATE = 0.01  # of learning, in fine-tuning


def _mixtures() -> dict[str, Callable[[], float]]:
    """Shares of a layer's filters that stay, by what stands in the table."""
    chance = random.Random(7)
    return {
        "all": lambda: 1.0,
        "¾ of each layer": lambda: 0.75,
        "½ of each layer": lambda: 0.5,
        "¼ of each layer": lambda: 0.25,
        "¼, ½ or ¾, at random": lambda: chance.choice((0.25, 0.5, 0.75)),
        "20% to 100%, at random": lambda: chance.uniform(0.2, 1.0),
        "10% to 90%, at random": lambda: chance.uniform(0.1, 0.9),
    }


def _random_cut(units: Units, share: Callable[[], float]) -> torch.Tensor:
    removed = torch.zeros(len(units), dtype=torch.bool)
    for layer in units.layers:
        keep = max(1, round(share() * len(layer.units)))
        removed[list(layer.units)[keep:]] = True
    return removed


def predictions(case: str, folder: str | None = None) -> dict[str, Any]:
    """Predicted and measured latency of one network at several prunings.

    Args:
        case: of `CASES`.
        folder: with the tables; None: a fresh one, so that the layers are timed.
    """
    name, samples = CASES[case]
    torch.set_num_threads(machine.THREADS)
    model, batches = networks.load(name, "contiguous", 1, samples=samples)
    images = batches[0][0]
    with tempfile.TemporaryDirectory() as fresh:
        gauge = Gauge(model, unpack((images, None), _CPU), _CPU, folder=folder or fresh, progress=False)
        units = discover(model, (images,)).units
        rows = []
        for told, share in _mixtures().items():
            removed = _random_cut(units, share)
            narrow = copy.deepcopy(model)
            cut(narrow, units, removed)
            gates = {conv: ~removed[row] for conv, row in units.filters.items()}
            found = gauge.read(narrow, gates)
            rows.append({"kept": told, "seconds": found.seconds, "predicted": found.predicted})
    return {"block": gauge.block, "rows": rows, "machine": machine.facts()}


def reached(case: str) -> dict[str, Any]:
    """One network pruned to half of its latency, and to the same multiply-adds without a latency."""
    name, samples = CASES[case]
    torch.set_num_threads(machine.THREADS)
    model, batches = networks.load(name, "contiguous", 2, samples=min(samples, 8))
    images = networks.load(name, "contiguous", 1, samples=samples)[1][0][0]
    count = discover(model, (images[:1],)).units.total_filters // 8
    options: dict[str, Any] = {
        "criterion": "l1",
        "filters_per_step": count,
        "finetune": 0,
        "progress": False,
    }
    with tempfile.TemporaryDirectory() as fresh:
        timed = attrfast.prune(
            model, batches, max_latency=TARGET, latency_input=images, latency_cache=fresh, **options
        )
        share = timed.history[-1].macs / timed.history[0].macs
        counted = attrfast.prune(model, batches, max_macs=share, **options)
        return {
            "macs": share,
            "max_latency": _faster(model, timed.model, images),
            "max_macs": _faster(model, counted.model, images),
            "machine": machine.facts(),
        }


def _faster(model: nn.Module, pruned: nn.Module, images: torch.Tensor) -> dict[str, float]:
    row = measure(model, pruned, images, batch_sizes=(len(images),), rounds=11).rows[0]
    return {"before": row.original.median, "after": row.pruned.median, "faster": row.speedup}


def accuracy(name: str, seed: int, *, images: int = 4000, epochs: int = 8) -> dict[str, Any]:
    """A small network, trained on a part of Fashion-MNIST and pruned in four ways. One thread.

    To a latency by importance alone and by importance per millisecond, and each time to the multiply-adds
    that were left then, without a latency.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    splits = data.fashion_mnist(val_size=60000 - images, batch_size=64, seed=seed)
    model = getattr(models, name)(num_classes=10, in_channels=1)
    train(model, splits.train, epochs)
    example = next(iter(splits.test))[0][:32]
    tested = list(splits.test)
    options: dict[str, Any] = {
        "criterion": "attribution",
        "max_batches": 10,
        "val_loader": tested[:1],
        "finetune": attrfast.FineTune(epochs=1, lr=_RATE),
        "progress": False,
        "seed": seed,
    }
    rows = []
    with tempfile.TemporaryDirectory() as fresh:
        Gauge(model, unpack((example, None), _CPU), _CPU, folder=fresh, progress=False)
        for weight in WEIGHTS:
            timed = attrfast.prune(
                model,
                splits.train,
                max_latency=SMALL_TARGET,
                latency_input=example,
                latency_cache=fresh,
                latency_weight=weight,
                **options,
            )
            share = timed.history[-1].macs / timed.history[0].macs
            counted = attrfast.prune(model, splits.train, max_macs=share, **options)
            row: dict[str, Any] = {"weight": weight, "macs": share}
            for way, result in (("max_latency", timed), ("max_macs", counted)):
                steps = len(result.history) - 1
                if steps > EPOCHS:
                    raise RuntimeError(f"{steps} steps leave nothing of {EPOCHS} epochs")
                rest = attrfast.FineTune(epochs=EPOCHS - steps, lr=_RATE)
                fine_tune(result.model, splits.train, rest, step=steps, device=_CPU, seed=seed)
                row[f"{way} steps"] = steps
                row[f"{way} faster"] = _faster(model, result.model, example)["faster"]
                row[f"{way} top1"] = evaluate(result.model, tested, device=_CPU).top1
            rows.append(row)
    before = evaluate(model, tested, device=_CPU).top1
    return {"before": before, "rows": rows, "machine": machine.facts()}


def error(row: dict[str, Any]) -> float:
    """Of a prediction, as a share of what was measured."""
    return float(row["predicted"] / row["seconds"] - 1)


def worst(rows: Sequence[dict[str, Any]]) -> float:
    """The largest error, whichever its sign."""
    return max(abs(error(row)) for row in rows)
