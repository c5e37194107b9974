"""Units: which filters go together, who reads them, and what is left whole."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from families import family, images_for
from small_networks import NETWORKS, Gated, Grouped, NeverUsed, Plain, Reused, SeveralInputsAndOutputs
from torch import nn
from torch.nn import functional

from attrfast.channels import find_units
from attrfast.errors import ModelError
from attrfast.units import Units

IMAGES = (torch.randn(2, 3, 16, 16),)


def sets(units: Units) -> set[frozenset[tuple[str, int]]]:
    """Every unit as the set of its filters, by convolution and index."""
    members: dict[int, set[tuple[str, int]]] = {}
    for name, row in units.filters.items():
        for index, unit in enumerate(row.tolist()):
            members.setdefault(unit, set()).add((name, index))
    return {frozenset(m) for m in members.values()}


@pytest.mark.parametrize(
    "name",
    [
        "vgg11_bn",
        "resnet18",
        "resnet50",
        "wide_resnet50_2",
        "densenet121",
        "mobilenet_v2",
        "mnasnet0_5",
        "squeezenet1_1",
    ],
)
def test_families_agree_with_torch_prunings_dependency_graph(name: str) -> None:
    """For a filter of every convolution: the same others go with it, and the same inputs are read."""
    model, images = family(name), images_for(name, 2)
    units = find_units(model, (images,))
    graph = tp.DependencyGraph().build_dependency(model, images)
    names = {module: n for n, module in model.named_modules()}
    compared = 0
    for conv, row in units.filters.items():
        module = model.get_submodule(conv)
        assert isinstance(module, nn.Conv2d)
        if module.groups > 1:
            continue  # comes along with the convolution before it
        index = len(row) // 2
        unit = int(row[index])
        group = graph.get_pruning_group(module, tp.prune_conv_out_channels, [index])
        together: set[tuple[str, int]] = set()
        read: set[tuple[str, int]] = set()
        for dependency, indices in group:
            target, where = dependency.target.module, dependency.handler
            if where in (tp.prune_conv_out_channels, tp.prune_depthwise_conv_out_channels):
                together.update((names[target], i) for i in indices)
            elif where in (tp.prune_conv_in_channels, tp.prune_linear_in_channels):
                read.update((names[target], i) for i in indices)
        own = {(n, i) for n, r in units.filters.items() for i, u in enumerate(r.tolist()) if u == unit}
        reads = {(n, i) for n, r in units.inputs.items() for i, u in enumerate(r.tolist()) if u == unit}
        assert own == together, conv
        assert reads == read, conv
        compared += 1
    assert compared >= 8


def test_a_plain_convolutions_filter_is_a_unit_of_its_own() -> None:
    units = find_units(Plain(), IMAGES)
    assert all(len(members) == 1 for members in sets(units))
    assert len(units) == units.total_filters == 8 + 16 + 16
    assert [layer.name for layer in units.layers] == ["features.0", "features.4", "features.7"]


def test_a_flattened_map_gives_a_linear_layer_all_positions_of_a_channel() -> None:
    units = find_units(Plain(), IMAGES)
    row = units.inputs["classifier.1"]
    assert row.tolist() == [int(u) for u in units.filters["features.7"] for _ in range(4)]


def test_a_residual_sum_couples_its_convolutions() -> None:
    units = find_units(Reused(), IMAGES)
    assert torch.equal(units.filters["stem"], units.filters["body"])
    assert units.layers[0].convs == ("stem", "body")
    assert set(units.size.tolist()) == {1, 2}


def test_a_grouped_convolution_loses_the_same_place_of_every_group() -> None:
    units = find_units(Grouped(), IMAGES)
    row = units.filters["grouped"]
    assert row.view(4, 4).unique(dim=0).shape == (1, 4)
    assert units.filters["stem"].view(4, 2).unique(dim=0).shape == (1, 2)


def test_a_depthwise_convolution_is_part_of_the_unit_and_no_reader() -> None:
    units = find_units(Grouped(), IMAGES)
    assert units.depthwise == {"depthwise", "multiplied"}
    assert "depthwise" not in units.inputs
    assert torch.equal(units.filters["depthwise"], units.filters["grouped"])
    assert units.filters["multiplied"].tolist() == [
        u for u in units.filters["point"].tolist() for _ in (0, 1)
    ]


def test_a_gate_is_coupled_with_what_it_multiplies() -> None:
    units = find_units(Gated(), IMAGES)
    assert torch.equal(units.outputs["excite"], units.filters["first"])
    assert set(units.inputs) >= {"squeeze", "second", "head"}


def test_concatenated_channels_keep_their_places() -> None:
    images = torch.randn(2, 2, 3, 12, 12)
    units = find_units(SeveralInputsAndOutputs(), tuple(images))
    expected = units.filters["left"].tolist() + units.filters["right"].tolist()
    assert units.inputs["mix"].tolist() == units.inputs["second_head"].tolist() == expected


def test_what_is_never_called_has_no_score() -> None:
    units = find_units(NeverUsed(), IMAGES)
    assert "unused" not in units.filters
    assert set(units.filters) == {"first", "second"}


def test_a_convolution_that_makes_the_output_is_no_candidate() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    units = find_units(model, IMAGES)
    assert set(units.filters) == {"0"}


class Shuffle(nn.Module):
    """Channels are split, shuffled and joined, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.relu(self.first(x)).chunk(2, 1)
        both = torch.cat([torch.relu(self.left(a)), b], 1)
        n, c, h, w = both.shape
        mixed = both.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(mixed).mean((2, 3))


def test_shuffled_channels_are_followed_to_their_readers() -> None:
    units = find_units(Shuffle(), IMAGES)
    left, second_half = units.filters["left"], units.filters["first"][4:]
    expected = torch.stack([left, second_half], 1).flatten()
    assert torch.equal(units.inputs["head"], expected)
    assert torch.equal(units.inputs["left"], units.filters["first"][:4])


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda x: torch.softmax(x, 1), "softmax"),
        (lambda x: functional.layer_norm(x, x.shape[1:]), "layer_norm"),
        (lambda x: functional.group_norm(x, 2), "group_norm"),
        (lambda x: x + torch.ones(8, 1, 1), "no filter made"),
        (lambda x: functional.pad(x, (0, 0, 0, 0, 0, 0))[:, list(range(8))], "getitem"),
    ],
    ids=["softmax", "layer norm", "group norm", "a constant a channel", "a list of indices"],
)
def test_mixed_channels_are_frozen_with_the_reason(between: object, why: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.second = nn.Conv2d(8, 4, 3)
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.second(between(self.first(x))))  # type: ignore[operator]
            return self.head(x.mean((2, 3)))

    units = find_units(Mixed(), IMAGES)
    reason = units.frozen[int(units.filters["first"][0])]
    assert reason is not None
    assert why in reason
    assert units.frozen[int(units.filters["second"][0])] is None


def test_a_model_without_convolutions_is_refused() -> None:
    with pytest.raises(ModelError, match="no convolution"):
        find_units(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), IMAGES)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_map_fits_its_module(name: str) -> None:
    make, inputs = NETWORKS[name]
    model = make()
    units = find_units(model, inputs(2))
    for conv, row in units.filters.items():
        module = model.get_submodule(conv)
        assert len(row) == module.out_channels
        assert torch.equal(row, units.outputs[conv])
    for reader, row in units.inputs.items():
        module = model.get_submodule(reader)
        assert len(row) == (module.in_features if isinstance(module, nn.Linear) else module.in_channels)
    assert int(units.size.sum()) == sum(len(row) for row in units.filters.values())
    assert sorted(u for layer in units.layers for u in layer.units) == list(range(len(units)))
