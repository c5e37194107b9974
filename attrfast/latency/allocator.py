"""Keeps freed memory with the process while passes are timed.

glibc's malloc gives large blocks back to the system, and takes them anew, page by page, in the next pass. How
many of them depends on all blocks around: a pass of ResNet-18 over 16 images met 55,000 new pages, one with a
quarter of the widths none. Such time belongs to no layer, and no width foretells it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from attrfast.buffers import glibc

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt(3)
_NEVER = 2**31 - 1
# Where malloc's own adjustment ends for a program that works with large blocks.
_AS_EVER = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))
_CHOSEN = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


@contextlib.contextmanager
def memory_is_kept(device: torch.device) -> Iterator[None]:
    """A region in which malloc gives nothing back to the system.

    Without effect where memory is another device's, where malloc has no such settings, and where the user
    has made them by the environment. Threads other than the main one have heaps of 64 MB each, and blocks
    that do not fit there come and go as ever.
    """
    library = None if device.type != "cpu" or any(map(os.environ.get, _CHOSEN)) else glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        for option, value in _AS_EVER:
            library.mallopt(option, value)
        library.malloc_trim(0)
