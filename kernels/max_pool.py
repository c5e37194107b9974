"""Forward: a folded batch norm, a ReLU and a max-pooling; the place of each maximum takes one byte.

    p[o]    = max over the window of o of clamp(z * scale[c] + shift[c], lower, upper)
    code[o] = ky * kernel[1] + kx of the maximum: the first of equals, the last NaN where there is one

Bytes: z once, p once, one byte a window: e(T + T') + T' for T' windows, which is the floor. Windows that
overlap read elements again from the cache.

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
from attrfast.kernels.tiles import (
    PIECE,
    clamped,
    column_place,
    cut_columns,
    cut_lines,
    line_channels,
    line_rows,
    line_tile,
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
def affine(z, scale, shift, LOWER: tl.constexpr, UPPER: tl.constexpr):
    if scale is not None:
        z = z * scale
    if shift is not None:
        z = z + shift
    return clamped(z, LOWER, UPPER)


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
):
    base, offset, inside, row, _line, is_line, first = line_tile(
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
    for ky in tl.static_range(2):
        z = tl.load(z_ptr + start + twice + ky * w, mask=is_input, other=0.0).to(WIDE)
        even, odd = tl.split(tl.reshape(z, [LINES, WIDTH, 2]))
        best, code = winner(best, code, affine(even, scale, shift, LOWER, UPPER), 2 * ky, inside)
        best, code = winner(best, code, affine(odd, scale, shift, LOWER, UPPER), 2 * ky + 1, inside)
    tl.store(p_ptr + base + offset, best.to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(code_ptr + base + offset, code.to(tl.uint8), mask=inside)


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


@triton.jit(do_not_specialize=["row_units", "units", "channels", "h", "w", "columns"])
def max_pool_lines(
    z_ptr,
    scale_ptr,
    shift_ptr,
    p_ptr,
    code_ptr,
    row_units,
    units,
    channels,
    h,
    w,
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
    WIDE: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    base, offset, inside, row, _line, is_line, first = line_tile(
        row_units, units, ROW_UNIT, UNIT, LINES, WIDTH, SPLIT, False
    )
    channel = line_channels(row, channels, LINES, SPLIT)
    scale, shift = None, None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + channel, mask=is_line, other=0.0)[:, None]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + channel, mask=is_line, other=0.0)[:, None]
    place = place_in_row(first, offset, WIDTH, SPLIT, BIG)
    top = (place // columns) * SY - PY
    left = (place % columns) * SX - PX
    start = line_rows(row, LINES, SPLIT)[:, None] * h * w
    best = tl.full([LINES, WIDTH], float("-inf"), WIDE)
    # Where all are -inf none wins: the code is that of the first place inside the input.
    code = (tl.maximum(-top, 0) * KW + tl.maximum(-left, 0) + tl.zeros([LINES, WIDTH], tl.int32)).to(
        tl.int32
    )
    for k in tl.range(KH * KW, loop_unroll_factor=UNROLL):
        iy, ix = top + k // KW, left + k % KW
        taken = inside & (iy >= 0) & (iy < h) & (ix >= 0) & (ix < w)
        z = tl.load(z_ptr + start + iy * w + ix, mask=taken, other=0.0).to(WIDE)
        best, code = winner(best, code, affine(z, scale, shift, LOWER, UPPER), k, taken)
    tl.store(p_ptr + base + offset, best.to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(code_ptr + base + offset, code.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["positions", "units", "blocks", "h", "w", "rows", "columns"])
def max_pool_columns(
    z_ptr,
    scale_ptr,
    shift_ptr,
    p_ptr,
    code_ptr,
    positions,
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
    UNROLL: tl.constexpr,
    BIG: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    WIDE: tl.constexpr,
    UNIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Positions are the windows of all samples."""
    _, piece, c0 = column_place(tl.cdiv(positions.to(tl.int64), HEIGHT), blocks, WIDTH)
    channels = units.to(tl.int64) * UNIT
    window = piece * HEIGHT + tl.arange(0, HEIGHT)
    if not BIG:
        window = window.to(tl.int32)
    c = tl.arange(0, WIDTH)
    is_channel = c < channels - c0
    inside = (window < positions)[:, None] & is_channel[None, :]
    scale, shift = None, None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + c0 + c, mask=is_channel, other=0.0)[None, :]
    top = (window // columns) % rows * SY - PY
    left = (window % columns) * SX - PX
    start = window // columns // rows * h
    best = tl.full([HEIGHT, WIDTH], float("-inf"), WIDE)
    code = (tl.maximum(-top, 0) * KW + tl.maximum(-left, 0)).to(tl.int32)
    code = code[:, None] + tl.zeros([HEIGHT, WIDTH], tl.int32)
    for k in tl.range(KH * KW, loop_unroll_factor=UNROLL):
        iy, ix = top + k // KW, left + k % KW
        taken = inside & ((iy >= 0) & (iy < h) & (ix >= 0) & (ix < w))[:, None]
        pixel = ((start + iy) * w + ix).to(tl.int64)
        offset = pixel[:, None] * channels + c0 + c[None, :]
        z = tl.load(z_ptr + offset, mask=taken, other=0.0).to(WIDE)
        best, code = winner(best, code, affine(z, scale, shift, LOWER, UPPER), k, taken)
    offset = window.to(tl.int64)[:, None] * channels + c0 + c[None, :]
    tl.store(p_ptr + offset, best.to(p_ptr.dtype.element_ty), mask=inside)
    tl.store(code_ptr + offset, code.to(tl.uint8), mask=inside)


def affine_relu_max_pool(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    p: Tensor,
    code: Tensor,
    pool: Pool,
    lower: float,
    upper: float,
    last: bool,
) -> None:
    """Writes p and code. z, p and code lie alike: contiguous, or channels-last where `last`."""
    n, c = z.shape[:2]
    windows = pool.rows * pool.columns
    unroll = pool.kernel[0] * pool.kernel[1]
    chosen = {
        "LOWER": lower,
        "UPPER": upper,
        "WIDE": tl.float64 if z.dtype == torch.float64 else tl.float32,
    }
    window = {**pool.constants(), "UNROLL": unroll if unroll <= UNROLLED else 1}

    def run(config: Config, p: Tensor, code: Tensor) -> None:
        config = scaled(config, z.dtype, 2 if pool.pairs or last else 4)
        pointers = z, scale, shift, p, code
        size = pool.h, pool.w, pool.rows, pool.columns
        if last:
            columns = cut_columns(1, n * windows, c)
            width = columns.width(config.elements)
            height = max(1, config.elements // width)
            blocks = columns.blocks(config.elements)
            launch(
                max_pool_columns,
                -(-n * windows // height) * blocks,
                config.threads,
                (*pointers, n * windows, c // columns.unit, blocks, *size),
                {
                    **chosen,
                    **window,
                    "BIG": pool.big(n),
                    "UNIT": columns.unit,
                    "HEIGHT": height,
                    "WIDTH": width,
                },
            )
            return
        lines = cut_lines(n * c, windows, PIECE)
        constants = {**chosen, **lines.constants(config.elements), "BIG": pool.big(1)}
        del constants["FLAT"]
        numbers: tuple[int, ...] = (lines.rows // lines.row_unit, windows // lines.unit, c, pool.h)
        if pool.pairs:
            unit = power_in(pool.w)
            kernel, numbers = max_pool_pairs, (*numbers, pool.w // unit)
            constants["W_UNIT"] = unit
        else:
            kernel, numbers = max_pool_lines, (*numbers, pool.w, pool.columns)
            constants |= window
        launch(kernel, lines.programs(config.elements), config.threads, (*pointers, *numbers), constants)

    given = scale is not None, shift is not None, pool.kernel, pool.stride
    key = "max_pool", z.dtype, last, given, bucket(windows), bucket(c), bucket(z.numel())
    choice = tuned(key, z.device, lambda f: run(f, torch.empty_like(p), torch.empty_like(code)))
    run(choice, p, code)


def power_in(count: int) -> int:
    """The largest power of two up to 16 that divides count."""
    return min(16, count & -count)
