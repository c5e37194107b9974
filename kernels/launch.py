"""How a kernel is started, and with which tile: the choice among a few configurations, made once.

A configuration changes how much one program does, never what comes out: sums have the same bits with
every one (see `tiles.py`), so that choosing by the clock does no harm.

Threads are counted, not warps, which are 32 threads wide on some GPUs and 64 on others.

The list is short because all these kernels do little arithmetic for the bytes they move. What matters is
how many bytes are under way: 16 elements a thread are 4 loads of 16 bytes from each float32 operand and
2 of 16-bit ones, 32 elements twice that; 128 or 256 threads in a program are a matter of its granularity.
"""

import functools
import logging
import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

log = logging.getLogger("attrfast")


@dataclass(frozen=True)
class Config:
    """Elements in a tile, threads in a program."""

    elements: int
    threads: int


DEFAULT = Config(4096, 256)
CONFIGS = (DEFAULT, Config(2048, 128), Config(4096, 128))
_choices: dict[Hashable, Config] = {}


@triton.jit
def _nothing():
    pass


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in the CPU's memory.

    TRITON_INTERPRET says so when kernels are imported, and never again.
    """
    return not isinstance(_nothing, triton.JITFunction)


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as it was asked for."""

    kernel: Any
    programs: int
    threads: int
    args: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches are noted in a list, and not made: for reports about what would run."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any, programs: int, threads: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Starts `programs` programs.

    Products are not contracted with additions into fused multiply-adds: which of them could be depends
    on the configuration, and with it the last bit of a sum.
    """
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, threads, args, constants))
    elif programs:
        kernel[(programs,)](
            *args, **constants, num_warps=threads // _warp_size(), enable_fp_fusion=False
        )


@functools.cache
def _warp_size() -> int:
    """Threads in a warp; the interpreter has none, and all GPUs of a machine are taken to be alike."""
    if interpreted():
        return 32
    return int(getattr(torch.cuda.get_device_properties(), "warp_size", 32))


def scaled(config: Config, dtype: torch.dtype, heavier: int = 1) -> Config:
    """Fewer elements where each takes more registers: half as many in float64.

    Args:
        heavier: how much more than in an element-wise kernel.
    """
    return Config(
        config.elements // (2 * heavier if dtype == torch.float64 else heavier), config.threads
    )


def bucket(count: int) -> int:
    """Sizes that share a choice: those with as many binary digits."""
    return count.bit_length()


def tuned(key: Hashable, device: torch.device, run: Callable[[Config], None]) -> Config:
    """The fastest configuration for calls like this one; the default where none can be measured.

    Args:
        key: what calls must share to share a choice: kernel, dtype, layout, size buckets.
        run: one call on memory that may be overwritten; called only to measure.

    Measuring happens once a key and process, and synchronises with the GPU; never while a CUDA graph
    is captured. ATTRFAST_TUNE=0 turns it off.
    """
    found = _choices.get(key)
    if found is not None:
        return found
    if not _may_measure(device):
        return DEFAULT
    choice = _choices[key] = fastest(run, _median_time)
    log.debug("attrfast: %s runs with %s", key, choice)
    return choice


def fastest(run: Callable[[Config], None], clock: Callable[[Callable[[], None]], float]) -> Config:
    """The configuration with the smallest time; the first of equals."""
    times = {config: clock(functools.partial(run, config)) for config in CONFIGS}
    return min(CONFIGS, key=lambda config: times[config])


def _may_measure(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and not interpreted()
        and os.environ.get("ATTRFAST_TUNE", "1").strip() != "0"
        and not torch.cuda.is_current_stream_capturing()
    )


def _median_time(call: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))
