"""Batch norm and ReLU over maps that are joined along the channels, by a kernel that reads the parts.

Must not know what a stage or a pass is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attrfast._backend import backend_for
from attrfast.buffers import Buffers, empty_channels_last
from attrfast.layouts import aligned, channels_lie_together, empty_laid, laid
from attrfast.reference import INF, compute_dtype

Tensor = torch.Tensor

ENABLED = True  # benchmarks and tests turn it off to compare


def suits(parts: Sequence[Tensor]) -> bool:
    """Whether `forward` takes these parts: (N, C of each, positions...), else alike, dense in one layout."""
    if not ENABLED:
        return False
    first = parts[0]
    last = channels_lie_together(first)
    return (
        2 <= first.dim() <= 5
        and first.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and all(
            part.dtype == first.dtype
            and part.device == first.device
            and part.layout == torch.strided
            and part.shape[:1] == first.shape[:1]
            and part.shape[2:] == first.shape[2:]
            and channels_lie_together(part) == last
            and (last or part.is_contiguous())
            and aligned(part)
            for part in parts
        )
        and backend_for(first.device).has_joined
    )


def shape(parts: Sequence[Tensor]) -> tuple[int, ...]:
    """That of the joined map."""
    first = parts[0]
    return len(first), sum(part.shape[1] for part in parts), *first.shape[2:]


def forward(
    parts: Sequence[Tensor],
    scale: Tensor,
    shift: Tensor,
    lower: float = 0.0,
    upper: float = INF,
    *,
    buffers: Buffers | None = None,
) -> Tensor:
    """clamp(cat(parts, 1) * scale + shift, lower, upper), if `suits` accepts the parts.

    Args:
        scale, shift: (C,) in the compute dtype, with C that of the joined map.
        buffers: what large memory comes from.

    Returns:
        (N, C, positions...), laid out as the parts are.
    """
    y = _empty(parts[0], shape(parts), buffers)
    if y.numel():
        backend = backend_for(y.device)
        backend.joined(parts, laid(scale, False), laid(shift, False), y, lower, upper)
    return y


def gradient(
    parts: Sequence[Tensor],
    g: Tensor,
    scale: Tensor,
    shift: Tensor,
    lower: float,
    upper: float,
    guided: bool,
    attribute: bool,
    into: Sequence[Tensor | None],
    adds: Sequence[bool],
) -> Tensor:
    """Backward of `forward` from what it was given; see `attrfast.reference.joined_backward`.

    Args:
        g: the gradient with respect to what `forward` returned.
        into: for each part, memory that is shaped and laid like it for its gradient, or None.
        adds: for each part, whether the gradient is added to what that memory holds.

    Returns:
        s: (N, C) in the compute dtype, zeros unless `attribute`.
    """
    s = torch.zeros(g.shape[:2], dtype=compute_dtype(g.dtype), device=g.device)
    if g.shape[:2].numel():
        g = laid(g, channels_lie_together(parts[0]))
        vectors = laid(scale, False), laid(shift, False)
        sums = s if attribute else None
        backend_for(g.device).joined_backward(parts, g, *vectors, into, adds, sums, lower, upper, guided)
    return s


def empty_like(part: Tensor, buffers: Buffers | None) -> Tensor:
    """Memory for the gradient of a part."""
    return _empty(part, part.shape, buffers)


def _empty(like: Tensor, shape: Sequence[int], buffers: Buffers | None) -> Tensor:
    last = channels_lie_together(like)
    if last and like.dtype == torch.float32 and len(shape) == 4:
        return empty_channels_last(buffers, shape)
    return empty_laid(like, last, shape)
