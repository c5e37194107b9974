"""As many samples at once as memory holds: a limit that is kept, and what happens where memory is full."""

from __future__ import annotations

import resource
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn

import attrfast
from attrfast.batches import unpack
from attrfast.channels import discover
from attrfast.graph import bytes_per_sample
from attrfast.portions import Limit, Portions, is_out_of_memory, parse_memory
from benchmarks import fresh

CPU = torch.device("cpu")


class Full(nn.Module):
    """Raises what a full memory raises where it is given more samples than it holds, and counts its passes."""

    def __init__(self, holds: int, error: type[BaseException] = torch.OutOfMemoryError) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = lived_in(Plain())
        self.holds, self.error = holds, error
        self.passes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.holds:
            raise self.error("out of memory" if self.error is not MemoryError else "")
        self.passes.append(len(x))
        return self.inside(x)


def data(samples: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, 16, 16, generator=generator)
    return images, torch.randint(CLASSES, (samples,), generator=generator)


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(*(t.split(list(sizes)) for t in data(sum(sizes))), strict=True))


def score(model: nn.Module, loader: Any, *args: Any, **options: Any) -> Any:
    return attrfast.attribute(model, loader, *args, progress=False, **options)


# -- memory is full --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
@pytest.mark.parametrize(
    "criterion", ["taylor", "apoz", "causal_map", ["taylor", "attribution", "hrank"]]
)
def test_what_does_not_fit_runs_in_halves_and_counts_once(criterion: Any, error: Any) -> None:
    expected = score(Full(100), batches(8, 12), criterion, by_class=criterion == "taylor")
    model = Full(3, error)
    got = score(model, batches(8, 12), criterion, by_class=criterion == "taylor")
    for name in [criterion] if isinstance(criterion, str) else criterion:
        one, other = (s if isinstance(criterion, str) else s[name] for s in (got, expected))
        assert one.samples == other.samples == 20
        torch.testing.assert_close(one.raw, other.raw, rtol=1e-5, atol=1e-7)
        if other.by_class is not None:
            torch.testing.assert_close(one.by_class, other.by_class, rtol=1e-5, atol=1e-7)
            assert torch.equal(one.class_samples, other.class_samples)
    # 8 and 4 do not fit; 2 do, and from then on nothing larger is tried.
    assert max(model.passes) == 2


def test_full_memory_in_one_of_two_criteria_counts_nothing_twice() -> None:
    class SeldomFull(Full):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.passes.append(len(x))
            if len(self.passes) == 4:  # the own pass of causal_map, after taylor's
                raise self.error("out of memory")
            return self.inside(x)

    rules = ["taylor", "causal_map"]
    expected = score(Full(100), batches(8), rules)
    got = score(SeldomFull(100), batches(8), rules)
    for rule in rules:
        assert got[rule].samples == 8
        torch.testing.assert_close(got[rule].raw, expected[rule].raw, rtol=1e-5, atol=1e-7)


def test_one_sample_that_does_not_fit_is_an_error_that_says_so() -> None:
    with pytest.raises(attrfast.OutOfMemoryError, match="does not hold the pass of one sample"):
        score(Full(0), batches(4), units=discover(Full(4), (data(2)[0],)))
    assert issubclass(attrfast.OutOfMemoryError, MemoryError)


def test_other_errors_are_not_taken_for_a_full_memory() -> None:
    model = Full(100)
    model.register_forward_pre_hook(lambda module, args: 1 / 0 if len(args[0]) > 2 else None)
    with pytest.raises(ZeroDivisionError):
        score(model, batches(4))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(OSError(2, "No such file"))
    assert is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))


def test_pruning_goes_on_in_halves() -> None:
    options: dict[str, Any] = {"keep_ratio": 0.7, "finetune": 0, "progress": False}
    whole = attrfast.prune(Full(100), batches(8, 8), "taylor", val_loader=batches(2), **options)
    halves = attrfast.prune(Full(3), batches(8, 8), "taylor", val_loader=batches(2), **options)
    assert all(torch.equal(whole.gates[name], halves.gates[name]) for name in whole.gates)


def _under_a_real_limit() -> tuple[int, float]:
    torch.set_num_threads(1)
    model = nn.Sequential(
        *(m for _ in range(6) for m in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    images, labels = torch.randn(32, 16, 64, 64), torch.zeros(32, dtype=torch.int64)
    small = score(model, [(images, labels)], microbatch=1)
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (40 << 20),) * 2)
    found = score(model, [(images, labels)])
    return found.samples, float((found.raw - small.raw).abs().max() / small.raw.max())


def test_an_allocator_that_fails_in_earnest_is_survived() -> None:
    """The system gives 40 MB more; the batch of 32 would take 6 times 8 MB and more."""
    samples, difference = fresh.call(_under_a_real_limit)
    assert samples == 32
    assert difference < 1e-5


# -- a limit ---------------------------------------------------------------------------------------------


def test_the_plan_counts_what_stages_keep_and_the_two_largest_tensors() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)),
    ).eval()
    record = discover(model, (torch.randn(2, 3, 8, 8),)).record
    made = [8 * 64, 8 * 64, 8 * 64, 8 * 16, 4 * 16, 4 * 16, 5]
    assert record.samples == 2
    assert bytes_per_sample(record, None) == 4 * (sum(made) + 2 * 8 * 64)


class _Memory:
    """Stands in for the system: every sample takes 10 bytes over 100 that are there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fixed: int = 0, holes: int = 0) -> None:
        self.peak, self.fixed, self.holes, self.seen = 100, fixed, holes, list[int]()
        monkeypatch.setattr("attrfast.portions._forget_peak", self._forget)
        monkeypatch.setattr("attrfast.portions._peak", lambda _: self.peak)

    def _forget(self, _: torch.device) -> bool:
        self.peak = 100
        return True

    def work(self, part: Any) -> None:
        self.seen.append(part.samples)
        self.peak = 100 + max(1, self.fixed + 10 * part.samples - self.holes)
        self.holes //= 4


def batch_of(samples: int) -> Any:
    return unpack((torch.randn(samples, 2), torch.zeros(samples, dtype=torch.int64)), CPU)


@pytest.mark.parametrize("fixed", [0, 200])
@pytest.mark.parametrize("planned", [1.0, 10.0, 60.0, 2000.0, 0.0])
def test_portions_grow_to_the_limit_and_stay_there(
    monkeypatch: pytest.MonkeyPatch, planned: float, fixed: int
) -> None:
    memory = _Memory(monkeypatch, fixed)
    portions = Portions(CPU, limit=Limit(1000, 100), planned=planned)
    for _ in range(12):
        portions.run(batch_of(64), memory.work)
    assert sum(memory.seen) == 12 * 64
    assert max(memory.seen[len(memory.seen) // 2 :]) >= 30
    if planned >= 10.0:
        assert fixed + 10 * max(memory.seen) <= 1000


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(1, [1]), (10, [10]), (11, [6, 5]), (35, [18, 17]), (400, [200] * 2)],
)
def test_a_large_batch_runs_in_halves(samples: int, expected: list[int]) -> None:
    seen: list[int] = []
    portions = Portions(CPU, planned=10.0, comfort=100.0)
    portions.run(batch_of(samples), lambda part: seen.append(part.samples))
    assert seen == expected
    seen.clear()
    portions = Portions(CPU, planned=10.0, comfort=100.0, most=7)
    portions.run(batch_of(samples), lambda part: seen.append(part.samples))
    assert sum(seen) == samples
    assert max(seen) <= 7


@pytest.mark.parametrize(
    ("layers", "width", "side", "expected"),
    [(150, 16, 16, [28]), (8, 64, 36, [14, 14]), (2, 64, 36, [28])],
    ids=["deep and narrow", "wide", "small"],
)
def test_a_batch_runs_in_halves_where_layers_make_much(
    layers: int, width: int, side: int, expected: list[int]
) -> None:
    """By the plan a batch takes 70, 93 and 37 MB."""
    kernel = 1 if layers > 100 else 3
    body: list[nn.Module] = []
    for index in range(layers):
        reads = width if index else 3
        convolution = nn.Conv2d(reads, width, kernel, padding=kernel // 2, bias=False)
        body += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))
    whole = Full(28)
    whole.inside = net
    images = torch.randn(28, 3, side, side).contiguous(memory_format=torch.channels_last)
    whole.eval()
    score(whole.to(memory_format=torch.channels_last), [(images, torch.zeros(28, dtype=torch.int64))])
    assert whole.passes[-len(expected) :] == expected


@pytest.mark.parametrize("helps", [True, False])
def test_a_sample_is_made_to_take_less_as_long_as_that_helps(
    monkeypatch: pytest.MonkeyPatch, helps: bool
) -> None:
    memory, shrinks = _Memory(monkeypatch, fixed=8000), list[int]()

    def shrink() -> bool:
        shrinks.append(memory.fixed)
        if helps:
            memory.fixed //= 2
        return True

    portions = Portions(CPU, limit=Limit(1000, 100), planned=10.0, shrink=shrink)
    with pytest.warns(UserWarning, match="more than memory_limit") if not helps else nullcontext():
        for _ in range(3):
            portions.run(batch_of(40), memory.work)
    assert sum(memory.seen) == 120
    assert shrinks == ([8000, 4000, 2000, 1000] if helps else [8000] * 3)
    assert (memory.peak - 100 <= 1000) is helps


@pytest.mark.parametrize("holes", [300, 1000, 4000])
def test_first_portions_that_fill_holes_of_the_heap_mislead_nobody(
    monkeypatch: pytest.MonkeyPatch, holes: int
) -> None:
    memory = _Memory(monkeypatch, holes=holes)
    portions = Portions(CPU, limit=Limit(1000, 100), planned=10.0)
    for _ in range(6):
        portions.run(batch_of(2000), memory.work)
    assert 60 <= max(memory.seen) <= 100


def test_a_limit_that_was_passed_makes_portions_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = _Memory(monkeypatch)
    portions = Portions(CPU, limit=Limit(300, 100), planned=1.0)
    for _ in range(4):
        portions.run(batch_of(64), memory.work)
    assert memory.seen[0] == 64
    assert max(memory.seen[1:]) <= 30


def test_a_sample_above_the_limit_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = _Memory(monkeypatch)
    portions = Portions(CPU, limit=Limit(5, 100), planned=10.0)
    with pytest.warns(UserWarning, match="one sample takes"):
        portions.run(batch_of(3), memory.work)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        portions.run(batch_of(3), memory.work)
    assert memory.seen == [1] * 6


def _growth(limit: str | None) -> tuple[int, list[float]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = attrfast.models.vgg_small(num_classes=10, in_channels=3).eval()
    images, labels = torch.randn(640, 3, 32, 32), torch.zeros(640, dtype=torch.int64)
    loader = [(images, labels)] * 2
    score(model, [(images[:8], labels[:8])])  # what libraries set up once
    before, seen = _status("VmRSS"), []
    from attrfast import portions

    portions._PARTS = 1
    forget = portions._forget_peak
    portions._forget_peak = lambda device: (seen.append(_status("VmHWM")), forget(device))[1]
    found = score(model, loader, memory_limit=limit)
    return max([*seen[1:], _status("VmHWM")]) - before, found.raw.tolist()


def _status(field: str) -> int:
    return int(open("/proc/self/status").read().split(field + ":")[1].split()[0]) * 1024


def test_a_pass_stays_under_its_limit() -> None:
    taken, scores = zip(*(fresh.call(_growth, limit) for limit in ("128MB", None)), strict=True)
    assert taken[0] <= 128e6 < 200e6 < taken[1]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        *(("512MB", 512_000_000), ("1.5 GiB", 3 << 29), ("20kb", 20_000), (4096, 4096), ("7B", 7)),
        (None, None),
    ],
)
def test_a_limit_is_read_as_it_is_written(asked: Any, expected: int | None) -> None:
    limit = parse_memory(asked, CPU)
    assert (None if limit is None else limit.bytes) == expected


def test_a_share_is_of_the_devices_memory() -> None:
    whole, quarter, other = (parse_memory(asked, CPU) for asked in (1.0, "25%", 0.25))
    assert whole
    assert quarter
    assert other
    assert 1 << 28 < whole.bytes < 1 << 50
    assert quarter.bytes == other.bytes == whole.bytes // 4


@pytest.mark.parametrize(
    "asked", ["lots", "512", "-3MB", 0, -1, True, "0MB", "3 parsecs", float("nan"), "1e400GB"]
)
def test_a_limit_that_says_nothing_is_refused(asked: Any) -> None:
    with pytest.raises(attrfast.InputError, match="memory_limit must be bytes with their unit"):
        score(Plain(), batches(2), memory_limit=asked)
