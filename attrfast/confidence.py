"""Says when enough samples have been read: when reading the rest would hardly change which filters are lowest.

Sums over groups of samples are kept beside the total. Redrawing how much each group counts shows how the
ranking would turn out on other samples, through whatever is made of the sums afterwards: the absolute value,
the norms of the layers, the order of all of them together. Must not know what is done with the ranking.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from attrfast.units import Units

AVERAGE = 0.02  # of the lowest filters, that the rest of the samples may exchange for others on average,
MOST = 0.15  # and at most, at the confidence that is asked for
HIGHEST = 0.999  # confidence: it takes 64,000 draws

FIRST = 1024  # samples before the first look
GROWTH = 1.25  # of the samples, from look to look
_LOOKS = 32  # at most: up to 1024 * 1.25^31, a million samples
_DRAWS = 1000  # at least
_AT_ONCE = 1 << 20  # numbers of the draws that are held in memory together
_GROUPS = 64  # at most; at least half as many by the time of the first look
_SMALLEST = 16  # samples in a group, at the start

Importance = Callable[[torch.Tensor, int], torch.Tensor]


class Spread(Protocol):
    """What tells how samples differ."""

    @property
    def samples(self) -> int:
        """How many there are."""

    def deviations(self) -> torch.Tensor:
        """(G, U) float64 on the CPU: how far the sum of each group is from that of average samples.

        The sum of their squares over the groups estimates the variance of the total (U,).
        """


class Groups:
    """Sums over up to 64 groups of samples that follow each other.

    When there are 64, neighbours are united; so their number stays between 32 and 64 whatever is read, and
    a drift in the order of the samples shows as a difference between groups.

    Args:
        units: U.

    Attributes:
        samples: how many were added.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(_GROUPS, units, dtype=dtype, device=device)
        self._each = _SMALLEST
        self.samples = 0

    def add(self, values: torch.Tensor) -> None:
        """Adds the values (n, U) of the next n samples."""
        while self.samples + len(values) > _GROUPS * self._each:
            self._sums[: _GROUPS // 2] = self._sums[0::2] + self._sums[1::2]
            self._sums[_GROUPS // 2 :] = 0
            self._each *= 2
        place = torch.arange(self.samples, self.samples + len(values), device=values.device)
        self._sums.index_add_(0, place // self._each, values.to(self._sums.dtype))
        self.samples += len(values)

    def sums(self, most: int = _GROUPS) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums (G, U) float64 and samples (G,) float64 of at most so many groups of neighbours, on the CPU."""
        whole, rest = divmod(self.samples, self._each)
        sums = self._sums[: whole + (rest > 0)].to("cpu", torch.float64)
        count = torch.full((len(sums),), float(self._each), dtype=torch.float64)
        if rest:
            count[-1] = rest
        united = torch.arange(len(sums)) // max(1, -(-len(sums) // most))
        groups = int(united[-1]) + 1 if len(united) else 0
        return (
            sums.new_zeros(groups, sums.shape[1]).index_add_(0, united, sums),
            count.new_zeros(groups).index_add_(0, united, count),
        )

    def deviations(self) -> torch.Tensor:
        """See `Spread`."""
        return deviations(*self.sums())


def deviations(sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """What `Spread` asks for, of the sums (G, U) over groups of so many samples (G,)."""
    groups = len(sums)
    mean = sums.sum(0) / count.sum()
    return (sums - count[:, None] * mean) * math.sqrt(groups / max(1, groups - 1))


class Looks:
    """A sequence of tests whether the lowest filters are settled.

    One look asks: if the samples that are still to come were added, how many of the lowest filters would be
    others? The answer is drawn 1,000 times or more by the Gaussian multiplier bootstrap over groups of samples:
    every group's deviation from the mean is multiplied by a standard normal number and added to the total, and
    all that turns sums into a ranking is done anew. So what filters have in common is kept, and the threshold
    moves with them. Where it is known which part of all samples was read, the variance is that of the mean of
    this part against the mean of the whole (finite population correction).

    A look finds the filters settled if at most 2% of them would be others on average, and more than 15% with a
    probability of at most (1 - confidence) / 32. There are at most 32 looks, so the probability that more than
    15% are others after any of them is at most 1 - confidence (Bonferroni). The average is not corrected.

    Source: V. Chernozhukov, D. Chetverikov, K. Kato, "Gaussian approximations and multiplier bootstrap for
    maxima of sums of high-dimensional random vectors", Annals of Statistics 41(6), 2013, section 3; W. G.
    Cochran, "Sampling Techniques", 3rd ed., 1977, eq. 2.20 for the correction; P. Armitage, C. K. McPherson,
    B. C. Rowe, "Repeated significance tests on accumulating data", J. R. Statist. Soc. A 132, 1969, for why
    looking repeatedly must be paid for.

    Args:
        units: the model's units; those that are frozen are no candidates.
        importance: totals (B, U) and the number of their samples -> what is ranked (B, U).
        confidence: in (0, 0.999].
        lowest: how many filters the question is about; None: a sixteenth of all.
        seed: of the draws.

    Attributes:
        lowest: how many filters it is about.
        settled: whether the last look found that the rest will leave them as they are, up to the tolerance.
        undecided: (U,) bool, by the last look: units that the rest may well bring among the lowest or out of
            them. None before the first.
    """

    def __init__(
        self,
        units: Units,
        importance: Importance,
        *,
        confidence: float,
        lowest: int | None,
        seed: int,
    ) -> None:
        self._importance = importance
        self._free = torch.tensor([reason is None for reason in units.frozen])
        self._size = units.size[self._free]
        everything = int(self._size.sum())
        self.lowest = min(lowest or math.ceil(units.total_filters / 16), everything)
        self._risk, self._seed = 1 - confidence, seed
        # Of so many, one and the one that is looked at make up (1 - confidence) / 32.
        self._draws = max(_DRAWS, math.ceil(2 * _LOOKS / self._risk))
        self._next, self._left = float(FIRST), _LOOKS
        self.settled = False
        self.undecided: torch.Tensor | None = None

    def look(self, total: torch.Tensor, groups: Spread, part: float) -> None:
        """Takes one look, where it is time for one.

        Args:
            total: (U,) the sum over the samples read.
            groups: how they differ.
            part: which part of all samples was read; 0 where nobody knows.
        """
        if groups.samples < self._next or self._left == 0:
            return
        while self._next <= groups.samples:
            self._next *= GROWTH
        self._left -= 1
        total, deviations = total.to("cpu", torch.float64), groups.deviations()
        now = self._of(self._importance(total[None], groups.samples))[0]
        noise = torch.Generator().manual_seed(self._seed * _LOOKS + self._left)
        changed = torch.zeros(len(now))
        done = lost = beyond = 0
        while done < self._draws:
            count = min(max(1, _AT_ONCE // len(total)), self._draws - done)
            weights = torch.randn(count, len(deviations), generator=noise, dtype=torch.float64)
            others = total + math.sqrt(1 - part) * weights @ deviations
            drawn = self._of(self._importance(others, groups.samples))
            exchanged = ((now & ~drawn) * self._size).sum(1)
            changed += (drawn != now).sum(0)
            done, lost = done + count, lost + int(exchanged.sum())
            beyond += int((exchanged > MOST * self.lowest).sum())
            self.settled = lost <= AVERAGE * self.lowest * done and beyond <= 1
            if done >= _DRAWS and not self.settled:
                break
        self.undecided = torch.zeros(len(self._free), dtype=torch.bool)
        self.undecided[self._free] = changed > self._risk * done

    def _of(self, importance: torch.Tensor) -> torch.Tensor:
        """(B, F) bool of the units that may go: the lowest, which take `lowest` filters along."""
        return lowest_units(importance[:, self._free], self._size, self.lowest)


def lowest_units(importance: torch.Tensor, size: torch.Tensor, filters: int) -> torch.Tensor:
    """(B, U) bool: of every row, the units of lowest importance that take so many filters along.

    Args:
        importance: (B, U).
        size: (U,) int64, filters of each unit.
    """
    order = importance.argsort(dim=1, stable=True)
    before = size[order].cumsum(1) - size[order]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, before < filters)
