"""Which units go: lowest first over all layers, within every limit that was set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import Grouped, Plain, Reused, SeveralInputsAndOutputs, UpAndDown
from torch import nn

from attrfast.channels import find_units
from attrfast.errors import InputError, NumericalError
from attrfast.selection import Block, first_filters, mask, rank, spared
from attrfast.units import Units

IMAGE = torch.randn(2, 3, 16, 16)
MODELS: dict[str, nn.Module] = {
    "plain": Plain(),
    "grouped": Grouped(),
    "reused": Reused(),
    "up and down": UpAndDown(),
    "concatenated": SeveralInputsAndOutputs(),
}
UNITS = {
    name: find_units(model, (IMAGE, IMAGE) if name == "concatenated" else (IMAGE,))
    for name, model in MODELS.items()
}


def widths(units: Units, removed: torch.Tensor) -> dict[str, int]:
    """Filters that every convolution keeps."""
    return {name: int((~removed[row]).sum()) for name, row in units.filters.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Units, torch.Tensor, int, int, int]:
    """Units, importances with many ties, min_filters, round_to and how many blocks go."""
    units = UNITS[draw(st.sampled_from(sorted(UNITS)))]
    values = draw(
        st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), min_size=len(units), max_size=len(units))
    )
    return (
        units,
        torch.tensor(values),
        draw(st.integers(1, 6)),
        draw(st.sampled_from([1, 2, 3, 4, 8])),
        draw(st.integers(0, 60)),
    )


@given(cases())
@settings(max_examples=200, deadline=None)
def test_any_beginning_of_the_ranking_keeps_every_limit(
    case: tuple[Units, torch.Tensor, int, int, int],
) -> None:
    units, importance, min_filters, round_to, taken = case
    blocks = rank(importance, units, min_filters=min_filters, round_to=round_to)[:taken]
    removed = mask(blocks, units)
    before = widths(units, torch.zeros_like(removed))
    for name, left in widths(units, removed).items():
        if left < before[name]:
            assert left >= min_filters
            assert left % round_to == 0
        assert left >= 1
    assert not any(units.frozen[u] for u in torch.nonzero(removed).flatten().tolist())
    assert sum(b.filters for b in blocks) == int(units.size[removed].sum())
    assert sum(len(b.units) for b in blocks) == int(removed.sum()), "a unit is in two blocks"
    assert [b.score for b in blocks] == sorted(b.score for b in blocks)


@given(cases())
@settings(max_examples=100, deadline=None)
def test_within_a_layer_the_least_important_go_first(
    case: tuple[Units, torch.Tensor, int, int, int],
) -> None:
    units, importance, _, _, taken = case
    removed = mask(rank(importance, units)[:taken], units)
    for layer in units.layers:
        mine = torch.tensor(layer.units)
        gone, left = mine[removed[mine]], mine[~removed[mine]]
        if len(gone) and len(left):
            assert float(importance[gone].max()) <= float(importance[left].min())


@pytest.mark.parametrize("round_to", [1, 4])
def test_every_group_keeps_the_same_width(round_to: int) -> None:
    model, units = MODELS["grouped"], UNITS["grouped"]
    assert isinstance(model, Grouped)
    torch.manual_seed(0)
    blocks = rank(torch.rand(len(units)), units, round_to=round_to)
    for end in range(len(blocks) + 1):
        removed = mask(blocks[:end], units)
        for name in ("grouped", "multiplied"):
            conv = model.get_submodule(name)
            assert isinstance(conv, nn.Conv2d)
            kept = ~removed[units.filters[name]]
            # A depth-multiplied convolution loses whole groups; others lose the same of each group.
            per_group = kept.view(conv.groups, -1).sum(1)
            left = per_group if name == "grouped" else per_group[per_group > 0]
            assert len(left.unique()) == 1


def test_layers_are_ranked_together() -> None:
    units = UNITS["plain"]
    importance = torch.ones(len(units))
    order = torch.tensor([9, 1, 30, 2])
    importance[order] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert [b.units for b in rank(importance, units)[:4]] == [(9,), (1,), (30,), (2,)]


def test_ties_go_by_position() -> None:
    blocks = rank(torch.zeros(len(UNITS["plain"])), UNITS["plain"])
    assert blocks == rank(torch.zeros(len(UNITS["plain"])), UNITS["plain"])
    assert [b.units[0] for b in blocks[:7]] == list(range(7))


def test_a_coupled_unit_counts_all_the_filters_it_takes() -> None:
    units = UNITS["reused"]  # stem and body are one layer, two filters a unit
    blocks = rank(torch.rand(len(units)), units)
    assert {b.filters for b in blocks} == {1, 2}
    assert all(b.filters == int(units.size[list(b.units)].sum()) for b in blocks)


def test_a_block_ranks_by_the_mean_of_its_members() -> None:
    units = UNITS["plain"]
    importance = torch.arange(len(units), dtype=torch.float32)
    for block in rank(importance, units, round_to=4):
        assert block.score == pytest.approx(importance[list(block.units)].mean().item())


@pytest.mark.parametrize("round_to", [3, 5])
def test_a_width_that_is_no_multiple_becomes_one_when_first_cut(round_to: int) -> None:
    units = UNITS["plain"]
    first = next(b for b in rank(torch.arange(len(units)).float(), units, round_to=round_to))
    assert len(first.units) == 8 - round_to * math.floor(7 / round_to)


def test_spared_units_stay() -> None:
    units = UNITS["plain"]
    allowed = units.layer_of != 0
    blocks = rank(torch.rand(len(units)), units, allowed=allowed)
    assert blocks
    assert not mask(blocks, units)[units.layer_of == 0].any()


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (6, 3)])
def test_as_many_blocks_as_reach_the_count(count: int, expected: int) -> None:
    blocks = [Block(0.0, (0,), 2), Block(0.1, (1,), 1), Block(0.2, (2,), 2)]
    assert first_filters(blocks, count) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_importance_that_is_not_finite_is_refused_by_layer(value: float) -> None:
    importance = torch.zeros(len(UNITS["plain"]))
    importance[10] = value
    with pytest.raises(NumericalError, match=r"features\.4 is (nan|inf|-inf)"):
        rank(importance, UNITS["plain"])


@pytest.mark.parametrize("name", ["min_filters", "round_to"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_limits_must_be_whole_numbers_from_one(name: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"{name} must be .* got {value}"):
        rank(torch.zeros(len(UNITS["plain"])), UNITS["plain"], **{name: value})


@pytest.mark.parametrize(
    ("entry", "layers"),
    [
        ("features.0", {"features.0"}),
        ("features", {"features.0", "features.4", "features.7"}),
        ("features.[47]", {"features.4", "features.7"}),
        ("*", {"features.0", "features.4", "features.7"}),
        (MODELS["plain"].get_submodule("features.4"), {"features.4"}),
        ("classifier", set()),
    ],
)
def test_ignore_takes_names_patterns_and_modules(entry: str | nn.Module, layers: set[str]) -> None:
    units = UNITS["plain"]
    whole = spared([entry], MODELS["plain"], units)
    assert {n for n, row in units.filters.items() if bool(whole[row].all())} == layers
    assert {n for n, row in units.filters.items() if bool(whole[row].any())} == layers
    assert torch.equal(spared(entry, MODELS["plain"], units), whole)  # type: ignore[arg-type]


def test_ignoring_one_coupled_convolution_spares_its_layer() -> None:
    whole = spared(["body"], MODELS["reused"], UNITS["reused"])
    assert bool(whole[UNITS["reused"].filters["stem"]].all())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("feature.0", r"'feature\.0'.*did you mean 'features\.0'"),
        (nn.Conv2d(1, 1, 1), "Conv2d that is no module of the model"),
        (3, "names or modules, got int"),
    ],
)
def test_ignore_of_something_unknown_is_refused(entry: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spared([entry], MODELS["plain"], UNITS["plain"])  # type: ignore[list-item]
