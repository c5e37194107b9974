"""Adds up over processes what their passes measured. Must not know how a score is made of it."""

from __future__ import annotations

import hashlib

import torch

from attrfast.distributed import Group
from attrfast.errors import DistributedError, InputError
from attrfast.passes import Pass, numbers
from attrfast.units import Units


def pool(mine: Pass | None, units: Units | None, group: Group, mark: str) -> list[int]:
    """Puts the sums over all processes into every process's pass, by one reduction.

    Args:
        mine: this process's pass; None where it had no data, or where none is needed.
        units: the model's, as this process found them; None where it had no data.
        mark: of the model and of what is measured, which must be the same everywhere.

    Returns:
        The ranks that had data, at least one.

    Raises:
        InputError: no process had data.
        DistributedError: the processes do not measure the same, or one of them is gone.
    """
    told = group.meet("scoring", (mark, _described(mine, units)))
    holders = [rank for rank, (_, described) in enumerate(told) if described is not None]
    if not holders:
        raise InputError(
            "the loader gave no batch; pass a non-empty iterable of (input, label) batches (a generator "
            "can be read only once)"
        )
    if group.alone:
        return holders
    first = told[holders[0]][1]
    for rank, (theirs, described) in enumerate(told):
        if theirs != told[0][0]:
            raise DistributedError(
                f"rank {rank} scores another model than rank 0, or by other arguments; give all processes "
                f"the same, or distributed=False to each for scores of its own"
            )
        if described is not None and described[0] != first[0]:
            raise DistributedError(
                f"rank {rank} found other units in the model than rank {holders[0]}, as its first batch "
                f"takes another way through it; give all processes the same units=..."
            )
    classes = max(told[rank][1][2] for rank in holders)
    count, tallies, by_class = first[1]
    if not tallies:
        return holders
    if mine is None:
        sums = torch.zeros(numbers(tallies, count, classes, by_class), dtype=torch.float64)
    else:
        sums = mine.sums(classes)
    total = group.add_up("scoring", sums)
    if mine is not None:
        mine.replace_sums(total, classes)
    return holders


def _described(mine: Pass | None, units: Units | None) -> tuple[str, tuple[int, int, bool], int] | None:
    """A digest of the units, what `numbers` needs to know of a pass, and the classes that it has seen."""
    if units is None:
        return None
    rows = [(name, row.tolist()) for name, row in units.filters.items()]
    digest = hashlib.blake2b(repr(rows).encode(), digest_size=16).hexdigest()
    if mine is None:
        return digest, (len(units), 0, False), 0
    return digest, (len(units), len(mine.tallies), mine.by_class), mine.classes
