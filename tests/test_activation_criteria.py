"""apoz and hrank are what their papers say of every feature map, wherever a network makes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from definition import layer_error, map_means
from families import family, images_for, lived_in
from small_networks import NETWORKS
from torch import nn
from torch.nn import functional

import attrfast
from attrfast import fused, stage_runs, tiers
from attrfast.criteria import ActivationCriterion, APoZ
from attrfast.map_statistics import share_not_zero

# Network -> for every call of a ReLU, the convolution whose filters its channels belong to.
RELUS: dict[str, list[str | None]] = {
    "plain": ["features.0", "features.4", "features.7", None],
    "functional": ["first", "second", "third"],
    "reused": ["stem", "body", "body", "side"],
    "several inputs and outputs": ["left", "right", "mix"],
    "grouped": ["stem", "grouped", "depthwise", "point", "multiplied", "last"],
    "never used": ["first", "second"],
    "data dependent": ["first", "block", "last"],
    "up and down": ["up", "depthwise_up", "grouped_up", "last"],  # a PReLU follows `down`
    "1d": ["first", "second"],
    "3d": ["first", "second"],
    "gated": ["first", None, "second"],
    "fixed view": ["first", "second"],
    "half": ["second", "third"],
}


def alive(array: np.ndarray[Any, Any]) -> float:
    return 1 - float((array == 0).sum()) / array.size


def rank(array: np.ndarray[Any, Any]) -> float:
    if array.ndim < 2:
        array = array.reshape(1, -1)
    return float(np.linalg.matrix_rank(array.reshape(array.shape[0], -1)))


STATISTICS = {"apoz": alive, "hrank": rank}


def small(name: str, samples: int = 3) -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.Tensor]:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, images = lived_in(make()).double(), tuple(x.double() for x in inputs(samples))
    if name == "data dependent":
        images = tuple(x.abs() for x in images)
    return model, images, torch.arange(samples) % 5


def score(model: nn.Module, loader: Any, criterion: Any, **options: Any) -> Any:
    return attrfast.attribute(model, loader, criterion, progress=False, **{"normalize": None, **options})


@pytest.mark.parametrize("criterion", STATISTICS)
@pytest.mark.parametrize("name", NETWORKS)
def test_small_network(name: str, criterion: str) -> None:
    model, inputs, labels = small(name)
    got = score(model, [(inputs, labels)], criterion)
    means = map_means(model, inputs, got.units, RELUS[name], STATISTICS[criterion])
    assert float(means.std()) > 0
    torch.testing.assert_close(got.raw, means.mean(0), rtol=1e-12, atol=1e-14)
    assert got.reduction is None


def resnet18_relus() -> list[str | None]:
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    return ["conv1", *(f"{block}.conv{k}" for block in blocks for k in (1, 2))]


def mobilenet_relus(model: nn.Module) -> list[str | None]:
    """A convolution is followed by a batch norm, and that by a ReLU6 or by nothing."""
    modules = list(model.named_modules())
    names = [name for name, module in modules if not list(module.children())]
    pairs = [(names[i - 2], model.get_submodule(name)) for i, name in enumerate(names) if i > 1]
    return [conv for conv, module in pairs if isinstance(module, nn.ReLU6)]


@pytest.mark.parametrize("criterion", STATISTICS)
def test_residual_stages_average_over_their_relus(criterion: str) -> None:
    model, images = family("resnet18").double(), images_for("resnet18", 1).double()[:, :, :32, :32]
    got = score(model, [(images, torch.tensor([1]))], criterion)
    means = map_means(model, (images,), got.units, resnet18_relus(), STATISTICS[criterion])
    assert layer_error(got.raw, means.mean(0), got.units) <= 1e-12


def test_units_that_no_relu_follows_are_measured_at_their_readers() -> None:
    """The narrow ends of an inverted residual block are linear, and none of their values is zero."""
    model, images = family("mobilenet_v2").double(), images_for("mobilenet_v2", 2).double()
    got = score(model, [(images, torch.tensor([1, 2]))], "apoz")
    means = map_means(model, (images,), got.units, mobilenet_relus(model), alive)
    assert layer_error(got.raw, means.mean(0), got.units) <= 1e-12
    assert float(got["features.2.conv.2"].min()) == 1
    assert float(got["features.2.conv.0.0"].min()) < 1


@pytest.mark.parametrize("criterion", STATISTICS)
def test_splitting_a_batch_changes_nothing(criterion: str) -> None:
    model, inputs, labels = small("plain", 6)
    whole = score(model, [(inputs, labels)], criterion)
    for size in (1, 4):
        parts = score(model, [(inputs, labels)], criterion, microbatch=size)
        torch.testing.assert_close(parts.raw, whole.raw, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["plain", "functional", "reused"])
def test_stages_that_run_part_by_part_are_measured_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, labels = small(name, 5)
    whole = score(model, [(inputs, labels)], ["taylor", "apoz", "hrank"])

    def two(run: Any, size: int, samples: int) -> int:
        return samples if run.buffers is None else min(2, samples)

    monkeypatch.setattr(stage_runs.StageRun, "samples_at_once", two)
    parts = score(model, [(inputs, labels)], ["taylor", "apoz", "hrank"])
    for criterion in whole:
        torch.testing.assert_close(parts[criterion].raw, whole[criterion].raw, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("criteria", [["apoz"], ["taylor", "apoz"]], ids=str)
@pytest.mark.parametrize("name", ["plain", "functional", "reused"])
def test_zeros_are_counted_while_maps_are_made(
    name: str, criteria: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(mode: Any, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a map is read again")

    model, inputs, labels = small(name)
    want = score(model, [(inputs, labels)], "apoz")
    monkeypatch.setattr(fused.PlanMode, "held", again)
    got = score(model, [(inputs, labels)], criteria)["apoz"]
    assert torch.equal(got.raw, want.raw)


@pytest.mark.parametrize("name", NETWORKS)
def test_both_tiers_count_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, labels = small(name)
    fast = score(model, [(inputs, labels)], "apoz")
    monkeypatch.setattr(tiers, "make_plan", lambda *args, **options: None)
    slow = score(model, [(inputs, labels)], "apoz")
    torch.testing.assert_close(slow.raw, fast.raw, rtol=1e-14, atol=0)


def test_positions_of_any_number_of_dimensions_are_counted() -> None:
    maps = torch.randint(-1, 2, (2, 3, 2, 1, 3, 2)).double()
    for dims in range(2, 7):
        here = maps.flatten(dims - 1)
        want = (here != 0).double().flatten(2).mean(2) if dims > 2 else (here != 0).double()
        torch.testing.assert_close(share_not_zero(here), want, rtol=1e-15, atol=0)


class Complement(APoZ):
    """A statistic of its own, under the name of one that kernels take."""

    def statistic(self, maps: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 1 - share_not_zero(maps)


def test_a_subclass_that_measures_something_else_is_asked() -> None:
    model, inputs, labels = small("plain")
    share = score(model, [(inputs, labels)], "apoz")
    rest = score(model, [(inputs, labels)], Complement())
    torch.testing.assert_close(rest.raw, 1 - share.raw, rtol=1e-14, atol=1e-15)


def test_batches_that_go_different_ways_are_each_measured_on_theirs() -> None:
    model, (x,), labels = small("data dependent")
    got = score(model, [(x, labels), (-x, labels), (x, labels)], ["taylor", "apoz"])["apoz"]
    once = map_means(model, (x,), got.units, ["first", "block", "last"], alive)
    twice = map_means(model, (-x,), got.units, ["first", "block", "block", "last"], alive)
    expected = (2 * once.mean(0) + twice.mean(0)) / 3
    assert not torch.allclose(expected, once.mean(0))
    torch.testing.assert_close(got.raw, expected, rtol=1e-12, atol=1e-14)


class Restless(nn.Module):
    """Takes another way every time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.times = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.times += 1
        x = self.first(x)
        for _ in range(self.times):
            x = torch.relu(x)
        return self.head(x.mean((2, 3)))


def test_a_model_that_never_repeats_itself_is_refused() -> None:
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    loader = [(images, torch.tensor([0, 1]))]
    with pytest.raises(attrfast.ModelError, match="another way every time"):
        score(Restless().double(), loader, "apoz")
    assert float(score(Restless().double(), loader, "taylor").raw.max()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_counted_as_they_are(dtype: torch.dtype) -> None:
    """The network's own output of the first ReLU, in its dtype, has the zeros that are counted."""
    model, inputs, labels = small("plain")
    model, images = model.to(dtype), inputs[0].to(dtype)
    got = score(model, [(images, labels)], "apoz")
    with torch.no_grad():
        maps = model.get_submodule("features")[:3](images)
    alive_share = (maps != 0).float().mean((0, 2, 3))
    torch.testing.assert_close(got["features.0"], alive_share, rtol=0.02, atol=0)
    mixed = score(model.float(), [(images.float(), labels)], ["hrank", "apoz"], amp_dtype=dtype)
    assert float((mixed["apoz"].raw - got.raw).abs().max()) < 0.05


class Ceilings(nn.Module):
    """ReLUs in spellings without a name of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3) for i in (3, 4, 4))
        self.tanh = nn.Hardtanh(0.0, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tanh(self.a(x))
        x = self.b(x).clamp_(min=0)
        return functional.threshold(self.c(x), 0.0, 0.0, inplace=True).mean((2, 3)) @ torch.ones(
            4, 3, dtype=x.dtype
        )


def test_any_spelling_of_a_relu_is_one() -> None:
    torch.manual_seed(0)
    model, images = Ceilings().double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    got = score(model, [(images, torch.tensor([0, 1]))], "apoz")
    with torch.no_grad():
        a = model.a(images).clamp(0, 0.5)
        b = model.b(a).relu()
    for name, x in (("a", a), ("b", b)):
        torch.testing.assert_close(got[name], (x != 0).double().mean((0, 2, 3)))


class Crops(nn.Module):
    """Looks at the four quarters of an image as a batch of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def quarters(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([half for both in x.chunk(2, 2) for half in both.chunk(2, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.conv(self.quarters(x)))
        return self.head(maps.mean((2, 3))).view(4, len(x), -1).mean(0)


def test_parts_of_a_sample_that_make_a_batch_of_their_own_are_averaged() -> None:
    torch.manual_seed(0)
    model, images = Crops().double(), torch.randn(3, 3, 12, 12, dtype=torch.float64)
    got = score(model, [(images, torch.tensor([0, 1, 2]))], ["hrank", "taylor"])["hrank"]
    with torch.no_grad():
        maps = torch.relu(model.conv(model.quarters(images)))
    expected = [np.mean([rank(m[c].numpy()) for m in maps]) for c in range(4)]
    np.testing.assert_allclose(got["conv"], expected, rtol=1e-12)


@pytest.mark.parametrize("criterion", STATISTICS)
def test_a_map_that_is_not_finite_is_named(criterion: str) -> None:
    model, inputs, labels = small("plain")
    with torch.no_grad():
        model.get_parameter("features.4.weight")[2] = float("nan")
    with pytest.raises(attrfast.NumericalError, match=r"feature map.*features\.4.*features\.4\.weight"):
        score(model, [(inputs, labels)], criterion)


def test_a_statistic_of_ones_own() -> None:
    @attrfast.register_criterion("test_largest")
    class Largest(ActivationCriterion):
        def statistic(self, maps: torch.Tensor) -> torch.Tensor:
            return maps.flatten(2).amax(2)

    model, inputs, labels = small("functional")
    got = score(model, [(inputs, labels)], "test_largest")
    means = map_means(model, inputs, got.units, RELUS["functional"], lambda array: float(array.max()))
    torch.testing.assert_close(got.raw, means.mean(0), rtol=1e-12, atol=0)
