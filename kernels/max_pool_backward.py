"""Backward of `affine_relu_max_pool`, and the attribution on the way.

    gz[i] = scale[c] * rule(sum of g[o] over the windows o with code[o] at i and lower < p[o] < upper)
    rule(x) = x, or x where it is positive, else 0, if guided
    s[n, c] = sum over windows of p * g

Bytes: p, g and the codes once, gz once: e(T + 2T') + T' for T' windows, which is the floor.

Each input element asks the windows over it whether it is their maximum: nothing is written twice and no
two programs meet. Windows that overlap are read again from the cache; a window counts for s at the first
of its places inside the input. Where windows tile the input there is one for each element, and the kernel
goes by windows instead (for 2x2 in contiguous tensors, else for any size in channels-last ones):

    window  |A|B|C|   ->   row 2r    |A 0|0 B|0 0|    A's maximum is its first element,
                           row 2r+1  |0 0|0 0|C 0|    B's its second, C's its third
"""

import torch
import triton
import triton.language as tl

from attrfast.kernels.launch import Config, bucket, launch, scaled, tuned
from attrfast.kernels.max_pool import UNROLLED, Pool, pair_places, place_in_row, power_in
from attrfast.kernels.partials import add_partials
from attrfast.kernels.tiles import (
    PIECE,
    column_place,
    cut_columns,
    cut_lines,
    line_channels,
    line_rows,
    line_tile,
    passed,
    steps_down,
    tree_columns,
    tree_lines,
)

Tensor = torch.Tensor


@triton.jit
def ruled(x, scale, GUIDED: tl.constexpr):
    if GUIDED:
        x = tl.where(x > 0, x, 0.0)
    return x if scale is None else x * scale


@triton.jit(do_not_specialize=["row_units", "units", "channels", "h", "w_units"])
def pool_backward_pairs(
    p_ptr,
    code_ptr,
    g_ptr,
    scale_ptr,
    gz_ptr,
    s_ptr,
    row_units,
    units,
    channels,
    h,
    w_units,
    W_UNIT: tl.constexpr,
    BIG: tl.constexpr,
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
    LOG: tl.constexpr,
):
    """Lines of windows."""
    base, offset, inside, row, line, is_line, first = line_tile(
        row_units, units, ROW_UNIT, UNIT, LINES, WIDTH, SPLIT, False
    )
    scale = None
    if scale_ptr is not None:
        channel = line_channels(row, channels, LINES, SPLIT)
        scale = tl.load(scale_ptr + channel, mask=is_line, other=0.0)[:, None]
    p = tl.load(p_ptr + base + offset, mask=inside, other=0.0).to(WIDE)
    g = tl.load(g_ptr + base + offset, mask=inside, other=0.0).to(WIDE)
    code = tl.load(code_ptr + base + offset, mask=inside, other=0).to(tl.int32)
    g1 = passed(p, g, LOWER, UPPER, False)
    w = w_units * W_UNIT
    twice, is_input = pair_places(is_line, units * UNIT, w, first, LINES, WIDTH, SPLIT, BIG)
    start = line_rows(row, LINES, SPLIT)[:, None] * h * w
    for ky in tl.static_range(2):
        even = ruled(tl.where(code == 2 * ky, g1, 0.0), scale, GUIDED)
        odd = ruled(tl.where(code == 2 * ky + 1, g1, 0.0), scale, GUIDED)
        pair = tl.interleave(even, odd).to(gz_ptr.dtype.element_ty)
        tl.store(gz_ptr + start + twice + ky * w, pair, mask=is_input)
    if ATTRIBUTE:
        tl.store(s_ptr + line, tree_lines(p * g, LINES, WIDTH, LOG), mask=is_line)


@triton.jit(do_not_specialize=["row_units", "units", "channels", "w", "rows", "columns"])
def pool_backward_lines(
    p_ptr,
    code_ptr,
    g_ptr,
    scale_ptr,
    gz_ptr,
    s_ptr,
    row_units,
    units,
    channels,
    w,
    rows,
    columns,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    UNROLL: tl.constexpr,
    BIG: tl.constexpr,
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
    LOG: tl.constexpr,
):
    """Lines of the input."""
    base, offset, inside, row, line, is_line, first = line_tile(
        row_units, units, ROW_UNIT, UNIT, LINES, WIDTH, SPLIT, False
    )
    scale = None
    if scale_ptr is not None:
        channel = line_channels(row, channels, LINES, SPLIT)
        scale = tl.load(scale_ptr + channel, mask=is_line, other=0.0)[:, None]
    place = place_in_row(first, offset, WIDTH, SPLIT, BIG)
    up, along = place // w + PY, place % w + PX
    start = line_rows(row, LINES, SPLIT)[:, None] * rows * columns
    total = tl.zeros([LINES, WIDTH], WIDE)
    flow = tl.zeros([LINES, WIDTH], WIDE)
    OVER: tl.constexpr = (KW + SX - 1) // SX  # windows over a place, along a row
    for k in tl.range((KH + SY - 1) // SY * OVER, loop_unroll_factor=UNROLL):
        oy, ox = up // SY - k // OVER, along // SX - k % OVER
        ky, kx = up - oy * SY, along - ox * SX
        over = (oy >= 0) & (oy < rows) & (ky < KH) & (ox >= 0) & (ox < columns) & (kx < KW)
        over = over & inside
        at = start + oy * columns + ox
        p = tl.load(p_ptr + at, mask=over, other=0.0).to(WIDE)
        g = tl.load(g_ptr + at, mask=over, other=0.0).to(WIDE)
        code = tl.load(code_ptr + at, mask=over, other=255).to(tl.int32)
        total += tl.where(code == ky * KW + kx, passed(p, g, LOWER, UPPER, False), 0.0)
        if ATTRIBUTE:
            is_first = (ky == tl.maximum(PY - oy * SY, 0)) & (kx == tl.maximum(PX - ox * SX, 0))
            flow += tl.where(is_first, p * g, 0.0)
    gz = ruled(total, scale, GUIDED)
    tl.store(gz_ptr + base + offset, gz.to(gz_ptr.dtype.element_ty), mask=inside)
    if ATTRIBUTE:
        tl.store(s_ptr + line, tree_lines(flow, LINES, WIDTH, LOG), mask=is_line)


@triton.jit(do_not_specialize=["positions", "pieces", "units", "blocks", "w", "rows", "columns"])
def pool_backward_columns(
    p_ptr,
    code_ptr,
    g_ptr,
    scale_ptr,
    gz_ptr,
    s_ptr,
    positions,
    pieces,
    units,
    blocks,
    w,
    rows,
    columns,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    UNROLL: tl.constexpr,
    BIG: tl.constexpr,
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
    """Positions are those of the input."""
    sample, piece, c0 = column_place(pieces, blocks, WIDTH)
    channels = units.to(tl.int64) * UNIT
    c = tl.arange(0, WIDTH)
    is_channel = c < channels - c0
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
    flow = tl.zeros([HEIGHT, WIDTH], WIDE)
    OVER: tl.constexpr = (KW + SX - 1) // SX
    for step in range(steps_down(positions, piece, HEIGHT, STEPS)):
        place = (piece * STEPS + step) * HEIGHT + tl.arange(0, HEIGHT)
        if not BIG:
            place = place.to(tl.int32)
        inside = (place < positions)[:, None] & is_channel[None, :]
        up, along = place // w + PY, place % w + PX
        total = tl.zeros([HEIGHT, WIDTH], WIDE)
        for k in tl.range((KH + SY - 1) // SY * OVER, loop_unroll_factor=UNROLL):
            oy, ox = up // SY - k // OVER, along // SX - k % OVER
            ky, kx = up - oy * SY, along - ox * SX
            over = (oy >= 0) & (oy < rows) & (ky < KH) & (ox >= 0) & (ox < columns) & (kx < KW)
            over = over[:, None] & inside
            window = sample * rows * columns + (oy * columns + ox)
            at = window[:, None] * channels + c0 + c[None, :]
            p = tl.load(p_ptr + at, mask=over, other=0.0).to(WIDE)
            g = tl.load(g_ptr + at, mask=over, other=0.0).to(WIDE)
            code = tl.load(code_ptr + at, mask=over, other=255).to(tl.int32)
            here = (ky * KW + kx)[:, None]
            total += tl.where(code == here, passed(p, g, LOWER, UPPER, False), 0.0)
            if ATTRIBUTE:
                is_first = (ky == tl.maximum(PY - oy * SY, 0)) & (kx == tl.maximum(PX - ox * SX, 0))
                flow += tl.where(is_first[:, None], p * g, 0.0)
        gz = ruled(total, scale, GUIDED).to(gz_ptr.dtype.element_ty)
        offset = (sample * positions + place)[:, None] * channels + c0 + c[None, :]
        tl.store(gz_ptr + offset, gz, mask=inside)
    if ATTRIBUTE:
        s = tree_columns(flow, HEIGHT, WIDTH, LOG)
        tl.store(s_ptr + (sample * pieces + piece) * channels + c0 + c, s, mask=is_channel)


@triton.jit(do_not_specialize=["positions", "pieces", "units", "blocks", "columns"])
def pool_backward_tiling_columns(
    p_ptr,
    code_ptr,
    g_ptr,
    scale_ptr,
    gz_ptr,
    s_ptr,
    positions,
    pieces,
    units,
    blocks,
    columns,
    KH: tl.constexpr,
    KW: tl.constexpr,
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
    """Positions are windows."""
    sample, piece, c0 = column_place(pieces, blocks, WIDTH)
    channels = units.to(tl.int64) * UNIT
    c = tl.arange(0, WIDTH)
    is_channel = c < channels - c0
    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
    flow = tl.zeros([HEIGHT, WIDTH], WIDE)
    for step in range(steps_down(positions, piece, HEIGHT, STEPS)):
        window = (piece * STEPS + step) * HEIGHT + tl.arange(0, HEIGHT)
        inside = (window < positions)[:, None] & is_channel[None, :]
        at = (sample * positions + window)[:, None] * channels + c0 + c[None, :]
        p = tl.load(p_ptr + at, mask=inside, other=0.0).to(WIDE)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(WIDE)
        code = tl.load(code_ptr + at, mask=inside, other=255).to(tl.int32)
        g1 = passed(p, g, LOWER, UPPER, False)
        if ATTRIBUTE:
            flow += p * g
        # The first element of each window, counted in elements of a channel.
        corner = (sample * positions + window // columns * columns) * (KH * KW) + window % columns * KW
        for k in tl.static_range(KH * KW):
            gz = ruled(tl.where(code == k, g1, 0.0), scale, GUIDED).to(gz_ptr.dtype.element_ty)
            element = corner + (k // KW) * KW * columns + k % KW
            tl.store(gz_ptr + element[:, None] * channels + c0 + c[None, :], gz, mask=inside)
    if ATTRIBUTE:
        s = tree_columns(flow, HEIGHT, WIDTH, LOG)
        tl.store(s_ptr + (sample * pieces + piece) * channels + c0 + c, s, mask=is_channel)


def affine_relu_max_pool_backward(
    p: Tensor,
    code: Tensor,
    g: Tensor,
    scale: Tensor | None,
    gz: Tensor,
    s: Tensor,
    pool: Pool,
    lower: float,
    upper: float,
    guided: bool,
    attribute: bool,
    last: bool,
) -> None:
    """Writes gz, and s where `attribute`.

    p, code, g and gz lie alike: contiguous, or channels-last where `last`; s is contiguous. The bounds
    are rounded to p's dtype.
    """
    n, c = p.shape[:2]
    tiling = pool.tiles and pool.kernel[0] * pool.kernel[1] <= UNROLLED
    by_window = tiling if last else pool.pairs
    positions = pool.rows * pool.columns if by_window else pool.h * pool.w
    # Overlapping windows take registers, in float64 twice as many.
    longest = PIECE // 2 if p.dtype == torch.float64 and not by_window else PIECE
    lines, columns = cut_lines(n * c, positions, longest), cut_columns(n, positions, c)
    pieces = columns.pieces if last else lines.pieces
    sums = s
    if attribute and pieces > 1:
        sums = torch.empty(s.numel() * pieces, dtype=s.dtype, device=s.device)
    chosen = {
        "LOWER": lower,
        "UPPER": upper,
        "GUIDED": guided,
        "ATTRIBUTE": attribute,
        "WIDE": tl.float64 if p.dtype == torch.float64 else tl.float32,
    }
    over = [-(-k // stride) for k, stride in zip(pool.kernel, pool.stride, strict=True)]
    unroll = over[0] * over[1] if over[0] * over[1] <= UNROLLED else 1
    window = {**pool.constants(), "UNROLL": unroll}

    def run(config: Config, gz: Tensor) -> None:
        config = scaled(config, p.dtype, 2 if by_window or last else 4)
        pointers = p, code, g, scale, gz, sums
        size: tuple[int, ...] = (pool.w, pool.rows, pool.columns)
        constants = dict(chosen)
        if last:
            numbers = positions, pieces, c // columns.unit, columns.blocks(config.elements)
            constants |= columns.constants(config.elements)
            programs = columns.programs(config.elements)
            if by_window:
                kernel, size = pool_backward_tiling_columns, (pool.columns,)
                constants |= {"KH": pool.kernel[0], "KW": pool.kernel[1]}
            else:
                kernel = pool_backward_columns
                constants |= {**window, "BIG": pool.big(1)}
            launch(kernel, programs, config.threads, (*pointers, *numbers, *size), constants)
            return
        constants |= {**lines.constants(config.elements), "BIG": pool.big(1), "LOG": lines.log()}
        del constants["FLAT"]
        if by_window:
            unit = power_in(pool.w)
            kernel, size = pool_backward_pairs, (pool.h, pool.w // unit)
            constants["W_UNIT"] = unit
        else:
            kernel = pool_backward_lines
            constants |= window
        rows = lines.rows // lines.row_unit
        args = (*pointers, rows, positions // lines.unit, c, *size)
        launch(kernel, lines.programs(config.elements), config.threads, args, constants)

    given = scale is not None, attribute, pool.kernel, pool.stride
    key = "pool_backward", p.dtype, last, given, bucket(positions), bucket(c), bucket(gz.numel())
    run(tuned(key, p.device, lambda config: run(config, torch.empty_like(gz))), gz)
    if attribute and pieces > 1:
        add_partials(sums, s, pieces, c if last else 1)
