"""Criteria that train: every formula against a slow computation, and `prune` with each of them."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from definition import score_matrix
from families import lived_in
from small_networks import CLASSES, NETWORKS, Plain, Reused
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import attrfast
from attrfast.channels import discover
from attrfast.criteria import (
    SSS,
    BNScale,
    Learnt,
    Phase,
    Soft,
    TrainedCriterion,
    Trainee,
    Variational,
)
from attrfast.criteria.factors import at_readers, fold_into_output, fold_into_readers, scaled
from attrfast.criteria.soft import lowest, set_to_zero
from attrfast.criteria.sss import apg_step, soft_threshold
from attrfast.criteria.variational import gaussian_kl
from attrfast.finetune import FineTune, fine_tune
from attrfast.masking import masked
from attrfast.models.resnet import ResNet
from attrfast.residual import find_branches
from attrfast.surgery import cut

CPU = torch.device("cpu")


def residual_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lived_in(ResNet(2, num_classes=CLASSES, width=0.25))


def batches(count: int = 4, size: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images whose class can be seen."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count * size) % CLASSES
    images = 0.3 * torch.randn(count * size, 3, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, label % 3, : 4 + label] += 1
    return list(zip(images.split(size), labels.split(size), strict=True))


def trainee(model: nn.Module, images: torch.Tensor, samples: int = 48) -> Trainee:
    found = discover(model, (images[:2],))
    return Trainee(model, found.units, find_branches(model, found.record), lambda: samples)


def prune(model: nn.Module, data: Any = None, **options: Any) -> attrfast.PruneResult:
    options = {"finetune": 1, "progress": False, **options}
    return attrfast.prune(model, batches() if data is None else data, **options)


# Names of what trains, and settings under which something happens within seconds.
TRAINED: dict[str, TrainedCriterion] = {
    "sss": SSS(epochs=2, lr=0.02, gamma=0.05),
    "variational": Variational(epochs=2, prior_std=0.03),
    "soft": Soft(epochs=2, rate=0.25),
    "bn_scale": BNScale(epochs=2, sparsity=1e-2),
}


# -- sss ------------------------------------------------------------------------------------------------


def test_a_step_is_that_of_accelerated_proximal_gradient() -> None:
    """Against the method with two sequences: x = prox(y - lr * grad(y)), y = x + momentum * (x - x before)."""
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    hessian, shift = root @ root.T / 6, torch.randn(6, dtype=torch.float64)
    lr, momentum, gamma = 0.1, 0.8, 0.4
    factors, velocity = torch.ones(6).double(), torch.zeros(6).double()
    x, y = [1.0] * 6, [1.0] * 6
    for _ in range(60):
        apg_step(factors, velocity, hessian @ (factors - shift), lr=lr, momentum=momentum, gamma=gamma)
        grad = [sum(float(hessian[i, j]) * (y[j] - float(shift[j])) for j in range(6)) for i in range(6)]
        before = x
        x = []
        for i in range(6):
            z = y[i] - lr * grad[i]
            x.append(math.copysign(max(abs(z) - lr * gamma, 0.0), z))
        y = [a + momentum * (a - b) for a, b in zip(x, before, strict=True)]
        assert factors.tolist() == pytest.approx(y, rel=1e-12, abs=1e-14)


def test_steps_end_where_zero_is_best_exactly_at_zero() -> None:
    """On a separable problem the answer is known: soft thresholding of the minimum without penalty."""
    curvature = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    minimum = torch.tensor([0.3, -1.0, 2.0, 0.05], dtype=torch.float64)
    factors, velocity = torch.ones(4).double(), torch.zeros(4).double()
    for _ in range(500):
        grad = curvature * (factors - minimum)
        apg_step(factors, velocity, grad, lr=0.1, momentum=0.5, gamma=0.4)
    expected = [
        math.copysign(max(abs(m) - 0.4 / c, 0), m) for m, c in zip(minimum, curvature, strict=True)
    ]
    assert factors.tolist() == pytest.approx(expected, abs=1e-9)
    assert [value == 0 for value in factors.tolist()] == [True, False, False, True]


def test_the_gradient_of_a_units_factor_is_its_contribution_to_the_loss() -> None:
    """At factors of one, d(mean loss) / d(lambda) is the mean over samples of the score matrix."""
    make, inputs = NETWORKS["grouped"]
    torch.manual_seed(0)
    model, (images,) = lived_in(make()).double(), inputs(4)
    images, labels = images.double(), torch.tensor([0, 1, 2, 3])
    work = trainee(model, images)
    phase = SSS().begin(work)
    with phase.around_forward():
        functional.cross_entropy(model(images), labels).backward()
    expected = score_matrix(
        model,
        (images,),
        labels,
        work.units,
        lambda logits, y: functional.cross_entropy(logits, y, reduction="sum"),
    ).mean(0)
    torch.testing.assert_close(phase.units.grad, expected, rtol=1e-10, atol=1e-14)


def test_one_training_step_moves_weights_and_factors_by_their_own_rules() -> None:
    torch.manual_seed(0)
    model = lived_in(ResNet(1, num_classes=CLASSES, width=0.25)).double()
    images, labels = batches(1)[0]
    images = images.double()
    lr, gamma = 0.05, 0.02
    options = SSS(epochs=1, lr=lr, gamma=gamma, momentum=0.0, weight_decay=0.0, schedule="constant")
    by_hand = copy.deepcopy(model).train()
    work = trainee(model, images)
    phase = options.begin(work)
    how = FineTune(epochs=1, lr=lr, momentum=0.0, weight_decay=0.0, schedule="constant")
    fine_tune(model, [(images, labels)], how, step=1, device=CPU, phase=phase)

    units = torch.ones(len(work.units), dtype=torch.float64, requires_grad=True)
    blocks = torch.ones(len(work.branches), dtype=torch.float64, requires_grad=True)
    assert len(blocks) == 3
    # The factors stand in the network itself: hooks on modules multiply what readers take and blocks add.
    hooks = []
    for name, row in work.units.inputs.items():
        hooks.append(
            by_hand.get_submodule(name).register_forward_pre_hook(
                lambda m, args, row=row: (
                    (args[0] * units[row].view((1, -1) + (1,) * (args[0].dim() - 2)),)
                    if bool((row >= 0).all())
                    else None
                )
            )
        )
    for index, branch in enumerate(work.branches):
        hooks.append(
            by_hand.get_submodule(branch.last).register_forward_hook(
                lambda m, args, out, index=index: out * blocks[index]
            )
        )
    loss = functional.cross_entropy(by_hand(images), labels)
    weights = list(by_hand.parameters())
    grads = torch.autograd.grad(loss, [*weights, units, blocks])
    for new, old, grad in zip(model.parameters(), weights, grads[:-2], strict=True):
        torch.testing.assert_close(new, old - lr * grad, rtol=1e-10, atol=1e-12)
    for new, grad in ((phase.units, grads[-2]), (phase.of_branches, grads[-1])):
        expected = [
            math.copysign(max(abs(1 - lr * g) - lr * gamma, 0), 1 - lr * g) for g in grad.tolist()
        ]
        assert new.tolist() == pytest.approx(expected, rel=1e-10)


def test_factors_of_units_that_must_stay_are_one() -> None:
    model = residual_network()
    work = trainee(model, batches()[0][0])
    layer = work.units.layers[0]
    frozen = tuple(
        "it is to stay" if unit in layer.units else reason
        for unit, reason in enumerate(work.units.frozen)
    )
    work = dataclasses.replace(work, units=dataclasses.replace(work.units, frozen=frozen))
    phase = SSS(gamma=0.1).begin(work)
    fine_tune(model, batches(), FineTune(epochs=1), step=1, device=CPU, phase=phase)
    stay = torch.tensor([reason is not None for reason in frozen])
    assert bool((phase.units[stay] == 1).all())
    assert bool((phase.units[~stay] != 1).all())


def test_a_soft_threshold_is_the_proximal_operator_of_the_absolute_value() -> None:
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for z in (-2.0, -0.3, 0.0, 0.69, 0.71, 1.5):
        best = grid[(0.5 * (grid - z).square() + 0.7 * grid.abs()).argmin()]
        assert float(soft_threshold(torch.tensor(z).double(), 0.7)) == pytest.approx(
            float(best), abs=1e-4
        )


# -- folding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_factors_compute_the_same(name: str) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = lived_in(make()).double()
    data = tuple(x.double() for x in inputs(3))
    units = discover(model, data).units
    free = torch.tensor([reason is None for reason in units.frozen])
    factors = torch.where(free, torch.randn(len(units), dtype=torch.float64), 1.0)
    factors[torch.nonzero(free).flatten()[::3]] = 0
    with torch.no_grad(), scaled(model, at_readers(model, units, factors)):
        expected = model(*data)
    fold_into_readers(model, units, factors)
    with torch.no_grad():
        got = model(*data)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad(), masked(model, units, factors == 0):
        torch.testing.assert_close(model(*data), got, rtol=1e-12, atol=1e-12)
    gone = factors == 0
    for row in units.filters.values():  # every convolution keeps a filter
        if bool(gone[row].all()):
            gone[row[0]] = False
    smaller = copy.deepcopy(model)
    cut(smaller, units, gone)
    if name != "fixed view":  # which is found out by running it
        with torch.no_grad():
            torch.testing.assert_close(smaller(*data), got, rtol=1e-12, atol=1e-12)
            assert sum(p.numel() for p in smaller.parameters()) < sum(
                p.numel() for p in model.parameters()
            )


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Linear(8, 4), nn.BatchNorm2d(3)])
def test_an_output_factor_is_folded_into_weight_and_bias(layer: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for value in (-1.7, 0.0):
        factor = torch.tensor(value, dtype=torch.float64)
        with torch.no_grad(), scaled(model, outputs={"0.weight": factor}):
            expected = model.eval()(x)
        fold_into_output(model[0], factor)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-14)


# -- variational ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "std", "prior"), [(0.7, 0.2, 0.5), (-0.1, 0.05, 0.05), (0.0, 1.0, 0.3)]
)
def test_the_divergence_is_that_of_samples(mean: float, std: float, prior: float) -> None:
    """KL(q || p) is the mean over samples of q of log q - log p; five standard errors are allowed."""
    generator = torch.Generator().manual_seed(0)
    x = mean + std * torch.randn(200_000, dtype=torch.float64, generator=generator)
    log_q = -0.5 * ((x - mean) / std) ** 2 - math.log(std)
    log_p = -0.5 * (x / prior) ** 2 - math.log(prior)
    sampled = log_q - log_p
    error = float(sampled.std()) / math.sqrt(len(x))
    got = gaussian_kl(torch.tensor(mean).double(), torch.tensor(std).double().log(), prior)
    assert float(got) == pytest.approx(float(sampled.mean()), abs=5 * error + 1e-12)


def test_saliencies_multiply_scale_and_shift_of_batch_norms() -> None:
    """A drawn network is the network with these scales and shifts; the means are the network itself."""
    model = residual_network().double()
    images = batches()[0][0].double()
    with torch.no_grad():
        before = model(images)
    work = trainee(model, images)
    phase = Variational(prior_std=0.2, max_mean=1e-9).begin(work)
    drawn = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad(), phase.around_forward():
        got = model(images)
    torch.manual_seed(3)
    saliency = phase.mean + 0.2 * torch.randn(len(work.units), dtype=torch.float64)
    with torch.no_grad():
        for name, row in work.units.outputs.items():
            module = drawn.get_submodule(name)
            if isinstance(module, nn.BatchNorm2d):
                module.weight *= saliency[row]
                module.bias *= saliency[row]
        torch.testing.assert_close(got, drawn(images), rtol=1e-10, atol=1e-12)
        assert float((got - before).abs().max()) > 1e-3
    phase.finish()
    with torch.no_grad():
        torch.testing.assert_close(model(images), before, rtol=1e-10, atol=1e-12)
    assert all(p.requires_grad for p in model.parameters())


def test_the_bound_is_the_mean_loss_plus_the_divergence_of_a_sample() -> None:
    model = residual_network().double()
    work = trainee(model, batches()[0][0].double(), samples=40)
    phase = Variational(prior_std=0.3).begin(work)
    with torch.no_grad():
        phase.log_std.normal_()
    prior = torch.distributions.Normal(0.0, 0.3)
    total = 0.0
    for mean, log_std in zip(phase.mean.tolist(), phase.log_std.tolist(), strict=True):
        posterior = torch.distributions.Normal(mean, math.exp(log_std))
        total += float(torch.distributions.kl_divergence(posterior, prior))
    assert float(phase.penalty().detach()) == pytest.approx(total / 40, rel=1e-5)


def test_one_training_step_follows_the_gradient_of_the_bound() -> None:
    model = residual_network().double()
    images, labels = batches(1)[0]
    images = images.double()
    lr, prior = 0.05, 0.2
    work = trainee(model, images, samples=40)
    by_hand = copy.deepcopy(model).train()
    phase = Variational(prior_std=prior).begin(work)
    mean = phase.mean.detach().clone().requires_grad_()
    log_std = phase.log_std.detach().clone().requires_grad_()
    how = FineTune(epochs=1, lr=lr, momentum=0.0, weight_decay=0.0, schedule="constant")
    fine_tune(model, [(images, labels)], how, step=1, device=CPU, seed=5, phase=phase)

    with torch.random.fork_rng():
        torch.manual_seed(5)
        saliency = mean + log_std.exp() * torch.randn(len(mean), dtype=torch.float64)
    start = mean.detach()
    for name, row in work.units.outputs.items():
        module = by_hand.get_submodule(name)
        if isinstance(module, nn.BatchNorm2d):
            ratio = (saliency / start)[row].view(1, -1, 1, 1)
            module.register_forward_hook(lambda m, args, out, ratio=ratio: out * ratio)
    loss = functional.cross_entropy(by_hand(images), labels)
    posterior = torch.distributions.Normal(mean, log_std.exp())
    divergence = torch.distributions.kl_divergence(
        posterior, torch.distributions.Normal(torch.zeros(()).double(), prior)
    )
    grads = torch.autograd.grad(loss + divergence.sum() / 40, (mean, log_std))
    torch.testing.assert_close(phase.mean, start - lr * grads[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(phase.log_std, (log_std - lr * grads[1]).detach(), rtol=1e-9, atol=1e-12)


def test_units_go_whose_mean_and_deviation_are_both_small() -> None:
    model = residual_network()
    work = trainee(model, batches()[0][0])
    phase = Variational(max_mean=0.1, max_std=0.2).begin(work)
    layer = max(work.units.layers, key=lambda one: len(one.units))
    cases = {0: (0.05, 0.1, True), 1: (-0.05, 0.1, True), 2: (0.5, 0.1, False), 3: (0.05, 0.5, False)}
    with torch.no_grad():
        for index, (mean, std, _) in cases.items():
            phase.mean[layer.units[index]] = mean
            phase.log_std[layer.units[index]] = math.log(std)
        means, stds = phase.mean.tolist(), phase.log_std.exp().tolist()
    importance = phase.finish().importance
    for index, (*_, gone) in cases.items():
        unit = layer.units[index]
        assert (float(importance[unit]) == 0) == gone
        if not gone:
            assert float(importance[unit]) == pytest.approx(
                math.hypot(means[unit], stds[unit]), rel=1e-5
            )


def test_a_layer_of_small_saliencies_keeps_its_highest() -> None:
    model = residual_network()
    work = trainee(model, batches()[0][0])
    phase = Variational(max_mean=100.0, max_std=100.0).begin(work)
    importance = phase.finish().importance
    for layer in work.units.layers:
        assert int((importance[list(layer.units)] > 0).sum()) == 1


# -- soft -----------------------------------------------------------------------------------------------


def test_the_lowest_share_of_every_layer_is_chosen() -> None:
    units = trainee(residual_network(), batches()[0][0]).units
    norms = torch.rand(len(units), generator=torch.Generator().manual_seed(0)).double()
    free = torch.ones(len(units), dtype=torch.bool)
    free[3] = False
    chosen = lowest(norms, units, free, 0.4)
    assert not bool(chosen[3])
    for layer in units.layers:
        mine = sorted((u for u in layer.units if u != 3), key=lambda u: float(norms[u]))
        count = min(int(0.4 * len(layer.units)), len(mine))
        assert [u for u in mine if bool(chosen[u])] == mine[:count]


@pytest.mark.parametrize("name", ["grouped", "up and down", "1d"])
def test_filters_of_zeros_give_out_zeros(name: str) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, data = lived_in(make()), inputs(2)
    units = discover(model, data).units
    chosen = torch.tensor([reason is None for reason in units.frozen])
    chosen &= torch.arange(len(units)) % 2 == 0
    seen: dict[str, torch.Tensor] = {}
    set_to_zero(model, units, chosen)
    for conv in units.filters:
        model.get_submodule(conv).register_forward_hook(
            lambda m, args, out, conv=conv: seen.__setitem__(conv, out.detach())
        )
    model(*data)
    for conv, row in units.filters.items():
        silent = (seen[conv].transpose(0, 1).flatten(1) == 0).all(1)
        if conv in units.depthwise:
            assert not bool(silent.all())
        else:
            assert torch.equal(silent, chosen[row])


def test_filters_come_back_after_they_were_set_to_zero() -> None:
    model = residual_network()
    work = trainee(model, batches()[0][0])
    phase = Soft(rate=0.5).begin(work)
    back: list[torch.Tensor] = []
    choices: list[torch.Tensor] = []

    class Watched(Phase):
        def after_epoch(self) -> None:
            if choices:
                back.append(phase.options.from_weights(model, work.units, 0)[choices[-1]])
            phase.after_epoch()
            choices.append(phase.zeroed)
            assert not bool(phase.options.from_weights(model, work.units, 0)[phase.zeroed].any())

    fine_tune(model, batches(), FineTune(epochs=3, lr=0.05), step=1, device=CPU, phase=Watched())
    assert len(back) == 2
    assert all(bool((norms > 0).all()) for norms in back)
    learnt = phase.finish()
    assert torch.equal(learnt.importance == 0, choices[-1])


# -- batch norms' scales --------------------------------------------------------------------------------


def test_scales_of_all_batch_norms_of_a_unit_are_added_up() -> None:
    model = residual_network()
    scores = attrfast.attribute(model, batches(), criterion="bn_scale", normalize=None, progress=False)
    norms = dict(model.named_modules())
    inner = norms["layer1.0.bn1"].weight.detach().abs()
    torch.testing.assert_close(scores["layer1.0.conv1"], inner)
    stage = sum(
        norms[name].weight.detach().abs()
        for name in ("layer2.0.bn2", "layer2.0.shortcut.1", "layer2.1.bn2")
    )
    torch.testing.assert_close(scores["layer2.1.conv2"], stage)


@pytest.mark.parametrize("criterion", ["bn_scale", "variational", BNScale(sparsity=1e-3, epochs=1)])
def test_layers_without_batch_norms_are_named_and_left_whole(criterion: Any) -> None:
    torch.manual_seed(0)
    model = lived_in(Plain())
    images = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))]
    with pytest.warns(UserWarning, match=r"left whole: features\.7: no batch norm"):
        result = prune(model, images, criterion=criterion, keep_ratio=0.8)
    assert result.history[-1].phi <= 0.8
    assert bool(result.gates["features.7"].all())
    with pytest.raises(attrfast.ModelError, match=r"no layer .*first.*no batch norm"):
        prune(lived_in(NETWORKS["functional"][0]()), images, criterion=criterion, keep_ratio=0.8)


def test_scores_of_filters_without_batch_norms_are_refused() -> None:
    data = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))]
    with pytest.raises(attrfast.ModelError, match=r"features\.7"):
        attrfast.attribute(lived_in(Plain()), data, criterion="bn_scale", progress=False)


def test_the_subgradient_of_the_scales_joins_the_losss() -> None:
    model = residual_network().double()
    images, labels = batches()[0][0].double(), batches()[0][1]
    plain = copy.deepcopy(model)
    functional.cross_entropy(plain(images), labels).backward()
    phase = BNScale(sparsity=0.1).begin(trainee(model, images))
    with torch.no_grad():
        model.bn1.weight[0] = plain.bn1.weight[0] = 0
    model.zero_grad()
    functional.cross_entropy(model(images), labels).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    phase.after_backward()
    for name, p in model.named_parameters():
        added = 0.1 * p.detach().sign() if "bn" in name and "weight" in name else torch.zeros_like(p)
        if name.endswith("shortcut.1.weight"):
            added = 0.1 * p.detach().sign()
        torch.testing.assert_close(p.grad, before[name] + added, rtol=1e-12, atol=0)


def test_pressed_scales_step_further_by_the_rate_times_the_sparsity() -> None:
    images, labels = batches(1)[0]
    how = FineTune(epochs=1, lr=0.05, momentum=0.0, weight_decay=0.0, schedule="constant")
    scales = []
    for sparsity in (0.0, 0.3):
        model = residual_network().double()
        phase = BNScale(sparsity=sparsity).begin(trainee(model, images.double()))
        fine_tune(model, [(images.double(), labels)], how, step=1, device=CPU, phase=phase)
        scales.append(torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]))
    free, pressed = scales
    before = [m.weight for m in residual_network().modules() if isinstance(m, nn.BatchNorm2d)]
    expected = free - 0.05 * 0.3 * torch.cat(before).double().sign()
    torch.testing.assert_close(pressed, expected, rtol=1e-10, atol=1e-12)


# -- geometric median -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_geometric_medians_criterion_adds_up_distances(name: str) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model, data = make().double(), tuple(x.double() for x in inputs(2))
    batch = [(data, torch.tensor([0, 1]))]
    scores = attrfast.attribute(model, batch, criterion="fpgm", normalize=None, progress=False)
    expected = [0.0] * len(scores.units)
    for conv, row in scores.units.filters.items():
        module = model.get_submodule(conv)
        filters: list[list[float]] = []
        for index in range(module.out_channels):
            if module.transposed:
                inside, each = module.in_channels // module.groups, module.out_channels // module.groups
                group, place = divmod(index, each)
                weight = module.weight[group * inside : (group + 1) * inside, place]
            else:
                weight = module.weight[index]
            filters.append(weight.flatten().tolist())
        for one, unit in zip(filters, row.tolist(), strict=True):
            expected[unit] += sum(math.dist(one, other) for other in filters)
    assert scores.importance.tolist() == pytest.approx(expected, rel=1e-10)


# -- prune ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRAINED, "fpgm"])
def test_every_criterion_reaches_a_budget_and_leaves_the_model(name: str) -> None:
    model = residual_network()
    before = copy.deepcopy(model.state_dict())
    result = prune(model, criterion=TRAINED.get(name, name), max_macs=0.6, filters_per_step=20)
    first, last = result.history[0], result.history[-1]
    assert last.macs <= 0.6 * first.macs
    assert result.criterion == name
    for a, b in itertools.pairwise(result.history):
        assert sum(b.removed.values()) == a.filters - b.filters > 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in result.model.parameters())
    assert all(bool(p.isfinite().all()) for p in result.model.parameters())
    loss = functional.cross_entropy(result.model.train()(batches()[0][0]), batches()[0][1])
    loss.backward()


@pytest.mark.parametrize("name", ["sss", "soft"])
def test_networks_without_batch_norms_or_modules_are_trained_too(name: str) -> None:
    torch.manual_seed(0)
    result = prune(lived_in(Reused()), criterion=TRAINED[name], keep_ratio=0.6)
    assert result.history[-1].phi <= 0.6


class BareWeights(nn.Module):
    """Convolutions whose weights are a buffer and a parameter of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.register_buffer("blur", torch.full((4, 6, 1, 1), 0.1))
        self.own = nn.Parameter(torch.randn(6, 4, 1, 1))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.conv2d(torch.relu(self.first(x)), self.blur)
        x = functional.conv2d(x, self.own)
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:left whole")
@pytest.mark.parametrize("name", ["sss", "soft"])
def test_weights_without_a_module_are_left_alone(name: str) -> None:
    torch.manual_seed(0)
    result = prune(BareWeights(), criterion=TRAINED[name], keep_ratio=0.8)
    assert bool(result.gates["first"].all())
    assert not bool(result.gates["second"].all())


def test_without_a_target_one_phase_and_its_zeros_are_the_result() -> None:
    result = prune(residual_network(), criterion=Soft(epochs=1, rate=0.5), finetune=0)
    assert len(result.history) == 2
    assert result.stopped.startswith("one step")
    for layer, gate in result.gates.items():
        assert int(gate.sum()) == len(gate) - len(gate) // 2, layer
    nothing = prune(residual_network(), criterion=SSS(epochs=1, gamma=0.0), finetune=0)
    assert nothing.history[1].removed == {}
    with pytest.raises(attrfast.InputError, match="needs a target"):
        prune(residual_network(), criterion="bn_scale")


def test_zeros_go_past_the_target() -> None:
    result = prune(residual_network(), criterion=Soft(epochs=1, rate=0.5), keep_ratio=0.9, finetune=0)
    assert result.history[-1].phi < 0.6


def test_layers_to_be_ignored_and_the_least_width_are_kept() -> None:
    options = {"criterion": Soft(epochs=1, rate=0.9), "finetune": 0}
    result = prune(residual_network(), min_filters=3, ignore="layer3", **options)
    for name, gate in result.gates.items():
        assert bool(gate.all()) if name.startswith("layer3") else int(gate.sum()) == 3


def test_seeds_decide() -> None:
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))
    a, b, c = (
        prune(
            residual_network(),
            DataLoader(data, batch_size=12, shuffle=True),
            criterion=TRAINED["variational"],
            keep_ratio=0.9,
            seed=seed,
        ).model
        for seed in (0, 0, 1)
    )
    images = batches()[0][0]
    assert torch.equal(a(images), b(images))
    assert not torch.equal(a(images), c(images))


# -- residual blocks ------------------------------------------------------------------------------------


@dataclass
class OneBlock(TrainedCriterion):
    """Finds in every step that the last branch there is adds nothing."""

    def begin(self, trainee: Trainee) -> Phase:
        class Silencing(Phase):
            def finish(self) -> Learnt:
                branches: Sequence[Any] = trainee.branches
                for branch in branches[-1:]:
                    last = trainee.model.get_submodule(branch.last)
                    fold_into_output(last, torch.tensor(0.0))
                return Learnt(torch.ones(len(trainee.units)).double(), tuple(branches[-1:]))

        return Silencing()


def test_a_factor_of_zero_removes_its_residual_block() -> None:
    model = residual_network()
    with torch.no_grad():  # nothing comes back through a factor whose branch adds nothing
        model.layer2[1].bn2.weight.zero_()
        model.layer2[1].bn2.bias.zero_()
    model.layer2[1].bn2.requires_grad_(False)
    options = SSS(epochs=15, lr=0.05, gamma=0.3, momentum=0.5, schedule="constant")
    result = prune(model, criterion=options, finetune=0)
    for conv in ("layer2.1.conv1", "layer2.1.conv2"):
        assert not bool(result.gates[conv].any())
    names = dict(result.model.named_modules())
    assert not any(name.startswith(("layer2.1.conv", "layer2.1.bn")) for name in names)
    assert (
        sum(result.history[1].removed.values()) == result.history[0].filters - result.history[1].filters
    )


def test_steps_with_blocks_reach_a_budget_and_leave_the_model_whole() -> None:
    model = residual_network()
    before = copy.deepcopy(model.state_dict())
    result = prune(model, criterion=OneBlock(epochs=1), max_macs=0.4)
    assert result.history[-1].macs <= 0.4 * result.history[0].macs
    gone = [name for name, gate in result.gates.items() if not bool(gate.any())]
    assert gone
    assert set(gone).isdisjoint(dict(result.model.named_modules()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert isinstance(result.model, ResNet)


def test_blocks_of_ignored_layers_stay() -> None:
    options = {"criterion": OneBlock(epochs=1), "keep_ratio": 0.7, "filters_per_step": 1}
    result = prune(residual_network(), ignore=["layer3.1.conv1", "layer2"], **options)
    assert bool(result.gates["layer3.1.conv1"].all())
    assert all(bool(g.all()) for name, g in result.gates.items() if name.startswith("layer2"))
    assert not bool(result.gates["layer3.0.conv1"].any())


def test_an_inplace_run_takes_blocks_out_of_the_model_itself() -> None:
    options = {"criterion": OneBlock(epochs=1), "keep_ratio": 0.6}
    copied = prune(residual_network(), **options)
    model = residual_network()
    result = prune(model, inplace=True, **options)
    assert result.model is model
    assert model.state_dict().keys() == copied.model.state_dict().keys()
    images = batches()[0][0]
    assert torch.equal(model.eval()(images), copied.model.eval()(images))


# -- resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [*TRAINED.values(), OneBlock(epochs=1)])
def test_a_run_that_was_cut_off_ends_in_the_same_model(tmp_path: Path, criterion: Any) -> None:
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True)))

    def run(folder: str, **options: Any) -> attrfast.PruneResult:
        return prune(
            residual_network(),
            DataLoader(data, batch_size=12, shuffle=True),
            criterion=criterion,
            max_macs=0.35,
            filters_per_step=30,
            output_dir=tmp_path / folder,
            **options,
        )

    def stop(row: attrfast.Step, _: nn.Module) -> None:
        if row.step == 1:
            raise attrfast.AttrfastError("cut off")

    whole = run("whole")
    assert len(whole.history) > 2
    with pytest.raises(attrfast.AttrfastError, match="cut off"):
        run("cut", callback=stop)
    again = run("cut", resume=True)
    left, right = whole.model.state_dict(), again.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(torch.equal(whole.gates[name], again.gates[name]) for name in whole.gates)
    assert [row.top1 for row in whole.history] == [row.top1 for row in again.history]


def test_a_run_without_a_target_is_not_taken_further(tmp_path: Path) -> None:
    options = {"criterion": Soft(epochs=1), "output_dir": tmp_path}
    first = prune(residual_network(), **options)
    again = prune(residual_network(), resume=True, **options)
    assert len(again.history) == 2
    assert all(torch.equal(first.gates[name], again.gates[name]) for name in first.gates)


def test_training_that_runs_away_is_told() -> None:
    with pytest.raises(attrfast.NumericalError, match="lr"):
        prune(residual_network(), criterion=SSS(epochs=1, lr=1e30), keep_ratio=0.8)


# -- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sss", "variational"])
def test_scores_that_need_training_are_refused_without_it(name: str) -> None:
    with pytest.raises(attrfast.InputError, match=f"attrfast.prune.*{name}"):
        attrfast.attribute(residual_network(), batches(), criterion=name, progress=False)


def test_a_model_that_may_not_be_trained_is_refused() -> None:
    model = residual_network().requires_grad_(False)
    with pytest.raises(attrfast.ModelError, match="requires_grad"):
        prune(model, criterion="sss", keep_ratio=0.8)


@pytest.mark.parametrize(
    ("criterion", "options", "named"),
    [
        (SSS, {"epochs": 0}, "epochs"),
        (SSS, {"lr": 0}, "lr"),
        (SSS, {"momentum": 1.0}, "momentum"),
        (SSS, {"weight_decay": -1.0}, "weight_decay"),
        (SSS, {"schedule": "none"}, "schedule"),
        (SSS, {"gamma": -1.0}, "gamma"),
        (Soft, {"rate": 1.0}, "rate"),
        (BNScale, {"sparsity": -1e-4}, "sparsity"),
        (Variational, {"prior_std": 0.0}, "prior_std"),
        (Variational, {"max_std": -1.0}, "max_std"),
    ],
)
def test_options_out_of_range_are_named(criterion: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(attrfast.InputError, match=f"^{named} must"):
        criterion(**options)


@pytest.mark.parametrize("options", [{"classes": [0, 1]}, {"balance": "worst_class"}], ids=str)
def test_a_criterion_that_trains_knows_no_classes(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]
    with pytest.raises(
        attrfast.InputError, match=r"'sss' is not measured on samples, so it knows no classes"
    ):
        attrfast.prune(Plain(), loader, criterion="sss", keep_ratio=0.5, **options)
