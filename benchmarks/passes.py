"""Whole importance passes side by side: time interleaved in one process, memory in fresh ones."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import contenders, machine, memory, timing
from benchmarks.networks import FORMATS, NETWORKS, load
from benchmarks.quiet import Clock

NO_MEMORY = ("floor",)  # its tensors exist before it runs


@dataclass(frozen=True)
class Target:
    """attrfast's figure must not be above `limit` times that of `against`."""

    quantity: str  # "time" or "memory"
    against: str
    limit: float


TARGETS = (
    Target("time", "floor", 1.25),
    Target("time", "bare", 0.70),
    Target("time", "captum", 0.75),
    Target("memory", "hooks", 0.42),
    Target("memory", "bare", 0.60),
)


def measure(
    network: str,
    *,
    rounds: int,
    repeats: int,
    patience: float,
    names: tuple[str, ...] = contenders.NAMES,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times and peak memory of every contender on one network, in the memory format that suits each.

    Args:
        network: a name of `benchmarks.networks.NETWORKS`.
        rounds: of whole passes, after one that is not counted.
        repeats: fresh processes for each peak; 0 measures none.
        patience: seconds to spend on waiting for a quiet machine.
        names: of contenders.
        say: told what goes on.
    """
    torch.set_num_threads(machine.THREADS)
    about = machine.facts()
    label = NETWORKS[network].label
    say(f"{label}: {rounds} rounds of whole passes, after a trial of both memory formats")
    times = _times(network, names, rounds, Clock(patience))
    gc.collect()
    say(f"{label}: peak memory, {repeats} processes each")
    rows: dict[str, Any] = {}
    for name in names:
        counted = repeats and name not in NO_MEMORY
        peaks = memory.peaks(name, network, times.formats[name], repeats) if counted else []
        rows[name] = {
            "format": times.formats[name],
            "seconds": statistics.median(times.seconds[name]),
            "bytes": statistics.median(peaks) if peaks else None,
            "all_seconds": times.seconds[name],
            "all_bytes": peaks,
            "trial_seconds": times.trial[name],
        }
    return {
        "label": label,
        "machine": about,
        "rounds": rounds,
        "repeats": repeats,
        "others": times.others,
        "contenders": rows,
        "targets": [judge(target, rows) for target in TARGETS if target.against in rows],
    }


@dataclass(frozen=True)
class _Times:
    """Seconds of every contender.

    Attributes:
        formats: the memory format that suits each.
        seconds: of whole passes in that format, round by round.
        trial: of passes of one batch, by memory format.
        others: the largest share of the machine that other processes used during a pass.
    """

    formats: dict[str, str]
    seconds: dict[str, list[float]]
    trial: dict[str, dict[str, list[float]]]
    others: float


def _times(network: str, names: tuple[str, ...], rounds: int, clock: Clock) -> _Times:
    loaded = {layout: load(network, layout) for layout in FORMATS}

    def clean() -> None:
        for model, _ in loaded.values():
            model.zero_grad()
        gc.collect()

    # One batch in each memory format: a round to warm up, and two that count.
    short = {
        f"{name}/{layout}": contenders.prepare(name, model, data[:1])
        for name in names
        for layout, (model, data) in loaded.items()
    }
    seconds, _ = timing.interleaved(short, 2, clock, warm_up=1, after=clean)
    trial = {name: {layout: seconds[f"{name}/{layout}"] for layout in loaded} for name in names}
    formats = {name: min(FORMATS, key=lambda layout: min(trial[name][layout])) for name in names}
    whole = {name: contenders.prepare(name, *loaded[formats[name]]) for name in names}
    seconds, others = timing.interleaved(whole, rounds, clock, after=clean)
    return _Times(formats, seconds, trial, others)


def time_ratio(rows: dict[str, Any], name: str, base: str) -> float:
    seconds = {key: rows[key]["all_seconds"] for key in (name, base)}
    return timing.ratio(seconds, name, base)


def memory_ratio(rows: dict[str, Any], name: str, base: str) -> float | None:
    """None where one of them has no figure."""
    if rows[name]["bytes"] is None or rows[base]["bytes"] is None:
        return None
    return float(rows[name]["bytes"] / rows[base]["bytes"])


def judge(target: Target, rows: dict[str, Any]) -> dict[str, Any]:
    ratio = time_ratio if target.quantity == "time" else memory_ratio
    found = ratio(rows, "attrfast", target.against)
    verdict = "not measured" if found is None else "held" if found <= target.limit else "missed"
    return {
        "quantity": target.quantity,
        "against": target.against,
        "limit": target.limit,
        "ratio": found,
        "verdict": verdict,
    }
