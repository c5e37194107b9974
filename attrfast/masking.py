"""Runs a model as if units were gone: the definition of what surgery must equal.

A removed unit's channels are zero wherever a reader takes them in. No hook is set and nothing is written
to the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attrfast.signatures import CONVOLUTIONS, bound_arguments, channel_dim
from attrfast.trace import CallMode
from attrfast.units import Units, reader_weights


class masked(CallMode):  # noqa: N801 - read as a context: `with masked(...): model(x)`
    """Context in which the model computes without the removed units.

    Args:
        model: the whole model.
        units: its units.
        removed: (U,) bool.
    """

    def __init__(self, model: nn.Module, units: Units, removed: torch.Tensor) -> None:
        super().__init__()
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        self.keep: dict[int, torch.Tensor] = {}
        for weight, name in reader_weights(model, units).items():
            row = units.inputs[name]
            gone = (row >= 0) & removed[row.clamp(min=0)]
            if bool(gone.any()):
                self.keep[id(state[weight])] = (~gone).to(state[weight].device)

    def meet(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in CONVOLUTIONS or name == "linear":
            x, weight, *rest = bound_arguments(name, args, kwargs)
            keep = self.keep.get(id(weight))
            if keep is not None:
                dim = channel_dim(name, x)
                shape = [1] * x.dim()
                shape[dim] = len(keep)
                x = torch.where(keep.view(shape), x, torch.zeros((), dtype=x.dtype, device=x.device))
            return func(x, weight, *rest)
        return func(*args, **kwargs)
