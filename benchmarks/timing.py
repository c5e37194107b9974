"""Times several functions against each other on a machine that is never quite idle.

Within a round all run one after the other (A B C, A B C, ...), so that what slows the machine for some
seconds slows them all; ratios are taken within each round, and their median over rounds is reported. Runs
that other processes disturbed are left out, as long as undisturbed ones are there.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.quiet import LIMIT, Clock

Runs = Mapping[str, Callable[[], object]]


@dataclass
class Times:
    """One function's runs, round by round.

    Attributes:
        seconds: that each took.
        others: share of the machine's processors that other processes used during each.
    """

    seconds: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def add(self, seconds: float, others: float) -> None:
        self.seconds.append(seconds)
        self.others.append(others)

    @property
    def median(self) -> float:
        return statistics.median(_chosen(self.seconds, [share <= LIMIT for share in self.others]))

    @property
    def disturbed(self) -> bool:
        """Whether no run was left alone by other processes."""
        return min(self.others) > LIMIT


def interleaved(
    runs: Runs,
    rounds: int,
    clock: Clock,
    *,
    warm_up: int = 0,
    after: Callable[[], object] = gc.collect,
) -> dict[str, Times]:
    """Times every run in every round.

    Args:
        runs: what to time, by name, in the order within a round.
        rounds: how many are counted.
        clock: times each run.
        warm_up: rounds before those, which are not timed.
        after: called after every run, outside the time.
    """
    times = {name: Times() for name in runs}
    for _ in range(warm_up):
        for run in runs.values():
            run()
            after()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].add(*clock.time(run, after))
    return times


def joined(several: Sequence[Times]) -> Times:
    """The runs of all of them, one after the other."""
    return Times(
        [seconds for one in several for seconds in one.seconds],
        [share for one in several for share in one.others],
    )


def ratio(ours: Times, base: Times) -> tuple[float, bool]:
    """Median over rounds of one time divided by another of the same round.

    Returns:
        It, and whether at least one round left both alone.
    """
    ratios = [a / b for a, b in zip(ours.seconds, base.seconds, strict=True)]
    quiet = [max(pair) <= LIMIT for pair in zip(ours.others, base.others, strict=True)]
    return statistics.median(_chosen(ratios, quiet)), any(quiet)


def _chosen(values: Sequence[float], quiet: Sequence[bool]) -> list[float]:
    """The values of quiet runs, or all where none was quiet."""
    return [value for value, good in zip(values, quiet, strict=True) if good] or list(values)
