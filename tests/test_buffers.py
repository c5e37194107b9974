"""Memory of a pass: handed out again as soon as no tensor lies in it, and never before."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from attrfast.buffers import Buffers
from benchmarks import fresh

SHAPE, STRIDES = (4, 3, 8, 8), (192, 1, 24, 3)  # channels-last


def lent(buffers: Buffers, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return buffers.empty(shape, torch.empty(shape).stride(), torch.float32)


def test_a_tensor_lies_as_it_is_asked_for() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8):
        x = Buffers().empty(SHAPE, STRIDES, dtype)
        assert (x.shape, x.stride(), x.dtype) == (SHAPE, STRIDES, dtype)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.data_ptr() % 64 == 0
        x.fill_(3)
        assert bool((x == 3).all())


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 5)])
def test_a_tensor_may_be_empty(shape: tuple[int, ...]) -> None:
    assert lent(Buffers(), shape).shape == shape


def test_memory_comes_back_with_the_last_tensor_in_it() -> None:
    buffers = Buffers()
    x = lent(buffers)
    place, view = x.data_ptr(), x[1:]
    del x
    assert lent(buffers).data_ptr() != place  # the view is still there
    del view
    assert place in {t.data_ptr() for t in [lent(buffers) for _ in range(2)]}


def test_what_a_graph_keeps_is_not_handed_out() -> None:
    buffers = Buffers()
    weight = torch.ones(SHAPE, requires_grad=True)
    x = lent(buffers).fill_(2.0)
    out = (x * weight).sum()
    del x
    gc.collect()
    other = lent(buffers).fill_(7.0)
    out.backward()
    assert weight.grad is not None
    assert bool((weight.grad == 2).all())
    assert bool((other == 7).all())


def test_a_block_is_not_spent_on_something_much_smaller() -> None:
    buffers = Buffers()
    large = lent(buffers, (3 << 20,))
    place = large.data_ptr()
    del large
    assert lent(buffers, (1 << 20,)).data_ptr() != place
    assert lent(buffers, (2 << 20,)).data_ptr() == place


def test_what_two_batches_did_not_use_is_given_back() -> None:
    buffers = Buffers()
    held, used = lent(buffers), lent(buffers)
    place = used.data_ptr()
    del used
    buffers.next_batch()
    again = lent(buffers)
    assert again.data_ptr() == place
    del again
    buffers.next_batch()
    buffers.next_batch()
    assert len(buffers._blocks) == 2  # one that a tensor lies in, one that was used a batch ago
    buffers.next_batch()
    assert [block.free for block in buffers._blocks] == [False]
    assert held.fill_(1.0).sum() == held.numel()


def _after_holes() -> list[int]:
    """Resident bytes while the heap is full, when half of it is free, and when the second batch begins."""
    buffers = Buffers()
    buffers.next_batch()
    kept = [torch.ones(16 << 10) for _ in range(1000)]
    seen = [_resident()]
    kept = kept[::2]
    seen.append(_resident())
    buffers.next_batch()
    assert len(kept) == 500
    return [*seen, _resident()]


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another malloc")
def test_holes_that_the_first_batch_leaves_are_given_back() -> None:
    full, holes, later = fresh.call(_after_holes)
    assert holes >= full - (4 << 20)
    assert later <= full - (24 << 20)


def test_memory_outlives_the_buffers_while_a_tensor_is_there() -> None:
    x = lent(Buffers()).fill_(5.0)
    gc.collect()
    assert bool((x == 5).all())


def test_gradients_are_added_in_place() -> None:
    """autograd writes into a gradient that has its memory for itself; a view would cost a new tensor."""
    buffers = Buffers()

    class Lent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return lent(buffers).copy_(g)

    x = torch.ones(SHAPE, requires_grad=True)
    seen: list[int] = []
    middle = x * 1.0
    middle.register_hook(lambda g: seen.append(g.data_ptr()))
    (Lent.apply(middle) + Lent.apply(middle)).sum().backward()
    first, second = (block.pages for block in buffers._blocks)
    places = {torch.frombuffer(pages, dtype=torch.uint8).data_ptr() for pages in (first, second)}
    assert seen[0] in places


def test_short_memory_is_no_reason_not_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty

    def short(*size: int, **options: object) -> torch.Tensor:
        if size and isinstance(size[0], int) and size[0] > 1 << 20:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*size, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", short)
    assert lent(Buffers()).shape == SHAPE


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no other way to see whose the pages are")
def test_memory_is_not_shared_with_children() -> None:
    """Linux gives huge pages to private memory alone."""
    x = lent(Buffers()).zero_()
    child = os.fork()
    if child == 0:
        ctypes.memset(x.data_ptr(), 1, x.nbytes)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert not x.any()
