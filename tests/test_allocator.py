"""Memory stays with the process while passes are timed, and no longer."""

from __future__ import annotations

import statistics

import pytest
import torch

from attrfast.latency import allocator

resource = pytest.importorskip("resource", reason="no such system")

CPU = torch.device("cpu")


def new_pages(megabytes: int) -> int:
    """That the process meets while it makes and drops some memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nobody has set malloc up."""
    for name in allocator._CHOSEN:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def usual_pages(megabytes: int) -> float:
    """New pages in most of several turns: what lies around may cost one or two of them."""
    return statistics.median(new_pages(megabytes) for _ in range(9))


@pytest.mark.skipif(allocator._glibc() is None, reason="another malloc")
def test_passes_are_timed_in_memory_that_is_there(ordinary: pytest.MonkeyPatch) -> None:
    with allocator.memory_is_kept(CPU):
        assert usual_pages(64) < 100
        assert usual_pages(40) < 100
    assert usual_pages(64) > 10_000, "memory is not given back any more"
    assert usual_pages(20) < 100, "smaller memory is taken anew, which it was not before"


def test_malloc_stays_as_the_user_has_set_it(ordinary: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    ordinary.setattr(allocator, "_glibc", lambda: asked.append(1))
    with allocator.memory_is_kept(CPU):
        assert asked
    asked.clear()
    ordinary.setenv("MALLOC_MMAP_MAX_", "0")
    with allocator.memory_is_kept(CPU):
        assert not asked


def test_memory_of_another_device_is_left_alone(ordinary: pytest.MonkeyPatch) -> None:
    ordinary.setattr(allocator, "_glibc", lambda: pytest.fail("malloc was looked at"))
    with allocator.memory_is_kept(torch.device("cuda")):
        pass
