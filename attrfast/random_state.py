"""The state of all random generators that a run may draw from, so that a resumed run draws the same numbers.

attrfast's own draws depend on its seed alone; a user's function, dataset or augmentation draws from wherever
it likes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from attrfast.errors import InputError
from attrfast.seeding import generators


def now(loaders: Iterable[Any], device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, of the device's, and of the loaders'."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "loaders": [generator.get_state().cpu() for generator in generators(loaders)],
    }


def restore(state: dict[str, Any], loaders: Iterable[Any], device: torch.device) -> None:
    """Puts all of them where they were.

    Raises:
        InputError: it is no such state, or one of other loaders. No generator has changed then.
    """
    before = now(loaders := list(loaders), device)
    try:
        _set(state, loaders, device)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        _set(before, loaders, device)
        raise InputError(f"the state of the random generators can't be used: {error}") from error


def _set(state: dict[str, Any], loaders: Iterable[Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    for generator, own in zip(generators(loaders), state["loaders"], strict=True):
        generator.set_state(own)
