"""Depthwise convolutions by the backend's own kernels, with what follows them in the same launch, both ways.

Must not know what a stage or a pass is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attrfast._backend import backend_for
from attrfast.buffers import Buffers, empty_channels_last, scratch_for
from attrfast.convolution import Geometry, may_be_ours, size_made
from attrfast.layouts import laid
from attrfast.reference import INF, compute_dtype

Tensor = torch.Tensor

DTYPES = torch.float32, torch.bfloat16

ENABLED = True  # benchmarks and tests turn it off to compare


def suits(x: Tensor, weight: Tensor, geometry: Geometry, *, transposed: bool = False) -> bool:
    """Whether `convolve` takes a convolution, and is not slower than the library; arguments as there."""
    stride, padding, dilation, groups = geometry
    return (
        ENABLED
        and groups > 1
        and weight.dim() == 4
        and groups == len(weight)
        and weight.shape[1] == 1
        and weight.shape[2] == weight.shape[3]
        and weight.shape[2] in (3, 5, 7)
        and may_be_ours(x, weight, transposed, DTYPES, groups)
        and stride in ([1, 1], [2, 2])
        and dilation == [1, 1]
        and max(padding) < weight.shape[2]
        and x.numel() > 0
        and _pays(x.shape[1])
        and backend_for(x.device).has_depthwise
    )


def _pays(channels: int) -> bool:
    """Whether it is not slower than the library's, by the measurements in docs/depthwise.md."""
    return channels >= 16


def convolve(
    x: Tensor,
    weight: Tensor,
    padding: list[int],
    *,
    stride: int = 1,
    size: Sequence[int] | None = None,
    transposed: bool = False,
    factor: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    lower: float = -INF,
    upper: float = INF,
    out: Tensor | None = None,
    buffers: Buffers | None = None,
) -> Tensor:
    """clamp(conv(x, weight * factor) * scale + shift + residual, lower, upper), if `suits` accepts it.

    Args:
        padding, stride: of the convolution; with `transposed`, of the one whose input's gradient this is.
        size: rows and columns of that input; without `transposed`, they follow.
        transposed: x is a gradient for a convolution's output, and the result one for its input.
        factor: of channels, float32, or None for 1. The weight takes it.
        scale, shift: (C,) float32, or None for 1 and 0.
        out: channels-last memory for the result; None makes new memory.
        buffers: what large memory comes from.

    Returns:
        (N, C, H, W), channels-last.
    """
    kernel = weight.shape[2]
    if not transposed:
        size = size_made(x.shape[2:], weight.shape[2:], padding, [stride, stride])
    assert size is not None
    if out is None:
        out = empty_channels_last(buffers, (*x.shape[:2], *size), x.dtype)
    backend = backend_for(x.device)
    shape = (tuple(size), kernel, stride, tuple(padding))
    scratch = scratch_for(buffers, backend.depthwise_floats(x, *shape, transposed))
    vectors = (None if v is None else laid(v, False) for v in (factor, scale, shift))
    other = None if residual is None else laid(residual, True)
    backend.depthwise(x, *shape, transposed, weight, *vectors, other, lower, upper, out, scratch)
    return out


def gradient(
    a: Tensor,
    g: Tensor,
    weight: Tensor,
    padding: list[int],
    stride: int,
    size: Sequence[int],
    scale: Tensor | None = None,
    lower: float = 0.0,
    upper: float = INF,
    guided: bool = False,
    attribute: bool = True,
    *,
    out: Tensor | None = None,
    buffers: Buffers | None = None,
) -> tuple[Tensor, Tensor]:
    """Backward of a convolution and of what followed it, if `suits` accepts g with `transposed`.

    Args:
        a, g, weight, scale, lower, upper, guided, attribute: see `attrfast.reference.depthwise_backward`.
        padding, stride, size: see `convolve`.
        out: channels-last memory for gx; None makes new memory.
        buffers: what large memory comes from.

    Returns:
        gx, channels-last; s: (N, C), zeros unless `attribute`.
    """
    gx = empty_channels_last(buffers, (*g.shape[:2], *size), g.dtype) if out is None else out
    make = torch.empty if attribute else torch.zeros
    s = make(g.shape[:2], dtype=compute_dtype(g.dtype), device=g.device)
    backend = backend_for(g.device)
    shape = (tuple(size), weight.shape[2], stride, tuple(padding))
    scratch = scratch_for(buffers, backend.depthwise_floats(g, *shape, True))
    scale = None if scale is None else laid(scale, False)
    into = s if attribute else None
    backend.depthwise_backward(
        laid(a, True), g, *shape, weight, scale, gx, into, scratch, lower, upper, guided
    )
    return gx, s
