"""The two layouts that kernels work in, and which of them a result has: the rule for every backend.

Must not know any op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_META = torch.empty((), device="meta")
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_lie_together(x: torch.Tensor) -> bool:
    """Whether results shaped like x lie channels-last, as x does; otherwise they lie contiguous."""
    if x.is_contiguous():
        return False
    if x.dim() in _CHANNELS_LAST:
        return x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    # (N, C, P) whose channels lie together: what a transposed linear layer's map looks like.
    return x.dim() == 3 and x.transpose(1, 2).is_contiguous()


def is_dense(x: torch.Tensor) -> bool:
    """Whether x lies contiguous, or channels-last as PyTorch knows it: every element has memory of its own."""
    return x.is_contiguous() or (
        x.dim() in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    )


def aligned(x: torch.Tensor) -> bool:
    """Whether the memory begins where an element may; memory of foreign origin need not."""
    return x.data_ptr() % x.element_size() == 0


def laid(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """The tensor in one of the two layouts, and aligned: itself, or a copy."""
    if not aligned(x):
        x = x.clone()
    if not channels_last:
        return x.contiguous()
    if x.dim() in _CHANNELS_LAST:
        return x.contiguous(memory_format=_CHANNELS_LAST[x.dim()])
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def empty_laid(
    like: torch.Tensor, channels_last: bool, shape: Sequence[int], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """New memory in one of the two layouts, on the device of `like` and by default in its dtype."""
    dtype = dtype or like.dtype
    if not channels_last:
        return torch.empty(shape, dtype=dtype, device=like.device)
    if len(shape) in _CHANNELS_LAST:
        return torch.empty(
            shape, dtype=dtype, device=like.device, memory_format=_CHANNELS_LAST[len(shape)]
        )
    return torch.empty((shape[0], shape[2], shape[1]), dtype=dtype, device=like.device).transpose(1, 2)


def strides_laid(channels_last: bool, shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a dense tensor of that shape in one of the two layouts."""
    return empty_laid(_META, channels_last, shape).stride()


def common(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The tensor in the layout that all tensors of a launch get, and whether that is channels-last."""
    last = channels_lie_together(x)
    return laid(x, last), last


def put_back(target: torch.Tensor, work: torch.Tensor) -> None:
    """Writes back into the caller's tensor what was worked on in a copy."""
    if work.data_ptr() != target.data_ptr() or work.stride() != target.stride():
        target.copy_(work)


def elements_lie_apart(x: torch.Tensor) -> bool:
    """Whether no two elements share memory. False too for strides so odd that they would have to be tried."""
    reach = 0  # from the first element to the last one of the dimensions so far
    for step, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if step <= reach:
            return x.numel() == 0
        reach += step * (size - 1)
    return True


def apart_from(written: torch.Tensor, x: torch.Tensor | None) -> torch.Tensor | None:
    """What is read while `written` is written: x itself, or a copy where their memory overlaps."""
    if x is None:
        return None
    (begin, end), (other, last) = _span(written), _span(x)
    return x.clone() if begin < last and other < end else x


def _span(x: torch.Tensor) -> tuple[int, int]:
    """From the first to behind the last byte of a tensor; both 0 for an empty one."""
    if x.numel() == 0:
        return 0, 0
    reach = sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.element_size()
