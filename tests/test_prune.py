"""`prune` from a model and a loader to a smaller model, its history and its gates."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import FAMILIES, family, images_for, lived_in
from small_networks import CLASSES, NETWORKS, Grouped, Plain, Reused
from torch import nn

import attrfast
from attrfast.channels import find_units
from attrfast.cost import cost
from attrfast.masking import masked


def network() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Plain())


def loader(batches: int = 3, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 16, 16, generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for _ in range(batches)
    ]


def prune(model: nn.Module, data: Any = None, **options: Any) -> attrfast.PruneResult:
    options = {"finetune": 0, "progress": False, **options}
    return attrfast.prune(model, loader() if data is None else data, **options)


# -- targets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.5, 0.2])
def test_keep_ratio_is_reached_and_not_overshot(ratio: float) -> None:
    result = prune(network(), keep_ratio=ratio, filters_per_step=4)
    last, first = result.history[-1], result.history[0]
    assert last.filters <= ratio * first.filters
    assert last.filters > ratio * first.filters - 1  # every unit here is one filter
    assert last.phi == last.filters / first.filters
    assert sum(int(gate.sum()) for gate in result.gates.values()) == last.filters


@pytest.mark.parametrize("target", [0.7, 0.3])
@pytest.mark.parametrize("name", ["max_macs", "max_params"])
def test_a_share_of_the_cost_is_reached(name: str, target: float) -> None:
    result = prune(network(), **{name: target}, filters_per_step=5)
    first, last = result.history[0], result.history[-1]
    what = name.removeprefix("max_")
    assert getattr(last, what) <= target * getattr(first, what)
    assert getattr(result.history[-2], what) > target * getattr(first, what)
    assert name in result.stopped


def test_a_target_may_be_a_count() -> None:
    model = network()
    whole = cost(model, (torch.randn(1, 3, 16, 16),))
    limit = whole.params // 2
    assert prune(model, max_params=limit).history[-1].params <= limit


def test_several_targets_all_hold() -> None:
    result = prune(network(), keep_ratio=0.8, max_macs=0.4, max_params=0.9)
    first, last = result.history[0], result.history[-1]
    assert last.phi <= 0.8
    assert last.macs <= 0.4 * first.macs
    assert last.params <= 0.9 * first.params


def test_an_accuracy_drop_ends_the_run_at_the_last_model_within_it() -> None:
    model = network()
    images = torch.cat([x for x, _ in loader()])
    with torch.no_grad():
        data = [(images, model(images).argmax(1))]  # top-1 is 100% to begin with
    result = prune(model, data, max_accuracy_drop=0.2, filters_per_step=2)
    assert result.history[0].top1 == 1
    assert all(row.top1 >= 0.8 for row in result.history)
    with torch.no_grad():
        kept = float((result.model(images).argmax(1) == data[0][1]).float().mean())
    assert kept == pytest.approx(result.history[-1].top1)
    assert "max_accuracy_drop" in result.stopped or "nothing more" in result.stopped


# -- history, gates and the model ----------------------------------------------------------------------------


def test_history_tells_what_the_models_measure() -> None:
    data = loader()
    seen: list[tuple[attrfast.Step, nn.Module]] = []
    result = prune(
        network(),
        data,
        keep_ratio=0.5,
        filters_per_step=6,
        callback=lambda row, model: seen.append((row, copy.deepcopy(model))),
    )
    assert [row.step for row in result.history] == list(range(len(result.history)))
    assert [row for row, _ in seen] == result.history[1:]
    whole = cost(network(), (data[0][0],))
    for row, model in seen:
        found = cost(model, (data[0][0],))
        assert (row.macs, row.params) == (found.macs, found.params)
        assert row.params == sum(p.numel() for p in model.parameters())
        assert row.macs_pruned_percent == pytest.approx(100 * (1 - found.macs / whole.macs))
        assert row.params_pruned_percent == pytest.approx(100 * (1 - found.params / whole.params))
        with torch.no_grad():
            logits = torch.cat([model.eval()(x) for x, _ in data])
        labels = torch.cat([y for _, y in data])
        assert row.top1 == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
        assert row.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5)
        assert min(row.seconds_scoring, row.seconds_cutting, row.seconds_tuning) >= 0
        assert row.seconds_scoring > 0
    for before, after in zip(result.history, result.history[1:], strict=False):
        assert sum(after.removed.values()) == before.filters - after.filters >= 6 or after.phi <= 0.5


def test_each_step_removes_the_lowest_scores_of_all_layers() -> None:
    model, data = network(), loader()
    scores = attrfast.attribute(model, data, criterion="taylor", progress=False)
    result = prune(model, data, criterion="taylor", keep_ratio=0.75, filters_per_step=10)
    assert len(result.history) == 2
    values = torch.cat([scores[name] for name in result.gates])
    kept = torch.cat(list(result.gates.values()))
    assert float(values[~kept].max()) <= float(values[kept].min())
    assert int((~kept).sum()) == 10


def test_without_fine_tuning_the_result_is_the_masked_original() -> None:
    model, data = network().double(), [(x.double(), y) for x, y in loader()]
    result = prune(model, data, keep_ratio=0.4, filters_per_step=7)
    units = find_units(model, (data[0][0],))
    removed = torch.zeros(len(units), dtype=torch.bool)
    for name, gate in result.gates.items():
        removed[units.filters[name][~gate]] = True
    with torch.no_grad(), masked(model.eval(), units, removed):
        expected = model(data[0][0])
    torch.testing.assert_close(result.model.eval()(data[0][0]), expected, rtol=1e-10, atol=1e-12)


def test_the_users_model_is_not_touched() -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    result = prune(model, keep_ratio=0.5, finetune=1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert result.model is not model
    assert result.model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_inplace_puts_the_result_into_the_users_model() -> None:
    model = network()
    copied = prune(copy.deepcopy(model), keep_ratio=0.5)
    result = prune(model, keep_ratio=0.5, inplace=True)
    assert result.model is model
    assert model.features[0].out_channels == copied.model.features[0].out_channels
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), copied.model(images))


def test_an_inplace_run_that_fails_leaves_the_model_whole() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())

    def broken(_: nn.Module, step: int) -> None:
        if step == 2:
            raise RuntimeError("out of coffee")

    with pytest.raises(attrfast.AttrfastError, match="out of coffee") as caught:
        prune(model, keep_ratio=0.3, filters_per_step=4, inplace=True, finetune=broken)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_same_seed_gives_the_same_model() -> None:
    a, b, c = (
        prune(network(), keep_ratio=0.5, finetune=1, seed=seed, criterion="random").model
        for seed in (0, 0, 1)
    )
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(a(images), b(images))
    assert not torch.equal(a(images), c(images))


def test_summary_shows_every_step() -> None:
    result = prune(network(), keep_ratio=0.5, filters_per_step=8)
    text = result.summary()
    for row in result.history:
        assert f"{row.macs_pruned_percent:.1f}%" in text
        assert f"{row.phi:.3f}" in text
    assert "keep_ratio" in text


def test_a_generator_may_be_given() -> None:
    with pytest.warns(UserWarning, match="kept in memory"):
        result = prune(network(), (batch for batch in loader()), keep_ratio=0.6)
    assert result.history[-1].phi <= 0.6


# -- limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [Plain, Grouped, Reused])
def test_round_to_keeps_the_widths_of_pruned_layers_multiples(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    result = prune(lived_in(model()), keep_ratio=0.7, round_to=4, filters_per_step=4)
    narrower = [gate for gate in result.gates.values() if not bool(gate.all())]
    assert narrower
    assert all(int(gate.sum()) % 4 == 0 for gate in narrower)


def test_min_filters_are_kept() -> None:
    result = prune(network(), keep_ratio=0.35, min_filters=4)
    assert min(int(gate.sum()) for gate in result.gates.values()) >= 4


def test_ignored_layers_stay_whole() -> None:
    model = network()
    for ignore in (["features.4"], [model.features[4]], ["features.[4]"]):
        result = prune(model, keep_ratio=0.6, ignore=ignore)
        assert bool(result.gates["features.4"].all())
        assert not bool(result.gates["features.7"].all())


def test_outputs_of_the_classifier_stay() -> None:
    result = prune(network(), keep_ratio=0.2)
    assert result.model(torch.randn(1, 3, 16, 16)).shape == (1, CLASSES)


def test_what_cannot_be_cut_is_left_whole_with_a_warning() -> None:
    make, inputs = NETWORKS["fixed view"]
    torch.manual_seed(0)
    data = [(inputs(4)[0], torch.tensor([0, 1, 2, 3]))]
    with pytest.warns(UserWarning, match="left whole: second"):
        result = prune(make(), data, keep_ratio=0.8)
    assert bool(result.gates["second"].all())
    assert not bool(result.gates["first"].all())


# -- fine-tuning ---------------------------------------------------------------------------------------------


def test_fine_tuning_lowers_the_loss() -> None:
    data = loader()
    rough = prune(network(), data, keep_ratio=0.5)
    tuned = prune(network(), data, keep_ratio=0.5, finetune=attrfast.FineTune(epochs=5, lr=0.05))
    assert tuned.history[-1].loss < rough.history[-1].loss


def test_a_callable_tunes_the_smaller_model_step_by_step() -> None:
    seen: list[tuple[int, int]] = []

    def tune(model: nn.Module, step: int) -> None:
        seen.append((step, sum(p.numel() for p in model.parameters())))
        with torch.no_grad():
            model.classifier[3].bias.fill_(step)

    result = prune(network(), keep_ratio=0.5, filters_per_step=8, finetune=tune)
    assert [step for step, _ in seen] == [row.step for row in result.history[1:]]
    assert [size for _, size in seen] == [row.params for row in result.history[1:]]
    assert torch.equal(result.model.classifier[3].bias, torch.full((CLASSES,), float(len(seen))))


@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": "adam", "schedule": "constant"},
        {"optimizer": "adamw", "schedule": "onecycle", "label_smoothing": 0.1},
        {"optimizer": lambda p: torch.optim.RMSprop(p, lr=1e-3)},
        {"schedule": lambda o, steps: torch.optim.lr_scheduler.LinearLR(o, total_iters=steps)},
        {"max_grad_norm": 0.1, "epochs": 2},
        {"amp_dtype": torch.bfloat16},
    ],
    ids=lambda how: ", ".join(how),
)
def test_every_way_of_tuning_trains(how: dict[str, Any]) -> None:
    untuned = prune(network(), keep_ratio=0.7).model
    tuned = prune(network(), keep_ratio=0.7, finetune=attrfast.FineTune(**how)).model
    assert all(torch.isfinite(p).all() for p in tuned.parameters())
    assert not torch.equal(untuned.features[0].weight, tuned.features[0].weight)


def test_final_fine_tuning_comes_once_after_the_last_step() -> None:
    steps: list[int] = []
    result = prune(
        network(),
        keep_ratio=0.6,
        filters_per_step=8,
        final_finetune=lambda model, step: steps.append(step),
    )
    assert steps == [len(result.history)]


# -- families ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:left whole")
@pytest.mark.parametrize("name", FAMILIES)
def test_family_loses_30_percent_of_its_filters_and_trains(name: str) -> None:
    model, images, labels = family(name), images_for(name, 2), torch.tensor([1, 7])
    result = prune(model, [(images, labels)], keep_ratio=0.7, filters_per_step=10**6)
    assert result.history[-1].phi <= 0.7
    assert result.history[-1].macs < result.history[0].macs
    smaller = result.model.train()
    output = smaller(images)
    logits = output if isinstance(output, torch.Tensor) else output[0]
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    torch.optim.SGD(smaller.parameters(), lr=1e-3).step()
    assert math.isfinite(float(loss.detach()))


@pytest.mark.filterwarnings("ignore:left whole")
@pytest.mark.parametrize("name", NETWORKS)
def test_small_network_loses_30_percent_of_its_filters(name: str) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    data = [(inputs(4), torch.tensor([0, 1, 2, 3]))]
    share = 0.8 if name == "fixed view" else 0.7  # one of its two layers must stay
    result = prune(lived_in(make()), data, keep_ratio=share, finetune=1)
    assert result.history[-1].phi <= share
