"""Tells whether other processes disturb a measurement, and waits for a better moment, within limits.

Two threads that wait for each other lose several times the processor time that a third process takes, so
a disturbed run says nothing about the code that ran.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 0.05  # share of the machine's processors that others may use during a run


class Clock:
    """Times runs, and repeats those that others disturbed as long as its patience lasts.

    Args:
        patience: seconds to spend, over the life of the clock, on waiting and on repeated runs.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience

    def time(self, run: Callable[[], object], after: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a run, and the share of the processors that others used meanwhile.

        Args:
            run: what to time.
            after: called after every run, outside the time.
        """
        while True:
            self._wait()
            before, start = _busy_elsewhere(), time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            others = _share(before, seconds)
            after()
            if seconds < 0.1:  # the kernel's counters are too coarse to tell
                return seconds, 0.0
            if others <= LIMIT or self.patience <= 0:
                return seconds, others
            self.patience -= seconds

    def _wait(self) -> None:
        while self.patience > 0:
            before, start = _busy_elsewhere(), time.perf_counter()
            time.sleep(0.1)
            if _share(before, time.perf_counter() - start) <= LIMIT:
                return
            time.sleep(0.9)
            self.patience -= 1.0


def _share(before: float, seconds: float) -> float:
    used = _busy_elsewhere() - before
    return max(0.0, used / (seconds * (os.cpu_count() or 1)))


def _busy_elsewhere() -> float:
    """Processor seconds since the start of the machine that this process did not use; 0 if not known."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(x) for x in fields[:8])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
