"""How time and memory of a pass grow: with the samples, with the layers scored, with the network's depth.

Every point is a pass in a fresh process, over images that are made when they are asked for and then thrown
away. Chains of convolution, batch norm and ReLU start near the identity, so that neither activations nor
gradients vanish in a thousand layers.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from benchmarks import contenders, fresh, machine, memory
from benchmarks.quiet import LIMIT, Clock

SAMPLES = (1_000, 3_000, 10_000, 30_000, 100_000)
DEPTHS = (10, 30, 100, 300, 1_000)
BOUNDED = "attrfast, memory_limit"
MEMORY_LIMIT = 160_000_000  # bytes, of `BOUNDED`; the record of 1,000 layers takes 40 MB of them
LINEAR, FLAT = 1.05, 1.20  # at most: the exponent of time, and the highest peak over the lowest

_WIDTH, _SIDE = 16, 16  # of the chains: channels, and pixels of their images' sides
_BATCH, _CHAIN_BATCH = 64, 16
_CHAIN_BATCHES = 2


@dataclass(frozen=True)
class Series:
    """Passes that differ in one number.

    Attributes:
        title: what grows, as pictures and tables say it.
        points: its values.
        contenders: who is measured.
        linear: whether attrfast's time may grow, in proportion.
        flat: whether attrfast's peak must not grow.
    """

    title: str
    points: tuple[int, ...]
    contenders: tuple[str, ...]
    linear: bool
    flat: bool


def all_series(samples: Sequence[int] = SAMPLES, depths: Sequence[int] = DEPTHS) -> dict[str, Series]:
    """What `measure` measures: up to so many samples, and layers."""
    both = "hooks", "attrfast"
    scored = f"layers scored of {depths[-1]:,}"
    return {
        "samples": Series("samples", tuple(samples), both, linear=True, flat=True),
        "scored": Series(scored, (1, *depths[::-2][::-1]), ("captum", *both), linear=False, flat=True),
        "depth": Series(
            "layers of the network", tuple(depths), (*both, BOUNDED), linear=True, flat=False
        ),
    }


class Images(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches of random images and labels, made one after the other; the same every time.

    Args:
        samples: in all.
        shape: of an image.
        batch: samples in a batch; the last may have fewer.
    """

    def __init__(self, samples: int, shape: tuple[int, int, int], batch: int) -> None:
        self.samples, self.shape, self.batch = samples, shape, batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        random = torch.Generator().manual_seed(0)
        for start in range(0, self.samples, self.batch):
            size = min(self.batch, self.samples - start)
            images = torch.randn(size, *self.shape, generator=random)
            yield (
                images.to(memory_format=torch.channels_last),
                torch.randint(10, (size,), generator=random),
            )


def chain(depth: int, width: int = _WIDTH) -> nn.Module:
    """So many times convolution, batch norm and ReLU, and a linear head."""
    layers: list[nn.Module] = []
    for index in range(depth):
        conv = nn.Conv2d(width if index else 3, width, 3, padding=1, bias=False)
        with torch.no_grad():
            nn.init.dirac_(conv.weight).add_(torch.randn_like(conv.weight), alpha=1e-3)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def measure(
    series: dict[str, Series],
    *,
    repeats: int,
    patience: float,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Seconds and peak bytes at every point of every series, and how they grow.

    Args:
        series: see `all_series`.
        repeats: of every point; medians count.
        patience: seconds to spend on waiting for a quiet machine.
        say: told what goes on.
    """
    about = machine.facts() | {"threads": machine.THREADS}
    passes = repeats * sum(len(one.points) * len(one.contenders) for one in series.values())
    found = {}
    for key, one in series.items():
        rounds = []
        for turn in range(repeats):
            say(f"growth with {one.title}, up to {max(one.points):,}: {turn + 1} of {repeats}")
            rounds.append(fresh.call(_round, key, one, patience / passes))
        rows = {
            name: [_median([done[name][i] for done in rounds]) for i in range(len(one.points))]
            for name in one.contenders
        }
        found[key] = {
            "title": one.title,
            "points": list(one.points),
            "kept": [kept_bytes(key, value, max(one.points)) for value in one.points],
            "contenders": rows,
            "fits": {name: fit(one, name, points) for name, points in rows.items()},
        }
    return {"machine": about, "repeats": repeats, "series": found}


def kept_bytes(key: str, value: int, largest: int) -> int | None:
    """Activations that a batch leaves between the layers of a chain; None for another network."""
    if key == "samples":
        return None
    depth = value if key == "depth" else largest
    return 4 * depth * _CHAIN_BATCH * _WIDTH * _SIDE * _SIDE


def fit(series: Series, name: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """How a contender's time and memory grow over a series.

    Returns:
        The exponent of its time over the larger half of the points (there, what is done once no longer
        counts), the bytes that each unit more takes, the highest peak over the lowest, and what attrfast
        holds of `LINEAR`, `FLAT` and `MEMORY_LIMIT`.
    """
    seconds = [row["seconds"] for row in points]
    peaks = [row["bytes"] for row in points]
    top = slice(len(points) // 2 - (len(points) < 3), None)
    exponent = statistics.linear_regression(
        [math.log(x) for x in series.points[top]], [math.log(y) for y in seconds[top]]
    ).slope
    spread = max(peaks) / max(1, min(peaks))
    quiet = not any(row["disturbed"] for row in points[top])
    verdicts = {}
    if series.linear and name.startswith("attrfast"):
        verdicts["time"] = ("held" if exponent <= LINEAR else "missed") if quiet else "disturbed"
    if name == BOUNDED or (series.flat and name == "attrfast"):
        good = max(peaks) <= MEMORY_LIMIT if name == BOUNDED else spread <= FLAT
        verdicts["memory"] = "held" if good else "missed"
    return {
        "exponent": exponent,
        "bytes_each": statistics.linear_regression(series.points, peaks).slope,
        "spread": spread,
        "verdicts": verdicts,
    }


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    quiet = [row for row in rounds if row["others"] <= LIMIT] or rounds
    return {
        "seconds": statistics.median(row["seconds"] for row in quiet),
        "bytes": statistics.median(row["bytes"] for row in rounds),
        "disturbed": min(row["others"] for row in rounds) > LIMIT,
        "all": rounds,
    }


def _round(key: str, series: Series, patience: float) -> dict[str, list[dict[str, Any]]]:
    """Forks this process, which has only imported what it needs, for each contender at each point."""
    memory.import_libraries()
    largest = max(series.points)
    return {
        name: [
            fresh.call(_point, name, key, value, largest, patience, fork=True) for value in series.points
        ]
        for name in series.contenders
    }


def _point(name: str, key: str, value: int, largest: int, patience: float) -> dict[str, Any]:
    torch.set_num_threads(machine.THREADS)
    memory.wake_libraries()
    torch.manual_seed(0)
    if key == "samples":
        from attrfast.models import vgg_small

        model: nn.Module = vgg_small(width=0.5)
        images = Images(value, (1, 28, 28), _BATCH)
    else:
        model = chain(value if key == "depth" else largest)
        images = Images(_CHAIN_BATCHES * _CHAIN_BATCH, (3, _SIDE, _SIDE), _CHAIN_BATCH)
    model = model.eval().to(memory_format=torch.channels_last)
    run = _prepared(name, model, DataLoader(images, batch_size=None), value if key == "scored" else None)
    clock = Clock(patience)
    (seconds, others), peak = memory.grown(lambda: clock.time(run, gc.collect))
    return {"seconds": seconds, "others": others, "bytes": peak}


def _prepared(
    name: str, model: nn.Module, batches: contenders.Stream, layers: int | None
) -> Callable[[], object]:
    """A pass of a contender that scores the first `layers` layers, or all."""
    if name == BOUNDED:
        return functools.partial(contenders.attrfast, model, batches, memory_limit=MEMORY_LIMIT)
    if not name.startswith("attrfast"):
        return functools.partial(contenders.CONTENDERS[name], model, batches, layers=layers)
    if layers is None:
        return functools.partial(contenders.attrfast, model, batches)

    def run() -> contenders.Scores:
        return contenders.attrfast(model, batches, units=_first_layers(model, batches, layers))

    return run


def _first_layers(model: nn.Module, batches: contenders.Stream, count: int) -> Any:
    """What is found in a chain (`attrfast.channels.Discovery`), without the units of later layers."""
    from attrfast.channels import discover

    images, _ = next(iter(batches))
    found = discover(model, (images[:2],))
    units = found.units
    layers = units.layers[:count]
    stop = 1 + max(max(layer.units) for layer in layers)

    def kept(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: row for name, row in rows.items() if int(row.max()) < stop}

    return dataclasses.replace(
        found,
        units=dataclasses.replace(
            units,
            filters=kept(units.filters),
            outputs=kept(units.outputs),
            inputs=kept(units.inputs),
            layers=layers,
            layer_of=units.layer_of[:stop],
            size=units.size[:stop],
            frozen=units.frozen[:stop],
        ),
        channels={value: place for value, place in found.channels.items() if int(place[1].max()) < stop},
    )
