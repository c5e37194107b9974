"""The fast tier measures elsewhere and in other ops; it must give what the readers' side gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, family, images_for, lived_in
from small_networks import NETWORKS, DataDependent
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attrfast import depthwise, ops, pointwise, stage_runs, winograd
from attrfast.batches import main_output
from attrfast.channels import Discovery, discover
from attrfast.following import PlanMismatchError
from attrfast.graph import Plan
from attrfast.plain import ReferenceBackend
from attrfast.signatures import CONVOLUTIONS
from attrfast.tiers import Runner

# In float64, relative to the largest entry of the matrix: sums run in another order, no more.
TOLERANCE = 1e-11


def matrices(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], *, guided: bool
) -> tuple[torch.Tensor, torch.Tensor, Runner, Discovery]:
    """S (N, U) by the fast tier and by the call tier, and the fast tier's runner."""
    found = discover(model, tuple(x[:2] for x in inputs))
    samples = inputs[0].shape[0]

    def forward() -> torch.Tensor:
        output = model(*inputs)
        return output if isinstance(output, torch.Tensor) else output[0]

    weights = torch.randn(samples, forward().shape[1], dtype=torch.float64)
    both = []
    for fused in (True, False):
        runner = Runner(model, found, guided=guided, absolute=False, fused=fused)
        both.append((runner, runner.run(forward, lambda out: (out * weights).sum(), samples)))
    return both[0][1], both[1][1], both[0][0], found


def assert_same(fast: torch.Tensor, called: torch.Tensor) -> None:
    fast, called = fast.detach(), called.detach()
    assert float(called.abs().max()) > 0
    assert float((fast - called).abs().max()) <= TOLERANCE * float(called.abs().max())


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_cut_gives_what_the_readers_give_on_a_family(name: str, guided: bool) -> None:
    model, images = family(name).double(), images_for(name, 2).double()
    fast, called, runner, _ = matrices(model, (images,), guided=guided)
    assert runner.plan is not None, "the fast tier did not run"
    assert_same(fast, called)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_cut_gives_what_the_readers_give_on_a_small_network(name: str, guided: bool) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = lived_in(make()).double()
    fast, called, _, _ = matrices(model, tuple(x.double() for x in inputs(3)), guided=guided)
    assert_same(fast, called)


def bytes_measured(plan: Plan, found: Discovery) -> int:
    """What taps read beyond what the stages' own backward reads anyway."""
    record = found.record
    return sum(record.shapes[value].numel() for _, value in plan.into.values())


def bytes_at_the_readers(found: Discovery) -> int:
    record = found.record
    readers = [c for c in record.calls if c.name in CONVOLUTIONS or c.name == "linear"]
    return sum(record.shapes[c.inputs[0]].numel() for c in readers if c.inputs[0] in found.channels)


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "resnet50"])
def test_where_flow_is_conserved_taps_cost_no_pass_of_their_own(name: str) -> None:
    model, images = family(name).double(), images_for(name, 2).double()
    found = discover(model, (images,))
    plan = Runner(model, found, guided=False, absolute=False).plan
    assert plan is not None
    assert plan.through
    assert bytes_at_the_readers(found) > 0
    assert bytes_measured(plan, found) == 0


def test_a_tap_sinks_through_pooling() -> None:
    """Of a map that a pass of its own must read, and its pooled form, the pooled one is measured."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4, 3),
    ).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    found = discover(model, (images,))
    plan = Runner(model, found, guided=False, absolute=False).plan
    assert plan is not None
    measured = [found.record.shapes[v].numel() for v in (*plan.through, *(v for _, v in plan.into))]
    assert measured == [8]
    fast, called, _, _ = matrices(model, (images,), guided=False)
    assert_same(fast, called)


@pytest.mark.parametrize(("recorded", "scored"), [(8, 8), (4, 4), (8, 4), (4, 8)])
def test_a_window_larger_than_the_map_is_pytorchs(recorded: int, scored: int) -> None:
    """Rounding up, PyTorch pools a map of one position by a window of two."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)),
        *(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
    ).double()
    found = discover(model, (torch.randn(2, 3, recorded, recorded, dtype=torch.float64),))
    images = torch.randn(2, 3, scored, scored, dtype=torch.float64)
    both = [
        Runner(model, found, guided=False, absolute=False, fused=fused).run(
            lambda: model(images), lambda out: (out * torch.arange(3)).sum(), 2
        )
        for fused in (True, False)
    ]
    assert_same(*both)


def test_other_calls_than_the_recorded_ones_are_met_by_the_call_tier() -> None:
    torch.manual_seed(0)
    model = lived_in(DataDependent()).double()
    once = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    found = discover(model, (once,))
    runner = Runner(model, found, guided=False, absolute=False)
    plain = Runner(model, found, guided=False, absolute=False, fused=False)
    assert runner.plan is not None
    other = -once
    for images, still_fast in ((once, True), (other, False), (once, False)):
        results = [
            r.run(lambda x=images: model(x), lambda out: out[:, 0].sum(), 2) for r in (runner, plain)
        ]
        assert_same(*results)
        assert (runner.plan is not None) == still_fast


class _Alternating(nn.Module):
    """Which of two layers of one shape runs depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(i, 4, 3) for i in (3, 4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.a if float(x.sum()) > 0 else self.b
        x = torch.relu(chosen(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


def test_another_layer_in_the_place_of_the_recorded_one_is_told_from_it() -> None:
    torch.manual_seed(0)
    model = _Alternating().double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    found = discover(model, (images,))
    runner, plain = (
        Runner(model, found, guided=False, absolute=False, fused=fused) for fused in (True, False)
    )
    assert runner.plan is not None
    results = [r.run(lambda: model(-images), lambda out: out[:, 0].sum(), 2) for r in (runner, plain)]
    assert_same(*results)


@pytest.mark.parametrize(
    ("part", "guided"), [(1, False), (40_000, False), (1, True)], ids=["one", "several", "guided"]
)
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "mobilenet_v2", "googlenet", *NETWORKS])
def test_stages_may_run_part_by_part(
    name: str, part: int, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if name in NETWORKS:
        make, inputs = NETWORKS[name]
        model, args = lived_in(make()).double(), tuple(x.double() for x in inputs(5))
    else:
        model, args = family(name).double(), (images_for(name, 3).double(),)
    monkeypatch.setattr(stage_runs, "PART", part)
    used: list[int] = []
    step = stage_runs.StageRun.samples_at_once

    def noted(run: Any, size: int, samples: int) -> int:
        weight, run.weight = run.weight, run.weight[:0]  # a large one does not keep this test from parts
        used.append(step(run, size, samples))
        run.weight = weight
        return used[-1]

    monkeypatch.setattr(stage_runs.StageRun, "samples_at_once", noted)
    fast, called, _, _ = matrices(model, args, guided=guided)
    assert name in NETWORKS or min(used) < len(args[0])
    assert_same(fast, called)


class _Together(ReferenceBackend):
    """A backend that measures many flows in one call, as that of CUDA does."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def attributions(
        self, taps: list[tuple[torch.Tensor, torch.Tensor]], absolute: bool
    ) -> list[torch.Tensor]:
        self.calls.append(len(taps))
        return [self.attribution(x, g, absolute) for x, g in taps]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", [*NETWORKS, "resnet18", "mobilenet_v3_small", "densenet121"])
def test_flows_that_wait_for_each_other_are_the_same(
    name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if name in NETWORKS:
        make, inputs = NETWORKS[name]
        model, args = lived_in(make()).double(), tuple(x.double() for x in inputs(3))
    else:
        model, args = family(name).double(), (images_for(name, 2).double(),)
    found = discover(model, args)
    output = main_output(model(*args))
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    results = []
    for backend in (ReferenceBackend(), _Together()):
        monkeypatch.setattr(ops, "backend_for", lambda device, backend=backend: backend)
        runner = Runner(model, found, guided=False, absolute=False, fused=fused)
        results.append(
            runner.run(
                lambda: model(*args), lambda out: (main_output(out) * weights).sum(), len(args[0])
            )
        )
    if not fused:
        assert max(backend.calls) > 1
    assert_same(*results)


class _Seen(TorchDispatchMode):
    """Notes which gradients convolutions were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[10]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "mobilenet_v2", "densenet121"])
def test_no_gradient_of_a_weight_is_computed(
    name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for ours in (winograd, pointwise, depthwise):
        monkeypatch.setattr(ours, "ENABLED", False)  # so that all of them are PyTorch's
    model, images = family(name), images_for(name, 2)
    found = discover(model, (images,))
    runner = Runner(model, found, guided=False, absolute=False, fused=fused)
    seen = _Seen()
    with seen:
        runner.run(lambda: model(images), lambda out: out[:, 0].sum(), 2)
    assert seen.masks
    assert all(mask == [True, False, False] for mask in seen.masks)


def test_the_images_gradient_is_never_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward ends at the first layer's filters, so it meets one convolution less than forward."""
    monkeypatch.setattr(winograd, "ENABLED", False)  # so that all of them are PyTorch's
    model, images = family("vgg11_bn"), images_for("vgg11_bn", 2)
    found = discover(model, (images,))
    seen = _Seen()
    runner = Runner(model, found, guided=False, absolute=False)
    with seen:
        runner.run(lambda: model(images), lambda out: out[:, 0].sum(), 2)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert len(seen.masks) == convolutions - 1


def test_a_mismatch_names_the_call() -> None:
    torch.manual_seed(0)
    model = lived_in(DataDependent()).double()
    once = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    other = -once
    runner = Runner(model, discover(model, (once,)), guided=False, absolute=False)
    assert runner.plan is not None
    with pytest.raises(PlanMismatchError, match=r"call \d+ is conv2d.* of .*block.weight"):
        runner._forward(lambda: model(other), lambda out: [out.sum()], 2, 1.0, None, runner.plan)
