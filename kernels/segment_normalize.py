"""All layers' scores divided by their own norms, in one launch: a program for each segment.

    out[i] = theta[i] / norm(theta[offsets[l] : offsets[l + 1]])    for i in segment l

Bytes: theta three times (its largest value, its norm, the division), out once: 4eU against a floor of
2eU; a layer's scores stay in the cache between the three, and U is a few thousand.

The segment is divided by its largest value first, so that no square overflows or vanishes. A segment of
zeros stays zero.
"""

import torch
import triton
import triton.language as tl

from attrfast.kernels.launch import launch
from attrfast.kernels.tiles import tree_lines

Tensor = torch.Tensor
BLOCK = 1024
KINDS = {"l2": 0, "mean": 1, "max": 2}


@triton.jit
def segment_normalize_kernel(
    theta_ptr,
    offsets_ptr,
    out_ptr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG: tl.constexpr,
):
    segment = tl.program_id(0)
    start = tl.load(offsets_ptr + segment)
    stop = tl.load(offsets_ptr + segment + 1)
    lane = tl.arange(0, BLOCK)
    tops = tl.zeros([BLOCK], WIDE)
    strange = tl.zeros([BLOCK], tl.int32)
    for first in range(start, stop, BLOCK):
        x = tl.load(theta_ptr + first + lane, mask=first + lane < stop, other=0.0).to(WIDE)
        tops = tl.maximum(tops, tl.abs(x))
        strange = strange | (x != x).to(tl.int32)
    largest = tl.max(tops, 0)
    # A maximum may pass over NaN; the definition does not.
    largest = tl.where(tl.max(strange, 0) > 0, float("nan"), largest)
    divisor = tl.where(largest == 0, 1.0, largest).to(WIDE)
    if KIND == 2:
        size = divided(divisor, divisor)  # 1, or NaN for a segment with an infinity
    else:
        sums = tl.zeros([BLOCK], WIDE)
        for first in range(start, stop, BLOCK):
            x = tl.load(theta_ptr + first + lane, mask=first + lane < stop, other=0.0).to(WIDE)
            unit = divided(x, divisor)
            sums += unit * unit if KIND == 0 else tl.abs(unit)
        total = tl.sum(tree_lines(tl.reshape(sums, [1, BLOCK]), 1, BLOCK, LOG), 0)
        if KIND == 0:
            size = root(total)
        else:
            size = divided(total, (stop - start).to(WIDE))
    size = tl.where(largest == 0, 1.0, size).to(WIDE)
    for first in range(start, stop, BLOCK):
        inside = first + lane < stop
        x = tl.load(theta_ptr + first + lane, mask=inside, other=0.0).to(WIDE)
        out = divided(divided(x, divisor), size)
        tl.store(out_ptr + first + lane, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def divided(x, y):
    """x / y, rounded as IEEE 754 says (a plain `/` in float32 is off by up to two units)."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def root(x):
    """Likewise."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


def segment_normalize(theta: Tensor, offsets: Tensor, kind: str) -> Tensor:
    """See `attrfast.reference.segment_normalize`; `offsets` lies on theta's device."""
    theta = theta.contiguous()
    out = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
    launch(
        segment_normalize_kernel,
        offsets.shape[0] - 1 if theta.numel() else 0,
        128,
        (theta, offsets.contiguous(), out),
        {
            "KIND": KINDS[kind],
            "WIDE": tl.float64 if theta.dtype == torch.float64 else tl.float32,
            "BLOCK": BLOCK,
            "LOG": BLOCK.bit_length() - 1,
        },
    )
    return out
