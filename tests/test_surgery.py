"""A cut network computes what the whole one computes without the removed units."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, family, images_for, lived_in
from small_networks import NETWORKS, Grouped, Plain, UpAndDown
from torch import nn

from attrfast.channels import find_units
from attrfast.errors import ModelError
from attrfast.masking import masked
from attrfast.selection import mask, rank
from attrfast.surgery import cut, without
from attrfast.trace import tensors_in
from attrfast.units import Units

# Sums run over fewer terms, so only the last bits may differ.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def some_removed(units: Units, share: float, seed: int = 0) -> torch.Tensor:
    """(U,) bool: at random, this share of the filters or what comes nearest."""
    chance = torch.rand(len(units), generator=torch.Generator().manual_seed(seed))
    taken, filters = [], 0
    for block in rank(chance, units):
        if filters >= share * units.total_filters:
            break
        taken.append(block)
        filters += block.filters
    return mask(taken, units)


def assert_cut_equals_masked(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], units: Units, removed: torch.Tensor
) -> nn.Module:
    smaller = copy.deepcopy(model)
    cut(smaller, units, removed)
    with torch.no_grad():
        with masked(model, units, removed):
            expected = list(tensors_in(model(*inputs)))
        got = list(tensors_in(smaller(*inputs)))
        whole = list(tensors_in(model(*inputs)))
    for out, want, before in zip(got, expected, whole, strict=True):
        size = float(want.abs().max())
        assert float((out - want).abs().max()) <= TOLERANCE[out.dtype] * size
        assert not torch.equal(want, before), "the mask changed nothing, so the test shows nothing"
    return smaller


def trains_a_step(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    total = torch.stack([out.square().mean() for out in tensors_in(model(*inputs))]).sum()
    total.backward()
    optimiser.step()
    assert torch.isfinite(total)


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_family_cut_equals_masked_and_trains(name: str) -> None:
    model = family(name).double()
    images = images_for(name, 2).double()
    units = find_units(model, (images,))
    removed = some_removed(units, 0.3)
    assert removed.any()
    smaller = assert_cut_equals_masked(model, (images,), units, removed)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    trains_a_step(smaller, (images,))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"fixed view"}))
def test_small_network_cut_equals_masked_and_trains(name: str, share: float) -> None:
    make, inputs = NETWORKS[name]
    torch.manual_seed(0)
    model = lived_in(make()).double()
    example = tuple(x.double() for x in inputs(2))
    units = find_units(model, example)
    smaller = assert_cut_equals_masked(model, example, units, some_removed(units, share))
    trains_a_step(smaller, tuple(x.double() for x in inputs(3)))


def test_cut_twice_equals_both_masks_at_once() -> None:
    torch.manual_seed(0)
    model = lived_in(Grouped()).double()
    images = (torch.randn(2, 3, 16, 16, dtype=torch.float64),)
    units = find_units(model, images)
    both = some_removed(units, 0.5)
    first = both & some_removed(units, 0.2)
    smaller = copy.deepcopy(model)
    cut(smaller, units, first)
    left = find_units(smaller, images)
    cut(smaller, left, both[~first])
    with torch.no_grad(), masked(model, units, both):
        expected = model(*images)
    torch.testing.assert_close(smaller(*images), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [Plain, Grouped, UpAndDown])
def test_attributes_tell_the_new_widths(make: type[nn.Module]) -> None:
    model = make()
    images = (torch.randn(2, 3, 16, 16),)
    units = find_units(model, images)
    cut(model, units, some_removed(units, 0.4))
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            places = (module.in_channels, module.out_channels)
            ins, outs = places if module.transposed else places[::-1]
            assert module.weight.shape[:2] == (ins, outs // module.groups)
            assert module.bias is None or module.bias.shape == (module.out_channels,)
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            assert module.running_mean is not None
            assert module.running_var is not None
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor.shape == (module.num_features,)
        elif isinstance(module, nn.PReLU):
            assert module.weight.shape == (module.num_parameters,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_parameters_keep_what_they_were(dtype: torch.dtype, form: torch.memory_format) -> None:
    model = Plain().to(dtype=dtype, memory_format=form)
    images = (torch.randn(2, 3, 16, 16, dtype=dtype),)
    units = find_units(model, images)
    flags = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        p.requires_grad_(i % 3 > 0)
        p.grad = torch.zeros_like(p)
        flags[name] = p.requires_grad
    removed = some_removed(units, 0.3)
    cut(model, units, removed)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(t.dtype == dtype for t in model.parameters())
    assert all(b.dtype in (dtype, torch.int64) for b in model.buffers())
    for name, p in model.named_parameters():
        assert isinstance(p, nn.Parameter)
        assert p.is_leaf
        if p.dim() == 4:
            assert p.is_contiguous(memory_format=form), name
        assert p.grad is None or p.grad.shape == p.shape


def test_names_hooks_and_training_flags_stay() -> None:
    model = Plain().eval()
    model.features[0].train()
    model.features[0].register_forward_hook(lambda *_: None)
    names = list(model.state_dict())
    units = find_units(model, (torch.randn(2, 3, 16, 16),))
    cut(model, units, some_removed(units, 0.3))
    assert list(model.state_dict()) == names
    assert model.features[0].training
    assert not model.features[1].training
    assert len(model.features[0]._forward_hooks) == 1


def test_nothing_removed_changes_nothing() -> None:
    model = Plain()
    before = copy.deepcopy(model.state_dict())
    units = find_units(model, (torch.randn(2, 3, 16, 16),))
    cut(model, units, torch.zeros(len(units), dtype=torch.bool))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_layer_cannot_lose_all_its_filters() -> None:
    model = Plain()
    units = find_units(model, (torch.randn(2, 3, 16, 16),))
    with pytest.raises(ModelError, match=r"features\.0 would lose all of its 8 filters"):
        cut(model, units, units.layer_of == 0)


def test_a_frozen_unit_is_refused_with_its_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(1), nn.Conv2d(4, 4, 3))
    units = find_units(model, (torch.randn(2, 3, 16, 16),))
    frozen = [u for u, reason in enumerate(units.frozen) if reason is not None]
    removed = torch.zeros(len(units), dtype=torch.bool)
    removed[frozen[0]] = True
    with pytest.raises(ModelError, match=r"a filter of 0 can't be removed: .+"):
        cut(model, units, removed)


def test_without_leaves_the_model_as_it_was() -> None:
    model = Plain().train()
    images = torch.randn(2, 3, 16, 16)
    units = find_units(model, (images,))
    before = copy.deepcopy(model.state_dict())
    smaller = without(model, [((images,), {})], units, some_removed(units, 0.3))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert smaller.training
    assert smaller.features[0].out_channels < model.features[0].out_channels


def test_without_refuses_a_cut_that_computes_something_else() -> None:
    """Units that hide one of a channel's readers: the cut network no longer fits together."""
    model = Plain()
    images = torch.randn(2, 3, 16, 16)
    units = find_units(model, (images,))
    del units.inputs["features.4"]
    removed = torch.zeros(len(units), dtype=torch.bool)
    removed[0] = True
    with pytest.raises(ModelError, match="does not run"):
        without(model, [((images,), {})], units, removed)


def test_without_refuses_a_cut_that_keeps_other_channels() -> None:
    """Units that name the wrong channel of a batch norm: the widths fit, the values don't."""
    model = lived_in(Plain()).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    units = find_units(model, (images,))
    removed = torch.zeros(len(units), dtype=torch.bool)
    removed[0] = True
    without(model, [((images,), {})], units, removed)
    units.outputs["features.1"] = units.outputs["features.1"].flip(0)
    with pytest.raises(ModelError, match="computes something else"):
        without(model, [((images,), {})], units, removed)


def test_masking_writes_nothing_to_the_model() -> None:
    model = Plain().eval()
    images = torch.randn(2, 3, 16, 16)
    units = find_units(model, (images,))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), masked(model, units, some_removed(units, 0.3)):
        model(images)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
