"""The calls of a recorded pass as things that take time, by the channels that they read and make.

Must not know how long they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.channels import Discovery
from attrfast.signatures import CONVOLUTIONS
from attrfast.trace import Call, Param, Ref

_FIXED = torch.full((1,), -1, dtype=torch.int64)


@dataclass(frozen=True)
class TimedCall:
    """One call.

    Attributes:
        key: what it does on which shapes, in words. Calls with the same key take the same time.
        inputs, outputs: (channels,) int64 unit of each channel that it reads and makes, -1 for none; one
            entry of -1 where no removal changes their number.
        product: whether its work is the product of both (a convolution or a linear layer).
    """

    key: str
    inputs: torch.Tensor
    outputs: torch.Tensor
    product: bool

    def widths(self, removed: torch.Tensor) -> tuple[int, int]:
        """How many of its inputs and outputs are left without the units where `removed` (U,) is true."""
        return _left(self.inputs, removed), _left(self.outputs, removed)


def _left(row: torch.Tensor, removed: torch.Tensor) -> int:
    return len(row) - int(((row >= 0) & removed[row.clamp(min=0)]).sum())


def timed_calls(model: nn.Module, found: Discovery) -> list[TimedCall]:
    """Every call of the recorded pass, in its order.

    Args:
        model: whose pass was recorded.
        found: the record and the units.
    """
    state = dict((*model.named_parameters(), *model.named_buffers()))
    out = []
    for call in found.record.calls:
        inputs, outputs = _row(call.inputs, found), _row(call.outputs, found)
        product = call.name in CONVOLUTIONS or call.name in ("linear", "matmul", "bmm", "addmm")
        if product and {name.removesuffix(".weight") for name in call.state} & found.units.depthwise:
            product = False  # a filter a channel
        out.append(
            TimedCall(
                _key(call, found, state),
                _FIXED if inputs is None else inputs,
                # What makes nothing with channels (a pooled vector's norm, say) works on what it reads.
                outputs if outputs is not None else _FIXED if product or inputs is None else inputs,
                product,
            )
        )
    return out


def _row(values: Sequence[int], found: Discovery) -> torch.Tensor | None:
    """Units of the first of these values that has channels of units."""
    return next((found.channels[value][1] for value in values if value in found.channels), None)


def _key(call: Call, found: Discovery, state: dict[str, torch.Tensor]) -> str:
    def told(item: Any) -> str:
        if isinstance(item, Ref):
            return f"x{list(found.record.shapes[item.value])}*{found.record.itemsizes[item.value]}"
        if isinstance(item, Param):
            return f"w{list(state[item.name].shape)}"
        if isinstance(item, (tuple, list)):
            return f"({', '.join(map(told, item))})"
        if isinstance(item, dict):
            return ", ".join(f"{name}={told(value)}" for name, value in item.items())
        return str(item)

    return f"{call.name}{told(call.args)}{{{told(call.kwargs)}}}"
