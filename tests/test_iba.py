"""The criterion `iba` against a bottleneck written by hand, given the same noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, ChannelsInTheLastDimension, Functional, Quarters, Reused, Sequence1d
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

import attrfast
from attrfast.criteria.iba import InformationBottleneck
from attrfast.feature_maps import as_given, by_channel

SAMPLES = 5
Tail = Callable[[torch.Tensor], torch.Tensor]


def labels() -> torch.Tensor:
    return torch.arange(SAMPLES) % CLASSES


def images(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(SAMPLES, 3, 12, 12, dtype=torch.float64).normal_(generator=generator)


def made(network: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return lived_in(network()).double()


def score(model: nn.Module, batches: Any, seed: int = 0, **options: Any) -> attrfast.Scores:
    rule = InformationBottleneck(**options)
    return attrfast.attribute(model, batches, rule, seed=seed, progress=False)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All the noise that is drawn, in order."""
    kept: list[torch.Tensor] = []
    draw = torch.randn

    def kept_draw(*args: Any, **options: Any) -> torch.Tensor:
        kept.append(draw(*args, **options))
        return kept[-1]

    monkeypatch.setattr(torch, "randn", kept_draw)
    return kept


def blurred(x: torch.Tensor, deviation: float) -> torch.Tensor:
    """A map (C, H, W) under a Gaussian whose part within the map is scaled to the sum 1."""
    if deviation == 0:
        return x
    height, width = x.shape[1:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    out = []
    for i in range(height):
        for j in range(width):
            weight = torch.exp(-((rows - i) ** 2 + (columns - j) ** 2) / (2 * deviation**2)).double()
            out.append((x * (weight / weight.sum())).sum((1, 2)))
    return torch.stack(out, 1).view(x.shape)


def bits_by_hand(
    maps: torch.Tensor,
    tail: Tail,
    classes: torch.Tensor,
    noise: Iterator[torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """(C,) mean over samples of the bits through each channel of maps (N, C, H, W).

    Args:
        tail: the rest of the network.
        noise: for every iteration, noise sample and image, in this order, (C, H, W) standard normal.
    """
    draws = [
        [[next(noise) for _ in classes] for _ in range(options["noise_samples"])]
        for _ in range(options["iterations"])
    ]
    mean, deviation = maps.mean(0), maps.std(0)
    alive = deviation > 0
    safe = torch.where(alive, deviation, 1.0)
    prior = Normal(mean, safe)
    total = torch.zeros(maps.shape[1], dtype=torch.float64)
    for n, r in enumerate(maps):
        alpha = torch.full_like(r, 5.0)
        m, v = torch.zeros_like(r), torch.zeros_like(r)

        def divergence(alpha: torch.Tensor, r: torch.Tensor = r) -> torch.Tensor:
            share = blurred(torch.sigmoid(alpha), options["blur"])
            kl = kl_divergence(Normal(share * r + (1 - share) * mean, (1 - share) * safe), prior)
            return torch.where(alive, kl, 0.0)

        for step in range(options["iterations"]):
            alpha = alpha.detach().requires_grad_()
            share = blurred(torch.sigmoid(alpha), options["blur"])
            loss = options["beta"] * divergence(alpha).mean()
            for draw in draws[step]:
                z = share * r + (1 - share) * (mean + deviation * draw[n])
                ce = functional.cross_entropy(tail(z[None]), classes[n : n + 1])
                loss = loss + ce / options["noise_samples"]
            (g,) = torch.autograd.grad(loss, alpha)
            # Kingma, Ba 2015, Adam, algorithm 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            first, second = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            alpha = alpha - options["learning_rate"] * first / (second.sqrt() + 1e-8)
        total += divergence(alpha.detach()).sum((1, 2)) / math.log(2)
    return total / len(maps)


OPTIONS = [
    {"iterations": 10, "beta": 10.0, "noise_samples": 1, "learning_rate": 1.0, "blur": 1.0},
    {"iterations": 3, "beta": 0.5, "noise_samples": 2, "learning_rate": 0.3, "blur": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["as in the paper", "other options"])
def test_scores_are_the_bits_through_a_bottleneck(
    drawn: list[torch.Tensor], options: dict[str, Any]
) -> None:
    model = made(Functional)
    with torch.no_grad():
        model.second.bias[3] = -1000.0  # this filter never responds, so its map never varies
    scores = score(model, [(images(), labels())], **options)
    noise = iter(drawn)
    with torch.no_grad():
        a = torch.relu(model.first(images()))
        b = torch.relu(model.second(a))
        c = torch.relu(model.third(functional.max_pool2d(b, 2)))

    def after_third(z: torch.Tensor) -> torch.Tensor:
        return model.head(z.mean((2, 3)))

    def after_second(z: torch.Tensor) -> torch.Tensor:
        return after_third(torch.relu(model.third(functional.max_pool2d(z, 2))))

    def after_first(z: torch.Tensor) -> torch.Tensor:
        return after_second(torch.relu(model.second(z)))

    for name, maps, tail in (
        ("first", a, after_first),
        ("second", b, after_second),
        ("third", c, after_third),
    ):
        expected = bits_by_hand(maps, tail, labels(), noise, options)
        got = scores.raw[scores.units.filters[name]]
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    assert next(noise, None) is None
    assert scores.raw[scores.units.filters["second"]][3] == 0


def test_a_layer_with_several_maps_gets_their_mean(drawn: list[torch.Tensor]) -> None:
    model, options = made(Reused), OPTIONS[1]
    scores = score(model, [(images(), labels())], **options)
    noise = iter(drawn)

    def side(z: torch.Tensor) -> torch.Tensor:
        return model.head(torch.relu(model.side(z)).amax((2, 3)))

    def body(z: torch.Tensor) -> torch.Tensor:
        return z + torch.relu(model.body(z))

    with torch.no_grad():
        a = torch.relu(model.stem(images()))
    parts = [
        bits_by_hand(maps.detach(), tail, labels(), noise, options)
        for maps, tail in (
            (a, lambda z: side(body(body(z)))),
            (body(a), lambda z: side(body(z))),
            (body(body(a)), side),
        )
    ]
    got = scores.raw[scores.units.filters["stem"]]
    torch.testing.assert_close(got, torch.stack(parts).mean(0), rtol=1e-7, atol=1e-9)


def test_channels_may_lie_in_any_dimension(drawn: list[torch.Tensor]) -> None:
    model, options = made(ChannelsInTheLastDimension), OPTIONS[1]
    scores = score(model, [(images(), labels())], **options)
    noise = iter(drawn)

    def after_third(z: torch.Tensor) -> torch.Tensor:
        return model.head(functional.adaptive_avg_pool2d(z, 3).flatten(1))

    def after_mix(z: torch.Tensor) -> torch.Tensor:
        return after_third(model.third(z).tanh())

    def mix(z: torch.Tensor) -> torch.Tensor:
        return functional.gelu(model.mix(z.movedim(1, 3)).movedim(3, 1))

    with torch.no_grad():
        a = torch.relu(model.first(images()))
        b = mix(a)
        c = model.third(b).tanh()
    for name, maps, tail in (
        ("first", a, lambda z: after_mix(mix(z))),
        ("mix", b, after_mix),
        ("third", c, after_third),
    ):
        expected = bits_by_hand(maps, tail, labels(), noise, options)
        got = scores.raw[scores.units.filters[name]]
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "dim", "samples", "seen"),
    [
        ((2, 3, 4, 5), 1, 2, (2, 3, 4, 5)),
        ((2, 4, 5, 3), 3, 2, (2, 3, 4, 5)),
        ((3, 4, 5), 0, 1, (1, 3, 4, 5)),
        ((6, 3, 4), 1, 1, (1, 3, 6, 4)),
        ((6, 4, 3), 2, 1, (1, 3, 6, 4)),
    ],
)
def test_maps_are_seen_by_sample_and_channel_and_given_back(
    shape: tuple[int, ...], dim: int, samples: int, seen: tuple[int, ...]
) -> None:
    x = torch.arange(math.prod(shape)).view(shape)
    maps = by_channel(x, dim, samples)
    assert maps.shape == seen
    for channel in range(shape[dim]):
        assert torch.equal(maps[:, channel].flatten(), x.select(dim, channel).flatten())
    assert torch.equal(as_given(maps.clone(), x, dim), x)


def test_parts_of_an_image_may_be_the_samples_of_a_layer() -> None:
    scores = score(made(Quarters), [(images(), labels())])
    assert scores.samples == SAMPLES
    assert bool(torch.isfinite(scores.raw).all())
    assert float(scores.raw.max()) > 0


def test_split_batches_give_the_same_scores() -> None:
    model = made(Functional)
    batch = (images(), labels())
    whole = score(model, [batch])
    pairs = ((batch[0][i : i + 2], batch[1][i : i + 2]) for i in (0, 2, 4))
    parts = score(model, pairs)
    torch.testing.assert_close(parts.raw, whole.raw, rtol=1e-9, atol=1e-12)
    assert parts.samples == SAMPLES


def test_the_seed_decides_the_noise() -> None:
    model = made(Sequence1d)
    x = torch.randn(SAMPLES, 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, again, other = (score(model, [(x, labels())], seed=seed).raw for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class TwoHeads(nn.Module):
    """One convolution for each of two outputs; the first output is the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Conv2d(3, 4, 3)
        self.side = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, CLASSES)
        self.second_head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        main, side = torch.relu(self.main(x)), torch.relu(self.side(x))
        return self.head(main.mean((2, 3))), self.second_head(side.mean((2, 3)))


@pytest.mark.parametrize("criterion", ["iba", "causal_map"])
def test_what_the_decision_does_not_depend_on_scores_nothing(criterion: str) -> None:
    batch = (images(), labels())
    scores = attrfast.attribute(made(TwoHeads), [batch], criterion, progress=False)
    assert (scores.raw[scores.units.filters["side"]] == 0).all()
    assert (scores.raw[scores.units.filters["main"]] > 0).any()


class Assigned(nn.Module):
    """A map that is written piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x[:, :, 0] = 0.5
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.mark.parametrize("criterion", ["iba", "causal_map"])
def test_a_map_written_piece_by_piece_scores_nothing_and_is_kept(criterion: str) -> None:
    batch = (images(), labels())
    scores = attrfast.attribute(made(Assigned), [batch], criterion, progress=False)
    first = scores.units.filters["first"]
    assert (scores.raw[first] == 0).all()
    assert all(scores.units.frozen[unit] for unit in first)
    assert (scores.raw[scores.units.filters["second"]] > 0).any()


class Undecided(Functional):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize("criterion", ["iba", "causal_map"])
def test_a_model_without_gradients_is_refused(criterion: str) -> None:
    with pytest.raises(attrfast.ModelError, match="no differentiable path"):
        attrfast.attribute(made(Undecided), [(images(), labels())], criterion, progress=False)


def test_more_passes_through_the_filter_that_decides() -> None:
    """Classes are told apart by the brightness of one colour, and one filter sees that colour."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 3, 10, 10, generator=generator, dtype=torch.float64)
    classes = torch.arange(8) % 2
    x[:, 0] += 3.0 * classes.view(-1, 1, 1)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        model[4].weight.copy_(torch.tensor([[-8.0, 0.0, 0.0], [8.0, 0.0, 0.0]]))
        model[4].bias.copy_(torch.tensor([14.0, -14.0]))
    raw = score(model, [(x, classes)], iterations=30).raw
    assert float(raw[0]) > 3 * float(raw[1:].max())


def test_the_users_loss_takes_the_place_of_the_cross_entropy() -> None:
    model = made(Functional)

    def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(output, batch[1], reduction="none")

    batch = (images(), labels())
    own = attrfast.attribute(model, [batch], "iba", loss_fn=loss, progress=False)
    assert torch.equal(own.raw, score(model, [batch]).raw)
    other = attrfast.attribute(model, [batch], "iba", loss_fn=lambda o, _: o[:, 0], progress=False)
    assert not torch.equal(other.raw, own.raw)


def test_too_little_to_estimate_a_variance_is_refused() -> None:
    with pytest.raises(attrfast.InputError, match="at least two samples"):
        score(made(Functional), [(images()[:1], labels()[:1])])


def test_inputs_of_several_sizes_are_refused() -> None:
    with pytest.raises(attrfast.InputError, match="one size"):
        score(made(Functional), [(images(), labels()), (images()[..., :11], labels())])


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"iterations": 2.5},
        {"noise_samples": -1},
        {"beta": -1.0},
        {"beta": float("nan")},
        {"learning_rate": float("inf")},
        {"blur": "1"},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(attrfast.InputError, match=name):
        InformationBottleneck(**options)
