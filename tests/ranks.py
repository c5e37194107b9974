"""Runs a function in several processes that share a default group over loopback.

The processes are forked from a server that has imported torch once, so that starting them takes no time.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DIED = "died"  # in place of a result
_LONGEST = 90.0  # seconds, after which a test of processes has hung


def run(
    work: Callable[..., Any],
    size: int,
    *arguments: Any,
    timeout: float = 60.0,
    wait_for: int | None = None,
) -> list[Any]:
    """What `work(rank, size, *arguments)` returns or raises in each process, by rank.

    Args:
        work: found by its name in its module.
        timeout: of the group, in seconds.
        wait_for: how many of the first processes are waited for; None: all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["attrfast"])
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            how = (work, rank, size, f"{folder}/store", timeout, theirs, arguments)
            processes.append(context.Process(target=_process, args=how, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        end = time.monotonic() + _LONGEST
        found = [_received(pipe, end) for pipe in pipes[:wait_for]]
        for process in processes:
            process.kill()
            process.join()
    return found


def _received(pipe: Connection, end: float) -> Any:
    try:
        if not pipe.poll(max(0.0, end - time.monotonic())):
            return "hangs"
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return DIED


def _process(
    work: Callable[..., Any],
    rank: int,
    size: int,
    store: str,
    timeout: float,
    pipe: Connection,
    arguments: tuple[Any, ...],
) -> None:
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(store)}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        found = work(rank, size, *arguments)
    except Exception as error:
        found = error
    pipe.send_bytes(pickle.dumps(found))
    if not isinstance(found, Exception):
        dist.destroy_process_group()
