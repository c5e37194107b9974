"""Which filters can only be removed together, and who reads them.

Holds the result of analysing a model (`Units`), in terms of module names and channel indices alone. It
must not know what an importance is, nor how a channel is cut out of a module.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Layer:
    """Convolutions whose filters are coupled, and which are normalised together.

    Attributes:
        name: the first of its convolutions, in the order of the forward pass.
        convs: names of all convolutions that produce its channels.
        units: indices of its units, ascending.
        frozen: why no unit of it can be removed, or None where at least one can.
    """

    name: str
    convs: tuple[str, ...]
    units: tuple[int, ...]
    frozen: str | None = None


@dataclass(frozen=True)
class Units:
    """The units of a model: U sets of filters that can only be removed together.

    Every map goes from a module's name to an int64 tensor with one entry a channel: the unit that the
    channel belongs to, or -1 where it belongs to none.

    Attributes:
        filters: convolution -> unit of each of its filters (output channels). The scored filters.
        outputs: any module that loses output channels with a unit (convolutions, linear layers that
            produce one of its channels, batch norms and other per-channel modules) -> unit of each of
            its output channels. Includes all of `filters`.
        inputs: reader (convolution or linear layer that takes the channels as input) -> unit of each of
            its input channels or features.
        depthwise: names of depthwise convolutions, whose inputs and outputs go together and which are
            therefore listed in `outputs` (and `filters`) and never in `inputs`.
        layers: the coupled layers; a unit is in exactly one.
        layer_of: (U,) int64, index into `layers`.
        size: (U,) int64, how many filters the unit takes along.
        frozen: for each unit, why it cannot be removed, or None.
    """

    filters: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    depthwise: frozenset[str]
    layers: tuple[Layer, ...]
    layer_of: torch.Tensor
    size: torch.Tensor
    frozen: tuple[str | None, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.frozen)

    @property
    def total_filters(self) -> int:
        """N of the paper: the filters of all units, removable or not."""
        return int(self.size.sum())


def reader_weights(model: nn.Module, units: Units) -> dict[str, str]:
    """Full name of a reader's weight -> name of the reader (a module, or the weight itself)."""
    modules = dict(model.named_modules())
    return {f"{name}.weight" if name in modules else name: name for name in units.inputs}
