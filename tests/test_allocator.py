"""Memory stays with the process while passes are timed, and no longer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attrfast.latency import allocator

CPU = torch.device("cpu")

# In a process of its own: after a refused allocation, which other tests ask for, malloc serves this thread from
# another heap, where large blocks come and go as if nothing were set.
_PAGES = """
import resource
import statistics

import torch

from attrfast.latency.allocator import memory_is_kept


def new_pages(megabytes):
    def once():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(megabytes << 18)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    return statistics.median(once() for _ in range(9))


with memory_is_kept(torch.device("cpu")):
    print(new_pages(64), new_pages(40))
print(new_pages(64), new_pages(20))
"""


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nobody has set malloc up."""
    for name in allocator._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.skipif(allocator.glibc() is None, reason="another malloc")
def test_passes_are_timed_in_memory_that_is_there(ordinary: pytest.MonkeyPatch) -> None:
    root = str(Path(allocator.__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", _PAGES],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    kept, after = (tuple(map(float, line.split())) for line in run.stdout.splitlines())
    assert max(kept) < 100
    assert after[0] > 10_000, "memory is not given back any more"
    assert after[1] < 100, "smaller memory is taken anew, which it was not before"


def test_malloc_stays_as_the_user_has_set_it(ordinary: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    ordinary.setattr(allocator, "glibc", lambda: asked.append(1))
    with allocator.memory_is_kept(CPU):
        assert asked
    asked.clear()
    ordinary.setenv("MALLOC_MMAP_MAX_", "0")
    with allocator.memory_is_kept(CPU):
        assert not asked


def test_memory_of_another_device_is_left_alone(ordinary: pytest.MonkeyPatch) -> None:
    ordinary.setattr(allocator, "glibc", lambda: pytest.fail("malloc was looked at"))
    with allocator.memory_is_kept(torch.device("cuda")):
        pass
