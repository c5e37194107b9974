"""Runs a function in a process of its own, which has imported everything and done nothing yet.

A server process imports the libraries once; every call is a fork of it. All calls thus start from the
same state, under the same allocator and the same environment.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_LIBRARIES = ["torch", "torchvision", "captum.attr", "torch_pruning", "attrfast", "benchmarks.passes"]


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function(*args, **kwargs)` returns in a fresh process; all of it must be picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LIBRARIES)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()
