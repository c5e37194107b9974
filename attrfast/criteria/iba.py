"""The criterion `iba`: how much information the network must let through a filter to decide as it does.

Source: Schulz, Sixt, Tombari, Landgraf 2020, Restricting the Flow: Information Bottlenecks for
Attribution, section 3 (the per-sample bottleneck), read out filter by filter.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from attrfast.batches import Batch
from attrfast.channels import Discovery
from attrfast.criteria.base import register_criterion
from attrfast.criteria.gradient import Taylor
from attrfast.errors import InputError, NoGradientError, NumericalError
from attrfast.feature_maps import FeatureMaps, Forward, Place, Recording, as_given, by_channel
from attrfast.matrix import RowsError


@register_criterion("iba")
class InformationBottleneck(Taylor):
    """mean_n of the bits that pass through a unit's channels, summed over positions.

    Into one feature map R at a time (`attrfast.feature_maps` says where), the pass puts
    Z = lambda R + (1 - lambda) eps, eps ~ N(mu, sigma^2), with mu and sigma of every channel and position
    estimated over the data. lambda = blur(sigmoid(alpha)); for every sample, alpha is optimised by Adam
    to minimise the cross-entropy plus beta times the mean over the map's elements of
    KL[N(lambda R + (1 - lambda) mu, (1 - lambda)^2 sigma^2) || N(mu, sigma^2)].
    The KL at the end, in bits, is what passes. A unit with several channels gets their sum; one with
    several places, the mean over them. An element that never varies over the data carries nothing.

    As in the paper: alpha starts at 5, 10 iterations at a learning rate of 1, beta = 10 over the number of
    elements times the sum of the KL, a Gaussian blur with a standard deviation of 1 over positions. Other
    than there: one sample of noise an iteration by default, not 10, since scores are means over images.

    It takes 1 + places x iterations x noise_samples forward passes a batch, most with a backward pass:
    score a few hundred images (`max_batches`), not a whole training set. The batches are kept in memory,
    because mu and sigma come first.

    Args:
        iterations: steps of Adam for every map.
        beta: weight of the information against the cross-entropy.
        noise_samples: draws of eps in every iteration.
        learning_rate: of Adam.
        blur: standard deviation of the blur over positions, in positions; 0: none.

    Raises:
        InputError: an option is not usable.
    """

    def __init__(
        self,
        iterations: int = 10,
        beta: float = 10.0,
        noise_samples: int = 1,
        learning_rate: float = 1.0,
        blur: float = 1.0,
    ) -> None:
        for name, count in (("iterations", iterations), ("noise_samples", noise_samples)):
            if not isinstance(count, int) or count < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {count!r}")
        for name, number in (("beta", beta), ("blur", blur), ("learning_rate", learning_rate)):
            if not isinstance(number, (int, float)) or not math.isfinite(number) or number < 0:
                raise InputError(f"{name} must be a finite number of at least 0, got {number!r}")
        self.iterations, self.noise_samples = iterations, noise_samples
        self.beta, self.learning_rate, self.blur = float(beta), float(learning_rate), float(blur)

    def own_pass(
        self,
        model: nn.Module,
        found: Discovery,
        *,
        objective: Callable[[Any, Batch], torch.Tensor],
        forward: Forward,
        seed: int,
        progress: bool,
    ) -> _Bottlenecks:
        return _Bottlenecks(self, FeatureMaps(model, found), objective, forward, seed, progress)


def information(
    r: torch.Tensor, opened: torch.Tensor, closed: torch.Tensor, varies: torch.Tensor
) -> torch.Tensor:
    """KL, in nats, of every element's Z from its noise.

    Args:
        r: (R - mu) / sigma.
        opened: lambda, of r's shape.
        closed: 1 - lambda, given as well because it is the smaller and its logarithm is taken.
        varies: where sigma is not zero; elsewhere the KL is 0.

    Source: Schulz et al. 2020, section 3.1, the KL of two normal distributions.
    """
    tiny = torch.finfo(closed.dtype).tiny
    kl = 0.5 * ((opened * r).square() + closed.square() - 1) - closed.clamp(min=tiny).log()
    return torch.where(varies, kl, 0.0)


class _Moments:
    """Mean and standard deviation over samples of one map, added up batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())
        self.dtype = torch.float32

    def add(self, x: torch.Tensor) -> None:
        """x: (N, C, positions...)."""
        self.dtype = x.dtype
        x = x.detach().double()
        mean = x.mean(0)
        squares = (x - mean).square().sum(0)
        if self.count == 0:
            self.count, self.mean, self.squares = len(x), mean, squares
            return
        if mean.shape != self.mean.shape:
            raise InputError(
                f"iba needs inputs of one size, as mean and variance are taken position by position: a "
                f"layer's maps have shape {tuple(mean.shape)} after {tuple(self.mean.shape)}; resize them"
            )
        # Chan, Golub, LeVeque 1979, Updating formulae for computing sample variances.
        total = self.count + len(x)
        step = mean - self.mean
        self.squares = self.squares + squares + step.square() * (self.count * len(x) / total)
        self.mean = self.mean + step * (len(x) / total)
        self.count = total

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation, which is 0 where nothing is left but rounding, in float32 or float64."""
        deviation = (self.squares / max(1, self.count - 1)).sqrt()
        rounding = 4 * torch.finfo(self.dtype).eps * self.mean.abs()
        deviation = torch.where(deviation <= rounding, 0.0, deviation)  # NaN stays NaN
        wide = torch.promote_types(self.dtype, torch.float32)
        return self.mean.to(wide), deviation.to(wide)


class _Bottlenecks:
    """First the moments of all maps, then one optimisation for each batch and map."""

    def __init__(
        self,
        options: InformationBottleneck,
        feature_maps: FeatureMaps,
        objective: Callable[[Any, Batch], torch.Tensor],
        forward: Forward,
        seed: int,
        progress: bool,
    ) -> None:
        self.options, self.feature_maps = options, feature_maps
        self.objective, self.forward = objective, forward
        self.seed, self.progress = seed, progress
        self.batches: list[tuple[Batch, Recording, list[Place]]] = []
        self.moments: dict[Place, _Moments] = {}
        self.samples = 0
        self.unheard: NoGradientError | None = None  # of a map that J does not depend on

    def add(self, batch: Batch) -> None:
        with torch.no_grad():
            captured = self.feature_maps.capture(batch, self.forward)
        try:
            maps = {p: by_channel(x, p.dim, batch.samples) for p, x in captured.maps.items()}
        except RowsError:
            if batch.samples == 1:
                raise
            for part in batch.split(1):
                self.add(part)
            return
        grown = {place: copy.copy(self.moments.get(place) or _Moments()) for place in maps}
        for place, x in maps.items():
            grown[place].add(x)
        self.moments |= grown  # all or, where memory is full, none
        self.batches.append((batch, captured.recording, list(maps)))
        self.samples += batch.samples

    def importance(self) -> torch.Tensor:
        alone = [place for place, moments in self.moments.items() if moments.count < 2]
        if alone:
            raise InputError(
                "iba needs at least two samples that take the same way through the model, as it estimates "
                "the variance of its feature maps; give it more"
            )
        total = torch.zeros(len(self.feature_maps.units), dtype=torch.float64)
        work = sum(len(places) for _, _, places in self.batches)
        bar = tqdm(total=work, desc="bottlenecks", leave=False, disable=None if self.progress else True)
        first, heard = 0, False
        with bar:
            for batch, recording, places in self.batches:
                bits = torch.zeros(len(total), dtype=torch.float64)
                counts = torch.zeros(len(total), dtype=torch.float64)
                for number, place in enumerate(places):
                    # A sample's noise depends on its number alone, not on who shares its batch.
                    seeds = [_mixed(self.seed, number, first + n) for n in range(batch.samples)]
                    known = place.units >= 0
                    members = place.units[known]
                    counts[torch.unique(members)] += 1
                    bar.update()
                    try:
                        passed = self._optimised(place, batch, recording, seeds)
                    except NoGradientError as error:
                        self.unheard = error
                        continue
                    heard = True
                    bits.index_add_(0, members, passed.double().cpu()[known])
                total += bits / counts.clamp(min=1)
                first += batch.samples
        if self.unheard is not None and not heard:
            raise self.unheard
        if not bool(torch.isfinite(total).all()):
            raise NumericalError(
                "the information through a layer is not finite; check the data and the weights, or leave "
                "out amp_dtype"
            )
        return total / self.samples

    def _optimised(
        self, place: Place, batch: Batch, recording: Recording, seeds: list[int]
    ) -> torch.Tensor:
        """(C,) bits that pass through each channel, summed over positions and samples.

        Args:
            seeds: of each sample's noise.

        Raises:
            NoGradientError: J does not depend on the map.
        """
        options = self.options
        mean, deviation = self.moments[place].finish()
        shape = (batch.samples, *mean.shape)
        # Channels of no unit pass as they are.
        scored = (place.units >= 0).view(-1, *[1] * (mean.dim() - 1)).to(mean.device)
        varies = (deviation != 0) & scored
        noises = [torch.Generator(mean.device).manual_seed(seed) for seed in seeds]
        kernels = [_blur(size, options.blur, mean) for size in mean.shape[1:]]
        alpha = torch.full(shape, 5.0, dtype=mean.dtype, device=mean.device, requires_grad=True)
        adam = torch.optim.Adam([alpha], lr=options.learning_rate)
        # Every term of J is one sample's, so that samples are optimised apart from each other.
        weight = options.beta / (int(scored.sum()) * math.prod(mean.shape[1:]))
        r = opened = closed = alpha

        def shares() -> tuple[torch.Tensor, torch.Tensor]:
            return _blurred(alpha.sigmoid(), kernels), _blurred((-alpha).sigmoid(), kernels)

        def passed() -> torch.Tensor:
            normal = torch.where(varies, (r - mean) / torch.where(varies, deviation, 1.0), 0.0)
            return information(normal, opened, closed, varies)

        def restrict(_: Place, x: torch.Tensor) -> torch.Tensor:
            nonlocal r
            r = by_channel(x, place.dim, batch.samples).to(mean.dtype)
            draws = [
                torch.randn(mean.shape, generator=g, dtype=mean.dtype, device=mean.device)
                for g in noises
            ]
            noise = mean + deviation * torch.stack(draws)
            z = torch.where(scored, opened * r + closed * noise, r)
            return torch.empty_like(x).copy_(as_given(z, x, place.dim))  # with the strides of x

        for _ in range(options.iterations):
            with torch.enable_grad():
                opened, closed = shares()
                loss = torch.zeros((), dtype=mean.dtype, device=mean.device)
                for _ in range(options.noise_samples):
                    output = self.feature_maps.run(
                        batch, self.forward, recording, {place.value: place}, restrict, place.call + 1
                    )
                    loss = loss + self.objective(output, batch) / options.noise_samples
                loss = loss + weight * passed().sum()
            (alpha.grad,) = torch.autograd.grad(loss, [alpha])
            adam.step()
        with torch.no_grad():
            opened, closed = shares()
            return passed().flatten(2).sum((0, 2)) / math.log(2)


def _mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    digest = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _blur(size: int, deviation: float, like: torch.Tensor) -> torch.Tensor | None:
    """(size, size): a Gaussian blur of one dimension of positions, every row with the sum 1."""
    if deviation == 0 or size == 1:
        return None
    steps = torch.arange(size, dtype=torch.float64)
    kernel = (-0.5 * ((steps[:, None] - steps) / deviation).square()).exp()
    return (kernel / kernel.sum(1, keepdim=True)).to(like)


def _blurred(x: torch.Tensor, kernels: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """x, (N, C, positions...), blurred along its positions."""
    for dim, kernel in enumerate(kernels, start=2):
        if kernel is not None:
            x = functional.linear(x.movedim(dim, -1), kernel).movedim(-1, dim)
    return x
