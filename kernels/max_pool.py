"""Forward: a folded batch norm, a ReLU and a max-pooling; the place of each maximum takes one byte.

    p[o]    = max over the window of o of clamp(z * scale[c] + shift[c], lower, upper)
    code[o] = ky * kernel[1] + kx of the maximum: the first of equals, the last NaN where there is one
    count[n, c] = number of places of the input where the clamp, as it would be stored, is not zero

Bytes: z once, p once, one byte a window: e(T + T') + T' for T' windows, which is the floor. Windows that
overlap read elements again from the cache. A count, where it is wanted, comes of the same loads: a place
counts in the last window that begins before it, and windows look as far as the next one then, which is no
further than their own end but for places that no window covers.

Windows of 2x2 that tile a contiguous input are the common case. There a program reads both input rows as
they lie, in full width, and deals the elements out in pairs:

    row 2r    |a b|c d|e f|      even |a c e|   odd |b d f|
    row 2r+1  |g h|i j|k l|           |g i k|       |h j l|    ->  p = max(a, b, g, h), ...
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attrfast.kernels.launch import Config, bucket, launch, scaled, tuned
from attrfast.kernels.partials import add_partials
from attrfast.kernels.tiles import (
    PIECE,
    affine,
    column_place,
    counted,
    cut_columns,
    cut_lines,
    flat_columns,
    line_channels,
    line_rows,
    line_tile,
    steps_down,
    tree_columns,
    tree_lines,
)

Tensor = torch.Tensor
UNROLLED = 9  # windows of no more places are unrolled


@dataclass(frozen=True)
class Pool:
    """A pooling's geometry: input (h, w), result (rows, columns)."""

    h: int
    w: int
    rows: int
    columns: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def tiles(self) -> bool:
        """Whether each input element is in exactly one window."""
        whole = self.rows * self.kernel[0] == self.h and self.columns * self.kernel[1] == self.w
        return whole and self.kernel == self.stride and self.padding == (0, 0)

    @property
    def pairs(self) -> bool:
        return self.tiles and self.kernel == (2, 2)

    def constants(self) -> dict[str, int]:
        (kh, kw), (sy, sx), (py, px) = self.kernel, self.stride, self.padding
        return {"KH": kh, "KW": kw, "SY": sy, "SX": sx, "PY": py, "PX": px}

    def reach(self) -> tuple[int, int]:
        """Places from the start of a window on that are its own or lie before the next one's start."""

        def along(axis: int, size: int, windows: int) -> int:
            stride = self.stride[axis]
            left = size + self.padding[axis] - (windows - 1) * stride  # from the last window's start on
            return max(self.kernel[axis], left, stride if windows > 1 else 0)

        return along(0, self.h, self.rows), along(1, self.w, self.columns)

    def big(self, planes: int) -> bool:
        """Whether places in so many planes take 64 bits, with room for what is added to them."""
        return planes * max(self.h * self.w, self.rows * self.columns) >= 1 << 30


@triton.jit
def place_in_row(first, offset, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BIG: tl.constexpr):
    """Position in its row of each element of a tile of lines."""
    if SPLIT:
        place = first + offset
        return place if BIG else place.to(tl.int32)
    else:
        return tl.arange(0, WIDTH)[None, :]


@triton.jit
def winner(best, code, v, here, taken):
    """The larger of two, by PyTorch's rule: NaN is the largest, and the later of two NaN wins."""
    wins = taken & ((v > best) | (v != v))
    return tl.where(wins, v, best), tl.where(wins, here, code)


@triton.jit(do_not_specialize=["row_units", "units", "channels", "h", "w_units"])
def max_pool_pairs(
    z_ptr,
    scale_ptr,
    shift_ptr,
    p_ptr,
    code_ptr,
    count_ptr,
    row_units,
    units,
    channels,
    h,
    w_units,
    W_UNIT: tl.constexpr,
    BIG: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    LOG: tl.constexpr,
):
    base, offset, inside, row, line, is_line, first = line_tile(
        row_units, units, ROW_UNIT, UNIT, LINES, WIDTH, SPLIT, False
    )
    channel = line_channels(row, channels, LINES, SPLIT)
    scale, shift = None, None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=is_line, other=0.0)[:, None]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel, mask=is_line, other=0.0)[:, None]
    w = w_units * W_UNIT
    twice, is_input = pair_places(is_line, units * UNIT, w, first, LINES, WIDTH, SPLIT, BIG)
    start = line_rows(row, LINES, SPLIT)[:, None] * h * w
    best = tl.full([LINES, WIDTH], float("-inf"), WIDE)
    code = tl.zeros([LINES, WIDTH], tl.int32)
    count = tl.zeros([LINES, WIDTH], WIDE)
    for ky in tl.static_range(2):
        z = tl.load(z_ptr + start + twice + ky * w, mask=is_input, other=0.0).to(WIDE)
        even, odd = tl.split(tl.reshape(z, [LINES, WIDTH, 2]))
        even, odd = affine(even, scale, shift, LOWER, UPPER), affine(odd, scale, shift, LOWER, UPPER)
        best, code = winner(best, code, even, 2 * ky, inside)
        best, code = winner(best, code, odd, 2 * ky + 1, inside)
        if count_ptr is not None:
            count += counted(even, inside, p_ptr.dtype.element_ty)
            count += counted(odd, inside, p_ptr.dtype.element_ty)
    tl.store(p_ptr + base + offset, best.to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(code_ptr + base + offset, code.to(tl.uint8), mask=inside)
    if count_ptr is not None:
        tl.store(count_ptr + line, tree_lines(count, LINES, WIDTH, LOG), mask=is_line)


@triton.jit
def pair_places(
    is_line,
    windows,
    w,
    first,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BIG: tl.constexpr,
):
    """Places in the input plane of the upper rows of a tile's windows, (LINES, 2 * WIDTH), and whether
    they are there."""
    wide = tl.arange(0, 2 * WIDTH)[None, :]
    if SPLIT:
        wide = 2 * first + tl.arange(0, LINES)[:, None] * (2 * WIDTH) + wide
        is_input = wide < 2 * windows.to(tl.int64)
        if not BIG:
            wide = wide.to(tl.int32)
    else:
        is_input = is_line[:, None] & (wide < 2 * windows)
    return (wide // w) * (2 * w) + wide % w, is_input


@triton.jit(do_not_specialize=["row_units", "units", "channels", "h", "w", "rows", "columns"])
def max_pool_lines(
    z_ptr,
    scale_ptr,
    shift_ptr,
    p_ptr,
    code_ptr,
    count_ptr,
    row_units,
    units,
    channels,
    h,
    w,
    rows,
    columns,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    TALL: tl.constexpr,
    BROAD: tl.constexpr,
    UNROLL: tl.constexpr,
    BIG: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WIDE: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    LOG: tl.constexpr,
):
    base, offset, inside, row, line, is_line, first = line_tile(
        row_units, units, ROW_UNIT, UNIT, LINES, WIDTH, SPLIT, False
    )
    channel = line_channels(row, channels, LINES, SPLIT)
    scale, shift = None, None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=is_line, other=0.0)[:, None]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel, mask=is_line, other=0.0)[:, None]
    place = place_in_row(first, offset, WIDTH, SPLIT, BIG)
    oy, ox = place // columns, place % columns
    top = oy * SY - PY
    left = ox * SX - PX
    start = line_rows(row, LINES, SPLIT)[:, None] * h * w
    best = tl.full([LINES, WIDTH], float("-inf"), WIDE)
    # Where all are -inf none wins: the code is that of the first place inside the input.
    code = (tl.maximum(-top, 0) * KW + tl.maximum(-left, 0) + tl.zeros([LINES, WIDTH], tl.int32)).to(
        tl.int32
    )
    count = tl.zeros([LINES, WIDTH], WIDE)
    for k in tl.range(TALL * BROAD, loop_unroll_factor=UNROLL):
        ky, kx = k // BROAD, k % BROAD
        iy, ix = top + ky, left + kx
        taken = inside & (iy >= 0) & (iy < h) & (ix >= 0) & (ix < w)
        z = tl.load(z_ptr + start + iy * w + ix, mask=taken, other=0.0).to(WIDE)
        y = affine(z, scale, shift, LOWER, UPPER)
        if count_ptr is not None:
            last_y, last_x = oy == rows - 1, ox == columns - 1
            mine = taken & ((ky < SY) | last_y) & ((kx < SX) | last_x)
            count += counted(y, mine, p_ptr.dtype.element_ty)
            taken = taken & (ky < KH) & (kx < KW)
        best, code = winner(best, code, y, ky * KW + kx, taken)
    tl.store(p_ptr + base + offset, best.to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(code_ptr + base + offset, code.to(tl.uint8), mask=inside)
    if count_ptr is not None:
        tl.store(count_ptr + line, tree_lines(count, LINES, WIDTH, LOG), mask=is_line)


@triton.jit(do_not_specialize=["positions", "pieces", "units", "blocks", "h", "w", "rows", "columns"])
def max_pool_columns(
    z_ptr,
    scale_ptr,
    shift_ptr,
    p_ptr,
    code_ptr,
    count_ptr,
    positions,
    pieces,
    units,
    blocks,
    h,
    w,
    rows,
    columns,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SY: tl.constexpr,
    SX: tl.constexpr,
    PY: tl.constexpr,
    PX: tl.constexpr,
    TALL: tl.constexpr,
    BROAD: tl.constexpr,
    UNROLL: tl.constexpr,
    BIG: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
    LOG: tl.constexpr,
):
    """Positions are windows. A program that counts walks down one sample; without a count, one sample has
    the windows of all."""
    sample, piece, c0 = column_place(pieces, blocks, WIDTH)
    if count_ptr is None:
        sample = 0
    channels = units.to(tl.int64) * UNIT
    c = tl.arange(0, WIDTH)
    is_channel = c < channels - c0
    scale, shift = None, None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
    start = sample * h
    if not BIG:
        start = start.to(tl.int32)
    count = tl.zeros([HEIGHT, WIDTH], WIDE)
    steps = 1 if count_ptr is None else steps_down(positions, piece, HEIGHT, STEPS)
    for step in range(steps):
        window = (piece * STEPS + step) * HEIGHT + tl.arange(0, HEIGHT)
        if not BIG:
            window = window.to(tl.int32)
        inside = (window < positions)[:, None] & is_channel[None, :]
        oy, ox = (window // columns) % rows, window % columns
        top, left = oy * SY - PY, ox * SX - PX
        above = start + window // columns // rows * h
        best = tl.full([HEIGHT, WIDTH], float("-inf"), WIDE)
        code = (tl.maximum(-top, 0) * KW + tl.maximum(-left, 0)).to(tl.int32)
        code = code[:, None] + tl.zeros([HEIGHT, WIDTH], tl.int32)
        for k in tl.range(TALL * BROAD, loop_unroll_factor=UNROLL):
            ky, kx = k // BROAD, k % BROAD
            iy, ix = top + ky, left + kx
            taken = inside & ((iy >= 0) & (iy < h) & (ix >= 0) & (ix < w))[:, None]
            pixel = ((above + iy) * w + ix).to(tl.int64)
            offset = pixel[:, None] * channels + c0 + c[None, :]
            z = tl.load(z_ptr + offset, mask=taken, other=0.0).to(WIDE)
            y = affine(z, scale, shift, LOWER, UPPER)
            if count_ptr is not None:
                mine = ((ky < SY) | (oy == rows - 1)) & ((kx < SX) | (ox == columns - 1))
                count += counted(y, taken & mine[:, None], p_ptr.dtype.element_ty)
                taken = taken & (ky < KH) & (kx < KW)
            best, code = winner(best, code, y, ky * KW + kx, taken)
        offset = (sample * positions + window)[:, None] * channels + c0 + c[None, :]
        tl.store(p_ptr + offset, best.to(p_ptr.dtype.element_ty), mask=inside)
        tl.store(code_ptr + offset, code.to(tl.uint8), mask=inside)
    if count_ptr is not None:
        sums = tree_columns(count, HEIGHT, WIDTH, LOG)
        tl.store(count_ptr + (sample * pieces + piece) * channels + c0 + c, sums, mask=is_channel)


def affine_relu_max_pool(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    p: Tensor,
    code: Tensor,
    count: Tensor | None,
    pool: Pool,
    lower: float,
    upper: float,
    last: bool,
) -> None:
    """Writes p and code, and count (N, C) where it is given.

    z, p and code lie alike: contiguous, or channels-last where `last`; count is contiguous.
    """
    n, c = z.shape[:2]
    windows = pool.rows * pool.columns
    lines, columns = cut_lines(n * c, windows, PIECE), cut_columns(n, windows, c)
    pieces = columns.pieces if last else lines.pieces
    sums = count
    if count is not None and pieces > 1:
        sums = torch.empty(count.numel() * pieces, dtype=count.dtype, device=count.device)
    chosen = {
        "LOWER": lower,
        "UPPER": upper,
        "WIDE": tl.float64 if z.dtype == torch.float64 else tl.float32,
    }
    tall, broad = pool.kernel if count is None else pool.reach()
    unroll = tall * broad if tall * broad <= UNROLLED else 1
    window = {**pool.constants(), "TALL": tall, "BROAD": broad, "UNROLL": unroll}

    def run(config: Config, p: Tensor, code: Tensor) -> None:
        size: tuple[int, ...]
        # A count takes registers, in float64 twice as many.
        light = pool.pairs or (last and not (count is not None and z.dtype == torch.float64))
        config = scaled(config, z.dtype, 2 if light else 4)
        pointers = z, scale, shift, p, code, sums
        if last:
            cut = columns if count is not None else flat_columns(n * windows, c, config.elements)
            numbers = cut.positions, cut.pieces, c // cut.unit, cut.blocks(config.elements)
            launch(
                max_pool_columns,
                cut.programs(config.elements),
                config.threads,
                (*pointers, *numbers, pool.h, pool.w, pool.rows, pool.columns),
                {**chosen, **window, **cut.constants(config.elements), "BIG": pool.big(n)},
            )
            return
        constants = {
            **chosen,
            **lines.constants(config.elements),
            "BIG": pool.big(1),
            "LOG": lines.log(),
        }
        del constants["FLAT"]
        if pool.pairs:
            unit = power_in(pool.w)
            kernel, size = max_pool_pairs, (pool.h, pool.w // unit)
            constants["W_UNIT"] = unit
        else:
            kernel, size = max_pool_lines, (pool.h, pool.w, pool.rows, pool.columns)
            constants |= window
        rows = lines.rows // lines.row_unit
        args = (*pointers, rows, windows // lines.unit, c, *size)
        launch(kernel, lines.programs(config.elements), config.threads, args, constants)

    given = scale is not None, shift is not None, count is not None, pool.kernel, pool.stride
    key = "max_pool", z.dtype, last, given, bucket(windows), bucket(c), bucket(z.numel())
    choice = tuned(key, z.device, lambda f: run(f, torch.empty_like(p), torch.empty_like(code)))
    run(choice, p, code)
    if count is not None and sums is not None and pieces > 1:
        add_partials(sums, count, pieces, c if last else 1)


def power_in(count: int) -> int:
    """The largest power of two up to 16 that divides count."""
    return min(16, count & -count)
