"""Finds the first layer at which a forward pass stops being finite. Runs only when something went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from attrfast.trace import call_name, state_names, tensors_in


class _FirstNonFinite(TorchFunctionMode):
    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.last = "the input"
        self.found: str | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        kinds: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.found is not None:
            return out
        for tensor in tensors_in((args, kwargs)):
            if id(tensor) in self.names:
                self.last = self.names[id(tensor)].rpartition(".")[0] or self.names[id(tensor)]
        for tensor in tensors_in(out):
            if tensor.is_floating_point() and id(tensor) not in self.names and _broken(tensor):
                self.found = f"{self.last} ({call_name(func)})"
        return out


def _broken(tensor: torch.Tensor) -> bool:
    return not bool(torch.isfinite(tensor.detach()).all())


def first_nonfinite(model: nn.Module, forward: Callable[[], Any], inputs: Any) -> str | None:
    """Where NaN or infinity first appears when `forward()` runs `model` in the mode that it is in.

    Returns:
        "the input", "the parameter NAME", "LAYER (operation)", or None where all is finite.
    """
    if any(t.is_floating_point() and _broken(t) for t in tensors_in(inputs)):
        return "the input"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and _broken(tensor):
            return f"the parameter {name}"
    mode = _FirstNonFinite(state_names(model))
    with torch.no_grad(), mode:
        forward()
    return mode.found
