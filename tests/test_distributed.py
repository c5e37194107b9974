"""Several processes give what one gives, whatever shards they have, or stop together with a reason."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from families import lived_in
from small_networks import CLASSES, Functional, Plain
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import attrfast
from attrfast.distributed import together
from attrfast.errors import DistributedError, InputError, NumericalError
from attrfast.finetune import FineTune, fine_tune

Batches = list[tuple[torch.Tensor, torch.Tensor]]

# Uneven shards of 22 samples, one of them empty.
SHARDS = {1: (0, 22), 2: (0, 15, 22), 4: (0, 0, 9, 20, 22)}
SIZES = sorted(SHARDS)
MEASURED = ["taylor", "taylor_fo", "taylor_guided", "obd", "apoz", "hrank", "causal_map", "l1", "random"]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(22, 3, 16, 16, generator=generator)
    return images, torch.randint(CLASSES, (22,), generator=generator)


def batches(start: int = 0, stop: int = 22, size: int = 4) -> Batches:
    images, labels = data()
    cuts = [(i, min(i + size, stop)) for i in range(start, stop, size)]
    return [(images[a:b], labels[a:b]) for a, b in cuts]


def shard(rank: int, size: int) -> Batches:
    return batches(*SHARDS[size][rank : rank + 2])


def network(kind: Callable[[], nn.Module] = Plain) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(kind())


def plain(scores: attrfast.Scores) -> dict[str, Any]:
    return {
        "raw": scores.raw,
        "importance": scores.importance,
        "by class": scores.by_class,
        "class samples": scores.class_samples,
        "samples": scores.samples,
        "layers": [layer.name for layer in scores.units.layers],
    }


def scored(rank: int, size: int) -> dict[str, dict[str, Any]]:
    score = functools.partial(attrfast.attribute, network(), shard(rank, size), progress=False)
    found = {f"together {name}": scores for name, scores in score(MEASURED).items()}
    found["classes"] = score("attribution", classes=[0, 3], by_class=True)
    found["by class"] = score("taylor", by_class=True, normalize="max")
    found["signed"] = score("taylor", reduction="signed_batch", microbatch=3)
    return {name: plain(scores) for name, scores in found.items()}


def pruned(rank: int, size: int) -> dict[str, Any]:
    found = {}
    for name, options in {
        "by macs": {"max_macs": 0.5},
        "worst class": {"keep_ratio": 0.6, "balance": "worst_class", "criterion": "taylor"},
    }.items():
        result = attrfast.prune(
            network(), shard(rank, size), finetune=0, filters_per_step=6, progress=False, **options
        )
        rows = [(row.filters, row.macs, row.top1, row.loss, row.removed) for row in result.history]
        found[name] = {k: v.tolist() for k, v in result.gates.items()}, rows, result.stopped
    return found


def both(rank: int, size: int) -> Any:
    return scored(rank, size), pruned(rank, size)


@functools.cache
def everything(size: int) -> list[Any]:
    """`both` in so many processes."""
    return ranks.run(both, size)


@functools.cache
def alone() -> Any:
    """`both` in a process that knows of no group."""
    return both(0, 1)


@pytest.mark.parametrize("size", SIZES)
def test_scores_are_those_of_one_process(size: int) -> None:
    """Those of all criteria that are sums, by class and of some classes, for any shards."""
    expected, _ = alone()
    for rank, (found, _) in enumerate(everything(size)):
        for name, scores in found.items():
            wanted = expected[name]
            for key in ("samples", "layers"):
                assert scores[key] == wanted[key], (rank, name, key)
            for key in ("raw", "importance", "by class", "class samples"):
                torch.testing.assert_close(scores[key], wanted[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_all_processes_have_the_same_bits(size: int) -> None:
    (first, _), *others = everything(size)
    for other, _ in others:
        for name, scores in first.items():
            assert torch.equal(scores["raw"], other[name]["raw"]), name
            assert torch.equal(scores["importance"], other[name]["importance"]), name


@pytest.mark.parametrize("size", SIZES)
def test_the_same_filters_go_as_in_one_process(size: int) -> None:
    _, expected = alone()
    for _, found in everything(size):
        for name, (gates, rows, stopped) in found.items():
            wanted_gates, wanted_rows, wanted_stopped = expected[name]
            assert (gates, stopped) == (wanted_gates, wanted_stopped)
            for row, wanted in zip(rows, wanted_rows, strict=True):
                assert row[:3] == wanted[:3]
                assert row[3] == pytest.approx(wanted[3], rel=1e-5)
                assert row[4] == wanted[4]


TUNING: dict[str, Any] = {"keep_ratio": 0.6, "filters_per_step": 9, "progress": False}


def tuned(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Fine-tuned with batches that together are those of one process, and with uneven shards."""
    step = FineTune(epochs=2, lr=0.02, max_grad_norm=1.0)
    quarters = [
        tuple(t[rank * 8 // size : (rank + 1) * 8 // size] for t in batch)
        for batch in batches(0, 16, size=8)
    ]
    found = {}
    for name, loader, model in (
        ("without batch norm", quarters, network(Functional)),
        ("uneven", shard(rank, size), network()),
    ):
        result = attrfast.prune(model, loader, finetune=step, final_finetune=1, **TUNING)
        found[name] = result.model.state_dict(), [(row.top1, row.loss) for row in result.history]
        if rank == 0:
            result.save(folder / name)
    return found


def test_fine_tuning_trains_by_the_samples_of_all_processes(tmp_path: Path) -> None:
    """A model without batch norm ends with the weights of one process, to rounding."""
    expected, _ = tuned(0, 1, tmp_path / "alone")["without batch norm"]
    found = [part["without batch norm"] for part in ranks.run(tuned, 2, tmp_path)]
    for weights, _ in found:
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    loaded = attrfast.load(tmp_path / "without batch norm", Functional)
    torch.testing.assert_close(loaded.state_dict(), found[0][0], rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 4])
def test_fine_tuning_on_uneven_shards_ends_in_the_same_bits(size: int, tmp_path: Path) -> None:
    (first, rows), *others = [part["uneven"] for part in ranks.run(tuned, size, tmp_path)]
    before = network().state_dict()
    means = [name for name in first if name.endswith("running_mean")]
    assert means
    assert all(
        first[name].shape != before[name].shape or not torch.equal(first[name], before[name])
        for name in means
    )
    for weights, history in others:
        assert weights.keys() == first.keys()
        assert all(torch.equal(weights[name], first[name]) for name in first)
        assert history == rows
    attrfast.load(tmp_path / "uneven", Plain)


class Odd(Functional):
    """Gives an object that DistributedDataParallel can't look into."""

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=super().forward(x))


def trained_odd(rank: int, size: int) -> Any:
    model = network(Odd)
    with together() as group:
        fine_tune(model, shard(rank, size), FineTune(), step=0, device=torch.device("cpu"), group=group)
    return [
        (p.detach() - q).abs().max()
        for p, q in zip(model.parameters(), network(Odd).parameters(), strict=True)
    ]


def test_fine_tuning_takes_models_with_outputs_of_any_kind() -> None:
    """Processes whose gradients were not exchanged would end with different weights, and be refused."""
    first, second = ranks.run(trained_odd, 2)
    assert first == second
    assert min(first) > 0


def sampled(rank: int, size: int) -> list[list[int]]:
    """The order of samples in the passes of a loader with a DistributedSampler."""
    images, labels = data()
    marked = TensorDataset(images, labels, torch.arange(22))
    sampler = DistributedSampler(marked, size, rank, shuffle=True)
    seen: list[list[int]] = []

    class Watched(DataLoader[Any]):
        def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
            seen.append([])
            for images, labels, index in super().__iter__():
                seen[-1] += index.tolist()
                yield images, labels

    loader = Watched(marked, batch_size=4, sampler=sampler)
    attrfast.prune(network(), loader, val_loader=batches(), finetune=2, keep_ratio=0.9, progress=False)
    assert sampler.epoch == 0
    return [order for order in seen if len(order) == 11]


def test_every_epoch_has_an_order_of_its_own() -> None:
    first, second = ranks.run(sampled, 2)
    assert len(first) >= 3
    assert len({tuple(order) for order in first}) == len(first)
    for ours, theirs in zip(first, second, strict=True):
        assert sorted(ours + theirs) == list(range(22))


class Failing:
    """A loader that goes wrong in one process when it is read for the n-th time."""

    def __init__(self, loader: Batches, how: Callable[[], Any], reading: int) -> None:
        self.loader, self.how, self.left = loader, how, reading

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        for index, batch in enumerate(self.loader):
            if self.left == 0 and index == 1:
                yield self.how()
            yield batch


def broken() -> Any:
    raise OSError("the disk is gone")


def unlabelled() -> Any:
    return torch.zeros(2, 3, 16, 16), torch.tensor([0, 77])


def poisoned() -> Any:
    return torch.full((2, 3, 16, 16), torch.nan), torch.tensor([0, 1])


def failing(rank: int, size: int) -> list[Any]:
    """What each process meets where rank 1 fails, then whether the group still works."""
    mine = batches()

    def attempt(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **{"progress": False, **options})
        except Exception as error:
            return error

    def wrong(how: Callable[[], Any], reading: int = 1) -> Any:
        return Failing(mine, how, reading) if rank == 1 else mine

    def callback(row: attrfast.Step, model: nn.Module) -> None:
        if rank == 1:
            raise KeyError("mine")

    prune, score = attrfast.prune, attrfast.attribute
    met = [
        attempt(score, network(), wrong(broken)),
        attempt(score, network(), wrong(unlabelled)),
        attempt(score, network(), wrong(poisoned)),
        # Read for an example, for the history, for scores, and for training (without the history, third).
        attempt(prune, network(), wrong(broken, 2), **TUNING),
        attempt(prune, network(), wrong(broken, 3), **TUNING),
        attempt(prune, network(), wrong(broken, 4), **TUNING),
        attempt(prune, network(), wrong(poisoned, 3), val_loader=mine, **TUNING),
        attempt(prune, network(), mine, callback=callback, **TUNING),
    ]
    return [*met, plain(score(network(), shard(rank, size), progress=False))]


@pytest.fixture(scope="module")
def met() -> list[list[Any]]:
    return ranks.run(failing, 2)


@pytest.mark.parametrize(
    ("attempt", "kind", "reason"),
    [
        (0, OSError, "the disk is gone"),
        (1, InputError, "label 77 is outside"),
        (2, NumericalError, "is nan in the batch after 4 samples"),
        (3, OSError, "the disk is gone"),
        (4, OSError, "the disk is gone"),
        (5, OSError, "the disk is gone"),
        (6, NumericalError, "the loss became nan"),
        (7, attrfast.AttrfastError, "your callback raised KeyError"),
    ],
)
def test_all_stop_with_the_reason_of_the_one_that_failed(
    met: list[list[Any]], attempt: int, kind: type[Exception], reason: str
) -> None:
    other, itself = (found[attempt] for found in met)
    assert type(itself) is kind
    assert reason in str(itself)
    assert type(other) is DistributedError
    assert "rank 1 of 2 failed" in str(other)
    assert reason in str(other)


def test_a_group_in_which_a_call_failed_works_on(met: list[list[Any]]) -> None:
    expected = alone()[0]["together taylor"]
    for found in met:
        torch.testing.assert_close(found[-1]["raw"], expected["raw"], rtol=1e-5, atol=1e-7)


def dying(rank: int, size: int) -> Any:
    mine = Failing(batches(), lambda: os._exit(1), 1) if rank == 1 else batches()
    return refused(lambda: attrfast.attribute(network(), mine, progress=False))


def dying_in_training(rank: int, size: int) -> Any:
    def loss(output: Any, batch: Any) -> torch.Tensor:
        value = nn.functional.cross_entropy(output, batch[1])
        if rank == 1 and torch.is_grad_enabled():
            value.register_hook(lambda _: os._exit(1))
        return value

    return refused(lambda: attrfast.prune(network(), batches(), loss_fn=loss, **TUNING))


def hanging(rank: int, size: int) -> Any:
    def sleep() -> Any:
        time.sleep(60)

    mine = Failing(batches(), sleep, 1) if rank == 1 else batches()
    start = time.monotonic()
    error = refused(lambda: attrfast.attribute(network(), mine, progress=False))
    return error, time.monotonic() - start


def refused(call: Callable[[], Any]) -> Exception:
    with pytest.raises(attrfast.AttrfastError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("work", [dying, dying_in_training])
def test_a_process_that_dies_stops_the_others(work: Callable[..., Any]) -> None:
    alive, dead = ranks.run(work, 2)
    assert dead == ranks.DIED
    assert type(alive) is DistributedError
    assert "rank 0 of 2 lost the others" in str(alive)


def test_a_process_that_hangs_stops_the_others_after_the_timeout() -> None:
    ((error, seconds),) = ranks.run(hanging, 2, timeout=2, wait_for=1)
    assert type(error) is DistributedError
    assert "within the group's timeout" in str(error)
    assert 1 < seconds < 40


def disagreeing(rank: int, size: int) -> list[Exception]:
    mine, options = batches(), {"progress": False}

    def elsewhere() -> Any:
        if rank == 0:
            return attrfast.attribute(network(), mine, progress=False)
        return attrfast.prune(network(), mine, **TUNING)

    def diverging(model: nn.Module, step: int) -> None:
        for parameter in model.parameters():
            parameter.data.add_(rank * 1e-3)

    other = network()
    other.features[0].bias.data.add_(rank)
    sss = attrfast.criteria.SSS(epochs=1, gamma=1e-3)
    return [
        refused(call)
        for call in (
            elsewhere,
            lambda: attrfast.attribute(network(), mine, ["taylor", "taylor_fo"][rank], **options),
            lambda: attrfast.attribute(other, mine, **options),
            lambda: attrfast.attribute(network(), [], **options),
            lambda: attrfast.attribute(network(), mine, "iba", **options),
            lambda: attrfast.prune(other, mine, **TUNING),
            lambda: attrfast.prune(network(), mine, **{**TUNING, "keep_ratio": [0.5, 0.6][rank]}),
            lambda: attrfast.prune(network(), mine, sss, **TUNING),
            lambda: attrfast.prune(network(), mine, finetune=diverging, **TUNING),
        )
    ]


def test_processes_that_do_not_agree_are_refused() -> None:
    reasons = [
        "at different places: rank 0 at 'scoring', rank 1 at 'examples'",
        "rank 1 scores another model than rank 0, or by other arguments",
        "rank 1 scores another model than rank 0, or by other arguments",
        "the loader gave no batch",
        "the criterion 'iba' is more than a sum over samples",
        "another model, or other arguments of prune",
        "another model, or other arguments of prune",
        "the criterion 'sss' trains, which it does in one process alone",
        "other weights after fine-tuning in step 1",
    ]
    for errors in ranks.run(disagreeing, 2):
        for error, reason in zip(errors, reasons, strict=True):
            assert reason in str(error)


def apart(rank: int, size: int) -> Any:
    """Calls of one process's own, also from within a call of all."""
    seen = []

    def callback(row: attrfast.Step, model: nn.Module) -> None:
        seen.append(
            attrfast.attribute(model, shard(rank, size), distributed=False, progress=False).samples
        )
        seen.append(attrfast.attribute(model, shard(rank, size), progress=False).samples)

    alone = attrfast.attribute(network(), shard(rank, size), distributed=False, progress=False)
    attrfast.prune(
        network(), shard(rank, size), callback=callback, finetune=0, keep_ratio=0.9, progress=False
    )
    return alone.samples, seen[:2]


def test_a_call_can_be_one_process_s_own() -> None:
    assert ranks.run(apart, 2) == [(15, [15, 22]), (7, [7, 22])]


def timed(rank: int, size: int, folder: Path) -> Any:
    result = attrfast.prune(
        network(),
        shard(rank, size),
        max_latency=0.9,
        latency_cache=folder / str(rank),
        finetune=0,
        progress=False,
    )
    rows = [(row.latency, row.latency_predicted, row.latency_share) for row in result.history]
    return rows, {name: gate.tolist() for name, gate in result.gates.items()}


def test_one_process_measures_latency_for_all(tmp_path: Path) -> None:
    first, second = ranks.run(timed, 2, tmp_path)
    assert first == second
    assert [folder.name for folder in tmp_path.iterdir()] == ["0"]


def resumed(rank: int, size: int, folder: Path) -> Any:
    """Cut off after a step, then gone on with; beside a run that was not cut off."""

    def callback(row: attrfast.Step, model: nn.Module) -> None:
        if row.step == 1:
            raise ValueError("enough")

    options = {**TUNING, "resume": True}
    mine = shard(rank, size)
    refused(
        lambda: attrfast.prune(network(), mine, callback=callback, output_dir=folder / "cut", **options)
    )
    again = attrfast.prune(
        network(), mine, output_dir=folder / f"cut{'' if rank == 0 else rank}", **options
    )
    whole = attrfast.prune(network(), mine, **TUNING)
    return again.model.state_dict(), whole.model.state_dict()


def test_a_run_goes_on_from_what_the_first_process_saved(tmp_path: Path) -> None:
    """The others need not see its folder."""
    for again, whole in ranks.run(resumed, 2, tmp_path):
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert not (tmp_path / "cut1").exists()
