"""Memory that one batch frees is kept for the next, on glibc.

The allocator gives large freed blocks back to the system, and the next batch gets new pages one fault at a
time: a tenth of a pass's time and more on fast processors. During a pass it therefore gives nothing back.
Afterwards its limits stand where glibc's own adjustment ends in any process that has freed a large tensor:
blocks up to 32 MB come from the heap, and what is free at the heap's end beyond 64 MB is returned.
`ATTRFAST_MALLOC=system` leaves the allocator alone. Must not know what runs in a pass.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = (1 << 31) - 1

_lock = threading.Lock()
_passes = 0


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function, where this process has it."""
    if os.environ.get("ATTRFAST_MALLOC", "").strip().lower() == "system":
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - another libc's mallopt may mean something else
        found = library.mallopt
    except (OSError, AttributeError, TypeError):
        return None
    found.argtypes, found.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return found  # type: ignore[no-any-return]


@contextmanager
def kept_pages(wanted: bool = True) -> Iterator[None]:
    """Within it, freed memory stays with the process. Passes may overlap, in several threads."""
    global _passes
    mallopt = _mallopt() if wanted else None
    if mallopt is None:
        yield
        return
    with _lock:
        _passes += 1
        if _passes == 1:
            mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if _passes == 0:
                mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
