"""Several processes read until the lowest filters are settled, and end at once."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import attrfast
from attrfast.confidence import FIRST, Groups
from attrfast.distributed import Group
from attrfast.errors import DistributedError
from attrfast.stopping import are_long_and_shuffled
from attrfast.stopping_together import StopTogether

Batches = list[tuple[torch.Tensor, torch.Tensor]]

SAMPLES = 6000
# Uneven shards, one of them empty, one of them read to its end long before the others.
SHARDS = {2: (0, 2500, SAMPLES), 4: (0, 0, 300, 2800, SAMPLES)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Plain())


def batches(start: int = 0, stop: int = SAMPLES, size: int = 50) -> Batches:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    return list(
        zip(images[start:stop].split(size), labels[start:stop].split(size), strict=True)
        if stop > start
        else ()
    )


class Counted:
    """A loader that knows how many batches were taken from it."""

    def __init__(self, batches: Batches, then: Callable[[], None] = lambda: None, after: int = 10**9):
        self.batches, self.taken, self.then, self.after = batches, 0, then, after

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.taken == self.after:
                self.then()
            self.taken += 1
            yield batch


def score(loader: Any, criterion: Any = "taylor", **options: Any) -> Any:
    options = {"stop": "confident", "lowest": 20, "progress": False, **options}
    return attrfast.attribute(network(), loader, criterion, **options)


def scored(rank: int, size: int) -> list[dict[str, Any]]:
    found = []
    for criterion, options in (("taylor", {}), ("taylor", {"lowest": 1}), (["taylor", "l1"], {})):
        # The last process has larger batches, as loaders of different machines may.
        mine = Counted(batches(*SHARDS[size][rank : rank + 2], 200 if rank == size - 1 else 50))
        scores = score(mine, criterion, **options)
        scores = scores["taylor"] if isinstance(scores, dict) else scores
        found.append(
            {
                "taken": mine.taken,
                "samples": scores.samples,
                "raw": scores.raw,
                "undecided": scores.undecided,
            }
        )
    return found


@functools.cache
def everything(size: int) -> list[Any]:
    return ranks.run(scored, size)


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("size", sorted(SHARDS))
def test_what_was_read_is_scored_as_by_one_process(size: int, attempt: int) -> None:
    read: Batches = []
    for rank, found in enumerate(everything(size)):
        mine = batches(*SHARDS[size][rank : rank + 2], 200 if rank == size - 1 else 50)
        read += mine[: found[attempt]["taken"]]
    wanted = score(read, stop=None)
    for found in everything(size):
        assert found[attempt]["samples"] == sum(len(x) for x, _ in read)
        torch.testing.assert_close(found[attempt]["raw"], wanted.raw, rtol=1e-5, atol=1e-7)
        assert torch.equal(found[attempt]["undecided"], everything(size)[0][attempt]["undecided"])


@pytest.mark.parametrize("size", sorted(SHARDS))
def test_they_end_early_where_the_filters_are_settled(size: int) -> None:
    settled, unsettled, several = everything(size)[0]
    assert FIRST <= settled["samples"] < SAMPLES
    assert unsettled["samples"] > settled["samples"]
    assert several["samples"] == settled["samples"]


def test_they_need_about_as_many_samples_as_one_process() -> None:
    one = score(batches()).samples
    for size in SHARDS:
        assert 0.5 * one <= everything(size)[0][0]["samples"] <= 2 * one


def sorted_labels(rank: int, size: int) -> tuple[int, list[str]]:
    images, labels = map(torch.cat, zip(*batches(), strict=True))
    order = labels.argsort(stable=True)[rank::size]
    mine = list(zip(images[order].split(50), labels[order].split(50), strict=True))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        scores = score(mine)
    return scores.samples, [str(warning.message) for warning in seen]


def test_sorted_labels_are_read_to_the_end_with_a_warning() -> None:
    for samples, seen in ranks.run(sorted_labels, 2):
        assert samples == SAMPLES
        assert any("sorts them by their labels" in text for text in seen)


def refused(call: Callable[[], Any]) -> Exception:
    with pytest.raises(attrfast.AttrfastError) as caught:
        call()
    return caught.value


def failing(rank: int, size: int) -> Any:
    def fail() -> None:
        raise OSError("the disk is gone")

    shard = batches(rank * 3000, (rank + 1) * 3000)
    try:
        return score(Counted(shard, fail, 5) if rank else shard)
    except (OSError, DistributedError) as error:
        return error


def dying(rank: int, size: int) -> Any:
    shard = batches(rank * 3000, (rank + 1) * 3000)
    mine = Counted(shard, lambda: os._exit(1), 5) if rank else shard
    return refused(lambda: score(mine))


def test_a_process_that_fails_between_meetings_stops_the_others() -> None:
    other, itself = ranks.run(failing, 2)
    assert type(itself) is OSError
    assert type(other) is DistributedError
    assert "the disk is gone" in str(other)


def test_a_process_that_dies_between_meetings_stops_the_others() -> None:
    alive, dead = ranks.run(dying, 2)
    assert dead == ranks.DIED
    assert type(alive) is DistributedError


def disagreeing(rank: int, size: int) -> Exception:
    criteria = ["taylor", "apoz"] if rank else "taylor"
    return refused(lambda: score(batches(rank * 3000, (rank + 1) * 3000), criteria))


def test_processes_that_score_different_things_are_told() -> None:
    for error in ranks.run(disagreeing, 2):
        assert type(error) is DistributedError
        assert "by 2 criteria" in str(error)


def pruned(rank: int, size: int) -> list[Any]:
    images, labels = map(torch.cat, zip(*batches(), strict=True))
    data = TensorDataset(images.repeat(2, 1, 1, 1), labels.repeat(2))
    sampler = DistributedSampler(data, size, rank, shuffle=True)
    found = []
    for loader in (DataLoader(data, 50, sampler=sampler), batches(rank * 3000, (rank + 1) * 3000)):
        result = attrfast.prune(
            network(),
            loader,
            criterion="taylor",
            keep_ratio=0.8,
            filters_per_step=20,
            val_loader=batches(0, 100),
            finetune=0,
            progress=False,
        )
        gates = {name: gate.tolist() for name, gate in result.gates.items()}
        found.append((gates, [row.samples_scored for row in result.history[1:]]))
    return found


def test_prune_does_so_by_itself_where_the_loaders_shuffle_and_are_long_together() -> None:
    first, second = ranks.run(pruned, 2)
    assert first == second
    (_, long), (_, listed) = first
    assert all(FIRST <= samples < 2 * SAMPLES for samples in long)
    assert listed == [SAMPLES] * len(listed)


def told_by(*others: Any) -> Any:
    """A group whose processes tell the same as this one, and what is given."""
    return SimpleNamespace(size=1 + len(others), meet=lambda where, told: [told, *others])


def test_what_is_long_and_shuffled() -> None:
    data = TensorDataset(torch.zeros(6000, 1))
    shuffled = DataLoader(data, shuffle=True)
    assert not are_long_and_shuffled(shuffled, Group())
    assert are_long_and_shuffled(shuffled, told_by(4000))
    assert not are_long_and_shuffled(shuffled, told_by(3999))
    assert not are_long_and_shuffled(shuffled, told_by(None))
    assert not are_long_and_shuffled(DataLoader(data, sampler=SequentialSampler(data)), told_by(6000))
    assert are_long_and_shuffled([], told_by(12_000))
    for shuffle in (True, False):
        sampler = DistributedSampler(data, 2, 0, shuffle=shuffle)
        assert are_long_and_shuffled(DataLoader(data, sampler=sampler), told_by(8000)) == shuffle


@pytest.mark.parametrize("most", [64, 16, 4, 1])
def test_united_groups_keep_their_sums(most: int) -> None:
    values = torch.randn(1000, 5, dtype=torch.float64)
    groups = Groups(5, torch.device("cpu"))
    for part in values.split(70):
        groups.add(part)
    sums, count = groups.sums(most)
    assert len(sums) == len(count) <= most
    torch.testing.assert_close(sums.sum(0), values.sum(0))
    assert int(count.sum()) == 1000
    first = int(count[0])
    torch.testing.assert_close(sums[0], values[:first].sum(0))


def test_meetings_come_with_a_quarter_more_samples() -> None:
    met: list[int] = []
    together = StopTogether(Group(0, 4))
    stop = SimpleNamespace(samples=0, watch=lambda batch: None)
    together._meet = lambda *_, **__: met.append(stop.samples)  # type: ignore[method-assign]
    for _ in range(12):
        stop.samples += 64
        together.after(stop, None, 0.0)  # type: ignore[arg-type]
    assert met == [256, 320, 448, 576, 768]
