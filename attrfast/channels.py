"""From a model and an example input to its units."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attrfast.errors import ModelError
from attrfast.flow import Analysis
from attrfast.labels import NONE, Labels
from attrfast.trace import Trace, trace
from attrfast.units import Layer, Units

log = logging.getLogger(__name__)


def find_units(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
) -> Units:
    """Finds the units of a model: filters that can only be removed together, and their readers.

    The model runs once in eval mode and, where that leaves layers uncalled (auxiliary heads), once in
    training mode; both leave it as it was.

    Args:
        model: any module.
        inputs: positional inputs of a small batch (two samples are enough), on the model's device.
        kwargs: keyword inputs.

    Raises:
        ModelError: the forward pass fails, or no convolution was called.
    """
    return discover(model, inputs, kwargs).units


@dataclass(frozen=True)
class Discovery:
    """A model's units, and where they lie in its recorded forward pass.

    Attributes:
        units: the units.
        record: the eval-mode pass.
        channels: value of the record -> the dimension that holds channels, and the unit of each
            (int64, -1 for none). Values without any unit are left out.
    """

    units: Units
    record: Trace
    channels: dict[int, tuple[int, torch.Tensor]]


def discover(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    others: Iterable[tuple[Sequence[Any], dict[str, Any]]] = (),
) -> Discovery:
    """`find_units`, with the recorded pass that it was found in.

    Args:
        others: more inputs and keyword inputs, tried one by one while there are layers that no pass has
            called: in a model that chooses its way by the data, they may lead to them.
    """
    analysis = Analysis(model)
    record = trace(model, inputs, kwargs)
    analysis.run(record)
    channels = dict(analysis.channels)
    if analysis.unseen():
        try:
            analysis.run(trace(model, inputs, kwargs, training=True))
        except ModelError as error:
            log.debug("no training-mode trace: %s", error)
    more = iter(others)
    while analysis.unseen() and (other := next(more, None)) is not None:
        analysis.run(trace(model, *other))
    if not analysis.scored:
        raise ModelError(
            "the model called no convolution of its own in the forward pass, so there is no filter to "
            "score; attrfast sees nn.Conv1d/2d/3d, their transposes, and nn.Linear applied to maps"
        )
    units, unit_of = _collect(analysis)
    found = {}
    rows: dict[int, torch.Tensor] = {}  # by the labels, which many values share
    for value, place in channels.items():
        row = rows.get(id(place.labels))
        if row is None:
            row = rows[id(place.labels)] = unit_of[torch.tensor(place.labels)]
        if bool((row >= 0).any()):
            found[value] = (place.dim, row)
    return Discovery(units, record, found)


def _collect(analysis: Analysis) -> tuple[Units, torch.Tensor]:
    """The units, and the unit of every label: -1 for none, and for `NONE` as well, which is the last."""
    labels = analysis.labels
    root = torch.tensor([*labels.roots(), NONE])  # the last is that of NONE
    outputs, inputs = _roots_in(analysis.outputs, root), _roots_in(analysis.inputs, root)
    read, frozen_here = (torch.zeros(len(root), dtype=torch.bool) for _ in range(2))
    read[torch.cat([root[:0], *inputs.values()])] = True
    frozen_here[torch.tensor(list(labels.reasons), dtype=torch.int64)] = True
    read[NONE] = False
    # A convolution that nothing reads makes the model's outputs: it is no candidate, and has no score.
    convs = [
        name
        for name in analysis.scored
        if bool(read[outputs[name]].any()) or not bool(frozen_here[outputs[name]].any())
    ]
    # Units are numbered in the order in which convolutions make them.
    made = torch.cat([root[:0], *(outputs[name] for name in convs)])
    ids, place = torch.unique(made, return_inverse=True)
    first = torch.full_like(ids, len(made)).scatter_reduce(0, place, torch.arange(len(made)), "amin")
    ids = ids[torch.argsort(first)]
    unit_of_root = torch.full_like(root, -1)
    unit_of_root[ids] = torch.arange(len(ids))
    unit_of = unit_of_root[root]

    def mapped(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {name: unit_of_root[row] for name, row in rows.items()}
        return {name: row for name, row in found.items() if bool((row >= 0).any())}

    outputs, inputs = mapped(outputs), mapped(inputs)
    filters = {name: outputs[name] for name in convs}
    size = torch.zeros(len(ids), dtype=torch.int64)
    for row in filters.values():
        size.index_add_(0, row[row >= 0], torch.ones_like(row[row >= 0]))
    frozen: list[str | None] = [labels.reasons.get(label) for label in ids.tolist()]
    layers, layer_of = _layers(filters, frozen, len(ids))
    units = Units(
        filters=filters,
        outputs=outputs,
        inputs=inputs,
        depthwise=frozenset(analysis.depthwise & outputs.keys()),
        layers=layers,
        layer_of=layer_of,
        size=size,
        frozen=tuple(frozen),
    )
    return units, unit_of


def _roots_in(rows: dict[str, tuple[int, ...]], root: torch.Tensor) -> dict[str, torch.Tensor]:
    """The roots of rows of labels."""
    every = root[torch.tensor([label for row in rows.values() for label in row], dtype=torch.int64)]
    return dict(zip(rows, torch.split(every, [len(row) for row in rows.values()]), strict=True))


def _layers(
    filters: dict[str, torch.Tensor], frozen: Sequence[str | None], count: int
) -> tuple[tuple[Layer, ...], torch.Tensor]:
    """Convolutions that share a unit belong to one layer."""
    home = torch.full((count,), len(filters))  # the position of the first convolution that makes a unit
    for i, row in enumerate(filters.values()):
        home[row] = home[row].clamp(max=i)
    convolutions = Labels()
    convolutions.new("", len(filters))
    for i, row in enumerate(filters.values()):
        for other in torch.unique(home[row]).tolist():
            convolutions.unite(i, other, "")
    roots = convolutions.roots()
    members: dict[int, list[str]] = {}
    for root, name in zip(roots, filters, strict=True):
        members.setdefault(root, []).append(name)
    _, layer_of_convolution = torch.unique(torch.tensor(roots), return_inverse=True)  # as in `members`
    layer_of = layer_of_convolution[home]
    order = torch.argsort(layer_of, stable=True)
    layers = []
    for convs, part in zip(
        members.values(), torch.split(order, torch.bincount(layer_of).tolist()), strict=True
    ):
        units = tuple(part.tolist())
        reasons = [frozen[u] for u in units]
        why = next((r for r in reasons if r), None) if all(reasons) else None
        layers.append(Layer(convs[0], tuple(convs), units, why))
    return tuple(layers), layer_of
