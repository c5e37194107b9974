"""The criterion `causal_map` against its definition: maps and gradients kept by hand, cosines by loops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import (
    CLASSES,
    ChannelsInTheLastDimension,
    DataDependent,
    Functional,
    Plain,
    Quarters,
    Reused,
    SeveralInputsAndOutputs,
)
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import attrfast
from attrfast.channels import discover
from attrfast.criteria import CausalMap

SAMPLES = 6
# Runs a network sample by sample: (logits, layer's first convolution -> its maps, each (1, C, ...)).
Maps = dict[str, list[torch.Tensor]]
ByHand = Callable[[Any, torch.Tensor], tuple[torch.Tensor, Maps]]


def labels() -> torch.Tensor:
    return torch.arange(SAMPLES) % CLASSES


def images(size: int = 16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, 3, size, size, generator=generator, dtype=torch.float64)


def made(network: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(network()).double()


def score(model: nn.Module, batches: Any, **options: Any) -> attrfast.Scores:
    return attrfast.attribute(model, batches, "causal_map", progress=False, **options)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5
    return dot / norms if norms > 0 else 0.0


def by_definition(
    run: ByHand, model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Layer -> (filters,) mean over samples, and over the layer's maps, of the cosine."""
    total: dict[str, torch.Tensor] = {}
    for n in range(len(classes)):
        logits, layers = run(model, inputs[n : n + 1])
        kept = [a for maps in layers.values() for a in maps]
        grads = iter(torch.autograd.grad(logits[0, classes[n]], kept, allow_unused=True))
        for name, maps in layers.items():
            for a in maps:
                g = next(grads)
                rows = [row.flatten().tolist() for row in a[0].detach()]
                if g is None:
                    continue
                alpha = [sum(row.flatten().tolist()) / row.numel() for row in g[0]]
                cam = [
                    max(0.0, sum(w * row[p] for w, row in zip(alpha, rows, strict=True)))
                    for p in range(len(rows[0]))
                ]
                found = [cosine([max(0.0, v) for v in row], cam) for row in rows]
                share = torch.tensor(found, dtype=torch.float64) / len(maps) / len(classes)
                total[name] = total.get(name, torch.zeros_like(share)) + share
    return total


def assert_scores(scores: attrfast.Scores, expected: dict[str, torch.Tensor]) -> None:
    assert {layer.name for layer in scores.units.layers} == set(expected)
    for name, values in expected.items():
        row = scores.units.filters[name].tolist()
        for unit in set(row):  # of several channels that can only go together, the mean
            own = [float(v) for v, u in zip(values, row, strict=True) if u == unit]
            assert float(scores.raw[unit]) == pytest.approx(sum(own) / len(own), rel=1e-10, abs=1e-12)


# -- networks run by hand ------------------------------------------------------------------------------


def plain(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    """By module hooks: the outputs of the ReLUs among the convolutions."""
    model, kept = copy.deepcopy(model), []
    for module in model.features:
        if isinstance(module, nn.ReLU):
            module.inplace = False
            module.register_forward_hook(lambda _, __, out: kept.append(out))
    logits = model(x)
    return logits, {f"features.{i}": [a] for i, a in zip((0, 4, 7), kept, strict=True)}


def functional_calls(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    a = functional.relu(model.first(x))
    b = functional.relu(model.second(a))
    c = functional.relu(model.third(functional.max_pool2d(b, 2)))
    return model.head(c.mean((2, 3))), {"first": [a], "second": [b], "third": [c]}


def reused(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    a = functional.relu(model.stem(x))
    b = a + functional.relu(model.body(a))
    c = b + functional.relu(model.body(b))
    d = functional.relu(model.side(c))
    return model.head(d.amax((2, 3))), {"stem": [a, b, c], "side": [d]}


class Joined(SeveralInputsAndOutputs):
    """Two layers whose maps are read together."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x, x.flip(3))


def joined(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    left, right = functional.relu(model.left(x)), functional.relu(model.right(x.flip(3)))
    mix = functional.relu(model.mix(torch.cat([left, right], 1)))
    return model.head(mix.mean((2, 3))), {"left": [left], "right": [right], "mix": [mix]}


class Overwritten(nn.Module):
    """A map that is read, and then changed in place through a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.squeeze = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        shift = torch.tanh(self.squeeze(x.mean((2, 3))))
        x = x.view(x.shape).add_(shift[:, :, None, None])
        return self.head(x.square().mean((2, 3)))


def overwritten(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    a = model.first(x)
    b = (a + torch.tanh(model.squeeze(a.mean((2, 3))))[:, :, None, None]).square()
    return model.head(b.mean((2, 3))), {"first": [a, b]}


def quarters(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    a = functional.relu(model.first(x))
    parts = a.view(1, 6, 2, 8, 2, 8).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    b = functional.relu(model.second(parts)).movedim(0, 1)[None]  # (1, 8, 4, 8, 8)
    c = functional.relu(model.third(b[0].movedim(1, 0))).movedim(0, 1)[None]
    return model.head(c.mean((2, 3, 4))), {"first": [a], "second": [b], "third": [c]}


class Grouped(nn.Module):
    """A grouped convolution, whose channels can only go with those of the other groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def grouped(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    a = functional.relu(model.first(x))
    b = functional.relu(model.second(a))
    return model.head(b.mean((2, 3))), {"first": [a], "second": [b]}


def channels_in_the_last_dimension(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    a = functional.relu(model.first(x))
    b = functional.gelu(model.mix(a.movedim(1, 3)).movedim(3, 1))
    c = model.third(b).tanh()
    logits = model.head(functional.adaptive_avg_pool2d(c, 3).flatten(1))
    return logits, {"first": [a], "mix": [b], "third": [c]}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], ByHand]] = {
    "modules": (Plain, plain),
    "functional calls": (Functional, functional_calls),
    "a module called twice": (Reused, reused),
    "two layers at one place": (Joined, joined),
    "maps overwritten": (Overwritten, overwritten),
    "parts of an image as samples": (Quarters, quarters),
    "channels that can only go together": (Grouped, grouped),
    "channels in the last dimension": (ChannelsInTheLastDimension, channels_in_the_last_dimension),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_the_mean_cosine_with_grad_cam(name: str) -> None:
    network, run = NETWORKS[name]
    model = made(network)
    expected = by_definition(run, model, images(), labels())
    assert_scores(score(model, [(images(), labels())]), expected)
    pairs = [(images()[i : i + 4], labels()[i : i + 4]) for i in (0, 4)]
    assert_scores(score(model, (pair for pair in pairs), microbatch=3), expected)


def test_the_predicted_class_can_be_the_target() -> None:
    model = made(Plain)
    expected = by_definition(plain, model, images(), model(images()).argmax(1))
    options = {"criterion": CausalMap(target="predicted"), "progress": False}
    assert_scores(attrfast.attribute(model, [(images(), labels())], **options), expected)


def test_batches_may_go_different_ways_through_the_model() -> None:
    model = made(DataDependent)
    once, twice = images() + 1, images() - 1

    def run(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
        maps = [functional.relu(model.first(x))]
        for _ in range(1 if float(x.sum()) > 0 else 2):
            maps.append(functional.relu(model.block(maps[-1])) + maps[-1])
        last = functional.relu(model.last(maps[-1]))
        return model.head(last.mean((2, 3))), {"first": maps, "last": [last]}

    parts = [by_definition(run, model, x, labels()) for x in (once, twice)]
    expected = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    batches = [(x[n : n + 1], labels()[n : n + 1]) for n in range(SAMPLES) for x in (once, twice)]
    assert_scores(score(model, batches), expected)


class Branches(nn.Module):
    """Two ways with the same calls and other parameters; bright images take the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bright = nn.Conv2d(4, 4, 3, padding=1)
        self.dark = nn.Conv2d(4, 4, 3, padding=1)
        self.bright_head = nn.Linear(4, CLASSES)
        self.dark_head = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = float(x.sum()) > 0
        x = torch.relu((self.bright if bright else self.dark)(torch.relu(self.stem(x))))
        return (self.bright_head if bright else self.dark_head)(x.mean((2, 3)))


def test_ways_with_the_same_calls_are_told_apart_by_their_parameters() -> None:
    model = made(Branches)
    bright, dark = images() + 1, images() - 1
    units = discover(model, (bright,), others=[((dark,), {})])
    alone = {
        "bright": by_definition(branches, model, bright, labels()),
        "dark": by_definition(branches, model, dark, labels()),
    }
    scores = score(model, [(bright, labels()), (dark, labels())], units=units)
    for name, expected in alone.items():  # the other half of the samples never met this convolution
        got = scores.raw[scores.units.filters[name]]
        torch.testing.assert_close(got, expected[name] / 2, rtol=1e-10, atol=1e-12)


def branches(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, Maps]:
    name = "bright" if float(x.sum()) > 0 else "dark"
    a = functional.relu(model.stem(x))
    b = functional.relu(getattr(model, name)(a))
    return getattr(model, f"{name}_head")(b.mean((2, 3))), {"stem": [a], name: [b]}


def test_a_zero_map_counts_as_zero() -> None:
    model = made(Functional)
    with torch.no_grad():
        model.second.bias[3] = -1000.0  # this filter never responds
        model.head.weight[2] = -model.head.weight[
            2
        ].abs()  # nothing in the last layer speaks for class 2
    scores = score(model, [(images(), torch.full((SAMPLES,), 2))])
    assert scores.raw[scores.units.filters["second"]][3] == 0
    assert (scores.raw[scores.units.filters["third"]] == 0).all()
    assert (scores.raw[scores.units.filters["second"]] > 0).any()


def test_small_gradients_give_the_same_cosines() -> None:
    model = made(Functional).float()
    whole = score(model, [(images().float(), labels())])
    with torch.no_grad():
        model.head.weight *= 1e-30
    small = score(model, [(images().float(), labels())])
    torch.testing.assert_close(small.raw, whole.raw, rtol=1e-4, atol=1e-5)


def test_all_layers_are_served_by_one_pass_a_batch() -> None:
    model = made(Plain)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.register_forward_hook(count)
    score(model, [(images(), labels())] * 3)
    assert calls == 1 + 3  # one finds the units


class Scaled(Functional):
    """Multiplies its input by a tensor that is no parameter and wants a gradient."""

    scale = torch.full((1,), 1.0, dtype=torch.float64, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale)


@pytest.mark.parametrize("criterion", ["causal_map", "iba"])
def test_nothing_but_maps_gets_a_gradient(criterion: str) -> None:
    def raw(network: type[nn.Module], x: torch.Tensor) -> torch.Tensor:
        batches = [(x, labels())]
        return attrfast.attribute(made(network), batches, criterion, progress=False).raw

    wanted = images().requires_grad_()
    expected = raw(Functional, images())
    assert torch.equal(raw(Functional, wanted), expected)
    assert torch.equal(raw(Functional, wanted * 1.0), expected)
    assert torch.equal(raw(Scaled, images()), expected)
    assert wanted.grad is None
    assert Scaled.scale.grad is None


def test_half_precision_comes_near() -> None:
    model = made(Plain).float()
    batch = [(images().float(), labels())]
    exact, rough = score(model, batch), score(model, batch, amp_dtype=torch.bfloat16)
    assert 0 < float((rough.raw - exact.raw).abs().max()) < 0.05


class Checkpointed(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = checkpoint(lambda t: torch.relu(self.second(t)), x, use_reentrant=False)
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


@pytest.mark.parametrize("criterion", ["causal_map", "iba"])
def test_checkpointed_activations_are_refused(criterion: str) -> None:
    with pytest.raises(attrfast.ModelError, match="checkpoints its activations"):
        attrfast.attribute(made(Checkpointed), [(images(), labels())], criterion, progress=False)


class Restless(Functional):
    """Takes another way on every pass."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).passes += 1
        for _ in range(self.passes):
            x = x * 1.0
        return super().forward(x)


def test_a_model_that_never_repeats_its_calls_is_refused() -> None:
    with pytest.raises(attrfast.ModelError, match="in an earlier pass"):
        score(made(Restless), [(images(), labels())])


@pytest.mark.parametrize("criterion", ["causal_map", "iba"])
@pytest.mark.parametrize("where", ["an image", "a weight"])
def test_what_is_not_finite_is_an_error(criterion: str, where: str) -> None:
    model, x = made(Plain), images()
    with torch.no_grad():
        if where == "an image":
            x[2, 0, 0, 0] = float("inf")
        else:
            model.features[0].weight[:] = float("nan")
    with pytest.raises(attrfast.NumericalError, match="not finite"):
        attrfast.attribute(model, [(x, labels())], criterion, progress=False)


@pytest.mark.parametrize("criterion", ["causal_map", "iba"])
def test_models_can_be_pruned_by_it(criterion: str) -> None:
    model = made(Reused)
    result = attrfast.prune(
        model,
        [(images(), labels())],
        criterion=criterion,
        keep_ratio=0.6,
        filters_per_step=3,
        finetune=0,
        progress=False,
    )
    assert len(result.history) > 2
    assert result.history[-1].phi <= 0.6
    assert result.model(images()).shape == (SAMPLES, CLASSES)
