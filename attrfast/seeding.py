"""A random state of one's own, so that the same seed gives the same run and the caller's state stays."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def seeded(seed: int, loaders: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Context in which torch's random numbers depend on the seed alone.

    Args:
        seed: of the global generators (CPU, and the device's) and of the loaders' own.
        loaders: whose generators (a DataLoader's, its sampler's and its dataset's `generator`) are
            seeded as well. Samplers that order by an epoch, as DistributedSampler, get the seed as theirs.
        device: the device that is worked on.

    All generators come back as they were. Random numbers of Python and NumPy are not touched.
    """
    own = generators(loaders)
    states = [(g, g.get_state()) for g in own]
    epochs = [(s, getattr(s, "epoch", 0)) for loader in loaders for s in _epochal(loader)]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            for generator in own:
                generator.manual_seed(seed)
            for sampler, _ in epochs:
                sampler.set_epoch(seed)
            yield
    finally:
        for sampler, epoch in epochs:
            sampler.set_epoch(epoch)
        for generator, state in states:
            generator.set_state(state)


def generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    """The loaders' own generators, each once."""
    return list({id(g): g for loader in loaders for g in _generators(loader)}.values())


def set_epoch(loader: Any, seed: int, epoch: int) -> None:
    """Tells a loader's samplers which epoch of a training begins, where they order by it."""
    for sampler in _epochal(loader):
        sampler.set_epoch((seed << 16) + epoch)


def _epochal(loader: Any) -> list[Any]:
    return [sampler for sampler in _samplers(loader) if callable(getattr(sampler, "set_epoch", None))]


def _samplers(loader: Any) -> tuple[Any, Any]:
    """What may draw the order of a DataLoader's samples."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None), getattr(batches, "sampler", None)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    for owner in (loader, *_samplers(loader), getattr(loader, "dataset", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
