"""What the networks of this package share: checked arguments, scaled widths and initial weights."""

from __future__ import annotations

import math

from torch import nn

from attrfast.errors import InputError


def check_sizes(*, num_classes: int, in_channels: int, width: float) -> None:
    """Refuses sizes with which no network can be built.

    Raises:
        InputError: a count below 1, or a width that is not a positive finite number.
    """
    for name, count in (("num_classes", num_classes), ("in_channels", in_channels)):
        if count < 1:
            raise InputError(f"{name} is {count}; it must be at least 1")
    if not (math.isfinite(width) and width > 0):
        raise InputError(f"width is {width}; it must be a positive number (1.0 is the usual size)")


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded, and never below one channel."""
    return max(1, round(channels * width))


def initialise(model: nn.Module) -> None:
    """He initialisation for convolutions, small normal weights for linear layers, in place.

    Source: He et al. 2015, "Delving Deep into Rectifiers" (fan-out form, which keeps the size of
    the gradients from layer to layer).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
