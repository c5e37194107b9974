"""Batch norm and ReLU over maps that are joined: the kernel's numbers, and what a pass makes of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from op_checks import ISAS, Poisoned, assert_close, using
from own_convolutions import LAST, Batches, assert_scores_of_float64, block, trained_statistics
from torch import nn
from torch.nn import functional

import attrfast
from attrfast import joined, reference, stage_runs, tiers
from attrfast.buffers import Buffers
from attrfast.shared_gradient import shared
from attrfast.stages import find_stages, uses_of
from attrfast.trace import trace

pytestmark = pytest.mark.skipif(not ISAS, reason="the native module is not built")

Tensor = torch.Tensor
INF = reference.INF
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# N, channels of each part, positions: whole and partial vectors and blocks, none at all, many parts.
CASES = [
    (2, (16, 32), (8, 8)),
    (1, (3, 1, 17), (7, 9)),
    (3, (40,), (1, 70)),
    (2, (5,) * 30, (6, 5)),
    (1, (64, 0, 7), (13, 30)),
    (4, (8, 24), ()),
    (2, (9, 16, 2), (5,)),
    (1, (4, 12), (3, 4, 5)),
    (0, (4, 12), (3, 4)),
]


def grid(*shape: int, seed: int) -> Tensor:
    """Multiples of a quarter, of which products and sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator) / 4


def in_layout(x: Tensor, last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


class Given:
    """Parts, a gradient and the vectors of a case."""

    def __init__(
        self, case: tuple[int, Sequence[int], Sequence[int]], dtype: torch.dtype, last: bool
    ) -> None:
        n, channels, positions = case
        wide = reference.compute_dtype(dtype)
        self.parts = [
            in_layout(grid(n, c, *positions, seed=i).to(dtype), last) for i, c in enumerate(channels)
        ]
        self.g = in_layout(grid(n, sum(channels), *positions, seed=100).to(dtype), last)
        self.scale = grid(sum(channels), seed=101).to(wide)
        self.shift = grid(sum(channels), seed=102).to(wide)

    def double(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        return (
            [x.double() for x in self.parts],
            self.g.double(),
            self.scale.double(),
            self.shift.double(),
        )


def layouts_of(case: tuple[int, Sequence[int], Sequence[int]]) -> list[bool]:
    """Where a part's channels may lie apart or together, both."""
    _, channels, positions = case
    return [False, True] if positions and min(channels) > 1 else [False]


EVERY = [(case, last) for case in CASES for last in layouts_of(case)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "last"), EVERY, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_forward_is_that_of_the_joined_map(
    isa: str, case: tuple[int, Sequence[int], Sequence[int]], last: bool, dtype: torch.dtype
) -> None:
    given = Given(case, dtype, last)
    assert joined.suits(given.parts)
    parts, _, scale, shift = given.double()
    for lower, upper in ((0.0, INF), (0.0, 1.5), (-INF, INF)):
        with using(isa):
            y = joined.forward(
                joined.Parts(given.parts), given.scale, given.shift, lower, upper, buffers=Poisoned()
            )
        assert y.shape == given.g.shape
        assert y.stride() == given.g.stride()
        want = reference.joined(parts, scale, shift, lower, upper)
        assert_close(y, want, torch.zeros_like(want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "last"), EVERY, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_the_gradient_is_cut_into_those_of_the_parts(
    isa: str, case: tuple[int, Sequence[int], Sequence[int]], last: bool, dtype: torch.dtype
) -> None:
    given = Given(case, dtype, last)
    parts, g, scale, shift = given.double()
    for upper, guided, attribute in ((INF, False, True), (1.5, True, True), (INF, False, False)):
        into: list[Tensor | None] = [torch.full_like(part, torch.nan) for part in given.parts]
        adds = [i % 3 == 1 for i in range(len(into))]
        for i, memory in enumerate(into):
            if adds[i]:
                assert memory is not None
                memory.fill_(2.0)
            elif i % 3 == 2:
                into[i] = None
        rules = 0.0, upper, guided, attribute
        with using(isa):
            s = joined.gradient(
                joined.Parts(given.parts), given.g, given.scale, given.shift, *rules, into, adds
            )
        wanted, sums = reference.joined_backward(parts, g, scale, shift, *rules)
        assert_close(s, sums, torch.zeros_like(sums))
        for memory, adding, want in zip(into, adds, wanted, strict=True):
            if memory is not None:
                want = want + 2.0 if adding else want
                assert_close(memory, want, torch.zeros_like(want))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_a_gradient_passes_where_nothing_was_clamped(last: bool, isa: str) -> None:
    given = Given((1, (20, 30), (2, 4)), torch.float32, last)
    given.parts[1][0, 3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0])
    for upper in (6.0, INF):
        rules = 0.0, upper, False, True
        into = [torch.full_like(part, torch.nan) for part in given.parts]
        with using(isa):
            s = joined.gradient(
                joined.Parts(given.parts),
                given.g,
                given.scale,
                given.shift,
                *rules,
                into,
                [False, False],
            )
        want, sums = reference.joined_backward(given.parts, given.g, given.scale, given.shift, *rules)
        torch.testing.assert_close(torch.cat(into, 1), torch.cat(want, 1), equal_nan=True)
        torch.testing.assert_close(s, sums, equal_nan=True)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_the_bits_do_not_depend_on_threads(last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    channels, size = (16, 5, 40), (31, 30)
    parts = [in_layout(torch.randn(3, c, *size, generator=generator), last) for c in channels]
    g = in_layout(torch.randn(3, sum(channels), *size, generator=generator), last)
    scale, shift = torch.randn(2, sum(channels), generator=generator)

    def run(parts: list[Tensor], g: Tensor) -> tuple[Tensor, ...]:
        into = [torch.empty_like(part) for part in parts]
        s = joined.gradient(
            joined.Parts(parts), g, scale, shift, 0.0, INF, False, True, into, [False] * len(parts)
        )
        return joined.forward(joined.Parts(parts), scale, shift), s, *into

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            results.append(run(parts, g))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_what_is_not_alike_is_joined_by_the_library() -> None:
    part = in_layout(torch.ones(2, 4, 3, 3), True)
    assert joined.suits([part, part.clone()])
    others = [
        torch.ones(2, 4, 3, 3),
        part.double(),
        in_layout(torch.ones(2, 4, 3, 2), True),
        in_layout(torch.ones(1, 4, 3, 3), True),
        in_layout(torch.ones(2, 8, 3, 3), True)[:, ::2],
        torch.ones(2, 4, 3, 3, dtype=torch.int32),
        part.to("meta"),
    ]
    for other in others:
        assert not joined.suits([part, other])


def test_readers_add_to_one_gradient() -> None:
    x = torch.ones(3, requires_grad=True)
    tensor, gradient = shared(x)
    assert torch.equal(tensor, x)
    for _ in range(2):  # two backward passes
        memory, holds = gradient.memory(lambda: torch.full((3,), 2.0))
        assert not holds
        again, holds = gradient.memory(lambda: torch.full((3,), torch.nan))
        assert holds
        assert again is memory
        again.add_(1.0)
        # autograd brings what the first reader has handed on.
        (got,) = torch.autograd.grad(tensor, x, memory, retain_graph=True)
        assert torch.equal(got, torch.full((3,), 3.0))


# -- passes ----------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """Two blocks in which every layer reads all that was made before, and a part that goes elsewhere, too."""

    def __init__(self, written: bool = False) -> None:
        super().__init__()
        self.written = written
        self.stem = block(3, 12, 3, nn.ReLU())
        self.layers, self.ends = nn.ModuleList(), nn.ModuleList()
        reads = 12
        for _ in range(2):
            for _ in range(3):
                self.layers.append(
                    nn.Sequential(
                        nn.BatchNorm2d(reads),
                        nn.ReLU(inplace=True),
                        *block(reads, 24, 1, nn.ReLU6()),
                        nn.Conv2d(24, 6, 3, padding=1, bias=False),
                    )
                )
                reads += 6
            self.ends.append(
                nn.Sequential(nn.BatchNorm2d(reads), nn.ReLU(), nn.Conv2d(reads, 12, 1), nn.AvgPool2d(2))
            )
            reads = 12
        self.last = nn.Conv2d(24, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for b in range(2):
            maps = [x]
            for layer in self.layers[3 * b : 3 * b + 3]:
                maps.append(layer(torch.cat(maps, 1)))
            out = self.ends[b](torch.cat(maps, dim=-3))
            if self.written:
                maps[1][:, :3].mul_(0.5)  # which those that have read it must not see
            x = out
        return self.last(torch.cat([x, functional.avg_pool2d(torch.cat(maps, 1), 2)[:, 6:18]], 1))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every launch of a pass was for."""
    made: list[str] = []
    forward, gradient = joined.forward, joined.gradient
    monkeypatch.setattr(joined, "forward", lambda *a, **k: (made.append("forward"), forward(*a, **k))[1])
    monkeypatch.setattr(
        joined, "gradient", lambda *a, **k: (made.append("gradient"), gradient(*a, **k))[1]
    )
    return made


def in_format(layout: torch.memory_format, written: bool = False) -> tuple[nn.Module, Batches]:
    net, data = trained_statistics(lambda: Dense(written))
    net = net.to(memory_format=layout)
    return net, [(images.contiguous(memory_format=layout), labels) for images, labels in data]


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["channels last", "contiguous"])
@pytest.mark.parametrize("criterion", ["taylor", "taylor_guided", "attribution", "apoz", "hrank", "obd"])
def test_a_pass_gives_the_scores_of_the_definition(
    criterion: str, layout: torch.memory_format, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = in_format(layout)
    assert_scores_of_float64(net, data, criterion)
    assert "forward" in calls
    got = attrfast.attribute(net, data, criterion, progress=False)
    monkeypatch.setattr(joined, "ENABLED", False)
    made = len(calls)
    want = attrfast.attribute(net, data, criterion, progress=False)
    assert len(calls) == made
    assert (got.importance - want.importance).norm() <= 1e-5 * want.importance.norm()


def test_a_pass_uses_it_forward_and_backward(calls: list[str]) -> None:
    net, data = in_format(LAST)
    attrfast.attribute(net, data, "taylor", progress=False)
    # Of eight, two read what they alone join: the first of each block joins one map.
    assert (calls.count("forward"), calls.count("gradient")) == (8, 8)


def test_each_of_several_backward_passes_begins_anew(calls: list[str]) -> None:
    net, data = in_format(LAST)
    several = attrfast.attribute(net, data, ["taylor", "attribution", "obd"], progress=False)
    assert calls.count("gradient") > calls.count("forward")
    for name, scores in several.items():
        alone = attrfast.attribute(net, data, name, progress=False)
        torch.testing.assert_close(scores.importance, alone.importance, rtol=1e-6, atol=0)


def test_under_autocast_parts_are_read_in_its_dtype(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = in_format(LAST)
    scores = []
    for enabled in (True, False):
        monkeypatch.setattr(joined, "ENABLED", enabled)
        with torch.autocast("cpu", torch.bfloat16):
            scores.append(attrfast.attribute(net, data, "taylor", progress=False).importance)
        assert "gradient" in calls
    # A gradient of many readers is rounded whenever one is added, in either way.
    assert (scores[0] - scores[1]).norm() <= 0.02 * scores[1].norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format], ids=["channels last", "contiguous"])
def test_a_map_that_is_joined_a_sample_at_a_time_gives_the_same(
    layout: torch.memory_format,
    dtype: torch.dtype | None,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, data = in_format(layout)

    def scores() -> Tensor:
        return attrfast.attribute(net, data, "taylor", progress=False, amp_dtype=dtype).importance

    def one_at_once(run: stage_runs.StageRun, size: int, samples: int) -> int:
        return samples if run.buffers is None else 1

    want = scores()
    made = len(calls)
    monkeypatch.setattr(stage_runs.StageRun, "samples_at_once", one_at_once)
    got = scores()
    # Of six samples each; maps that lie contiguous, as they stay under autocast, are joined whole.
    assert (len(calls) > 4 * made) == (layout is LAST or dtype is None)
    tolerance = 1e-5 if dtype is None else 0.02
    assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("criterion", ["taylor", "apoz"])
def test_the_memory_of_a_pass_does_not_wait_for_the_garbage_collector(
    criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, data = in_format(LAST)
    made: list[weakref.ref[Any]] = []
    monkeypatch.setattr(tiers, "Buffers", lambda: noted(Buffers(), made))
    real = joined.forward
    monkeypatch.setattr(joined, "forward", lambda *a, **k: noted(real(*a, **k), made))
    gc.disable()
    try:
        attrfast.attribute(net, data, criterion, progress=False)
        assert made
        assert all(ref() is None for ref in made)
    finally:
        gc.enable()


def noted(thing: Any, made: list[weakref.ref[Any]]) -> Any:
    made.append(weakref.ref(thing))
    return thing


def test_a_part_that_is_written_to_later_is_not_kept(calls: list[str]) -> None:
    net, data = in_format(LAST, written=True)
    record = trace(net, (data[0][0],))
    stages = [stage for stage in find_stages(record, uses_of(record), joins=True) if stage.has("cat")]
    plain = trace(in_format(LAST)[0], (data[0][0],))
    everything = [stage for stage in find_stages(plain, uses_of(plain), joins=True) if stage.has("cat")]
    assert (len(stages), len(everything)) == (2, 8)
    assert_scores_of_float64(net, data, "taylor")
    same = attrfast.attribute(in_format(LAST)[0], data, "taylor", progress=False)
    got = attrfast.attribute(net, data, "taylor", progress=False)
    assert (got.importance - same.importance).norm() > 1e-3 * same.importance.norm()


def test_what_is_made_of_joined_maps_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = in_format(LAST)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    forward, gradient = joined.forward, joined.gradient

    def noted(*args: object, **kwargs: object) -> Tensor:
        y: Tensor = forward(*args, **kwargs)  # type: ignore[arg-type]
        made.append(weakref.ref(y))
        return y

    def counting(*args: object, **kwargs: object) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        return gradient(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(joined, "forward", noted)
    monkeypatch.setattr(joined, "gradient", counting)
    attrfast.attribute(net, data, "taylor", progress=False)
    assert len(made) == len(alive) == 8
    assert set(alive) == {0}
