"""A whole data set scored: `attribute(stop="confident")` beside a hook-based script that reads all of it.

The networks are trained for a moment first, from several seeds, as how soon scores are settled depends on what
was learnt.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from attrfast import attribute, data
from attrfast.names import network
from benchmarks import contenders, machine, timing
from benchmarks.quiet import Clock
from benchmarks.training import train

NETWORKS = ("vgg_small", "resnet20")
FASTER = 10.0  # times, at least
CONFIDENT, ALL, HOOKS = 'stop="confident"', "attrfast, all samples", "hooks, all samples"
ORDERS = 3  # that the last is timed in, every round: how soon it stops depends on the order
_BATCH = 64


def fashion_mnist(seed: int) -> data.Splits:
    return data.fashion_mnist(val_size=100, batch_size=_BATCH, seed=seed)


def measure(
    name: str,
    seed: int,
    *,
    epochs: int,
    rounds: int,
    patience: float,
    splits: data.Splits | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times the three ways to score a training set, in turns; every round shuffles it anew.

    Args:
        name: a network of `attrfast.models`.
        seed: of its training, and of the order of the data.
        epochs: of training before.
        rounds: that count.
        patience: seconds to spend on waiting for a quiet machine.
        splits: the data; None: Fashion-MNIST.
        say: told what goes on.
    """
    torch.set_num_threads(machine.THREADS)
    about = machine.facts()
    torch.manual_seed(seed)
    splits = splits or fashion_mnist(seed)
    model = network(name, splits)()
    say(
        f"{name}, seed {seed}: {epochs} epochs of training, then {rounds} rounds over the whole training set"
    )
    train(model, splits.train, epochs)
    model.eval()
    read: list[int] = []

    def confident() -> None:
        scores = attribute(model, splits.train, "attribution", stop="confident", progress=False)
        read.append(scores.samples)

    runs: dict[str, Callable[[], object]] = {
        HOOKS: lambda: contenders.hooks(model, splits.train),
        ALL: lambda: contenders.attrfast(model, splits.train),
        **{f"{CONFIDENT} {i}": confident for i in range(ORDERS)},
    }
    times = timing.interleaved(runs, rounds, Clock(patience), after=gc.collect)
    orders = [times.pop(f"{CONFIDENT} {i}") for i in range(ORDERS)]
    slower, quiet = timing.ratio(timing.joined([times[HOOKS]] * ORDERS), timing.joined(orders))
    times[CONFIDENT] = timing.joined(orders)
    held = "held" if slower >= FASTER else "missed"
    return {
        "machine": about,
        "samples": len(splits.train.dataset),  # type: ignore[arg-type]
        "epochs": epochs,
        "rounds": rounds,
        "orders": ORDERS,
        "read": read,
        "seconds": {key: one.median for key, one in times.items()},
        "all_seconds": {key: one.seconds for key, one in times.items()},
        "all_others": {key: one.others for key, one in times.items()},
        "faster": slower,
        "verdict": held if quiet else "disturbed",
    }
