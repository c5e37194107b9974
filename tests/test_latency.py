"""What a model's latency is said to be, and what its filters cost, on a clock that tells what it should."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latency_clock import FakeTime, by_blocks, install
from small_networks import NETWORKS, FixedView, Plain
from torch import nn

from attrfast.batches import Batch, unpack
from attrfast.channels import find_units
from attrfast.errors import InputError, ModelError
from attrfast.latency import Gauge, Limit, inputs_of_a_pass, parse_limit
from attrfast.latency import weighed as weigh
from attrfast.latency.clock import pass_seconds, whole_pass_seconds
from attrfast.surgery import cut
from attrfast.trace import trace

CPU = torch.device("cpu")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    return install(monkeypatch, by_blocks(1))


def batch(*inputs: torch.Tensor) -> Batch:
    return unpack((inputs, None), CPU)


def made(model: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path) -> Gauge:
    return Gauge(model, batch(*inputs), CPU, folder=folder, progress=False)


def narrowed(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], keep: Callable[[int], int]
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A copy without the last filters of every layer that may lose them, and its gates."""
    units = find_units(model, inputs)
    removed = torch.zeros(len(units), dtype=torch.bool)
    for layer in units.layers:
        free = [unit for unit in layer.units if units.frozen[unit] is None]
        if free:
            removed[free[keep(len(free)) :]] = True
    smaller = copy.deepcopy(model).eval()
    cut(smaller, units, removed)
    return smaller, {name: ~removed[row] for name, row in units.filters.items()}


PREDICTED = sorted(NETWORKS.keys() - {"data dependent", "never used", "fixed view"})


@pytest.mark.parametrize("name", PREDICTED)
def test_a_latency_that_follows_the_law_is_predicted(name: str, fake: FakeTime, tmp_path: Path) -> None:
    """Residual, depthwise, grouped and transposed convolutions too, at widths that were not timed."""
    build, inputs_for = NETWORKS[name]
    model, inputs = build().eval(), inputs_for(2)
    gauge = made(model, inputs, tmp_path)
    chance = random.Random(3)
    for _ in range(3):
        smaller, gates = narrowed(model, inputs, lambda n: max(1, n - chance.randrange(n)))
        found = gauge.read(smaller, gates)
        assert found.predicted == pytest.approx(found.seconds, rel=0.03)
        assert found.share == pytest.approx(found.seconds / gauge.original)


@pytest.mark.parametrize("block", [1, 8, 16])
def test_blocks_of_channels_are_found_and_widths_kept_to_them(
    block: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, by_blocks(block))
    model, inputs = Plain(128).eval(), (torch.randn(1, 3, 8, 8),)
    gauge = made(model, inputs, tmp_path)
    assert gauge.block == block
    assert set(gauge.widths().values()) == {block}
    for keep in (lambda n: n // 2, lambda n: 5 * n // 8, lambda n: n // 3):  # the last is ragged
        smaller, gates = narrowed(model, inputs, keep)
        found = gauge.read(smaller, gates)
        assert found.predicted == pytest.approx(found.seconds, rel=0.1)


def test_predictions_hold_where_calls_wait_longer_than_when_they_were_timed(
    fake: FakeTime, tmp_path: Path
) -> None:
    model, inputs = Plain(64).eval(), (torch.randn(2, 3, 16, 16),)
    gauge = made(model, inputs, tmp_path)
    fake.wait = gauge.original / 50  # for each of a dozen calls
    for keep in (lambda n: 3 * n // 4, lambda n: n // 2, lambda n: n // 3):
        smaller, gates = narrowed(model, inputs, keep)
        found = gauge.read(smaller, gates)
        plain = (
            fake.of_a_pass(model, inputs, {}, CPU) * gauge._by_law(gauge._removed(gates)) / gauge._whole
        )
        assert found.predicted == pytest.approx(found.seconds, rel=0.05)
        assert abs(plain - found.seconds) > 2 * abs(found.predicted - found.seconds)


@pytest.mark.parametrize("first", [5, 60])
def test_copies_that_met_another_state_of_the_machine_are_timed_again(
    first: int, fake: FakeTime, tmp_path: Path
) -> None:
    model, inputs = Plain(64).eval(), (torch.randn(2, 3, 16, 16),)
    quiet = made(model, inputs, tmp_path / "quiet")
    fake.disturbed = range(fake.passes + first, fake.passes + first + 30)
    seen = fake.passes
    gauge = made(model, inputs, tmp_path / "disturbed")
    assert fake.passes - seen > seen, "nothing was timed again"
    assert quiet._whole == pytest.approx(gauge._whole, rel=1e-3)
    assert quiet._few == pytest.approx(gauge._few, rel=1e-3)


def test_a_narrow_layer_may_still_lose_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, by_blocks(16))
    gauge = made(Plain(64).eval(), (torch.randn(1, 3, 8, 8),), tmp_path)
    gauge.block = 128
    assert gauge.widths() == {"features.0": 32, "features.4": 64, "features.7": 64}


def test_a_unit_costs_what_the_model_saves_without_it(fake: FakeTime, tmp_path: Path) -> None:
    model, inputs = Plain(32).eval(), (torch.randn(2, 3, 16, 16),)
    gauge, units = made(model, inputs, tmp_path), find_units(model, inputs)
    gates = {name: torch.ones(len(row), dtype=torch.bool) for name, row in units.filters.items()}
    savings = gauge.savings(gates, units)
    for layer in units.layers:
        removed = torch.zeros(len(units), dtype=torch.bool)
        removed[layer.units[0]] = True
        smaller = copy.deepcopy(model)
        cut(smaller, units, removed)
        saved = gauge.original - fake.of_a_pass(smaller, inputs, {}, CPU)
        assert savings[layer.units[0]] == pytest.approx(saved, rel=0.05)


def test_within_the_last_block_only_what_is_done_by_channels_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, by_blocks(16))
    model, inputs = Plain(128).eval(), (torch.randn(1, 3, 8, 8),)
    gauge = made(model, inputs, tmp_path)
    smaller, gates = narrowed(model, inputs, lambda n: 16)
    wide = gauge.savings(
        {name: torch.ones_like(gate) for name, gate in gates.items()}, find_units(model, inputs)
    )
    narrow = gauge.savings(gates, find_units(smaller, inputs))
    assert 0 < narrow.max() < 0.2 * wide.min()


def test_importance_is_weighed_against_cost() -> None:
    importance = torch.tensor([1.0, 1.0, 0.0, -1.0, -1.0, 1.0])
    savings = torch.tensor([1.0, 4.0, 1.0, 1.0, 4.0, 0.0], dtype=torch.float64)
    weighed = weigh(importance, savings, 1.0)
    assert torch.argsort(weighed).tolist() == [4, 3, 2, 1, 0, 5]
    assert weighed[2] == 0
    assert bool(torch.isfinite(weighed).all())
    assert torch.equal(weigh(importance, torch.zeros(6), 1.0), importance)


# -- the table -------------------------------------------------------------------------------------------


def test_a_table_is_used_again(fake: FakeTime, tmp_path: Path) -> None:
    model, inputs = Plain().eval(), (torch.randn(2, 3, 16, 16),)
    first = made(model, inputs, tmp_path)
    timed = fake.passes
    again = made(Plain().eval(), inputs, tmp_path)
    assert fake.passes == timed
    smaller, gates = narrowed(model, inputs, lambda n: n // 2)
    assert again.read(smaller, gates) == first.read(smaller, gates)
    made(model, (torch.randn(3, 3, 16, 16),), tmp_path)  # other shapes are other layers
    assert fake.passes > timed
    (file,) = tmp_path.iterdir()
    samples = [row for rows in json.loads(file.read_text())["layers"].values() for row in rows]
    assert all(low <= median <= high for *_, median, low, high in samples)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace("e-06", "e-05", 1),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_a_damaged_table_is_told_and_made_again(
    damage: Callable[[str], str], fake: FakeTime, tmp_path: Path
) -> None:
    model, inputs = Plain().eval(), (torch.randn(2, 3, 16, 16),)
    made(model, inputs, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    with pytest.warns(UserWarning, match="can't be used"):
        made(model, inputs, tmp_path)
    assert file.read_text() == whole
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_can_t_be_written_is_named(fake: FakeTime, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give another folder as latency_cache"):
        made(Plain().eval(), (torch.randn(1, 3, 16, 16),), tmp_path / "file")


# -- models ----------------------------------------------------------------------------------------------


def test_a_model_with_sizes_written_out_is_timed_where_it_can_be_cut(
    fake: FakeTime, tmp_path: Path
) -> None:
    model, inputs = FixedView().eval(), (torch.randn(2, 3, 16, 16),)
    gauge = made(model, inputs, tmp_path)
    units = find_units(model, inputs)
    removed = torch.zeros(len(units), dtype=torch.bool)
    removed[units.filters["first"][4:]] = True
    smaller = copy.deepcopy(model)
    cut(smaller, units, removed)
    found = gauge.read(smaller, {name: ~removed[row] for name, row in units.filters.items()})
    assert found.predicted == pytest.approx(found.seconds, rel=0.03)


class Moody(Plain):
    """Does more in every seventh pass."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Moody.passes += 1
        return super().forward(x if Moody.passes % 7 else x * 2)


def test_a_model_that_makes_other_calls_every_time_is_refused(fake: FakeTime, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="makes the same calls in every pass"):
        made(Moody().eval(), (torch.randn(1, 3, 16, 16),), tmp_path)


def test_the_model_is_left_as_it_is(fake: FakeTime, tmp_path: Path) -> None:
    model = Plain().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    inputs = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),)
    made(model, inputs, tmp_path)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_the_real_clock_meets_every_call() -> None:
    model, image = Plain().eval(), torch.randn(1, 3, 16, 16)
    seconds = pass_seconds(model, (image,), {}, CPU)
    assert len(seconds) == len(trace(model, (image,)).calls)
    assert all(value > 0 for value in (*seconds, whole_pass_seconds(model, (image,), {}, CPU)))


# -- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "limit"),
    [
        ("0.5x", Limit(0.5, True)),
        (" .25 × ", Limit(0.25, True)),
        (1, Limit(1.0, True)),
        (0.3, Limit(0.3, True)),
        ("12ms", Limit(0.012, False)),
        ("0.5 s", Limit(0.5, False)),
        ("800us", Limit(800e-6, False)),
    ],
)
def test_a_limit_is_a_share_or_a_time(asked: Any, limit: Limit) -> None:
    found = parse_limit(asked)
    assert (found.relative, found.value) == (limit.relative, pytest.approx(limit.value))
    assert found.seconds(2.0) == pytest.approx(limit.value * (2 if limit.relative else 1))


@pytest.mark.parametrize("asked", ["", "2x", "0x", "fast", "12", 12, 0, -0.5, True, None, float("nan")])
def test_a_limit_without_a_sense_is_refused(asked: Any) -> None:
    with pytest.raises(InputError, match="max_latency must be a share"):
        parse_limit(asked)


@pytest.mark.parametrize(
    ("asked", "samples"),
    [(None, 1), (5, 5), (torch.randn(4, 3, 8, 8), 4), ([torch.randn(2, 3, 8, 8)], 2)],
)
def test_inputs_of_a_pass(asked: Any, samples: int) -> None:
    found = inputs_of_a_pass(asked, batch(torch.randn(2, 3, 16, 16)), CPU)
    assert found.samples == samples
    assert [len(tensor) for tensor in found.args] == [samples]


@pytest.mark.parametrize("asked", [0, -1, True, "image", torch.tensor(1.0)])
def test_inputs_that_are_none_are_refused(asked: Any) -> None:
    with pytest.raises(InputError, match="input"):
        inputs_of_a_pass(asked, batch(torch.randn(2, 3, 16, 16)), CPU)
