"""The floor: what a network's convolutions cost alone, which no importance pass can do without.

Every convolution call of one recorded forward pass runs again on tensors that exist already, in the dtype
that it ran in: forward, and the gradient for its input. No weight gradient, and none for the network's own
input, nor for what autocast makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.networks import Batches


@dataclass(frozen=True)
class _Convolution:
    """A call `torch.convolution(x, weight, bias, *rest)`, and a gradient for what it made."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    rest: tuple[Any, ...]  # stride, padding, dilation, transposed, output_padding, groups
    g: torch.Tensor
    backward_needed: bool

    def forward(self) -> None:
        torch.convolution(self.x, self.weight, self.bias, *self.rest)

    def backward(self) -> None:
        torch.ops.aten.convolution_backward(
            self.g, self.x, self.weight, None, *self.rest, [True, False, False]
        )


class _Recorder(TorchDispatchMode):
    """Notes every convolution that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Convolution] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            x, weight, bias, *rest = args
            g = torch.randn_like(out)
            self.calls.append(
                _Convolution(x.detach(), weight.detach(), bias, tuple(rest), g, x.requires_grad)
            )
        return out


def prepare(model: nn.Module, batches: Batches) -> Callable[[], None]:
    """Records the convolutions; what comes back runs all of them, once for each batch."""
    recorder = _Recorder()
    with recorder:
        model(batches[0][0])

    @torch.no_grad()
    def run() -> None:
        for _ in batches:
            for call in recorder.calls:
                call.forward()
            for call in reversed(recorder.calls):
                if call.backward_needed:
                    call.backward()

    return run
