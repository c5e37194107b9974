"""Measurements: what is run, how figures follow from times, and that the models stay as they are."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from families import lived_in
from small_networks import CLASSES, NETWORKS, Plain
from torch import nn

import attrfast
from attrfast.measure import Comparison, Latency, Measurement, measure
from attrfast.memory import peak

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Seen(nn.Module):
    """Notes its name and the inputs' shapes at every pass."""

    def __init__(self, name: str, notes: list[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        self.name, self.notes = name, notes
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.notes.append((self.name, tuple(x.shape)))
        return self.norm(x)


def pruned(model: nn.Module, **options: Any) -> attrfast.PruneResult:
    data = [(IMAGES, torch.arange(2))]
    options = {"criterion": "l2", "keep_ratio": 0.6, "finetune": 0, "progress": False, **options}
    return attrfast.prune(model, data, **options)


def test_models_run_in_turns_on_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attrfast.measure._SHORTEST", 0.0)  # one pass a round
    notes: list[tuple[str, tuple[int, ...]]] = []
    found = measure(Seen("a", notes), Seen("b", notes), IMAGES, batch_sizes=(1, 2, 5), rounds=4)
    assert [row.batch_size for row in found.rows] == [1, 2, 5]
    assert {shape for _, shape in notes} == {(n, 3, 16, 16) for n in (1, 2, 5)}
    for row in found.rows:
        assert len(row.original.seconds) == len(row.pruned.seconds) == 4
        assert min(row.original.seconds + row.pruned.seconds) > 0
        names = "".join(name for name, shape in notes if shape[0] == row.batch_size)
        assert names.endswith("aabbbbaa" * 2)  # one that warms up, one that counts
        assert len(names) > 8, "nothing ran before the clock did"


def test_short_passes_are_repeated_within_a_round() -> None:
    notes: list[tuple[str, tuple[int, ...]]] = []
    measure(Seen("a", notes), Seen("b", notes), IMAGES[:, :, :1, :1], batch_sizes=(1,), rounds=5)
    assert notes[-1] == notes[-2]  # the last round runs a, then b


def test_samples_are_repeated_up_to_the_batch_size() -> None:
    inputs: list[torch.Tensor] = []

    class Keeps(nn.Module):
        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            inputs.append(torch.cat([x.flatten(1), scale.view(-1, 1)], 1))
            return x

    example = {"x": IMAGES.to(memory_format=torch.channels_last), "scale": torch.tensor([1.0, 2.0])}
    measure(Keeps(), Keeps(), example, batch_sizes=[5], rounds=2)
    both = torch.cat([IMAGES.flatten(1), torch.tensor([[1.0], [2.0]])], 1)
    assert all(torch.equal(given, both[[0, 1, 0, 1, 0]]) for given in inputs)


def test_figures_follow_from_the_rounds() -> None:
    a, b = (3.0, 1.0, 2.0, 8.0, 5.0), (1.0, 2.0, 4.0, 2.0, 1.0)
    row = Comparison(1, Latency(a, 0), Latency(b, 0))
    assert row.original.median == np.median(a)
    assert row.original.quartiles == tuple(np.quantile(a, [0.25, 0.75]))
    assert row.speedup == np.median(np.array(a) / np.array(b))
    assert row.speedup != row.original.median / row.pruned.median


def test_peak_memory_is_that_of_the_tensors_alive_at_once() -> None:
    """In float32: a convolution's output beside that of the ReLU after it; then both smaller ones."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(8, 4, 1), nn.ReLU()
    )
    x = torch.zeros(2, 3, 16, 16)
    with torch.no_grad():
        got = peak(lambda: model(x), torch.device("cpu"), [*model.parameters(), x])
    assert got == 2 * (2 * 8 * 16 * 16 * 4)
    model[1].inplace = True
    with torch.no_grad():
        got = peak(lambda: model(x), torch.device("cpu"), [*model.parameters(), x])
    pooled = 2 * 8 * 4 * 4 * (4 + 8)  # values, and the indices that max_pool2d makes beside them
    assert got == 2 * 8 * 16 * 16 * 4 + pooled


def test_views_and_what_is_there_already_take_no_memory() -> None:
    x, weight = torch.ones(4, 8), torch.ones(8)
    with torch.no_grad():
        assert peak(lambda: x.view(8, 4).t()[1:], torch.device("cpu"), [x]) == 0
        assert peak(lambda: x.mul_(weight), torch.device("cpu"), [x, weight]) == 0
        assert peak(lambda: [x + i for i in range(3)], torch.device("cpu"), [x]) == 3 * 4 * 8 * 4


def test_a_pruned_model_is_measured_against_its_original() -> None:
    torch.manual_seed(0)
    model = lived_in(Plain()).train()
    result = pruned(model)
    assert result.original is model
    found = result.measure(IMAGES, (1, 3), rounds=2)
    sizes = [
        sum(t.numel() * t.element_size() for t in m.state_dict().values()) for m in (model, result.model)
    ]
    assert list(found.weights) == sizes
    assert all(row.pruned.memory < row.original.memory for row in found.rows)
    text = found.summary()
    for row in found.rows:
        assert f"{row.speedup:.2f}×" in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert [row["batch_size"] for row in plain["rows"]] == [1, 3]
    for row, (name, latency) in ((plain["rows"][1], pair) for pair in _named(found.rows[1])):
        assert row[name]["seconds"] == list(latency.seconds)
        assert row[name]["median"] == latency.median
        assert row[name]["quartiles"] == list(latency.quartiles)
        assert row[name]["memory"] == latency.memory
    assert plain["rows"][1]["speedup"] == found.rows[1].speedup
    assert plain["weights"] == sizes


def _named(row: Comparison) -> list[tuple[str, Latency]]:
    return [("original", row.original), ("pruned", row.pruned)]


def test_the_original_is_the_model_under_a_wrapper() -> None:
    """Compiled, it would not be compared with its like."""
    model = lived_in(Plain())
    assert pruned(torch.compile(model, backend="eager")).original is model


def test_units_of_the_summary() -> None:
    def row(size: int, seconds: float, memory: int) -> Comparison:
        return Comparison(
            size, Latency((seconds,) * 2, memory), Latency((seconds / 4,) * 2, memory // 4)
        )

    rows = (row(1, 4e-5, 400), row(2, 0.02, 4_000_000), row(64, 6.0, 8_000_000_000))
    text = Measurement(rows, (1_000_000, 250_000), "this", 2, "2.0").summary()
    for figure in ("40 µs", "10 µs", "20 ms", "5 ms", "6 s", "1.5 s", "4.00×"):
        assert figure in text
    for figure in ("400 B", "100 B", "4 MB", "1 MB", "8 GB", "2 GB", "250 kB"):
        assert figure in text
    assert "threads: 2" in text


@pytest.mark.parametrize("fails", [False, True])
def test_models_are_left_as_they_are(fails: bool) -> None:
    model = lived_in(Plain()).train()
    model.features[1].eval()
    result = pruned(model)
    before = [copy.deepcopy(m.state_dict()) for m in (model, result.model)]
    flags = [[m.training for m in x.modules()] for x in (model, result.model)]
    random = torch.random.get_rng_state()
    if fails:
        with pytest.raises(attrfast.ModelError, match=r"original model's forward pass.*\(1, 4, 8, 8\)"):
            result.measure(torch.zeros(2, 4, 8, 8))
    else:
        result.measure(IMAGES, (2,), rounds=2)
    for m, state, flag in zip((model, result.model), before, flags, strict=True):
        assert all(torch.equal(state[name], tensor) for name, tensor in m.state_dict().items())
        assert [x.training for x in m.modules()] == flag
        assert all(p.grad is None for p in m.parameters())
    assert torch.equal(random, torch.random.get_rng_state())


def test_several_inputs_may_be_given() -> None:
    make, inputs = NETWORKS["several inputs and outputs"]
    example = inputs(2)
    result = attrfast.prune(
        make(), [(example, torch.arange(2) % CLASSES)], keep_ratio=0.7, finetune=0, progress=False
    )
    assert [row.batch_size for row in result.measure(example, (3,), rounds=2).rows] == [3]


def test_after_pruning_in_place_the_original_must_be_given() -> None:
    result = pruned(lived_in(Plain()), inplace=True)
    assert result.original is None
    with pytest.raises(attrfast.InputError, match="pruned in place; give original="):
        result.measure(IMAGES)
    with pytest.raises(attrfast.InputError, match="is the pruned model itself"):
        result.measure(IMAGES, original=result.model)
    assert result.measure(IMAGES, (1,), rounds=2, original=Plain()).weights[0] > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_sizes": ()}, "batch_sizes is empty"),
        ({"batch_sizes": (0,)}, "at least 1, got 0"),
        ({"batch_sizes": (2.5,)}, "got 2.5"),
        ({"batch_sizes": 7.5}, "got 7.5"),
        ({"rounds": 1}, "rounds must be a whole number of at least 2, got 1"),
        ({"rounds": "many"}, "got 'many'"),
        ({"example": "text"}, "must hold tensors of shape"),
        ({"example": torch.zeros(0, 3, 16, 16)}, "no samples"),
    ],
)
def test_a_bad_argument_is_refused(options: dict[str, Any], reason: str) -> None:
    result = pruned(lived_in(Plain()))
    with pytest.raises(attrfast.InputError, match=reason):
        result.measure(**{"example": IMAGES, **options})


def test_a_device_that_does_not_exist_is_refused() -> None:
    result = pruned(lived_in(Plain()))
    with pytest.raises(attrfast.BackendError):
        result.measure(IMAGES, device="cuda:77")
