"""What a saved model's weights alone don't say: a `Recipe`, and its form as JSON.

Reading checks every value and runs nothing. Must not know where files lie.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attrfast import gate_text
from attrfast.architecture import Form, outputs
from attrfast.errors import InputError

FORMAT, VERSION = "attrfast recipe", 1


@dataclass(frozen=True)
class Recipe:
    """How a pruned model is built out of an unpruned one, and how it came about.

    Attributes:
        criterion: name of the criterion.
        stopped: why pruning ended, in words.
        history: one row a step, with the fields of `attrfast.Step`.
        gates: convolution -> (filters,) bool, true for those that are left. The filters are those of
            the model that `prune` was given, which may have been a pruned one.
        modules: module -> its kind, and its widths after pruning.
        shared: name of a tensor -> the name under which the weights hold it, for tensors with several.
        weights: size of the weights in bytes, and their SHA-256.
        versions: of attrfast and torch, which wrote it.
    """

    criterion: str
    stopped: str
    history: list[dict[str, Any]]
    gates: dict[str, torch.Tensor]
    modules: dict[str, Form]
    shared: dict[str, str]
    weights: tuple[int, str]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        for name, gate in self.gates.items():
            left = outputs(self.modules[name]) if name in self.modules else None
            if left != int(gate.sum()):
                raise InputError(f"{name} has {left} filters, though {int(gate.sum())} gates are open")
        for alias, name in self.shared.items():
            if alias == name or name in self.shared:
                raise InputError(f"{alias} is said to be {name}, under which no tensor is held")

    def to_json(self) -> str:
        """The text of the recipe; its last entry is the checksum of the others."""
        size, digest = self.weights
        body = {
            "format": FORMAT,
            "version": VERSION,
            "versions": self.versions,
            "criterion": self.criterion,
            "stopped": self.stopped,
            "history": _finite(self.history),
            "gates": gate_text.to_text(self.gates),
            "modules": {name: asdict(form) for name, form in self.modules.items()},
            "shared": self.shared,
            "weights": {"bytes": size, "sha256": digest},
        }
        return json.dumps({**body, "checksum": _checksum(body)}, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Reads what `to_json` wrote.

        Raises:
            InputError: it is no recipe, is of a later version, is damaged, or contradicts itself.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"it is no JSON: {error}") from error
        raw = _mapping(raw, "it")
        if raw.get("format") != FORMAT:
            raise InputError(f"its format is {raw.get('format')!r}, not {FORMAT!r}")
        if raw.get("version") != VERSION:
            raise InputError(
                f"it is of version {raw.get('version')!r}, and this attrfast reads version {VERSION}; "
                f"use the attrfast that wrote it"
            )
        told = raw.pop("checksum", None)
        if told != _checksum(raw):
            raise InputError("its checksum does not fit what it says: it was changed or damaged")
        missing = {
            "versions",
            "criterion",
            "stopped",
            "history",
            "gates",
            "modules",
            "shared",
            "weights",
        }
        if absent := sorted(missing - raw.keys()):
            raise InputError(f"it has no {absent[0]!r}")
        weights = _mapping(raw["weights"], "weights")
        return Recipe(
            criterion=_text(raw["criterion"], "criterion"),
            stopped=_text(raw["stopped"], "stopped"),
            history=[
                _row(row, f"history[{i}]") for i, row in enumerate(_list(raw["history"], "history"))
            ],
            gates={n: _gate(v, f"gates[{n!r}]") for n, v in _mapping(raw["gates"], "gates").items()},
            modules={
                n: _form(v, f"modules[{n!r}]") for n, v in _mapping(raw["modules"], "modules").items()
            },
            shared={n: _text(v, f"shared[{n!r}]") for n, v in _mapping(raw["shared"], "shared").items()},
            weights=(
                _count(weights.get("bytes"), "weights.bytes"),
                _text(weights.get("sha256"), "sha256"),
            ),
            versions={
                n: _text(v, f"versions[{n!r}]") for n, v in _mapping(raw["versions"], "versions").items()
            },
        )


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(item: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for a figure that there is not."""
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_finite(value) for value in item]
    return item


def _row(value: Any, where: str) -> dict[str, Any]:
    # JSON knows no NaN: of a figure that every step has, null is one.
    return {
        k: math.nan if v is None and not k.startswith("latency") else v
        for k, v in _mapping(value, where).items()
    }


def _form(value: Any, where: str) -> Form:
    raw = _mapping(value, where)
    widths = _mapping(raw.get("widths"), f"{where}.widths")
    return Form(
        kind=_text(raw.get("kind"), f"{where}.kind"),
        widths={name: _count(width, f"{where}.widths.{name}") for name, width in widths.items()},
        settings=_mapping(raw.get("settings"), f"{where}.settings"),
    )


def _gate(value: Any, where: str) -> torch.Tensor:
    text = _text(value, where)
    if not text or set(text) - {"0", "1"}:
        raise InputError(f"{where} must be made of 0 and 1, one for each filter, got {text[:40]!r}")
    return gate_text.from_text(text)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, got {_short(value)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(f"{where} must be a list, got {_short(value)}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} must be text, got {_short(value)}")
    return value


def _count(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where} must be a whole number of at least 1, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
