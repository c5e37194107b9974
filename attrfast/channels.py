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
from attrfast.labels import NONE
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
    for value, place in channels.items():
        row = unit_of[list(place.labels)]
        if bool((row >= 0).any()):
            found[value] = (place.dim, row)
    return Discovery(units, record, found)


def _collect(analysis: Analysis) -> tuple[Units, torch.Tensor]:
    """The units, and the unit of every label: -1 for none, and for `NONE` as well, which is the last."""
    labels = analysis.labels
    root = [labels.root(label) for label in range(len(labels.parent))]
    read = {root[x] for row in analysis.inputs.values() for x in row if x != NONE}
    # A convolution that nothing reads makes the model's outputs: it is no candidate, and has no score.
    convs = [
        name
        for name in analysis.scored
        if any(root[x] in read for x in analysis.outputs[name])
        or not any(root[x] in labels.reasons for x in analysis.outputs[name])
    ]
    ids: dict[int, int] = {}
    for name in convs:
        for label in analysis.outputs[name]:
            ids.setdefault(root[label], len(ids))
    unit_of = torch.tensor([ids.get(x, -1) for x in root] + [-1], dtype=torch.int64)

    def mapped(rows: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        found = {name: unit_of[list(row)] for name, row in rows.items()}
        return {name: row for name, row in found.items() if bool((row >= 0).any())}

    outputs = mapped(analysis.outputs)
    inputs = mapped(analysis.inputs)
    filters = {name: outputs[name] for name in convs}
    size = torch.zeros(len(ids), dtype=torch.int64)
    for row in filters.values():
        size.index_add_(0, row[row >= 0], torch.ones_like(row[row >= 0]))
    frozen: list[str | None] = [labels.reasons.get(root) for root in ids]
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


def _layers(
    filters: dict[str, torch.Tensor], frozen: Sequence[str | None], count: int
) -> tuple[tuple[Layer, ...], torch.Tensor]:
    """Convolutions that share a unit belong to one layer."""
    home: dict[int, int] = {}  # unit -> first convolution's position
    parent = list(range(len(filters)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, row in enumerate(filters.values()):
        for unit in row.tolist():
            if unit in home:
                a, b = sorted((root(home[unit]), root(i)))
                parent[b] = a
            else:
                home[unit] = i
    names = list(filters)
    convs: dict[int, list[str]] = {}
    for i, name in enumerate(names):
        convs.setdefault(root(i), []).append(name)
    place = {r: k for k, r in enumerate(convs)}
    layer_of = torch.tensor([place[root(home[u])] for u in range(count)], dtype=torch.int64)
    layers = []
    for k, members in enumerate(convs.values()):
        units = tuple(torch.nonzero(layer_of == k).flatten().tolist())
        reasons = [frozen[u] for u in units]
        why = next((r for r in reasons if r), None) if all(reasons) else None
        layers.append(Layer(members[0], tuple(members), units, why))
    return tuple(layers), layer_of
