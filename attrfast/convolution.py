"""The input's gradient of a convolution whose input was not kept.

Must not know what the gradient is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Geometry(NamedTuple):
    """Stride, padding and dilation, one number a spatial dimension, and groups."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def each(value: Any, count: int) -> list[int]:
    """A number for every one of `count` dimensions, from one number or a sequence."""
    values = [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)]
    return values * count if len(values) == 1 else values


def input_gradient(
    gz: torch.Tensor,
    weight: torch.Tensor,
    shape: torch.Size,
    strides: Sequence[int],
    geometry: Geometry,
) -> torch.Tensor:
    """Gradient with respect to the input, of which the shape and the layout are enough.

    Args:
        gz: gradient with respect to the convolution's output.
        weight: in gz's dtype.
        shape, strides: of the input.
    """
    # PyTorch's function reads no value of the input it is given: any memory will do, and gz's costs nothing.
    if gz.untyped_storage().nbytes() >= shape.numel() * gz.element_size():
        like = gz.as_strided(shape, strides, 0)
    else:
        like = torch.empty_strided(shape, strides, dtype=gz.dtype, device=gz.device)
    stride, padding, dilation, groups = geometry
    gx: torch.Tensor = torch.ops.aten.convolution_backward(
        gz,
        like,
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [True, False, False],
    )[0]
    return gx
