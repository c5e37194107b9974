"""Ends the passes of several processes at once, by what all of them have read. Must not know the ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attrfast.batches import Batch
from attrfast.confidence import FIRST, GROWTH, Groups, deviations
from attrfast.distributed import Group
from attrfast.errors import DistributedError
from attrfast.stopping import Stop

_GROUPS = 64  # of samples, of all processes together
_FEWEST = 4  # of one process


@dataclass(frozen=True)
class _Told:
    """What a process that had data tells of it.

    Attributes:
        samples: how many it has read.
        part: which part of its data they are; 0 where nobody knows.
        ascending: whether its labels came in ascending order.
        criteria, units: how many sums it has, and how long they are.
    """

    samples: int
    part: float
    ascending: bool
    criteria: int
    units: int


@dataclass(frozen=True)
class _Joined:
    """Groups of samples of all processes, see `attrfast.confidence.Spread`."""

    samples: int
    sums: torch.Tensor
    count: torch.Tensor

    def deviations(self) -> torch.Tensor:
        return deviations(self.sums, self.count)


class StopTogether:
    """Meets the other processes from time to time, to see whether the lowest filters are settled.

    They meet when each has read a quarter more than at the last meeting, or has nothing left to read; so they
    meet equally often, whatever their shards and batches. Groups of samples are kept by each process and put
    side by side: the total is that of all samples, and so is the variance.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._slots = max(_FEWEST, _GROUPS // group.size)
        self._next = FIRST / group.size
        self._over = False

    def after(self, stop: Stop, batch: Batch, part: float) -> bool:
        """Whether the passes end after this batch; see `Stop.after`."""
        stop.watch(batch)
        if stop.samples < self._next:
            return False
        self._next = stop.samples * GROWTH
        return self._meet(stop, part, finished=False)

    def finish(self, stop: Stop | None) -> None:
        """Goes on meeting those that still read, until they have read all or the filters are settled.

        Args:
            stop: None where this process had no data.
        """
        while not self._over and not self._meet(stop, 1.0, finished=True):
            pass

    def _meet(self, stop: Stop | None, part: float, *, finished: bool) -> bool:
        mine, sums = None, [] if stop is None else stop.read()
        if stop is not None:
            mine = _Told(stop.samples, part, stop.ascending, len(sums), len(sums[0][0]))
        met = self._group.meet("looking", (finished, mine))
        self._over = all(done for done, _ in met)
        told = {rank: tale for rank, (_, tale) in enumerate(met) if tale is not None}
        read = sum(tale.samples for tale in told.values())
        if self._over or read < FIRST or all(tale.ascending for tale in told.values()):
            return False
        (first, one), *others = told.items()
        for rank, tale in others:
            if (tale.criteria, tale.units) != (one.criteria, one.units):
                raise DistributedError(
                    f"rank {rank} scores {tale.units} units by {tale.criteria} criteria, and rank {first} "
                    f"{one.units} by {one.criteria}; give all processes the same model and arguments"
                )
        joined = self._joined(sums, one, read)
        known = all(tale.part > 0 for tale in told.values())
        whole = sum(tale.samples / tale.part for tale in told.values()) if known else 0.0
        settled = stop is not None and stop.look(
            [(each.sums.sum(0), each) for each in joined], read / whole if known else 0.0
        )
        verdict: bool = self._group.meet("whether the filters are settled", settled)[first]
        return verdict

    def _joined(
        self, mine: Sequence[tuple[torch.Tensor, Groups]], one: _Told, read: int
    ) -> list[_Joined]:
        """For each criterion, the groups of all processes."""
        shape = one.criteria, self._group.size, self._slots, 1 + one.units
        table = torch.zeros(shape, dtype=torch.float64)
        for rows, (_, groups) in zip(table, mine, strict=False):  # no data, no groups
            sums, count = groups.sums(self._slots)
            rows[self._group.rank, : len(sums), 0] = count
            rows[self._group.rank, : len(sums), 1:] = sums
        joined = []
        for whole in self._group.add_up("looking", table):
            rows = whole.flatten(0, 1)
            rows = rows[rows[:, 0] > 0]
            joined.append(_Joined(read, rows[:, 1:], rows[:, 0]))
        return joined
