"""Scoring that ends when the lowest filters are settled."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset

import attrfast
from attrfast.confidence import FIRST, Groups, Looks
from attrfast.distributed import Group
from attrfast.stopping import are_long_and_shuffled
from attrfast.units import Layer, Units


def network() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Plain())


def loader(samples: int, batch_size: int = 64, *, shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, 3, 16, 16, generator=generator)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=shuffle)


def score(model: nn.Module, batches: Any, *args: Any, **options: Any) -> Any:
    options = {"stop": "confident", "progress": False, **options}
    return attrfast.attribute(model, batches, *args, **options)


def units_of(count: int, layers: int = 1) -> Units:
    rows = torch.arange(count).chunk(layers)
    names = [f"layer{i}" for i in range(layers)]
    filters = dict(zip(names, rows, strict=True))
    return Units(
        filters=filters,
        outputs=filters,
        inputs={},
        depthwise=frozenset(),
        layers=tuple(Layer(n, (n,), tuple(r.tolist())) for n, r in filters.items()),
        layer_of=torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)]),
        size=torch.ones(count, dtype=torch.int64),
        frozen=(None,) * count,
    )


def mean(totals: torch.Tensor, samples: int) -> torch.Tensor:
    return totals / samples


# -- groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 70, [16] * 200, [7, 300, 1, 5000, 64], [1024], [0, 3, 0, 40]])
def test_groups_add_up_to_the_total_whatever_the_batches(sizes: list[int]) -> None:
    torch.manual_seed(0)
    values = torch.randn(sum(sizes), 5, dtype=torch.float64)
    groups = Groups(5, torch.device("cpu"))
    for part in values.split(sizes):
        groups.add(part)
    assert groups.samples == len(values)
    torch.testing.assert_close(groups.deviations().sum(0), torch.zeros(5, dtype=torch.float64))
    whole = Groups(5, torch.device("cpu"))
    whole.add(values)
    torch.testing.assert_close(groups.deviations(), whole.deviations())


def test_deviations_estimate_the_variance_of_the_total() -> None:
    torch.manual_seed(0)
    spread = torch.tensor([1.0, 5.0, 0.0], dtype=torch.float64)
    estimates = []
    for _ in range(50):
        groups = Groups(3, torch.device("cpu"))
        groups.add(torch.randn(2000, 3, dtype=torch.float64) * spread + 7)
        estimates.append(groups.deviations().square().sum(0))
    found = torch.stack(estimates).mean(0)
    torch.testing.assert_close(found, 2000 * spread**2, rtol=0.1, atol=1e-9)


def test_a_drift_from_batch_to_batch_makes_the_total_less_certain() -> None:
    torch.manual_seed(0)
    values, drift = torch.randn(3200, 1), torch.linspace(-3, 3, 3200)[:, None]
    steady, drifting = (Groups(1, torch.device("cpu")) for _ in range(2))
    steady.add(values + drift[torch.randperm(3200)])
    drifting.add(values + drift)
    assert drifting.deviations().square().sum() > 10 * steady.deviations().square().sum()


# -- looks -----------------------------------------------------------------------------------------------


def looked(means: torch.Tensor, noise: float, samples: int, part: float, **options: Any) -> Looks:
    """One look at samples that scatter around these means."""
    torch.manual_seed(0)
    values = means + noise * torch.randn(samples, len(means), dtype=torch.float64)
    groups = Groups(len(means), torch.device("cpu"))
    groups.add(values)
    options = {"confidence": 0.95, "lowest": 10, "seed": 0, **options}
    looks = Looks(units_of(len(means)), mean, **options)
    looks.look(values.sum(0), groups, part)
    return looks


def test_what_lies_far_apart_is_settled_and_what_is_equal_is_not() -> None:
    apart = torch.cat([torch.zeros(10), torch.ones(30)]).double()
    found = looked(apart, 0.5, 2000, 0.0)
    assert found.settled
    assert not bool(found.undecided.any())
    same = looked(torch.ones(40).double(), 0.5, 2000, 0.0)
    assert not same.settled
    assert int(same.undecided.sum()) > 20


def test_one_pair_in_doubt_is_tolerated_among_many_filters_and_not_among_few() -> None:
    means = torch.arange(120).double()
    means[40] = means[39]
    found = looked(means, 1.0, 2000, 0.0, lowest=40)
    assert found.settled
    assert torch.nonzero(found.undecided).flatten().tolist() == [39, 40]
    assert looked(means, 1.0, 2000, 0.0, lowest=20).settled
    means[15:25] = means[19]
    assert not looked(means, 1.0, 2000, 0.0, lowest=20).settled


def test_what_is_rarely_exchanged_but_then_in_numbers_is_not_settled() -> None:
    """Some of the 50 lowest rise together above as many others, one time in a hundred."""
    total = torch.cat([torch.full((42,), -10.0), torch.zeros(8), torch.ones(8), torch.full((42,), 10.0)])
    for together, settled in ((8, False), (7, True)):
        shift = torch.zeros(1, 100, dtype=torch.float64)
        shift[0, 50 - together : 50] = 1 / 2.326
        groups = SimpleNamespace(samples=FIRST, deviations=lambda shift=shift: shift)
        looks = Looks(units_of(100), mean, confidence=0.95, lowest=50, seed=0)
        looks.look(total, groups, 0.0)
        assert looks.settled == settled


def test_more_confidence_takes_more_draws_and_settles_all_the_same() -> None:
    apart = torch.cat([torch.zeros(10), torch.ones(30)]).double()
    assert all(looked(apart, 0.5, 2000, 0.0, confidence=c).settled for c in (0.5, 0.99, 0.999))


def test_what_is_left_to_read_can_change_less_the_less_there_is() -> None:
    means = 0.01 * torch.arange(40).double()
    assert not looked(means, 3.0, 2000, 0.0).settled
    assert looked(means, 3.0, 2000, 0.9999).settled


def test_there_is_no_look_before_there_are_enough_samples() -> None:
    means = torch.cat([torch.zeros(10), torch.ones(30)]).double()
    assert looked(means, 0.1, FIRST - 1, 0.0).undecided is None
    assert looked(means, 0.1, FIRST, 0.0).settled


def test_frozen_units_are_no_candidates() -> None:
    means = torch.cat([torch.zeros(10), torch.ones(30)]).double()
    units = units_of(40)
    units = Units(**{**vars(units), "frozen": ("it stays",) * 10 + (None,) * 30})
    torch.manual_seed(0)
    values = means + torch.randn(2000, 40, dtype=torch.float64)
    groups = Groups(40, torch.device("cpu"))
    groups.add(values)
    looks = Looks(units, mean, confidence=0.95, lowest=10, seed=0)
    looks.look(values.sum(0), groups, 0.0)
    assert not looks.settled
    assert looks.undecided is not None
    assert not bool(looks.undecided[:10].any())
    assert bool(looks.undecided[10:].any())


def test_early_ends_are_right_as_often_as_was_asked() -> None:
    """Streams of samples whose whole is known: the lowest at the end, against those of everything."""
    generator = torch.Generator().manual_seed(3)
    runs, wrong, early, exchanged = 40, 0, 0, 0
    for run in range(runs):
        means = torch.rand(60, generator=generator, dtype=torch.float64) + 0.5
        values = means * torch.randn(20_000, 60, generator=generator, dtype=torch.float64).abs()
        looks = Looks(units_of(60), mean, confidence=0.9, lowest=20, seed=run)
        groups, total = Groups(60, torch.device("cpu")), torch.zeros(60, dtype=torch.float64)
        for part in values.split(256):
            groups.add(part)
            total += part.sum(0)
            looks.look(total, groups, groups.samples / len(values))
            if looks.settled:
                break
        early += groups.samples < len(values) / 2
        chosen, right = (set(t.argsort()[:20].tolist()) for t in (total, values.sum(0)))
        exchanged += len(chosen - right)
        wrong += len(chosen - right) > 2
    assert wrong <= 0.1 * runs
    assert exchanged <= 0.02 * 20 * runs
    assert early > runs / 2


# -- attribute -------------------------------------------------------------------------------------------


def test_a_pass_that_ends_early_scores_what_it_has_read() -> None:
    model, batches = network(), list(loader(6000))
    found = score(model, batches, "taylor", lowest=20)
    assert FIRST <= found.samples < 6000
    read = batches[: found.samples // 64]
    same = attrfast.attribute(model, read, "taylor", progress=False)
    assert torch.equal(found.importance, same.importance)
    assert same.undecided is None
    whole = attrfast.attribute(model, batches, "taylor", progress=False)
    lowest, right = (set(s.importance.argsort()[:20].tolist()) for s in (found, whole))
    assert len(lowest - right) <= 1
    assert lowest ^ right <= set(torch.nonzero(found.undecided).flatten().tolist())


def test_a_short_loader_is_read_to_its_end_and_nothing_is_undecided() -> None:
    batches = list(loader(300))
    found = score(network(), batches, "taylor")
    assert found.samples == 300
    assert not bool(found.undecided.any())
    whole = attrfast.attribute(network(), batches, "taylor", progress=False)
    assert torch.equal(found.importance, whole.importance)


def test_several_criteria_end_when_all_are_settled() -> None:
    batches = list(loader(4000))
    alone = [score(network(), batches, name, lowest=20).samples for name in ("taylor", "apoz")]
    both = score(network(), batches, ["taylor", "apoz", "l1"], lowest=20)
    assert both["taylor"].samples == both["apoz"].samples == max(alone)
    assert both["l1"].undecided is None
    assert both["l1"].samples == 0


def test_the_same_seed_reads_as_much_again_and_a_microbatch_changes_nothing() -> None:
    batches = list(loader(4000))
    found = [score(network(), batches, lowest=20, microbatch=size) for size in (None, None, 24)]
    assert len({scores.samples for scores in found}) == 1
    assert torch.equal(found[0].undecided, found[1].undecided)


def test_sorted_labels_are_read_to_the_end_with_a_warning() -> None:
    images, labels = zip(*loader(3000), strict=True)
    order = torch.cat(labels).argsort(stable=True)
    batches = list(
        zip(torch.cat(images)[order].split(64), torch.cat(labels)[order].split(64), strict=True)
    )
    with pytest.warns(UserWarning, match="sorts them by their labels"):
        found = score(network(), batches, lowest=20)
    assert found.samples == 3000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = [(x, torch.zeros_like(y)) for x, y in batches]
        assert score(network(), one, lowest=20).samples == 3000


def test_a_generator_of_unknown_length_can_end_early() -> None:
    assert score(network(), iter(loader(6000)), "taylor", lowest=20).samples < 6000


def test_max_batches_is_the_whole_that_is_asked_about() -> None:
    found = score(network(), loader(6000), "taylor", max_batches=16)
    assert found.samples == 16 * 64
    assert not bool(found.undecided.any())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop": "soon"}, "stop must be 'confident' or None"),
        ({"confidence": 0.9995}, "confidence must be above 0 and at most 0.999"),
        ({"confidence": "high"}, "confidence must be above 0 and at most 0.999"),
        ({"lowest": 0}, "lowest must be a whole number"),
        ({"lowest": 1.5}, "lowest must be a whole number"),
        ({"criterion": "iba"}, "'iba' can't tell how sure it is"),
        ({"criterion": "causal_map"}, "'causal_map' can't tell how sure it is"),
    ],
)
def test_what_can_not_be_done_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(attrfast.InputError, match=said):
        score(network(), loader(128), **options)


def test_what_is_undecided_is_saved_and_told(tmp_path: Any) -> None:
    found = score(network(), list(loader(6000)), "taylor", lowest=20)
    again = attrfast.Scores.load(found.save(tmp_path / "scores.safetensors"))
    assert torch.equal(found.undecided, again.undecided)
    told = found.to_dict()["undecided"]
    assert list(told) == list(found)
    assert sum(map(len, told.values())) == int(found.units.size[found.undecided].sum())


# -- prune -----------------------------------------------------------------------------------------------


def prune(batches: Any, **options: Any) -> attrfast.PruneResult:
    options = {
        "criterion": "taylor",
        "keep_ratio": 0.6,
        "filters_per_step": 8,
        "finetune": 0,
        "progress": False,
        **options,
    }
    return attrfast.prune(network(), batches, val_loader=list(loader(64)), **options)


def test_pruning_tells_how_many_samples_every_step_read() -> None:
    batches = loader(3000)
    rows = prune(batches, stop="confident").history
    assert rows[0].samples_scored == 0
    assert rows[0].undecided is None
    assert all(FIRST <= row.samples_scored <= 3000 for row in rows[1:])
    assert min(row.samples_scored for row in rows[1:]) < 3000
    assert all(row.undecided is not None for row in rows[1:])
    rows = prune(batches).history
    assert [row.samples_scored for row in rows] == [0] + [3000] * (len(rows) - 1)
    assert all(row.undecided is None for row in rows)


def test_it_is_the_default_where_the_loader_is_long_and_shuffles(monkeypatch: Any) -> None:
    monkeypatch.setattr("attrfast.stopping.LONG", 2000)
    assert prune(loader(3000)).history[1].samples_scored < 3000
    for batches, options in (
        (loader(1900), {}),
        (loader(3000, shuffle=False), {}),
        (loader(3000), {"stop": None}),
        (loader(3000), {"balance": "worst_class"}),
        (loader(3000), {"criterion": "obd", "keep_ratio": 0.9}),
    ):
        row = prune(batches, **options).history[1]
        expected = None if options.get("criterion") != "obd" else row.undecided
        assert row.undecided == expected


def test_what_is_long_and_shuffled() -> None:
    data = TensorDataset(torch.zeros(10_000, 1))
    assert are_long_and_shuffled(DataLoader(data, sampler=RandomSampler(data)), Group())
    assert not are_long_and_shuffled(DataLoader(data, sampler=SequentialSampler(data)), Group())
    assert not are_long_and_shuffled([torch.zeros(10_000, 1)], Group())
    short = TensorDataset(torch.zeros(9_999, 1))
    assert not are_long_and_shuffled(DataLoader(short, shuffle=True), Group())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop": "confident", "balance": "worst_class"}, "balance ranks in another way"),
        ({"stop": "confident", "max_latency": "0.5x"}, "max_latency ranks in another way"),
        ({"stop": "never"}, "stop must be"),
        ({"stop": "confident", "confidence": 0}, "confidence must be above 0"),
        ({"stop": "confident", "criterion": "iba"}, "'iba' can't tell how sure it is"),
    ],
)
def test_pruning_refuses_what_can_not_be_done(options: dict[str, Any], said: str) -> None:
    with pytest.raises(attrfast.InputError, match=said):
        prune(loader(64), **options)
