"""How long the parts of a run take, and the most memory that the process holds meanwhile."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        name: in words.
        seconds: wall time.
        memory: bytes, the most at once: on a CUDA device by torch's allocator, elsewhere resident memory of
            the process, the interpreter and its libraries included.
    """

    name: str
    seconds: float
    memory: int


@contextlib.contextmanager
def phase(name: str, device: torch.device, into: list[Phase]) -> Iterator[None]:
    """Adds what happens inside to a list of phases, if it ends well; what is there already grows."""
    _reset(device)
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, memory = time.perf_counter() - start, _peak(device)
    for index, before in enumerate(into):
        if before.name == name:
            into[index] = Phase(name, before.seconds + seconds, max(before.memory, memory))
            return
    into.append(Phase(name, seconds, memory))


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # then the peak is that since the process began
        _RESET.write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
