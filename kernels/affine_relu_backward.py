"""Backward of `affine_relu`, with and without a residual, and the attribution on the way.

    g1 = where(lower < a < upper [and g > 0], g, 0)        NaN in a counts as inside
    gz = g1 * scale[c]
    s[n, c] = sum over p of a * g                          ATTRIBUTE 1
                            (a - residual) * g1            ATTRIBUTE 2, the flow through z's branch alone

Bytes: a, g and (ATTRIBUTE 2) the residual once each, gz and g1, where it is wanted, once each: 3eT for a
ReLU, as much as without the attribution, which is the floor. s and the partial sums come to less than a
hundredth of that. gz may be g where g1 is not wanted, and g1 may be g: a program reads its tile before it
writes it, and no other program reads that tile.
"""

import torch
import triton
import triton.language as tl

from attrfast.kernels.launch import Config, bucket, launch, scaled, tuned
from attrfast.kernels.partials import add_partials
from attrfast.kernels.tiles import (
    as_lines,
    as_stored,
    by_columns,
    column_place,
    cut_columns,
    cut_lines,
    line_channels,
    line_tile,
    passed,
    steps_down,
    tree_columns,
    tree_lines,
)

Tensor = torch.Tensor


@triton.jit(do_not_specialize=["row_units", "units", "channels"])
def backward_lines(
    a_ptr,
    g_ptr,
    scale_ptr,
    residual_ptr,
    g1_ptr,
    gz_ptr,
    s_ptr,
    row_units,
    units,
    channels,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    GUIDED: tl.constexpr,
    ATTRIBUTE: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    FLAT: tl.constexpr,
    LOG: tl.constexpr,
):
    base, offset, inside, row, line, is_line, _first = line_tile(
        row_units, units, ROW_UNIT, UNIT, LINES, WIDTH, SPLIT, FLAT
    )
    a = tl.load(a_ptr + base + offset, mask=inside, other=0.0).to(WIDE)
    g = tl.load(g_ptr + base + offset, mask=inside, other=0.0).to(WIDE)
    g1 = passed(a, g, LOWER, UPPER, GUIDED)
    if ATTRIBUTE == 2:
        flow = (a - tl.load(residual_ptr + base + offset, mask=inside, other=0.0).to(WIDE)) * g1
    else:
        flow = a * g
    if g1_ptr is not None:
        tl.store(g1_ptr + base + offset, g1.to(g1_ptr.dtype.element_ty), mask=inside)
    if scale_ptr is not None:
        channel = line_channels(row, channels, LINES, SPLIT)
        scale = tl.load(scale_ptr + channel, mask=is_line, other=0.0)[:, None]
        g1 = as_stored(as_lines(g1, LINES, WIDTH, FLAT) * scale, LINES, WIDTH, FLAT)
    tl.store(gz_ptr + base + offset, g1.to(gz_ptr.dtype.element_ty), mask=inside)
    if ATTRIBUTE != 0:
        s = tree_lines(as_lines(flow, LINES, WIDTH, FLAT), LINES, WIDTH, LOG)
        tl.store(s_ptr + line, s, mask=is_line)


@triton.jit(do_not_specialize=["positions", "pieces", "units", "blocks"])
def backward_columns(
    a_ptr,
    g_ptr,
    scale_ptr,
    residual_ptr,
    g1_ptr,
    gz_ptr,
    s_ptr,
    positions,
    pieces,
    units,
    blocks,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    GUIDED: tl.constexpr,
    ATTRIBUTE: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    LOG: tl.constexpr,
):
    sample, piece, c0 = column_place(pieces, blocks, WIDTH)
    channels = units.to(tl.int64) * UNIT
    c = tl.arange(0, WIDTH)
    is_channel = c < channels - c0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
    sums = tl.zeros([HEIGHT, WIDTH], WIDE)
    for step in range(steps_down(positions, piece, HEIGHT, STEPS)):
        p = (piece * STEPS + step) * HEIGHT + tl.arange(0, HEIGHT)
        inside = (p < positions)[:, None] & is_channel[None, :]
        offset = (sample * positions + p)[:, None] * channels + c0 + c[None, :]
        a = tl.load(a_ptr + offset, mask=inside, other=0.0).to(WIDE)
        g = tl.load(g_ptr + offset, mask=inside, other=0.0).to(WIDE)
        g1 = passed(a, g, LOWER, UPPER, GUIDED)
        if ATTRIBUTE == 2:
            sums += (a - tl.load(residual_ptr + offset, mask=inside, other=0.0).to(WIDE)) * g1
        elif ATTRIBUTE == 1:
            sums += a * g
        if g1_ptr is not None:
            tl.store(g1_ptr + offset, g1.to(g1_ptr.dtype.element_ty), mask=inside)
        if scale_ptr is not None:
            g1 = g1 * scale
        tl.store(gz_ptr + offset, g1.to(gz_ptr.dtype.element_ty), mask=inside)
    if ATTRIBUTE != 0:
        s = tree_columns(sums, HEIGHT, WIDTH, LOG)
        tl.store(s_ptr + (sample * pieces + piece) * channels + c0 + c, s, mask=is_channel)


def affine_relu_backward(
    a: Tensor,
    g: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
    g1: Tensor | None,
    gz: Tensor,
    s: Tensor,
    lower: float,
    upper: float,
    guided: bool,
    attribute: int,
    last: bool,
) -> None:
    """Writes gz, g1 where it is given, and s unless `attribute` is 0.

    a, g, residual, g1 and gz lie alike: contiguous, or channels-last where `last`; s is contiguous. The
    bounds are rounded to a's dtype.
    """
    n, c = a.shape[:2]
    positions = a.shape[2:].numel()
    last = by_columns(last, positions, c)
    lines, columns = cut_lines(n * c, positions), cut_columns(n, positions, c)
    pieces = columns.pieces if last else lines.pieces
    sums = (
        s
        if pieces == 1 or not attribute
        else torch.empty(s.numel() * pieces, dtype=s.dtype, device=s.device)
    )
    chosen = {
        "LOWER": lower,
        "UPPER": upper,
        "GUIDED": guided,
        "ATTRIBUTE": attribute,
        "WIDE": tl.float64 if a.dtype == torch.float64 else tl.float32,
    }

    def run(config: Config, g1: Tensor | None, gz: Tensor) -> None:
        config = scaled(config, a.dtype)
        pointers = a, g, scale, residual if attribute == 2 else None, g1, gz, sums
        if last:
            launch(
                backward_columns,
                columns.programs(config.elements),
                config.threads,
                (*pointers, positions, pieces, c // columns.unit, columns.blocks(config.elements)),
                {**chosen, **columns.constants(config.elements)},
            )
            return
        launch(
            backward_lines,
            lines.programs(config.elements),
            config.threads,
            (*pointers, lines.rows // lines.row_unit, positions // lines.unit, c),
            {**chosen, **lines.constants(config.elements), "LOG": lines.log()},
        )

    def measured(config: Config) -> None:
        run(config, None if g1 is None else torch.empty_like(gz), torch.empty_like(gz))

    given = scale is not None, g1 is not None, attribute
    key = "backward", a.dtype, last, given, bucket(positions), bucket(c), bucket(a.numel())
    run(tuned(key, a.device, measured), g1, gz)
    if attribute and pieces > 1:
        add_partials(sums, s, pieces, c if last else 1)
