"""What a saved model's weights alone don't say: a `Recipe`, and its form as JSON.

Reading checks every value and runs nothing. Must not know where files lie.
"""

from __future__ import annotations

from collections.abc import ItemsView
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attrfast import gate_text, schema
from attrfast.architecture import Form, outputs
from attrfast.errors import InputError
from attrfast.history import row_from_json

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
            "history": self.history,
            "gates": gate_text.to_text(self.gates),
            "modules": {name: asdict(form) for name, form in self.modules.items()},
            "shared": self.shared,
            "weights": {"bytes": size, "sha256": digest},
        }
        return schema.sealed(body)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Reads what `to_json` wrote.

        Raises:
            InputError: it is no recipe, is of a later version, is damaged, or contradicts itself.
        """
        needed = ("versions", "criterion", "stopped", "history", "gates", "modules", "shared", "weights")
        raw = schema.unsealed(text, FORMAT, VERSION, needed)

        def part(name: str) -> ItemsView[str, Any]:
            return schema.mapping(raw[name], name).items()

        weights = schema.mapping(raw["weights"], "weights")
        return Recipe(
            criterion=schema.text(raw["criterion"], "criterion"),
            stopped=schema.text(raw["stopped"], "stopped"),
            history=[
                asdict(row_from_json(row, f"history[{i}]"))
                for i, row in enumerate(schema.sequence(raw["history"], "history"))
            ],
            gates={n: _gate(v, f"gates[{n!r}]") for n, v in part("gates")},
            modules={n: _form(v, f"modules[{n!r}]") for n, v in part("modules")},
            shared={n: schema.text(v, f"shared[{n!r}]") for n, v in part("shared")},
            weights=(
                schema.count(weights.get("bytes"), "weights.bytes"),
                schema.text(weights.get("sha256"), "sha256"),
            ),
            versions={n: schema.text(v, f"versions[{n!r}]") for n, v in part("versions")},
        )


def _form(value: Any, where: str) -> Form:
    raw = schema.mapping(value, where)
    widths = schema.mapping(raw.get("widths"), f"{where}.widths")
    return Form(
        kind=schema.text(raw.get("kind"), f"{where}.kind"),
        widths={name: schema.count(width, f"{where}.widths.{name}") for name, width in widths.items()},
        settings=schema.mapping(raw.get("settings"), f"{where}.settings"),
    )


def _gate(value: Any, where: str) -> torch.Tensor:
    return gate_text.from_text(schema.bits(value, where))
