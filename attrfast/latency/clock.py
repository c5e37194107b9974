"""Times every call of a model's forward pass, in the pass itself.

A layer that is timed alone finds its weights in the cache and its input where it left it; in the model it
finds neither. Must not know what a layer is.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from attrfast.trace import CallMode, is_silent


class _Clock(CallMode):
    """Reads the time after every call."""

    def __init__(self, read: Callable[[], Any]) -> None:
        super().__init__()
        self._read = read
        self.readings = [read()]

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        out = func(*args, **kwargs)
        if not is_silent(name):
            self.readings.append(self._read())
        return out


def pass_seconds(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
) -> list[float]:
    """Seconds of every call, in the order of `attrfast.trace.Trace.calls`.

    A call's time runs from the end of the call before it, so that what Python does in between counts, and
    the times add up to the whole pass. On an accelerator the device tells the time.

    Args:
        model: in eval mode, on `device`; runs without gradients.
    """
    with torch.no_grad(), _Clock(_reader(device)) as clock:
        model(*args, **kwargs)
    return _differences(clock.readings, device)


def whole_pass_seconds(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device
) -> float:
    """Seconds of a pass whose calls nobody watches; see `pass_seconds`."""
    read = _reader(device)
    with torch.no_grad():
        readings = [read()]
        model(*args, **kwargs)
        readings.append(read())
    return _differences(readings, device)[0]


def _reader(device: torch.device) -> Callable[[], Any]:
    """What reads the time; waits until the device has nothing left to do."""
    if device.type == "cpu":
        return time.perf_counter
    torch.accelerator.synchronize(device)

    def event() -> torch.Event:
        now = torch.Event(device, enable_timing=True)
        now.record()
        return now

    return event


def _differences(readings: Sequence[Any], device: torch.device) -> list[float]:
    if device.type == "cpu":
        return [after - before for before, after in itertools.pairwise(readings)]
    torch.accelerator.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(readings)]
