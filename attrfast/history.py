"""The rows of a run's history, and how they are read from files. Must not know what a run is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from attrfast import schema
from attrfast.errors import InputError


@dataclass(frozen=True)
class Step:
    """One row of the history; row 0 is the original model.

    Attributes:
        step: 0, 1, 2, ...
        phi: filters left, as a share of those at the start.
        filters: filters left.
        top1: share of samples, after fine-tuning (NaN for a model that does not classify).
        loss: mean over samples, after fine-tuning.
        macs, params: multiply-adds of one sample, and parameters.
        macs_pruned_percent, params_pruned_percent: of the original's, in percent.
        removed: filters removed in this step, by layer (the name of its first convolution).
        seconds_scoring, seconds_cutting, seconds_tuning: wall time.
        samples_scored: how many the ranking comes from; 0 for a criterion that reads weights or trains.
        undecided: units of which it was not sure whether they are among the lowest; None where every step
            reads all samples.
        latency, latency_predicted: seconds of a pass, measured and by the table; None where none was asked.
        latency_share: of the original's, measured in turns with it.
    """

    step: int
    phi: float
    filters: int
    top1: float
    loss: float
    macs: int
    params: int
    macs_pruned_percent: float
    params_pruned_percent: float
    removed: dict[str, int] = field(default_factory=dict)
    seconds_scoring: float = 0.0
    seconds_cutting: float = 0.0
    seconds_tuning: float = 0.0
    samples_scored: int = 0
    undecided: int | None = None
    latency: float | None = None
    latency_predicted: float | None = None
    latency_share: float | None = None


_COUNTS = ("step", "filters", "macs", "params")
_SHARES = {"phi": 1.0, "top1": 1.0, "macs_pruned_percent": 100.0, "params_pruned_percent": 100.0}
_OPTIONAL = ("undecided", "latency", "latency_predicted", "latency_share")
_MAY_BE_NONE_OR_NAN = {"top1", "loss"}


def row_from_json(row: Any, where: str = "the row") -> Step:
    """A row that was written as JSON, NaN as null or as Python writes it.

    Raises:
        InputError: a field is missing, is none of `Step`, or has a value that no run gives it.
    """
    raw = schema.mapping(row, where)
    known = {f.name for f in fields(Step)}
    if strange := sorted(raw.keys() ^ (known & raw.keys())):
        raise InputError(f"{where} has {strange[0]!r}, which no step has")
    if missing := sorted({*_COUNTS, *_SHARES, "loss"} - raw.keys()):
        raise InputError(f"{where} has no {missing[0]!r}")
    return Step(**{name: _field(name, value, f"{where}.{name}") for name, value in raw.items()})


def _field(name: str, value: Any, where: str) -> Any:
    if name in (*_COUNTS, "samples_scored") or (name == "undecided" and value is not None):
        return schema.count(value, where, least=0)
    if name == "removed":
        removed = schema.mapping(value, where)
        return {layer: schema.count(count, f"{where}[{layer!r}]") for layer, count in removed.items()}
    if name in _OPTIONAL and value is None:
        return None
    if name in _MAY_BE_NONE_OR_NAN and (value is None or value != value):
        return math.nan
    if name == "loss":  # of the user's own, it may be anything
        return math.inf if value == math.inf else schema.number(value, where)
    # Whoever adds a layer leaves more than there was.
    low = -math.inf if name.endswith("percent") else 0.0
    return schema.number(value, where, low, _SHARES.get(name, math.inf))
