"""What a model is timed on."""

from __future__ import annotations

from typing import Any

import torch

from attrfast.batches import Batch, unpack
from attrfast.errors import InputError
from attrfast.rows import repeated


def inputs_of_a_pass(asked: Any, example: Batch, device: torch.device) -> Batch:
    """The inputs of one pass, on the device where it is timed.

    Args:
        asked: an input as a batch of the loader has it; or how many samples, repeated from `example`; or
            None for one.
        example: a batch of the loader's.

    Raises:
        InputError: it is none of these.
    """
    if asked is None or isinstance(asked, int):
        samples = 1 if asked is None else asked
        if samples < 1 or isinstance(asked, bool):
            raise InputError(
                f"latency_input must be an input of the model, or a number of samples of at least 1, got "
                f"{asked!r}"
            )
        asked = repeated(example.kwargs or example.args, example.samples, samples)
    return unpack((_near(asked, device), None), device)


def _near(tree: Any, device: torch.device) -> Any:
    """Tensors on `device` or on the CPU, from which they may be moved."""
    if isinstance(tree, torch.Tensor):
        return tree if tree.device == device else tree.cpu()
    if isinstance(tree, dict):
        return {key: _near(item, device) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return type(tree)(_near(item, device) for item in tree)
    return tree
