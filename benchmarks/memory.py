"""Peak memory of one pass in a fresh process: how far resident memory grows over the model and its data.

The allocator's peaks depend on where its first small pieces happened to lie. So every repeat starts a new
process, which imports all libraries, runs nothing, and is forked for each contender: all contenders of a
repeat start from the same state, and repeats from different ones. Libraries set themselves up on a tiny
convolution before the measurement begins.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import resource
from pathlib import Path

import torch
from torch import nn

from benchmarks import fresh
from benchmarks.contenders import prepare
from benchmarks.machine import THREADS
from benchmarks.networks import load

_LIBRARIES = ("torchvision", "captum.attr", "torch_pruning", "attrfast")
BATCHES = 2  # the peak is reached by then: later batches repeat the second


def peaks(formats: dict[str, str], network: str, repeats: int) -> dict[str, list[int]]:
    """Bytes by which resident memory grew in the pass of every contender, repeat by repeat.

    Args:
        formats: the memory format of each contender to measure.
    """
    rounds = [fresh.call(_round, formats, network) for _ in range(repeats)]
    return {name: [found[name] for found in rounds] for name in formats}


def _round(formats: dict[str, str], network: str) -> dict[str, int]:
    """Forks this process, which has only imported what it needs, once for each contender."""
    for library in _LIBRARIES:
        importlib.import_module(library)
    return {
        name: fresh.call(_growth, name, network, layout, fork=True) for name, layout in formats.items()
    }


def _growth(name: str, network: str, layout: str, batches: int = BATCHES) -> int:
    torch.set_num_threads(THREADS)
    _wake_libraries()
    model, data = load(network, layout, batches)
    run = prepare(name, model, data)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed by loading would be used again, uncounted
    exact = _reset_peak()
    before = _status("VmRSS") if exact else _highest()
    run()
    return (_status("VmHWM") if exact else _highest()) - before


def _wake_libraries() -> None:
    image = torch.randn(1, 8, 8, 8)
    kernel = torch.randn(8, 8, 3, 3, requires_grad=True)
    nn.functional.conv2d(image, kernel).relu().sum().backward()
    nn.functional.conv2d(
        image.to(memory_format=torch.channels_last), kernel.to(memory_format=torch.channels_last)
    ).sum().backward()


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
