"""Memory for the large tensors of a pass, which every batch uses again.

What an allocator does with large blocks costs a pass dear: given back to the system, they come as new pages,
one fault at a time; kept, they leave holes that the next tensor of the same size does not fit into. A pass
makes tensors of few sizes again and again, so it keeps its own, in huge pages where the system has them.
Must not know what is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_HUGE = 2 << 20  # bytes of a huge page
_LARGEST = (32 << 20) - (64 << 10)  # bytes: what glibc adapts to at most, less its headers
_WORTH = 8 << 20  # bytes from which a tensor lies in a block, the smallest of which is a huge page
_SPARE = 2  # a block may be so many times as large as what it is handed out for


@dataclass
class _Block:
    """Pages, and the view of them that a tensor's storage holds as long as it lives."""

    pages: mmap.mmap
    batch: int  # the last one that it was handed out in
    view: weakref.ref[memoryview] | None = None

    @property
    def free(self) -> bool:
        return self.view is None or self.view() is None


class Buffers:
    """Blocks of CPU memory; a block is free again as soon as no tensor lies in it."""

    def __init__(self) -> None:
        _calm_allocator()
        self._blocks: list[_Block] = []
        self._batch = 0
        self._scratch = torch.empty(0)
        self._piece = torch.empty(0)

    def next_batch(self) -> None:
        """Gives back what two batches had no use for, as where inputs change their size."""
        self._blocks = [b for b in self._blocks if b.batch >= self._batch - 1 or not b.free]
        self._batch += 1
        if self._batch == 2:
            _give_back_holes()

    def give_back(self) -> None:
        """Gives back all that no tensor lies in."""
        self._blocks = [b for b in self._blocks if not b.free]
        self._scratch = self._piece = torch.empty(0)

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any values.

        Args:
            strides: those of a dense tensor of that shape.
        """
        shape, strides = tuple(shape), tuple(strides)
        count = dtype.itemsize * torch.Size(shape).numel()
        if count == 0:
            return torch.empty_strided(shape, strides, dtype=dtype)
        block = self._block(count)
        block.batch = self._batch
        view = memoryview(block.pages)
        block.view = weakref.ref(view)
        memory = torch.frombuffer(view, dtype=dtype, count=count // dtype.itemsize)
        # No view of it: autograd adds a gradient in place only to what has its memory for itself.
        return torch.empty(0, dtype=dtype).set_(memory, 0, shape, strides)  # type: ignore[call-overload, no-any-return]

    def scratch(self, count: int) -> torch.Tensor:
        """float32 of any values, `count` of them or more, until the next call: the same memory every time."""
        if self._scratch.numel() < count:
            self._scratch = torch.empty(0)  # given back before more is taken
            self._scratch = _floats(count)
        return self._scratch

    def piece(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any values, until the next call: in the same memory every time, so pieces leave no holes.

        Args:
            strides: those of a dense tensor of that shape.
        """
        count = -(-dtype.itemsize * torch.Size(shape).numel() // 4)
        if self._piece.numel() < count:
            self._piece = torch.empty(0)
            self._piece = _floats(count)
        return self._piece.view(dtype).as_strided(tuple(shape), tuple(strides))

    def _block(self, count: int) -> _Block:
        size = _rounded(count)
        fitting = [b for b in self._blocks if size <= len(b.pages) <= _SPARE * size and b.free]
        if fitting:
            return min(fitting, key=lambda block: len(block.pages))
        self._blocks.append(_Block(_pages(size), self._batch))
        return self._blocks[-1]


def empty_channels_last(
    buffers: Buffers | None, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(N, C, H, W) of any values, channels-last: of buffers, if they are given, where it is large."""
    _, channels, rows, columns = shape
    strides = rows * columns * channels, 1, columns * channels, channels
    if buffers is not None and dtype.itemsize * torch.Size(shape).numel() > _WORTH:
        return buffers.empty(shape, strides, dtype)
    return torch.empty_strided(tuple(shape), strides, dtype=dtype)


def scratch_for(buffers: Buffers | None, floats: int) -> torch.Tensor:
    """float32 of any values, at least `floats`, for the length of a launch: of buffers, if they are given."""
    return torch.empty(floats) if buffers is None else buffers.scratch(floats)


def _calm_allocator() -> None:
    """Lets glibc keep the pages of what a pass makes elsewhere, as the library's convolutions do.

    Once a block of up to 32 MB that had pages of its own is freed, blocks of that size come from the heap, and
    the heap keeps twice as much free memory at its end instead of giving it back (mallopt(3),
    M_MMAP_THRESHOLD). Nothing is written to this one, so it takes no memory. Passes over ResNet-50 and
    DenseNet-121 had 20,000 to 50,000 page faults a batch without it, and mostly none with it.
    """
    with contextlib.suppress(RuntimeError):  # where memory is short, a pass may yet find what it needs
        torch.empty(_LARGEST, dtype=torch.uint8)


def _give_back_holes() -> None:
    """Lets glibc give the system all pages that lie free in the heap.

    What is made once, in the first batch (tables, folded and narrowed weights), lies there between maps that
    come and go, and the next ones do not fit into the same holes. A pass over ResNet-18 took 132 MB with this
    and 155 MB without, and one over ResNet-50 in bf16 172 and 182 MB.
    """
    library = glibc()
    if library is not None:
        library.malloc_trim(ctypes.c_size_t(0))


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is that one."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None
    return library


def _rounded(count: int) -> int:
    """Bytes of the huge pages that hold so many."""
    return -(-count // _HUGE) * _HUGE


def _floats(count: int) -> torch.Tensor:
    """float32 of any values in huge pages, at least so many."""
    return torch.frombuffer(_pages(_rounded(4 * count)), dtype=torch.float32)


def _pages(size: int) -> mmap.mmap:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size)
    # By default Python shares them with children, and Linux gives shared memory no huge pages.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
