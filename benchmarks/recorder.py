"""What `ScoreRecorder` costs a training loop: the same loop with it and without, in turns, in one process."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import machine, timing
from benchmarks.networks import FORMATS, NETWORKS, Batches, load
from benchmarks.quiet import Clock

NETWORKS_MEASURED = ("vgg16_bn", "resnet18")
LIMIT = 1.05  # of the loop's own time
BATCHES = 4  # a run


def loop(model: nn.Module, optimiser: torch.optim.Optimizer, batches: Batches) -> None:
    """Forward, cross-entropy, backward, a step of SGD with momentum."""
    for images, labels in batches:
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()


def measure(
    network: str, *, rounds: int, patience: float, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Times a training loop with and without a recorder, in both memory formats.

    Args:
        network: a name of `benchmarks.networks.NETWORKS`.
        rounds: of `BATCHES` batches each, after one that is not counted.
        patience: seconds to spend on waiting for a quiet machine.
        say: told what goes on.
    """
    import attrfast

    torch.set_num_threads(machine.THREADS)
    about, rows, runs = machine.facts(), {}, {}
    for layout in FORMATS:
        model, batches = load(network, layout, BATCHES)
        plain = functools.partial(
            loop, model.train(), torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9), batches
        )
        start = time.perf_counter()
        with attrfast.ScoreRecorder(model) as first:
            plain()
        rows[layout] = {"first_seconds": time.perf_counter() - start}
        units = first.scores().units

        def recorded(
            model: nn.Module = model, plain: Callable[[], None] = plain, units: Any = units
        ) -> None:
            with attrfast.ScoreRecorder(model, units=units) as recorder:
                plain()
            recorder.scores()

        runs |= {f"{layout} plain": plain, f"{layout} recorded": recorded}
    say(f"{NETWORKS[network].label}: {rounds} rounds of training, with a recorder and without")
    times = timing.interleaved(runs, rounds, Clock(patience), warm_up=1, after=gc.collect)
    for layout, row in rows.items():
        ours, base = times[f"{layout} recorded"], times[f"{layout} plain"]
        found, quiet = timing.ratio(ours, base)
        row |= {
            "plain_seconds": base.median,
            "recorded_seconds": ours.median,
            "ratio": found,
            "verdict": ("held" if found <= LIMIT else "missed") if quiet else "disturbed",
            "all_plain": base.seconds,
            "all_recorded": ours.seconds,
        }
    return {
        "label": NETWORKS[network].label,
        "machine": about,
        "rounds": rounds,
        "formats": rows,
    }
