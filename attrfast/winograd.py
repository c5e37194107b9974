"""3x3 convolutions by the backend's own kernel (Winograd's F(2x2, 3x3)), where it is faster than the library's.

Must not know what a stage or a pass is.
"""

from __future__ import annotations

import torch

from attrfast._backend import backend_for
from attrfast.buffers import Buffers, empty_channels_last, scratch_for
from attrfast.convolution import Geometry, may_be_ours, size_made
from attrfast.layouts import laid
from attrfast.reference import INF

Tensor = torch.Tensor

ENABLED = True  # benchmarks and tests turn it off to compare


def suits(x: Tensor, weight: Tensor, geometry: Geometry, *, transposed: bool = False) -> bool:
    """Whether `convolve` takes a convolution, and is faster than the library; arguments as there."""
    stride, padding, dilation, groups = geometry
    return (
        ENABLED
        and weight.shape[2:] == (3, 3)
        and may_be_ours(x, weight, transposed, (torch.float32,))
        and stride == dilation == [1, 1]
        and groups == 1
        and max(padding) <= 2
        and weight.stride(2) == 3 * weight.stride(3)
        and backend_for(x.device).has_winograd
        and _pays(
            x.shape[1], weight.shape[1 if transposed else 0], len(x), *_sizes(x, padding, transposed)
        )
    )


def _pays(reads: int, makes: int, samples: int, rows: int, columns: int) -> bool:
    """Whether it is faster than the library's, by the measurements in docs/winograd.md.

    A 2x2 tile of outputs costs two transforms besides its products, so there must be channels enough to pay
    for them, tiles enough to pay for the weight's, and no tile of one output alone.
    """
    tiles = samples * -(-rows // 2) * -(-columns // 2)
    return reads >= 24 and makes >= 16 and min(rows, columns) >= 2 and tiles >= 8


def _sizes(x: Tensor, padding: list[int], transposed: bool) -> list[int]:
    """Rows and columns of what a convolution of x makes."""
    grown = [2 - p for p in padding] if transposed else padding
    return size_made(x.shape[2:], [3, 3], grown, [1, 1])


def convolve(
    x: Tensor,
    weight: Tensor,
    padding: list[int],
    *,
    transposed: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float = -INF,
    upper: float = INF,
    out: Tensor | None = None,
    buffers: Buffers | None = None,
) -> Tensor:
    """clamp(conv(x, weight) * scale + shift + residual, lower, upper), of tensors that `suits` accepts.

    Args:
        padding: of the convolution; with `transposed`, of the one whose input's gradient this is.
        transposed: x is a gradient for a convolution's output, and the result one for its input.
        scale, shift: (C,) float32, or None for 1 and 0.
        out: channels-last memory for the result; None makes new memory.
        buffers: what large memory comes from.

    Returns:
        (N, C, H, W), channels-last.
    """
    channels = weight.shape[1 if transposed else 0]
    if out is None:
        shape = len(x), channels, *_sizes(x, padding, transposed)
        out = empty_channels_last(buffers, shape)
    if transposed:
        padding = [2 - p for p in padding]
    backend = backend_for(x.device)
    floats = backend.winograd_floats(x, channels, padding)
    scratch = scratch_for(buffers, floats)
    scale, shift = (None if v is None else laid(v, False) for v in (scale, shift))
    other = None if residual is None else laid(residual, True)
    backend.winograd(x, weight, padding, transposed, scale, shift, other, lower, upper, out, scratch)
    return out
