"""Whole importance passes side by side: time interleaved in one process, memory in fresh ones."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import contenders, machine, memory, timing
from benchmarks.networks import FORMATS, Case, load
from benchmarks.quiet import Clock

NO_MEMORY = ("floor",)  # its tensors exist before it runs


@dataclass(frozen=True)
class Target:
    """attrfast's figure must not be above `limit` times that of `against`, on one network or on all."""

    quantity: str  # "time" or "memory"
    against: str
    limit: float
    network: str | None = None


TARGETS = (
    Target("time", "floor", 1.10),
    Target("time", "captum", 0.65),
    Target("memory", "hooks", 0.25),
    Target("memory", "inference", 2.00, network="vgg16_bn"),
)


def measure(
    case: Case,
    *,
    rounds: int,
    repeats: int,
    patience: float,
    names: tuple[str, ...] = contenders.NAMES,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times and peak memory of every contender in one case, in the memory format that suits each.

    Args:
        case: a network, and what its forward passes run in.
        rounds: of whole passes, after one that is not counted.
        repeats: fresh processes for each peak; 0 measures none.
        patience: seconds to spend on waiting for a quiet machine.
        names: of contenders.
        say: told what goes on.
    """
    torch.set_num_threads(machine.THREADS)
    about = machine.facts()
    label = case.label
    say(f"{label}: {rounds} rounds of whole passes, after a trial of both memory formats")
    times = _times(case, names, rounds, Clock(patience))
    gc.collect()
    say(f"{label}: peak memory, {repeats} times")
    counted = {name: times.formats[name] for name in names if name not in NO_MEMORY}
    found = memory.peaks(counted, case, repeats) if repeats else {}
    rows: dict[str, Any] = {}
    for name in names:
        peaks = found.get(name, [])
        rows[name] = {
            "format": times.formats[name],
            "seconds": times.whole[name].median,
            "bytes": statistics.median(peaks) if peaks else None,
            "all_seconds": times.whole[name].seconds,
            "all_others": times.whole[name].others,
            "all_bytes": peaks,
            "trial_seconds": times.trial[name],
        }
    return {
        "label": label,
        "machine": about,
        "rounds": rounds,
        "repeats": repeats,
        "disturbed": [name for name in names if times.whole[name].disturbed],
        "contenders": rows,
        "targets": [
            judge(target, rows)
            for target in TARGETS
            if target.against in rows and target.network in (None, case.network)
        ],
    }


@dataclass(frozen=True)
class _Measured:
    """Times of every contender.

    Attributes:
        formats: the memory format that suits each.
        whole: of whole passes in that format.
        trial: seconds of passes of one batch, by memory format.
    """

    formats: dict[str, str]
    whole: dict[str, timing.Times]
    trial: dict[str, dict[str, list[float]]]


def _times(case: Case, names: tuple[str, ...], rounds: int, clock: Clock) -> _Measured:
    loaded = {layout: load(case.network, layout) for layout in FORMATS}
    amp = case.amp_dtype

    def clean() -> None:
        for model, _ in loaded.values():
            model.zero_grad()
        gc.collect()

    # One batch in each memory format: a round to warm up, and two that count.
    short = {
        f"{name}/{layout}": contenders.prepare(name, model, data[:1], amp)
        for name in names
        for layout, (model, data) in loaded.items()
    }
    found = timing.interleaved(short, 2, clock, warm_up=1, after=clean)
    trial = {name: {layout: found[f"{name}/{layout}"].seconds for layout in loaded} for name in names}
    formats = {name: min(FORMATS, key=lambda layout: min(trial[name][layout])) for name in names}
    whole = {name: contenders.prepare(name, *loaded[formats[name]], amp) for name in names}
    return _Measured(formats, timing.interleaved(whole, rounds, clock, after=clean), trial)


def time_ratio(rows: dict[str, Any], name: str, base: str) -> tuple[float, bool]:
    """See `timing.ratio`."""
    ours, other = (
        timing.Times(rows[key]["all_seconds"], rows[key]["all_others"]) for key in (name, base)
    )
    return timing.ratio(ours, other)


def memory_ratio(rows: dict[str, Any], name: str, base: str) -> float | None:
    """Median over repeats of one peak divided by another's; None where one has none."""
    pairs = list(zip(rows[name]["all_bytes"], rows[base]["all_bytes"], strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def judge(target: Target, rows: dict[str, Any]) -> dict[str, Any]:
    """What was found for a target, and whether it is held, missed, or can't be told."""
    found: float | None
    if target.quantity == "time":
        found, quiet = time_ratio(rows, "attrfast", target.against)
    else:
        found, quiet = memory_ratio(rows, "attrfast", target.against), True
    verdict = "held" if found is not None and found <= target.limit else "missed"
    if found is None or not quiet:
        verdict = "not measured" if found is None else "disturbed"
    return {
        "quantity": target.quantity,
        "against": target.against,
        "limit": target.limit,
        "ratio": found,
        "verdict": verdict,
    }
