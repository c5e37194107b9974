"""The second stage of sums over large maps: partial sums are added in their order, in float64.

    s[o, i] = sum over j of partial[o, j, i]

Bytes: those of the partial sums once, 4 (8 for float64) each; there is one for at least 256 positions of
a channels-last tensor and for 1,024 of a contiguous one.
"""

import torch
import triton
import triton.language as tl

from attrfast.kernels.launch import launch
from attrfast.kernels.tiles import power_of_two, tree_lines

TILE = 1024


@triton.jit(do_not_specialize=["count", "pieces", "inner"])
def partials_kernel(
    partial_ptr,
    s_ptr,
    count,
    pieces,
    inner,
    OUTPUTS: tl.constexpr,
    SIDE: tl.constexpr,
    LOG: tl.constexpr,
    BIG: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    if not BIG:
        at = at.to(tl.int32)  # 64-bit divisions take registers
    start = (at // inner) * pieces * inner + at % inner
    side = tl.arange(0, SIDE)
    is_output = at < count
    total = tl.zeros([OUTPUTS, SIDE], tl.float64)
    for first in range(0, pieces, SIDE):
        piece = first + side
        if BIG:
            piece = piece.to(tl.int64)
        here = is_output[:, None] & (piece < pieces)[None, :]
        offset = start[:, None] + piece[None, :] * inner
        total += tl.load(partial_ptr + offset, mask=here, other=0.0).to(tl.float64)
    s = tree_lines(total, OUTPUTS, SIDE, LOG)
    tl.store(s_ptr + at, s.to(s_ptr.dtype.element_ty), mask=is_output)


def add_partials(partial: torch.Tensor, s: torch.Tensor, pieces: int, inner: int) -> None:
    """Writes into s (outer * inner elements) the sums of partial (outer, pieces, inner)."""
    side = min(64, power_of_two(pieces))
    outputs = TILE // side
    launch(
        partials_kernel,
        -(-s.numel() // outputs),
        128,
        (partial, s, s.numel(), pieces, inner),
        {
            "OUTPUTS": outputs,
            "SIDE": side,
            "LOG": side.bit_length() - 1,
            "BIG": partial.numel() >= 1 << 30,
        },
    )
