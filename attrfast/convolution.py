"""What all convolutions share, and those by PyTorch where it takes the slower of its ways.

Must not know what they are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from attrfast.layouts import aligned, channels_lie_together


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


def size_made(
    size: Sequence[int], kernel: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> list[int]:
    """Spatial sizes of what a convolution without dilation makes of an input of `size`."""
    dimensions = zip(size, kernel, padding, stride, strict=True)
    return [(n + 2 * p - k) // s + 1 for n, k, p, s in dimensions]


def may_be_ours(
    x: torch.Tensor,
    weight: torch.Tensor,
    transposed: bool,
    dtypes: Sequence[torch.dtype],
    groups: int = 1,
) -> bool:
    """Whether these are tensors that kernels of our own convolve: channels-last, in a dtype that stays.

    Args:
        transposed: x is a gradient for the convolution's output.
        dtypes: what the kernel takes.
        groups: of the convolution.
    """
    return (
        x.dim() == 4
        and x.dtype == weight.dtype
        and x.dtype in dtypes
        and x.device == weight.device
        and (len(weight) if transposed else groups * weight.shape[1]) == x.shape[1]
        and aligned(x)
        and aligned(weight)
        and channels_lie_together(x)
        and _convolved_in(x) == x.dtype
    )


def _convolved_in(x: torch.Tensor) -> torch.dtype:
    """The dtype in which PyTorch would convolve x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


_MANY = 16  # samples from which PyTorch takes oneDNN in any case
_PAYS = 512  # positions from which it is faster: it lays the weight out anew


def left_behind(x: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> bool:
    """Whether PyTorch keeps a 1x1 convolution from oneDNN, which takes half the time.

    It does where it has one thread and few samples (`use_mkldnn` in ATen/native/Convolution.cpp), as in every
    process of `torchrun`.
    """
    return (
        torch.get_num_threads() == 1
        and weight.shape[2:] == (1, 1)
        and geometry == ([1, 1], [0, 0], [1, 1], 1)
        and x.dim() == 4
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(x) < _MANY
        and x.numel() >= _PAYS * x.shape[1] > 0
        and torch._C._has_mkldnn
        and bool(torch._C._get_mkldnn_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


def library_pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1 convolution that PyTorch has left behind."""
    out: torch.Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, [0, 0], [1, 1], [1, 1], 1)
    return out


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
    if left_behind(gz, weight, geometry):
        return library_pointwise(gz, weight.transpose(0, 1), None)
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
