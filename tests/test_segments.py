"""A pass in segments gives what a pass in one piece gives, and keeps less at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, family, images_for, lived_in
from small_networks import CLASSES, NETWORKS, DataDependent, Plain
from torch import nn
from torch.nn import functional

import attrfast
from attrfast.channels import discover
from attrfast.memory import peak
from attrfast.segments import boundaries, spread
from attrfast.tiers import Runner
from attrfast.trace import trace

CPU = torch.device("cpu")


def both(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], halvings: int, **options: Any
) -> list[list[torch.Tensor]]:
    """S for two objectives, by the call tier and in segments."""
    found = discover(model, tuple(x[:2] for x in inputs))
    samples = len(inputs[0])

    def forward() -> torch.Tensor:
        output = model(*inputs)
        return output if isinstance(output, torch.Tensor) else output[0]

    torch.manual_seed(5)
    weights = torch.randn(2, samples, forward().shape[1], dtype=torch.float64)
    results = []
    for count in (0, halvings):
        options = {"guided": False, "absolute": False, **options}
        runner = Runner(model, found, fused=False, **options)
        for _ in range(count):
            runner.more_segments()
        found_now = runner.matrices(forward, lambda out: [(out * w).sum() for w in weights], samples)
        results.append([each.detach().clone() for each in found_now])
    return results


def assert_same(results: list[list[torch.Tensor]]) -> None:
    whole, parts = results
    assert len(whole) == len(parts) == 2
    for a, b in zip(whole, parts, strict=True):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12 * float(a.abs().max()))


@pytest.mark.parametrize("halvings", [1, 2, 6])
@pytest.mark.parametrize(
    "name", [n for n in NETWORKS if not isinstance(NETWORKS[n][0](), DataDependent)]
)
def test_a_small_network_in_segments(name: str, halvings: int) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = lived_in(make()).double()
    assert_same(both(model, tuple(x.double() for x in inputs(3)), halvings))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_segments(name: str) -> None:
    assert_same(both(family(name).double(), (images_for(name, 2).double(),), 3))


@pytest.mark.parametrize("options", [{"guided": True}, {"absolute": True}])
def test_guided_gradients_and_sums_of_absolutes_in_segments(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = lived_in(Plain()).double()
    assert_same(both(model, (torch.randn(3, 3, 16, 16, dtype=torch.float64),), 2, **options))


def chain(depth: int, width: int = 8) -> nn.Sequential:
    convs = (m for _ in range(depth - 1) for m in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU()))
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        *(nn.ReLU(), *convs),
        nn.AdaptiveAvgPool2d(1),
        *(nn.Flatten(), nn.Linear(width, CLASSES)),
    ).eval()


def test_more_segments_keep_less() -> None:
    model, images = chain(32), torch.randn(1, 3, 64, 64)
    found = discover(model, (images,))
    taken = []
    for halvings in (0, 1, 2, 3):
        runner = Runner(model, found, guided=False, absolute=False, fused=False)
        for _ in range(halvings):
            assert runner.more_segments()

        def run(runner: Runner = runner) -> None:
            (matrix,) = runner.matrices(lambda: model(images), lambda out: [out.sum()], 1)
            assert float(matrix.abs().max()) > 0

        taken.append(peak(run, CPU, [*model.parameters(), images]))
    one = 8 * 64 * 64 * 4
    assert taken[0] >= 32 * one
    for halvings in (1, 2, 3):
        assert taken[halvings] <= (32 / 2**halvings + 8) * one


def test_cuts_part_the_bytes_evenly_and_never_at_what_is_written_to_later() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 16, 5)),
    ).eval()
    record = trace(model, (torch.randn(2, 3, 8, 8),))
    assert [call.name for call in record.calls] == [
        *("conv2d", "batch_norm", "relu", "conv2d", "relu", "flatten", "linear")
    ]
    assert [place.call for place in boundaries(record)] == [1, 3, 5, 6]
    assert all(len(place.live) == 1 for place in boundaries(record))
    even = trace(chain(16), (torch.randn(2, 3, 8, 8),))
    cuts = spread(even, boundaries(even), 4)
    assert len(cuts) == 3
    assert [round(cut.call / 8) for cut in cuts] == [1, 2, 3]


class Full(nn.Module):
    """Its second half raises what a full memory raises, if its first half ran with gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, CLASSES)
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        x = torch.relu(self.first(x))
        if x.grad_fn is not None and len(x) * x[0].nbytes >= 8 * 14 * 14 * 4:
            y = torch.relu(self.second(x))
            if y.grad_fn is not None and not x.is_leaf:
                raise torch.OutOfMemoryError("out of memory")
            return self.head(y.mean((2, 3)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def test_a_sample_that_memory_does_not_hold_is_scored_in_segments() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 16, 16, generator=generator)
    labels = torch.tensor([0, 3, 1])
    model = Full()
    got = attrfast.attribute(model, [(images, labels)], "taylor", progress=False)
    plain = nn.Sequential(
        *(model.first, nn.ReLU(), model.second, nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head),
    )
    expected = attrfast.attribute(plain, [(images, labels)], "taylor", progress=False)
    torch.testing.assert_close(got.raw, expected.raw, rtol=1e-5, atol=1e-8)
    assert got.samples == 3


def test_a_limit_that_a_sample_exceeds_is_kept_by_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first portion seems to take too much; the next ones are run in as many segments as it takes."""
    model, images, labels = chain(12), torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64)
    seen: list[int] = []
    halve = Runner.more_segments

    def noted(self: Runner) -> bool:
        more = halve(self)
        seen.append(self.segments)
        return more

    monkeypatch.setattr(Runner, "more_segments", noted)
    monkeypatch.setattr("attrfast.portions._peak", lambda _: 10_000 if len(seen) < 3 else 100)
    monkeypatch.setattr("attrfast.portions._taken", lambda _: 0)
    monkeypatch.setattr("attrfast.portions._forget_peak", lambda _: True)
    found = attrfast.attribute(
        model, [(images, labels)], ["taylor", "apoz"], memory_limit=1000, progress=False
    )
    assert seen == [2, 4, 8]
    expected = attrfast.attribute(model, [(images, labels)], ["taylor", "apoz"], progress=False)
    for name in found:
        torch.testing.assert_close(found[name].raw, expected[name].raw, rtol=1e-5, atol=1e-8)


def test_a_model_that_goes_another_way_is_not_scored_wrongly() -> None:
    class Wayward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.one(x))
            if len(x) == 1:
                x = functional.softplus(x)
            return self.head(torch.relu(self.two(x)).mean((2, 3)))

    model = Wayward().eval()
    found = discover(model, (torch.randn(2, 3, 8, 8),))
    runner = Runner(model, found, guided=False, absolute=False)
    assert runner.more_segments()
    with pytest.raises(attrfast.ModelError, match="goes another way than when it was recorded"):
        runner.run(lambda: model(torch.randn(1, 3, 8, 8)), lambda out: out.sum(), 1)
