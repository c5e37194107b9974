"""`prune` to a latency: what goes, when it stops, and what it says, on a clock that tells what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latency_clock import FakeTime, by_blocks, install
from small_networks import CLASSES, NETWORKS, Plain
from torch import nn

import attrfast
from attrfast.errors import InputError, TargetError

LIKED = 8


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return install(monkeypatch, by_blocks(LIKED))


def network(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return Plain(width)


def loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4, 3, 8, 8, generator=generator),
            torch.randint(CLASSES, (4,), generator=generator),
        )
        for _ in range(2)
    ]


def prune(model: nn.Module, folder: Path, data: Any = None, **options: Any) -> attrfast.PruneResult:
    options = {"finetune": 0, "progress": False, "latency_cache": folder, **options}
    return attrfast.prune(model, loader() if data is None else data, **options)


def seconds(fake: FakeTime, model: nn.Module, samples: int = 1) -> float:
    return fake.of_a_pass(model, (torch.randn(samples, 3, 8, 8),), {}, torch.device("cpu"))


@pytest.mark.parametrize("target", ["0.5x", 0.3, "time"])
def test_the_latency_is_reached_and_hardly_overshot(target: Any, fake: FakeTime, tmp_path: Path) -> None:
    model = network()
    whole = seconds(fake, model)
    share = {"0.5x": 0.5, "time": 0.4}.get(target, target)
    result = prune(model, tmp_path, max_latency=f"{0.4 * whole:.9f}s" if target == "time" else target)
    left = seconds(fake, result.model) / whole
    assert 0.8 * share < left <= share
    assert result.stopped == "max_latency reached"
    first, last = result.history[0], result.history[-1]
    assert (first.latency, first.latency_share) == (pytest.approx(whole), 1.0)
    assert last.latency_share == pytest.approx(left)
    assert last.latency == pytest.approx(left * whole)
    assert last.latency_predicted == pytest.approx(last.latency, rel=0.1)


def test_widths_are_what_the_device_likes_unless_others_are_asked_for(
    fake: FakeTime, tmp_path: Path
) -> None:
    liked = prune(network(), tmp_path, max_latency=0.5)
    assert {int(gate.sum()) % LIKED for gate in liked.gates.values()} == {0}
    asked = prune(network(), tmp_path, max_latency=0.5, round_to=3, criterion="l1")
    changed = [int(gate.sum()) for gate in asked.gates.values() if not bool(gate.all())]
    assert {width % 3 for width in changed} == {0}


@pytest.mark.parametrize("surprise", [1.2, 0.8])
def test_a_model_that_is_not_what_was_predicted_is_measured(
    surprise: float, fake: FakeTime, tmp_path: Path
) -> None:
    """What was measured counts: pruning goes on where it is slower, and stops early where it is faster."""
    fake.surprise = surprise
    model = network()
    result = prune(model, tmp_path, max_latency=0.5)
    left = surprise * seconds(fake, result.model) / seconds(fake, model)
    assert 0.4 < left <= 0.5
    last = result.history[-1]
    assert last.latency == pytest.approx(surprise * last.latency_predicted, rel=0.15)


class OneSlowLayer(nn.Module):
    """Its first layer works on 64 times as many positions as its second."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Conv2d(3, 64, 3, padding=1)
        self.pool = nn.AvgPool2d(8)
        self.middle = nn.Conv2d(64, 64, 1)
        self.quick = nn.Conv2d(64, 64, 1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.middle(self.pool(torch.relu(self.slow(x)))))
        return self.head(torch.relu(self.quick(x)).mean((2, 3)))


def test_filters_that_cost_time_go_first_where_time_has_weight(fake: FakeTime, tmp_path: Path) -> None:
    torch.manual_seed(0)
    timed = prune(OneSlowLayer(), tmp_path, max_latency=0.6, latency_weight=1.0, criterion="random")
    counted = prune(
        OneSlowLayer(),
        tmp_path,
        max_latency=None,
        latency_cache=None,
        keep_ratio=0.7,
        criterion="random",
    )
    gone = {name: float((~gate).sum()) for name, gate in timed.gates.items()}
    assert gone["slow"] > 4 * gone["quick"]
    gone = {name: float((~gate).sum()) for name, gate in counted.gates.items()}
    assert gone["slow"] < 2 * gone["quick"]


def test_without_weight_the_order_is_that_of_importance(fake: FakeTime, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OneSlowLayer()
    timed = prune(model, tmp_path, max_latency=0.6, criterion="l1", round_to=8)
    left = sum(int(gate.sum()) for gate in timed.gates.values())
    counted = prune(
        model,
        tmp_path,
        max_latency=None,
        latency_cache=None,
        keep_ratio=left / sum(len(gate) for gate in timed.gates.values()),
        criterion="l1",
        round_to=8,
    )
    assert all(torch.equal(timed.gates[name], counted.gates[name]) for name in timed.gates)


def test_all_targets_must_hold(fake: FakeTime, tmp_path: Path) -> None:
    model = network()
    result = prune(model, tmp_path, max_latency=0.7, max_params=0.2)
    assert result.history[-1].params <= 0.2 * result.history[0].params
    assert seconds(fake, result.model) <= 0.7 * seconds(fake, model)
    assert result.stopped == "max_params and max_latency reached"


def test_a_latency_out_of_reach_says_how_close_it_gets(fake: FakeTime, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"of the latency is left where max_latency asks for 0\.1%"):
        prune(network(), tmp_path, max_latency=0.001)


def test_a_criterion_that_trains_is_weighed_too(fake: FakeTime, tmp_path: Path) -> None:
    model = network(32)
    criterion = attrfast.criteria.Soft(epochs=1)
    result = prune(model, tmp_path, max_latency=0.6, criterion=criterion, filters_per_step=40)
    assert seconds(fake, result.model) <= 0.6 * seconds(fake, model)


@pytest.mark.parametrize("samples", [None, 3])
def test_inputs_of_several_tensors_are_timed(
    samples: int | None, fake: FakeTime, tmp_path: Path
) -> None:
    build, inputs_for = NETWORKS["several inputs and outputs"]
    data = [(inputs_for(2), torch.zeros(2, dtype=torch.long))]
    result = prune(build(), tmp_path, data, max_latency=0.9, latency_input=samples, criterion="l1")
    assert result.history[-1].latency_share <= 0.9


def test_a_run_goes_on_where_it_was_cut_off(fake: FakeTime, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_latency": 0.4,
        "filters_per_step": 24,
        "output_dir": tmp_path / "run",
    }
    whole = prune(network(), tmp_path, **{**options, "output_dir": tmp_path / "other"})

    def stop(row: attrfast.Step, model: nn.Module) -> None:
        if row.step == 1:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after step 1"):
        assert prune(network(), tmp_path, callback=stop, **options).interrupted
    again = prune(network(), tmp_path, resume=True, **options)
    assert [row.latency for row in again.history] == [row.latency for row in whole.history]
    assert all(torch.equal(whole.gates[name], gate) for name, gate in again.gates.items())
    with pytest.raises(InputError, match="other settings"):
        prune(network(), tmp_path, resume=True, latency_input=2, **options)


def test_the_summary_shows_predicted_and_measured(fake: FakeTime, tmp_path: Path) -> None:
    text = prune(network(), tmp_path, max_latency=0.5).summary()
    assert {"latency", "predicted", "100.0%"} <= set(text.replace("┃", " ").replace("│", " ").split())
    assert "latency" not in prune(network(), tmp_path, latency_cache=None, max_macs=0.5).summary()


@pytest.mark.parametrize(
    "options", [{"latency_input": 1}, {"latency_device": "cpu"}, {"latency_cache": "tables"}]
)
def test_what_is_timed_needs_a_latency(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no max_latency"):
        prune(network(), tmp_path, max_macs=0.5, **{"latency_cache": None, **options})


def test_a_latency_without_a_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_latency must be a share"):
        prune(network(), tmp_path, max_latency="fast")
