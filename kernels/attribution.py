"""Attribution alone, for taps with no ReLU of their own.

    s[n, c] = sum over p of x * g, or of abs(x * g)
              number of p where x is not zero              without g

Bytes: x and g once each, 2eT, which is the floor (eT without g); s and partial sums come to less than a
hundredth.
"""

import torch
import triton
import triton.language as tl

from attrfast.kernels.launch import Config, bucket, launch, scaled, tuned
from attrfast.kernels.partials import add_partials
from attrfast.kernels.tiles import (
    as_lines,
    column_place,
    counted,
    cut_columns,
    cut_lines,
    line_tile,
    steps_down,
    tree_columns,
    tree_lines,
)

Tensor = torch.Tensor


@triton.jit(do_not_specialize=["row_units", "units"])
def attribution_lines(
    x_ptr,
    g_ptr,
    s_ptr,
    row_units,
    units,
    ABSOLUTE: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    FLAT: tl.constexpr,
    LOG: tl.constexpr,
):
    base, offset, inside, _row, line, is_line, _first = line_tile(
        row_units, units, ROW_UNIT, UNIT, LINES, WIDTH, SPLIT, FLAT
    )
    x = tl.load(x_ptr + base + offset, mask=inside, other=0.0).to(WIDE)
    if g_ptr is None:
        flow = counted(x, inside, x_ptr.dtype.element_ty)
    else:
        flow = x * tl.load(g_ptr + base + offset, mask=inside, other=0.0).to(WIDE)
    if ABSOLUTE:
        flow = tl.abs(flow)
    s = tree_lines(as_lines(flow, LINES, WIDTH, FLAT), LINES, WIDTH, LOG)
    tl.store(s_ptr + line, s, mask=is_line)


@triton.jit(do_not_specialize=["positions", "pieces", "units", "blocks"])
def attribution_columns(
    x_ptr,
    g_ptr,
    s_ptr,
    positions,
    pieces,
    units,
    blocks,
    ABSOLUTE: tl.constexpr,
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
    sums = tl.zeros([HEIGHT, WIDTH], WIDE)
    for step in range(steps_down(positions, piece, HEIGHT, STEPS)):
        p = (piece * STEPS + step) * HEIGHT + tl.arange(0, HEIGHT)
        inside = (p < positions)[:, None] & is_channel[None, :]
        offset = (sample * positions + p)[:, None] * channels + c0 + c[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(WIDE)
        if g_ptr is None:
            flow = counted(x, inside, x_ptr.dtype.element_ty)
        else:
            flow = x * tl.load(g_ptr + offset, mask=inside, other=0.0).to(WIDE)
        sums += tl.abs(flow) if ABSOLUTE else flow
    s = tree_columns(sums, HEIGHT, WIDTH, LOG)
    tl.store(s_ptr + (sample * pieces + piece) * channels + c0 + c, s, mask=is_channel)


def attribution(x: Tensor, g: Tensor | None, s: Tensor, absolute: bool, last: bool) -> None:
    """Writes s (N, C), contiguous; without g, a count.

    x and g lie alike: contiguous, or channels-last where `last`.
    """
    n, c = x.shape[:2]
    positions = x.shape[2:].numel()
    lines, columns = cut_lines(n * c, positions), cut_columns(n, positions, c)
    pieces = columns.pieces if last else lines.pieces
    sums = s if pieces == 1 else torch.empty(s.numel() * pieces, dtype=s.dtype, device=s.device)
    chosen = {
        "ABSOLUTE": absolute,
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }

    def run(config: Config) -> None:
        config = scaled(config, x.dtype)
        if last:
            launch(
                attribution_columns,
                columns.programs(config.elements),
                config.threads,
                (x, g, sums, positions, pieces, c // columns.unit, columns.blocks(config.elements)),
                {**chosen, **columns.constants(config.elements)},
            )
            return
        launch(
            attribution_lines,
            lines.programs(config.elements),
            config.threads,
            (x, g, sums, lines.rows // lines.row_unit, positions // lines.unit),
            {**chosen, **lines.constants(config.elements), "LOG": lines.log()},
        )

    key = "attribution", x.dtype, last, g is None, bucket(positions), bucket(c), bucket(x.numel())
    run(tuned(key, x.device, run))
    if pieces > 1:
        add_partials(sums, s, pieces, c if last else 1)
