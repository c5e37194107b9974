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
            seeded as well.
        device: the device that is worked on.

    All generators come back as they were. Random numbers of Python and NumPy are not touched.
    """
    own = generators(loaders)
    states = [(g, g.get_state()) for g in own]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            for generator in own:
                generator.manual_seed(seed)
            yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def generators(loaders: Iterable[Any]) -> list[torch.Generator]:
    """The loaders' own generators, each once."""
    return list({id(g): g for loader in loaders for g in _generators(loader)}.values())


def _generators(loader: Any) -> Iterator[torch.Generator]:
    sampler = getattr(loader, "sampler", None)
    batches = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    for owner in (loader, sampler, batches, getattr(loader, "dataset", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
