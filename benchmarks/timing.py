"""Times several functions against each other on a machine that is never quite idle.

Within a round all run one after the other (A B C, A B C, ...), so that what slows the machine for some
seconds slows them all; ratios are taken within each round, and their median over rounds is reported.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping

from benchmarks.quiet import Clock

Runs = Mapping[str, Callable[[], object]]


def interleaved(
    runs: Runs,
    rounds: int,
    clock: Clock,
    *,
    warm_up: int = 0,
    after: Callable[[], object] = gc.collect,
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every run in every round, and the largest share of the machine that others used in one.

    Args:
        runs: what to time, by name, in the order within a round.
        rounds: how many are counted.
        clock: times each run.
        warm_up: rounds before those, which are not timed.
        after: called after every run, outside the time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    worst = 0.0
    for _ in range(warm_up):
        for run in runs.values():
            run()
            after()
    for _ in range(rounds):
        for name, run in runs.items():
            taken, others = clock.time(run, after)
            seconds[name].append(taken)
            worst = max(worst, others)
    return seconds, worst


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Median over rounds of one run's time divided by another's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
