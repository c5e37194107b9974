"""Which units go next: all layers ranked together, the lowest first.

Must not know where the importance comes from, nor how a unit is cut out.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from attrfast.errors import InputError, NumericalError
from attrfast.units import Units


@dataclass(frozen=True)
class Block:
    """Units of one layer that go in one go.

    Attributes:
        score: mean importance of its units.
        units: lowest first.
        filters: how many filters they take along.
    """

    score: float
    units: tuple[int, ...]
    filters: int


def for_the_worst_class(by_class: torch.Tensor) -> torch.Tensor:
    """Importance that guards the class which would lose most: the maximum over classes.

    The mean over all samples thins out a filter that one class of K needs to a K-th of its importance, and
    one that a rare class needs to less. By the maximum, a filter goes early only if every class can do
    without it: of all sets of as many units, the lowest by the maximum are the one in which the most
    that any class needs any of them is least. Each class is normalised on its own, so that neither its
    number of samples nor the size of its gradients speaks louder than which filters it needs.

    Args:
        by_class: (K, U), each class normalised within each layer; zero for a class without samples.

    Returns:
        (U,), comparable between layers: at most 1, the share of a layer's norm for the class that needs
        the unit most.
    """
    return by_class.amax(0)


def rank(
    importance: torch.Tensor,
    units: Units,
    *,
    min_filters: int = 1,
    round_to: int | Mapping[str, int] = 1,
    allowed: torch.Tensor | None = None,
) -> list[Block]:
    """All that may be removed, lowest importance first; any beginning of the list may be taken.

    Args:
        importance: (U,), comparable between layers.
        units: the model's units.
        min_filters: how many filters every convolution keeps at least.
        round_to: units of a layer go in blocks that leave every convolution a multiple of this; by the
            name of the convolution, if it differs.
        allowed: (U,) bool, units that may go; None: all that are not frozen.

    Raises:
        NumericalError: an importance is not finite.
        InputError: `min_filters` or `round_to` is below 1.
    """
    steps = round_to if isinstance(round_to, Mapping) else dict.fromkeys(units.filters, round_to)
    for name, value in (("min_filters", min_filters), *(("round_to", step) for step in steps.values())):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    bad = torch.nonzero(~torch.isfinite(importance)).flatten()
    if len(bad):
        where = units.layers[int(units.layer_of[bad[0]])].name
        raise NumericalError(
            f"the importance of a filter of {where} is {float(importance[bad[0]])}; check the data and "
            f"the weights"
        )
    scores = importance.tolist()
    free = [reason is None for reason in units.frozen]
    if allowed is not None:
        free = [f and bool(a) for f, a in zip(free, allowed.tolist(), strict=True)]
    blocks: list[Block] = []
    sizes = units.size.tolist()
    takes = _takes(units)
    for layer in units.layers:
        candidates = sorted((u for u in layer.units if free[u]), key=lambda u: (scores[u], u))
        width = {conv: len(units.filters[conv]) for conv in layer.convs}
        blocks.extend(
            _blocks(candidates, scores, sizes, takes, width, min_filters=min_filters, steps=steps)
        )
    # Within a layer scores ascend already; the sort is stable, so a layer's blocks stay in order.
    return sorted(blocks, key=lambda block: block.score)


def _takes(units: Units) -> list[dict[str, int]]:
    """For every unit, how many filters it takes from which convolution."""
    takes: list[dict[str, int]] = [{} for _ in range(len(units))]
    for conv, row in units.filters.items():
        for unit in row.tolist():
            if unit >= 0:
                takes[unit][conv] = takes[unit].get(conv, 0) + 1
    return takes


def _blocks(
    candidates: Sequence[int],
    scores: Sequence[float],
    sizes: Sequence[int],
    takes: Sequence[dict[str, int]],
    width: dict[str, int],
    *,
    min_filters: int,
    steps: Mapping[str, int],
) -> list[Block]:
    blocks = []
    pending: list[int] = []
    touched: set[str] = set()
    for unit in candidates:
        if any(width[conv] - count < min_filters for conv, count in takes[unit].items()):
            continue
        pending.append(unit)
        for conv, count in takes[unit].items():
            width[conv] -= count
            touched.add(conv)
        if all(width[conv] % steps[conv] == 0 for conv in touched):
            score = sum(scores[u] for u in pending) / len(pending)
            blocks.append(Block(score, tuple(pending), sum(sizes[u] for u in pending)))
            pending, touched = [], set()
    return blocks


def first_filters(blocks: Sequence[Block], count: int) -> int:
    """How many blocks from the beginning take at least `count` filters (all, if they don't)."""
    taken = 0
    for index, block in enumerate(blocks):
        if taken >= count:
            return index
        taken += block.filters
    return len(blocks)


def mask(blocks: Iterable[Block], units: Units) -> torch.Tensor:
    """(U,) bool, true for the blocks' units."""
    removed = torch.zeros(len(units), dtype=torch.bool)
    for block in blocks:
        removed[list(block.units)] = True
    return removed


def spared(ignore: Iterable[str | nn.Module], model: nn.Module, units: Units) -> torch.Tensor:
    """(U,) bool, true for units with a filter in one of the layers to leave whole.

    Args:
        ignore: names of modules (everything inside them counts), patterns such as `"layer4.*"`, or
            modules themselves.

    Raises:
        InputError: an entry matches nothing; the message names the nearest.
    """
    if isinstance(ignore, (str, nn.Module)):
        ignore = (ignore,)
    names = {id(module): name for name, module in model.named_modules()}
    whole = torch.zeros(len(units), dtype=torch.bool)
    for entry in ignore:
        pattern = entry
        if isinstance(entry, nn.Module):
            found = names.get(id(entry))
            if found is None:
                raise InputError(f"ignore holds a {type(entry).__name__} that is no module of the model")
            pattern = found
        if not isinstance(pattern, str):
            raise InputError(f"ignore must hold names or modules, got {type(entry).__name__}")
        hits = [n for n in units.filters if _matches(n, pattern)]
        if not hits and not any(_matches(n, pattern) for n in names.values()):
            near = difflib.get_close_matches(pattern, list(names.values()), n=1, cutoff=0.0)
            raise InputError(
                f"ignore names {pattern!r}, which is no module of the model; did you mean {near[0]!r}?"
            )
        for name in hits:
            row = units.filters[name]
            whole[row[row >= 0]] = True
    return whole


def _matches(name: str, pattern: str) -> bool:
    inside = pattern == "" or name == pattern or name.startswith(pattern + ".")
    return inside or fnmatch.fnmatchcase(name, pattern)
