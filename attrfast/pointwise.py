"""1x1 convolutions by the backend's own kernels, with what follows them in the same launch, forward and back.

Must not know what a stage or a pass is.
"""

from __future__ import annotations

import torch

from attrfast._backend import backend_for
from attrfast.buffers import Buffers, empty_channels_last, scratch_for
from attrfast.convolution import Geometry, may_be_ours
from attrfast.layouts import laid
from attrfast.reference import INF, compute_dtype

Tensor = torch.Tensor

DTYPES = torch.float32, torch.bfloat16

ENABLED = True  # benchmarks and tests turn it off to compare


def suits(x: Tensor, weight: Tensor, geometry: Geometry, *, transposed: bool = False) -> bool:
    """Whether `convolve` takes a convolution, and is not slower than the library; arguments as there."""
    return (
        ENABLED
        and weight.shape[2:] == (1, 1)
        and may_be_ours(x, weight, transposed, DTYPES)
        and geometry.stride == [1, 1]
        and geometry.padding == [0, 0]
        and geometry.groups == 1
        and x.numel() > 0
        and weight.numel() > 0
        and backend_for(x.device).has_pointwise
        and _pays(x.shape[1], weight.shape[1 if transposed else 0])
    )


def _pays(reads: int, makes: int) -> bool:
    """Whether it is not slower than the library's, by the measurements in docs/pointwise.md.

    Of three channels the products are the smaller part; where many become few, the copies of x are felt.
    """
    return reads >= 8 and (makes >= 32 or reads < 512)


def convolve(
    x: Tensor,
    weight: Tensor,
    padding: list[int],
    *,
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
    """clamp(conv(x * factor, weight) * scale + shift + residual, lower, upper), if `suits` accepts it.

    Args:
        padding: none; it stands here because `attrfast.winograd.convolve` has it.
        transposed: x is a gradient for a convolution's output, and the result one for its input.
        factor: of x's channels, float32, or None for 1. The weight takes it.
        scale, shift: (C,) float32, or None for 1 and 0.
        out: channels-last memory for the result; None makes new memory.
        buffers: what large memory comes from.

    Returns:
        (N, C, H, W), channels-last.
    """
    assert not any(padding)
    channels = weight.shape[1 if transposed else 0]
    if out is None:
        out = empty_channels_last(buffers, (len(x), channels, *x.shape[2:]), x.dtype)
    backend = backend_for(x.device)
    floats = backend.pointwise_floats(x, channels, False)
    scratch = scratch_for(buffers, floats)
    vectors = (None if v is None else laid(v, False) for v in (factor, scale, shift))
    other = None if residual is None else laid(residual, True)
    backend.pointwise(x, weight, transposed, *vectors, other, lower, upper, out, scratch)
    return out


def gradient(
    a: Tensor,
    g: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    lower: float = 0.0,
    upper: float = INF,
    guided: bool = False,
    attribute: int = 1,
    *,
    g1: Tensor | None = None,
    out: Tensor | None = None,
    buffers: Buffers | None = None,
) -> tuple[Tensor, Tensor]:
    """Backward of a convolution and of what followed it, if `suits` accepts g with `transposed`.

    Args:
        a to attribute: see `attrfast.reference.pointwise_backward`.
        g1: channels-last memory for the gradient with respect to the residual, or g; None does not make it.
        out: channels-last memory for gx; None makes new memory.
        buffers: what large memory comes from.

    Returns:
        gx, channels-last; s: (N, C).
    """
    gx = out
    if gx is None:
        gx = empty_channels_last(buffers, (len(g), weight.shape[1], *g.shape[2:]), g.dtype)
    make = torch.empty if attribute else torch.zeros
    s = make(g.shape[:2], dtype=compute_dtype(g.dtype), device=g.device)
    backend = backend_for(g.device)
    floats = backend.pointwise_floats(g, weight.shape[1], True)
    scratch = scratch_for(buffers, floats)
    scale = None if scale is None else laid(scale, False)
    other = laid(residual, True) if residual is not None and attribute == 2 else None
    backend.pointwise_backward(
        *(laid(a, True), g, other, weight, scale, g1, gx, s, scratch),
        *(lower, upper, guided, attribute),
    )
    return gx, s
