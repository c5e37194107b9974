"""Ends a pass over the data before the loader does. Must not know what comes of the ranking."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from attrfast.batches import Batch
from attrfast.confidence import FIRST, HIGHEST, Groups, Looks, Spread
from attrfast.criteria import Criterion, Reduction, has_own_pass
from attrfast.distributed import Group
from attrfast.errors import InputError
from attrfast.passes import Pass
from attrfast.scores import normalized
from attrfast.units import Units

LONG = 10_000  # samples, from which a loader is worth being read in part


class Stop:
    """Looks after every batch whether the lowest filters of all criteria are settled.

    Args:
        running: the pass, before its first batch.
        normalize, confidence, lowest, seed: as of `attribute`.

    Raises:
        InputError: a criterion can't tell how sure it is.
    """

    def __init__(
        self, running: Pass, normalize: str | None, confidence: float, lowest: int | None, seed: int
    ) -> None:
        running.keep_groups()
        self._running = running
        self._looks = [
            Looks(
                running.units,
                functools.partial(_ranked, tally.reduction, running.units, normalize),
                confidence=confidence,
                lowest=lowest,
                seed=seed,
            )
            for tally in running.tallies
        ]
        self._labels: tuple[int, int] | None = None  # the lowest, and the highest of the last batch
        self.ascending = True
        self._early = False

    @property
    def samples(self) -> int:
        """How many this process has read."""
        return self._running.samples

    def after(self, batch: Batch, part: float) -> bool:
        """Whether the pass of one process may end after this batch.

        Args:
            batch: as the loader gave it.
            part: which part of all batches was read; 0 where nobody knows.
        """
        self.watch(batch)
        if part >= 1:
            return False
        if self.ascending and self.samples >= FIRST:
            return False  # the samples to come are of other classes
        return self.look(self.read(), part)

    def read(self) -> list[tuple[torch.Tensor, Groups]]:
        """For each criterion the sum (U,) over the samples read, and the sums over groups of them."""
        return [
            (tally.total, tally.groups) for tally in self._running.tallies if tally.groups is not None
        ]

    def look(self, read: Sequence[tuple[torch.Tensor, Spread]], part: float) -> bool:
        """Whether the lowest filters of all criteria are settled by what was read, of all samples this part."""
        for looks, (total, groups) in zip(self._looks, read, strict=True):
            looks.look(total, groups, part)
        self._early = all(looks.settled for looks in self._looks)
        return self._early

    def watch(self, batch: Batch) -> None:
        """Follows whether labels have come in ascending order so far."""
        extremes = batch.extremes
        if extremes is None:
            self.ascending = False
            return
        low, high = extremes
        lowest, last = self._labels or (low, low)
        self.ascending = self.ascending and low >= last
        self._labels = lowest, high

    def undecided(self) -> list[torch.Tensor]:
        """(U,) bool for each criterion; nothing is undecided where everything was read."""
        lowest, last = self._labels or (0, 0)
        if self.ascending and lowest < last and self.samples >= FIRST:
            warnings.warn(
                "stop='confident' read all samples, because the loader sorts them by their labels, so that "
                "the first tell nothing about the rest; give a loader that shuffles",
                stacklevel=3,
            )
        none = torch.zeros(len(self._running.units), dtype=torch.bool)
        if not self._early:
            return [none] * len(self._looks)
        return [none if looks.undecided is None else looks.undecided for looks in self._looks]


def part_read(read: int, loader: Iterable[Any], max_batches: int | None) -> float:
    """Which part of the batches to be read the first `read` are; 0 where nobody knows their number."""
    total = len(loader) if isinstance(loader, Sized) else None
    if max_batches is not None:
        total = min(total, max_batches) if total else max_batches
    return read / total if total else 0.0


def can_stop(criterion: Criterion) -> bool:
    """Whether it can be told how sure this criterion is."""
    return criterion.needs_data and not criterion.trains and not has_own_pass(criterion)


def are_long_and_shuffled(loader: Iterable[Any], group: Group) -> bool:
    """Whether the loaders of all processes are `DataLoader`s in an order drawn anew every time, and have
    10,000 samples or more together."""
    told = group.meet("how long the loader is", _shuffled_samples(loader))
    return None not in told and sum(told) >= LONG


def _shuffled_samples(loader: Iterable[Any]) -> int | None:
    """How many a loader has that shuffles; None for another."""
    sampler = getattr(loader, "sampler", None) if isinstance(loader, DataLoader) else None
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler, SubsetRandomSampler)) or (
        isinstance(sampler, DistributedSampler) and sampler.shuffle
    ):
        return len(sampler)
    return 0 if isinstance(loader, Sized) and len(loader) == 0 else None


def check_stop(stop: str | None, confidence: float, lowest: int | None) -> None:
    """Raises InputError where one of these can't be used."""
    if stop not in (None, "confident"):
        raise InputError(f"stop must be 'confident' or None (read everything), got {stop!r}")
    if not (isinstance(confidence, (int, float)) and 0 < confidence <= HIGHEST):
        raise InputError(
            f"confidence must be above 0 and at most {HIGHEST}, for instance 0.95, got {confidence!r}"
        )
    if lowest is not None and (isinstance(lowest, bool) or not isinstance(lowest, int) or lowest < 1):
        raise InputError(
            f"lowest must be a whole number of filters of at least 1, or None for a sixteenth of all, got "
            f"{lowest!r}"
        )


def _ranked(
    reduction: Reduction, units: Units, normalize: str | None, totals: torch.Tensor, samples: int
) -> torch.Tensor:
    """What is ranked (B, U), of sums over samples (B, U)."""
    return normalized(reduction.finish(totals, samples), units, normalize)
