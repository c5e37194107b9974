"""Batch norm and ReLU over maps that are joined along the channels, by a kernel that reads the parts.

Must not know what a stage or a pass is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attrfast._backend import backend_for
from attrfast.buffers import Buffers, empty_channels_last
from attrfast.layouts import aligned, channels_lie_together, empty_laid, laid, strides_laid
from attrfast.pointers import DTYPES
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
        and first.dtype in DTYPES
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


class Parts:
    """Maps that `suits` accepts, to be joined; what a launch needs of them is looked up once.

    Args:
        tensors: (N, C of each, positions...).

    Attributes:
        tensors: the same.
        shape: that of the joined map.
        last: whether it lies channels-last, as they do.
        channels: C of each.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        first = tensors[0]
        self.tensors = tuple(tensors)
        self.last = channels_lie_together(first)
        self.channels = [x.shape[1] for x in tensors]
        self.shape = torch.Size((len(first), sum(self.channels), *first.shape[2:]))
        sample = first.shape[2:].numel() * first.element_size()
        self._steps = [sample * c for c in self.channels]
        self._addresses = [x.data_ptr() for x in tensors]

    @property
    def samples(self) -> int:
        return self.shape[0]

    def addresses(self, first: int) -> list[int]:
        """Where each part's sample `first` lies."""
        return [x + first * step for x, step in zip(self._addresses, self._steps, strict=True)]

    def addresses_of(self, others: Sequence[Tensor | None], first: int) -> list[int]:
        """The same of tensors that are shaped and laid like the parts; 0 for none."""
        return [
            0 if x is None else x.data_ptr() + first * step
            for x, step in zip(others, self._steps, strict=True)
        ]


def forward(
    parts: Parts,
    scale: Tensor,
    shift: Tensor,
    lower: float = 0.0,
    upper: float = INF,
    *,
    first: int = 0,
    samples: int | None = None,
    passing: bool = False,
    buffers: Buffers | None = None,
) -> Tensor:
    """clamp(cat(parts, 1) * scale + shift, lower, upper).

    Args:
        scale, shift: (C,) in the compute dtype, with C that of the joined map.
        first, samples: which samples; None: all from `first` on.
        passing: whether the result is done with before the next such call, which may overwrite it.
        buffers: what large memory comes from.

    Returns:
        (samples, C, positions...), laid out as the parts are.
    """
    count = parts.samples - first
    shape = (count if samples is None else min(samples, count), *parts.shape[1:])
    like = parts.tensors[0]
    if passing and buffers is not None:
        y = buffers.piece(shape, strides_laid(parts.last, shape), like.dtype)
    else:
        y = _empty(like, shape, buffers)
    if y.numel():
        vectors = laid(scale, False), laid(shift, False)
        given = parts.addresses(first), parts.channels, parts.last, *vectors
        backend_for(y.device).joined(*given, y, lower, upper)
    return y


def gradient(
    parts: Parts,
    g: Tensor,
    scale: Tensor,
    shift: Tensor,
    lower: float,
    upper: float,
    guided: bool,
    attribute: bool,
    into: Sequence[Tensor | None],
    adds: Sequence[bool],
    *,
    first: int = 0,
) -> Tensor:
    """Backward of `forward` from what it was given; see `attrfast.reference.joined_backward`.

    Args:
        g: the gradient with respect to what `forward` returned.
        into: for each part, memory that is shaped and laid like it for its gradient, or None.
        adds: for each part, whether the gradient is added to what that memory holds.
        first: the sample whose gradient g begins with.

    Returns:
        s: (samples of g, C) in the compute dtype, zeros unless `attribute`.
    """
    s = torch.zeros(g.shape[:2], dtype=compute_dtype(g.dtype), device=g.device)
    if g.shape[:2].numel():
        given = parts.addresses(first), parts.channels, parts.last
        tensors = laid(g, parts.last), laid(scale, False), laid(shift, False)
        targets, sums = parts.addresses_of(into, first), s if attribute else None
        backend_for(g.device).joined_backward(
            *given, *tensors, targets, adds, sums, lower, upper, guided
        )
    return s


def empty_like(part: Tensor, buffers: Buffers | None) -> Tensor:
    """Memory for the gradient of a part."""
    return _empty(part, part.shape, buffers)


def _empty(like: Tensor, shape: Sequence[int], buffers: Buffers | None) -> Tensor:
    last = channels_lie_together(like)
    if last and len(shape) == 4:
        return empty_channels_last(buffers, shape, like.dtype)
    return empty_laid(like, last, shape)
