"""How tensors are cut into tiles and in which order sums over positions are taken.

Two layouts. *Lines*, of contiguous tensors: (rows, P) with a row for each sample and channel. A row of no
more than `LONGEST` positions is one line; a longer one is cut into lines of `PIECE` positions. A program
works on several lines side by side, so that small maps fill it:

    row 0  |x x x x x x x x x . . . . . . .|   P = 9 in lines of width 16: the places marked "." are
    row 1  |x x x x x x x x x . . . . . . .|   masked and move no bytes

*Columns*, of channels-last tensors: (N, P, C). A program works on the channels side by side, which is
how they lie in memory, and walks down the positions in steps:

              channels →
    step 0   |x x x x x x x x|   p = 0 ..
             |x x x x x x x x|
    step 1   |x x x x x x x x|   added to step 0 element by element
             |x x x x x x x x|

Sums are the same bits on every run, machine and configuration: neighbours are added, then neighbours of
those (`tree_lines`, `tree_columns`), so the order depends on the widths below, which follow from the
shape alone, and not on how a compiler deals elements to threads. Kernels are compiled without contraction
to fused multiply-adds for the same reason. Where a row takes more than one line or piece, partial sums go
to memory and `partials.py` adds them in float64, in their order. There are no atomics.

Offsets within a tile fit 32 bits; where a tile begins is counted in 64.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

LONGEST = 4096  # positions of a row that is summed at once
PIECE = 1024  # positions of a line of a longer row: at most 10 additions after one another
SEGMENT = 256  # positions that one program of a channels-last tensor walks down


@dataclass(frozen=True)
class Lines:
    """The cut of a contiguous tensor.

    Attributes:
        rows, positions: the tensor as a matrix.
        width: of a line, a power of two.
        pieces: lines in a row.
        unit: a power of two that divides `positions`: tells the compiler how rows are aligned.
        row_unit: one that divides `rows`, where lines lie without gaps: how the tensor ends.
        split: whether a row may be several lines.
    """

    rows: int
    positions: int
    width: int
    pieces: int
    unit: int
    row_unit: int
    split: bool

    @property
    def flat(self) -> bool:
        """Whether lines lie in memory without gaps, so that a tile can be read as one line."""
        return not self.split and self.positions == self.width

    def count(self, elements: int) -> int:
        """Lines of a tile of about so many elements, a power of two."""
        return max(1, elements // self.width)

    def programs(self, elements: int) -> int:
        if self.split:
            return self.rows * -(-self.pieces // self.count(elements))
        return -(-self.rows // self.count(elements))

    def constants(self, elements: int) -> dict[str, Any]:
        """What `line_tile` must know when it is compiled."""
        return {
            "ROW_UNIT": self.row_unit,
            "UNIT": self.unit,
            "LINES": self.count(elements),
            "WIDTH": self.width,
            "SPLIT": self.split,
            "FLAT": self.flat,
        }

    def log(self) -> int:
        """Rounds of `tree_lines`."""
        return self.width.bit_length() - 1


def cut_lines(rows: int, positions: int, longest: int = LONGEST) -> Lines:
    """Rows of more than `longest` positions are split into pieces."""
    split = positions > longest
    width = min(PIECE, longest) if split else power_of_two(positions)
    pieces = -(-positions // width) if split else 1
    row_unit = math.gcd(rows, 16) if positions == width and not split else 1
    return Lines(rows, positions, width, pieces, math.gcd(positions, 16), row_unit, split)


@dataclass(frozen=True)
class Columns:
    """The cut of a channels-last tensor.

    Attributes:
        samples, positions, channels: the tensor.
        height: positions of a tile.
        steps: tiles that one program walks down.
        pieces: programs below one another in a sample.
        unit: a power of two that divides `channels`.
    """

    samples: int
    positions: int
    channels: int
    height: int
    steps: int
    pieces: int
    unit: int

    def width(self, elements: int) -> int:
        """Channels of a tile of about so many elements."""
        return min(power_of_two(self.channels), max(16, elements // self.height))

    def blocks(self, elements: int) -> int:
        """Programs beside one another."""
        return -(-self.channels // self.width(elements))

    def programs(self, elements: int) -> int:
        return self.samples * self.pieces * self.blocks(elements)

    def log(self) -> int:
        """Rounds of `tree_columns`."""
        return self.height.bit_length() - 1

    def constants(self, elements: int) -> dict[str, Any]:
        """What kernels that walk down the positions must know when they are compiled."""
        return {
            "UNIT": self.unit,
            "HEIGHT": self.height,
            "WIDTH": self.width(elements),
            "STEPS": self.steps,
            "LOG": self.log(),
        }


def cut_columns(samples: int, positions: int, channels: int) -> Columns:
    # At least 32 positions, more where there are few channels to fill a tile with.
    height = min(power_of_two(positions), max(32, 2048 // power_of_two(channels)))
    steps = min(max(1, SEGMENT // height), -(-positions // height))
    pieces = -(-positions // (steps * height))
    return Columns(samples, positions, channels, height, steps, pieces, math.gcd(channels, 16))


def flat_columns(positions: int, channels: int, elements: int) -> Columns:
    """For what has no sums, where samples are but more positions: a program works on one tile."""
    whole = cut_columns(1, positions, channels)
    height = max(1, elements // whole.width(elements))
    return dataclasses.replace(whole, height=height, steps=1, pieces=-(-positions // height))


def by_columns(last: bool, positions: int, channels: int) -> bool:
    """Whether a tensor is cut into columns: a channels-last one, and one of single positions, which lies
    like one and has a scale for every element of a line."""
    return last or (positions == 1 and channels >= 256)


def power_of_two(count: int) -> int:
    """The smallest that is not below count."""
    return 1 << max(0, count - 1).bit_length()


# -- on the device ----------------------------------------------------------------------------------------


@triton.jit
def line_tile(
    row_units,
    units,
    ROW_UNIT: tl.constexpr,
    UNIT: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    FLAT: tl.constexpr,
):
    """This program's tile of lines.

    Returns:
        base: 64-bit offset of the tile's first element in a tensor of row_units * ROW_UNIT rows and
            units * UNIT positions.
        offset, inside: what is added to it, and whether that is an element; of shape (LINES, WIDTH), or
            (LINES * WIDTH,) where FLAT.
        row: 64-bit, the row of the first line.
        line, is_line: (LINES,) where its sum goes, and whether it is one.
        first: place in its row of the first element, 0 where rows are not split.
    """
    pid = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, LINES)
    length = units.to(tl.int64) * UNIT
    # Comparisons are left in 64 bits: the compiler sees how a difference is aligned, not a minimum.
    if SPLIT:
        pieces = tl.cdiv(length, WIDTH)
        blocks = tl.cdiv(pieces, LINES)
        of_row = pid // blocks
        piece = (pid % blocks) * LINES
        first = piece * WIDTH
        base = of_row * length + first
        offset = index[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside = offset < length - first
        row = of_row
        line = of_row * pieces + piece + index
        is_line = index < pieces - piece
    else:
        line = pid * LINES + index
        row = pid * LINES
        left = row_units.to(tl.int64) * ROW_UNIT - pid * LINES
        is_line = index < left
        first = pid * 0
        base = pid * LINES * length
        if FLAT:
            offset = tl.arange(0, LINES * WIDTH)
            inside = offset < left * WIDTH
        else:
            place = tl.arange(0, WIDTH)[None, :]
            offset = index[:, None] * length.to(tl.int32) + place
            inside = (index[:, None] < left) & (place < length.to(tl.int32))
    return base, offset, inside, row, line, is_line, first


@triton.jit
def line_rows(row, LINES: tl.constexpr, SPLIT: tl.constexpr):
    """(LINES,) 64-bit, the row of each line of a tile."""
    return row + tl.arange(0, LINES) * (0 if SPLIT else 1)


@triton.jit
def line_channels(row, channels, LINES: tl.constexpr, SPLIT: tl.constexpr):
    """(LINES,) the channel of each line of a tile; one 64-bit division for all of them."""
    first = (row % channels).to(tl.int32)
    return (first + tl.arange(0, LINES) * (0 if SPLIT else 1)) % channels.to(tl.int32)


@triton.jit
def as_lines(x, LINES: tl.constexpr, WIDTH: tl.constexpr, FLAT: tl.constexpr):
    """A tile as it was loaded, as (LINES, WIDTH)."""
    return tl.reshape(x, [LINES, WIDTH]) if FLAT else x


@triton.jit
def as_stored(x, LINES: tl.constexpr, WIDTH: tl.constexpr, FLAT: tl.constexpr):
    """And back."""
    return tl.reshape(x, [LINES * WIDTH]) if FLAT else x


@triton.jit
def tree_lines(x, LINES: tl.constexpr, WIDTH: tl.constexpr, LOG: tl.constexpr):
    """(LINES, WIDTH) -> (LINES,), WIDTH = 2 ** LOG: neighbours first, then neighbours of those."""
    for i in tl.static_range(LOG):
        x = tl.sum(tl.reshape(x, [LINES, WIDTH >> (i + 1), 2]), 2)
    return tl.reshape(x, [LINES])


@triton.jit
def tree_columns(x, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, LOG: tl.constexpr):
    """(HEIGHT, WIDTH) -> (WIDTH,), HEIGHT = 2 ** LOG: likewise, down the columns."""
    for i in tl.static_range(LOG):
        x = tl.sum(tl.reshape(x, [HEIGHT >> (i + 1), 2, WIDTH]), 1)
    return tl.reshape(x, [WIDTH])


@triton.jit
def column_place(pieces, blocks, WIDTH: tl.constexpr):
    """Sample, piece and first channel (64-bit) of this program's column of tiles."""
    pid = tl.program_id(0).to(tl.int64)
    block = pid % blocks
    piece = (pid // blocks) % pieces
    return pid // blocks // pieces, piece, block * WIDTH


@triton.jit
def steps_down(positions, piece, HEIGHT: tl.constexpr, STEPS: tl.constexpr):
    """Tiles that this program walks down: fewer at the end of a sample."""
    left = tl.cdiv(positions - piece * (STEPS * HEIGHT), HEIGHT)
    return tl.minimum(left, STEPS).to(tl.int32)


@triton.jit
def clamped(y, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Within the bounds; NaN stays, because it is neither below nor above."""
    # A number beside a tensor would be a float32.
    low, high = tl.full([], LOWER, y.dtype), tl.full([], UPPER, y.dtype)
    y = tl.where(y < low, low, y)
    return tl.where(y > high, high, y)


@triton.jit
def affine(z, scale, shift, LOWER: tl.constexpr, UPPER: tl.constexpr):
    if scale is not None:
        z = z * scale
    if shift is not None:
        z = z + shift
    return clamped(z, LOWER, UPPER)


@triton.jit
def counted(y, is_element, STORED: tl.constexpr):
    """What elements add to a count when they are stored in that type: 1 unless they are zero then, NaN where
    they are not finite; 0 for what is no element."""
    stored = y.to(STORED).to(y.dtype)
    return tl.where(is_element, tl.where(stored != 0, 1.0, 0.0) + 0.0 * stored, 0.0)


@triton.jit
def passed(a, g, LOWER: tl.constexpr, UPPER: tl.constexpr, GUIDED: tl.constexpr):
    """g where the clamp whose output is a lets it pass, else 0; NaN in a counts as inside, and an infinite
    bound is none."""
    blocked = tl.zeros(a.shape, tl.int1)
    if float("-inf") != LOWER:
        blocked = blocked | (a <= tl.full([], LOWER, a.dtype))
    if float("inf") != UPPER:
        blocked = blocked | (a >= tl.full([], UPPER, a.dtype))
    if GUIDED:
        blocked = blocked | ~(g > 0)
    return tl.where(blocked, 0.0, g)
