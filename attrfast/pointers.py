"""How tensors are told to native code, on the CPU and on the GPU: the codes of csrc/attribution.h."""

from __future__ import annotations

import torch

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NORMS = {"l2": 0, "mean": 1, "max": 2}


def pointer(x: torch.Tensor | None) -> int:
    """Where a tensor's memory begins; 0 for none."""
    return 0 if x is None else x.data_ptr()


def shape_of(x: torch.Tensor, last: bool) -> tuple[int, bool, int, int, int]:
    """Dtype, layout, N, C and the number of positions P of a tensor (N, C, ...)."""
    return DTYPES[x.dtype], last, x.shape[0], x.shape[1], x.shape[2:].numel()
