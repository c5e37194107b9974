"""How many samples run at once: as many as memory holds. Must not know what is done with them."""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from attrfast.batches import Batch
from attrfast.errors import InputError, OutOfMemoryError

log = logging.getLogger(__name__)

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TEXT = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]+|%)\s*", re.IGNORECASE)

_CAUTION = 0.75  # of the limit is made use of
_FIRST = 0.5  # of what the plan allows, as long as nothing has been measured
_GROWTH = 2.0  # at most, from one portion to the next
_HELPS = 0.9  # of what a sample took before, at most, or what was done to make it take less was in vain
_PATIENCE = 2  # times in a row that it is in vain before it is left at that
_WORTH = 1.5  # a portion grows by this much or not at all: with every size, heaps get more holes
_SETTLED = (
    4  # portions of a size are measured before it grows: the first fill holes that were there before
)


@dataclass(frozen=True)
class Limit:
    """Bytes that may be taken over those that were taken before.

    Attributes:
        bytes: how many.
        base: what was taken when the limit was set.
    """

    bytes: int
    base: int


class Portions:
    """Cuts batches so that memory holds what is made of each part.

    With a limit, the first portion is what the plan allows, and later ones follow what was measured. Without
    one, batches run whole, or in halves where they are large; until memory is full. Then, and
    with a limit, what did not fit runs again in halves.

    Args:
        device: whose memory it is.
        most: samples at once, whatever memory holds; None: no bound.
        limit: what may be taken; None: all there is.
        planned: bytes a sample takes, roughly.
        comfort: bytes above which, by the plan, a batch runs in halves; None: batches stay whole.
        release: gives back memory that is kept between portions.
        shrink: lets a sample take less, where one is too much; False where that is not possible.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        most: int | None = None,
        limit: Limit | None = None,
        planned: float = 0.0,
        comfort: float | None = None,
        release: Callable[[], None] = lambda: None,
        shrink: Callable[[], bool] = lambda: False,
    ) -> None:
        self._device, self._most, self._limit = device, most, limit
        self._release, self._shrink = release, shrink
        self._comfortable = math.inf  # samples
        if comfort is not None and limit is None and planned > 0:
            self._comfortable = comfort / planned
        self._size = most
        self._warned = self._measured = False
        self._seen, self._highest = 0, 0.0
        self._single, self._vain = math.inf, 0  # bytes that one sample took
        if limit is not None and planned > 0:
            self._resize(_FIRST * limit.bytes / planned)

    def run(self, batch: Batch, work: Callable[[Batch], None]) -> None:
        """Does the work on all samples of a batch, in order, each once.

        Args:
            work: on some samples; leaves no trace where memory does not hold it.

        Raises:
            OutOfMemoryError: memory does not hold one sample.
        """
        rest = _parted(batch, 2 if batch.samples > max(1, self._comfortable) else 1)
        while rest:
            part = rest.pop(0)
            if self._size is not None and part.samples > self._size:
                rest = [*_parted(part, math.ceil(part.samples / self._size)), *rest]
                continue
            if self._limit is not None:
                self._measured = _forget_peak(self._device)
            if self._fits(part, work):
                self._learn(part.samples)
                continue
            if part.samples > 1:
                self._most = self._size = math.ceil(part.samples / 2)
                log.debug("memory was full: %d samples at once from here on", self._size)
            rest.insert(0, part)

    def _fits(self, part: Batch, work: Callable[[Batch], None]) -> bool:
        try:
            work(part)
            return True
        except (torch.OutOfMemoryError, MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            if part.samples == 1 and not self._shrink():
                raise OutOfMemoryError(
                    f"memory on {self._device} does not hold the pass of one sample: {error}. Make the "
                    f"inputs smaller, free memory, or choose another device"
                ) from error
        # Here the error is gone, and with it the tensors that its frames held.
        self._give_back()
        return False

    def _learn(self, samples: int) -> None:
        """Sets the size by what this portion took at its peak."""
        if self._limit is None or not self._measured:
            return
        limit = self._limit.bytes
        took = max(1, _peak(self._device) - self._limit.base)
        if took > limit and samples == 1:
            # Each time costs forward passes, and what is no activation does not shrink.
            if took < _HELPS * self._single:
                self._single, self._vain = took, 0
            else:
                self._vain += 1
            if not (self._vain <= _PATIENCE and self._shrink()) and not self._warned:
                self._warned = True
                warnings.warn(
                    f"one sample takes {took / 1e6:,.0f} MB, more than memory_limit ({limit / 1e6:,.0f} MB)",
                    stacklevel=2,
                )
        size = self._size or samples
        if took > limit:
            self._resize(_CAUTION * limit * samples / took)
        elif samples >= size / _WORTH:  # smaller ones tell more of what all portions take alike
            self._seen, self._highest = self._seen + 1, max(self._highest, took / samples)
            fitting = min(_CAUTION * limit / self._highest, _GROWTH * samples)
            if self._seen >= _SETTLED and fitting >= _WORTH * size:
                self._resize(fitting)

    def _resize(self, samples: float) -> None:
        size = max(1, int(samples))
        if self._most is not None:
            size = min(size, self._most)
        if size != self._size:
            self._size, self._seen, self._highest = size, 0, 0.0
            self._give_back()

    def _give_back(self) -> None:
        self._release()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _parted(batch: Batch, count: int) -> list[Batch]:
    """So many parts of about the same size, which all fit into the same memory."""
    return list(batch.split(math.ceil(batch.samples / count)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is full, in one of the ways in which that is said."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        said in text
        for said in (
            "can't allocate memory",
            "not enough memory",
            "out of memory",
            "could not create a primitive",  # oneDNN, of a convolution that a smaller batch may run
        )
    )


def parse_memory(asked: str | float | None, device: torch.device) -> Limit | None:
    """Reads a limit, from now on: `"512MB"`, `"1.5GiB"`, a share of the device's memory (`"25%"`
    or 0.25), or bytes (above 1).

    Raises:
        InputError: it is none of these.
    """
    if asked is None:
        return None
    value = math.nan
    if isinstance(asked, str):
        found = _TEXT.fullmatch(asked)
        if found is not None and found[2] == "%":
            value = float(found[1]) / 100 * _all_of(device)
        elif found is not None and found[2].lower() in _UNITS:
            value = float(found[1]) * _UNITS[found[2].lower()]
    elif isinstance(asked, (int, float)) and not isinstance(asked, bool):
        value = asked * _all_of(device) if 0 < asked <= 1 else float(asked)
    if not 1 <= value < math.inf:
        raise InputError(
            f"memory_limit must be bytes with their unit, such as '512MB' or '1.5GiB', or a share of the "
            f"device's memory, such as '25%' or 0.25, got {asked!r}"
        )
    return Limit(int(value), _taken(device))


def _all_of(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _taken(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else _status("VmRSS")


def _forget_peak(device: torch.device) -> bool:
    """Lets the peak be measured from here on, of the device or the process; False where nobody measures it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("this system does not measure peaks of memory; the plan alone decides")
        return False
    return device.type == "cpu"


def _peak(device: torch.device) -> int:
    """Bytes taken at most since `_forget_peak`."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """Of this process, by Linux; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = next((line for line in lines if line.startswith(field + ":")), None)
    return 0 if found is None else int(found.split()[1]) * 1024
