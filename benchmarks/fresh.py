"""Runs a function in a process of its own that starts from nothing."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def call(function: Callable[..., Any], *args: Any, fork: bool = False, **kwargs: Any) -> Any:
    """What `function(*args, **kwargs)` returns in another process; all of it must be picklable.

    Args:
        fork: continue from this process's state instead; only where no thread pool has started in it.
    """
    context = multiprocessing.get_context("fork" if fork else "spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()
