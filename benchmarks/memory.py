"""Peak memory of one pass in a fresh process: how far resident memory grows over the model and its data.

The allocator's peaks depend on where its first small pieces happened to lie. So every repeat starts a new
process, which imports all libraries, runs nothing, and is forked for each contender: all contenders of a
repeat start from the same state, and repeats from different ones. Libraries set themselves up on a tiny
convolution, and the contender scores a tiny network, before the measurement begins.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from benchmarks import fresh
from benchmarks.contenders import prepare
from benchmarks.machine import THREADS
from benchmarks.networks import FORMATS, Case, load

T = TypeVar("T")

_LIBRARIES = ("torchvision", "captum.attr", "torch_pruning", "attrfast")
BATCHES = 2  # the peak is reached by then: later batches repeat the second


def peaks(formats: dict[str, str], case: Case, repeats: int) -> dict[str, list[int]]:
    """Bytes by which resident memory grew in the pass of every contender, repeat by repeat.

    Args:
        formats: the memory format of each contender to measure.
    """
    rounds = [fresh.call(_round, formats, case) for _ in range(repeats)]
    return {name: [found[name] for found in rounds] for name in formats}


def _round(formats: dict[str, str], case: Case) -> dict[str, int]:
    """Forks this process, which has only imported what it needs, once for each contender."""
    import_libraries()
    return {name: fresh.call(_peak, name, case, layout, fork=True) for name, layout in formats.items()}


def _peak(name: str, case: Case, layout: str) -> int:
    torch.set_num_threads(THREADS)
    wake_libraries(case.amp_dtype)
    # Code becomes resident page by page when it first runs: tens of MB, which no pass needs to itself.
    prepare(name, *load("vgg_small", layout, 1), case.amp_dtype)()
    return grown(prepare(name, *load(case.network, layout, BATCHES), case.amp_dtype))[1]


def grown(run: Callable[[], T]) -> tuple[T, int]:
    """What `run()` gives, and how many bytes resident memory grew by at most while it ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed by loading would be used again, uncounted
    exact = _reset_peak()
    before = _status("VmRSS") if exact else _highest()
    result = run()
    return result, (_status("VmHWM") if exact else _highest()) - before


def import_libraries() -> None:
    """Everything that a contender imports, so that forks find it there."""
    for library in _LIBRARIES:
        importlib.import_module(library)


def wake_libraries(amp_dtype: torch.dtype | None = None) -> None:
    """Lets libraries set themselves up on a tiny convolution, in both memory formats."""
    kernel = torch.randn(8, 8, 3, 3, requires_grad=True)
    for layout in FORMATS.values():
        image = torch.randn(1, 8, 8, 8).to(memory_format=layout)
        with torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype is not None):
            out = nn.functional.conv2d(image, kernel.to(memory_format=layout))
        out.relu().sum().backward()


def _reset_peak() -> bool:
    """Sets the process's recorded peak to what it holds now; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _highest() -> int:
    """The process's highest resident memory so far; loading may have reached higher than it held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
