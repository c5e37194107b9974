"""Makes Triton's interpreter round to bfloat16 as GPUs do: to the nearest, ties to even.

It cuts the last 16 bits off instead (Triton 3.8), so that every test of bfloat16 would need a tolerance
of its own. Imported in processes that run the interpreter; it must not know any kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def _convert_as_gpus_do(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        floats = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return floats.bfloat16().view(torch.int16).numpy().view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return np.ascontiguousarray(data).astype(np.uint32) << 16
    return _convert(data, source, target, rounding_mode)


interpreter._convert_float = _convert_as_gpus_do
