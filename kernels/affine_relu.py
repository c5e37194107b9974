"""Forward: a folded batch norm, an addition and a ReLU, element by element.

    y = clamp(z * scale[c] + shift[c] + residual, lower, upper)
    count[n, c] = number of p where y, as it is stored, is not zero      where it is wanted

Bytes: z once, the residual once where there is one, y once: 2eT or 3eT, which is the floor, and with a count
next to nothing more. y may be z.
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
    clamped,
    column_place,
    counted,
    cut_columns,
    cut_lines,
    flat_columns,
    line_channels,
    line_tile,
    steps_down,
    tree_columns,
    tree_lines,
)

Tensor = torch.Tensor


@triton.jit(do_not_specialize=["row_units", "units", "channels"])
def affine_relu_lines(
    z_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    count_ptr,
    row_units,
    units,
    channels,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
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
    z = tl.load(z_ptr + base + offset, mask=inside, other=0.0)
    y = as_lines(z.to(WIDE), LINES, WIDTH, FLAT)
    channel = line_channels(row, channels, LINES, SPLIT)
    if scale_ptr is not None:
        y = y * tl.load(scale_ptr + channel, mask=is_line, other=0.0)[:, None]
    if shift_ptr is not None:
        y = y + tl.load(shift_ptr + channel, mask=is_line, other=0.0)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + base + offset, mask=inside, other=0.0)
        y = y + as_lines(residual.to(WIDE), LINES, WIDTH, FLAT)
    y = clamped(y, LOWER, UPPER)
    stored = as_stored(y.to(y_ptr.dtype.element_ty), LINES, WIDTH, FLAT)
    tl.store(y_ptr + base + offset, stored, mask=inside)
    if count_ptr is not None:
        count = counted(y, as_lines(inside, LINES, WIDTH, FLAT), y_ptr.dtype.element_ty)
        tl.store(count_ptr + line, tree_lines(count, LINES, WIDTH, LOG), mask=is_line)


@triton.jit(do_not_specialize=["positions", "pieces", "units", "blocks"])
def affine_relu_columns(
    z_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    count_ptr,
    positions,
    pieces,
    units,
    blocks,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    LOG: tl.constexpr,
):
    """A program that counts walks down one sample; without a count, one sample has the positions of all."""
    sample, piece, c0 = column_place(pieces, blocks, WIDTH)
    if count_ptr is None:
        sample = 0
    channels = units.to(tl.int64) * UNIT
    c = tl.arange(0, WIDTH)
    is_channel = c < channels - c0
    count = tl.zeros([HEIGHT, WIDTH], WIDE)
    steps = 1 if count_ptr is None else steps_down(positions, piece, HEIGHT, STEPS)
    for step in range(steps):
        p = (piece * STEPS + step) * HEIGHT + tl.arange(0, HEIGHT)
        inside = (p < positions)[:, None] & is_channel[None, :]
        offset = (sample * positions + p)[:, None] * channels + c0 + c[None, :]
        y = tl.load(z_ptr + offset, mask=inside, other=0.0).to(WIDE)
        # Read at each step, from the cache: kept, they take registers that there are not.
        if scale_ptr is not None:
            y = y * tl.load(scale_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
        if shift_ptr is not None:
            y = y + tl.load(shift_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
        if residual_ptr is not None:
            y = y + tl.load(residual_ptr + offset, mask=inside, other=0.0).to(WIDE)
        y = clamped(y, LOWER, UPPER)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
        if count_ptr is not None:
            count += counted(y, inside, y_ptr.dtype.element_ty)
    if count_ptr is not None:
        sums = tree_columns(count, HEIGHT, WIDTH, LOG)
        tl.store(count_ptr + (sample * pieces + piece) * channels + c0 + c, sums, mask=is_channel)


def affine_relu(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    count: Tensor | None,
    lower: float,
    upper: float,
    last: bool,
) -> None:
    """Writes y, and count (N, C) where it is given.

    z, residual and y lie alike: contiguous, or channels-last where `last`; count is contiguous.
    """
    n, c = z.shape[:2]
    positions = z.shape[2:].numel()
    last = by_columns(last, positions, c)
    lines, columns = cut_lines(n * c, positions), cut_columns(n, positions, c)
    pieces = columns.pieces if last else lines.pieces
    sums = count
    if count is not None and pieces > 1:
        sums = torch.empty(count.numel() * pieces, dtype=count.dtype, device=count.device)
    wide = tl.float64 if z.dtype == torch.float64 else tl.float32
    bounds = {"LOWER": lower, "UPPER": upper, "WIDE": wide}

    def run(config: Config, y: Tensor) -> None:
        config = scaled(config, z.dtype)
        pointers = z, scale, shift, residual, y, sums
        if last:
            cut = columns if count is not None else flat_columns(n * positions, c, config.elements)
            launch(
                affine_relu_columns,
                cut.programs(config.elements),
                config.threads,
                (*pointers, cut.positions, cut.pieces, c // cut.unit, cut.blocks(config.elements)),
                {**bounds, **cut.constants(config.elements)},
            )
            return
        launch(
            affine_relu_lines,
            lines.programs(config.elements),
            config.threads,
            (*pointers, lines.rows // lines.row_unit, positions // lines.unit, c),
            {**bounds, **lines.constants(config.elements), "LOG": lines.log()},
        )

    given = scale is not None, shift is not None, residual is not None, count is not None
    key = "affine_relu", z.dtype, last, given, bucket(positions), bucket(c), bucket(z.numel())
    run(tuned(key, z.device, lambda config: run(config, torch.empty_like(y))), y)
    if count is not None and sums is not None and pieces > 1:
        add_partials(sums, count, pieces, c if last else 1)
