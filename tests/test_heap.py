"""What a batch frees is kept for the next one, and the allocator's limits are set as told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from attrfast import heap


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    made: list[tuple[int, int]] = []

    def mallopt(option: int, value: int) -> int:
        made.append((option, value))
        return 1

    monkeypatch.setattr(heap, "_mallopt", lambda: mallopt)
    yield made
    assert heap._passes == 0


def test_the_first_pass_sets_the_limits_and_the_last_puts_them_back(
    calls: list[tuple[int, int]],
) -> None:
    with heap.kept_pages():
        assert calls == [(-3, 32 << 20), (-1, (1 << 31) - 1)]
        with heap.kept_pages():
            assert len(calls) == 2
        assert len(calls) == 2
    assert calls[2:] == [(-1, 64 << 20)]


def test_nothing_is_set_where_it_is_not_wanted(calls: list[tuple[int, int]]) -> None:
    with heap.kept_pages(False):
        pass
    assert calls == []


def test_the_allocator_can_be_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTRFAST_MALLOC", "system")
    assert heap._mallopt.__wrapped__() is None


FAULTS = """
import resource, torch
from attrfast import heap

def work():
    kept = [torch.full((5 << 20,), 1.0) for _ in range(3)]  # 20 MB each
    del kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

work(), work()
outside = faults()
with heap.kept_pages():
    work(), work()
    print(outside, faults())
"""


@pytest.mark.skipif(heap._mallopt() is None, reason="no glibc, or ATTRFAST_MALLOC=system")
def test_the_second_time_no_page_is_new() -> None:
    script = [sys.executable, "-c", FAULTS]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env={**os.environ})
    outside, inside = map(int, done.stdout.split())
    assert outside > 2000  # some of 60 MB, 4 KB a page
    assert inside < 200
