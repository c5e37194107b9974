"""All that decides the outcome of `attrfast prune`, and its form as TOML, which repeats the run.

Must not know how a run is carried out.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from attrfast.criteria import Criterion
from attrfast.engine import check_options
from attrfast.errors import InputError
from attrfast.finetune import FineTune
from attrfast.names import NamedData
from attrfast.portions import parse_memory
from attrfast.stopping import check_stop
from attrfast.targets import Asked

TRAIN = FineTune(epochs=0, optimizer="adamw", lr=3e-3, schedule="onecycle", weight_decay=0.01)
TABLES = {"train": TRAIN, "finetune": FineTune(), "final_finetune": FineTune(epochs=0)}
ELSEWHERE = ("device", "loader_workers")  # where and with how many hands a run is carried out


@dataclass(frozen=True)
class PruneSettings:
    """The options of `attrfast prune` under their names; see `attrfast.prune` for what they mean.

    Attributes:
        model, data: by the names of `attrfast.names`.
        weights: a file that the network starts from.
        train, finetune, final_finetune: epochs.
        step: filters removed in a step.
        score_batches: batches scored in a step.
        stop, confidence, memory_limit: of scoring.
        images, batch_size, image_size, loader_workers: of the data.
        tables: `train`, `finetune` or `final_finetune` -> further fields of `attrfast.FineTune`.
    """

    model: str
    data: str
    weights: str | None = None
    train: int = 0
    criterion: str = "attribution"
    keep_ratio: float | None = None
    max_macs: float | None = None
    max_params: float | None = None
    max_latency: str | None = None
    latency_input: int | None = None
    latency_device: str | None = None
    latency_weight: float = 0.0
    max_accuracy_drop: float | None = None
    step: int | None = None
    finetune: int = 1
    final_finetune: int = 0
    classes: tuple[int, ...] | None = None
    balance: str | None = None
    normalize: str | None = "l2"
    reduction: str | None = None
    score_batches: int | None = None
    stop: str | None = "auto"
    confidence: float = 0.95
    memory_limit: str | None = None
    round_to: int = 1
    min_filters: int = 1
    ignore: tuple[str, ...] = ()
    images: int | None = None
    batch_size: int | None = None
    image_size: int | None = None
    loader_workers: int = 2
    device: str | None = None
    seed: int = 0
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self) -> Criterion:
        """Refuses what can't be used, before anything long is begun; gives the criterion.

        Raises:
            InputError: a setting is not usable.
        """
        if self.stop != "auto":
            check_stop(self.stop, self.confidence, self.step)
        parse_memory(self.memory_limit, torch.device("cpu"))
        if self.balance not in (None, "worst_class"):
            raise InputError(f"balance must be 'worst_class', got {self.balance!r}")
        rule, _ = check_options(
            self.criterion, **self.scoring, microbatch=None, by_class=self.balance is not None
        )
        Asked(
            self.keep_ratio,
            self.max_macs,
            self.max_params,
            self.max_latency,
            self.max_accuracy_drop,
            needed=not rule.trains,
        )
        for name in TABLES:
            self.training(name)
        return rule

    @property
    def scoring(self) -> dict[str, Any]:
        """What `attribute` and `prune` are asked for alike."""
        return {
            "normalize": self.normalize,
            "reduction": self.reduction,
            "max_batches": self.score_batches,
            "classes": self.classes,
        }

    def opener(self) -> NamedData:
        """What opens the data for a seed."""
        return NamedData(self.data, self.images, self.loader_workers, self.batch_size, self.image_size)

    def training(self, name: str) -> FineTune:
        """How `train`, `finetune` or `final_finetune` is done.

        Raises:
            InputError: a value is not usable.
        """
        fields = {**self.tables.get(name, {}), "epochs": getattr(self, name)}
        try:
            return dataclasses.replace(TABLES[name], **fields)
        except TypeError as error:  # a text where a number belongs
            raise InputError(f"[prune.{name}] is not usable: {error}") from error

    def to_toml(self) -> str:
        """As a file for `attrfast prune --config`; what is not set is left out."""
        plain = {k: v for k, v in vars(self).items() if k != "tables" and v is not None and v != ()}
        plain |= {name: "none" for name in ("normalize", "stop") if getattr(self, name) is None}
        with_tables = {
            name: {**fields, "epochs": plain.pop(name)} for name, fields in self.tables.items()
        }
        lines = ["[prune]", *(f"{key} = {_toml(value)}" for key, value in plain.items())]
        for name, fields in with_tables.items():
            lines += ["", f"[prune.{name}]", *(f"{k} = {_toml(v)}" for k, v in fields.items())]
        return "\n".join(lines) + "\n"

    def command(self, out: str) -> list[str]:
        """The command that makes this run in the folder `out`, as words."""
        words = ["attrfast", "prune"]
        if self.tables:  # which only a file can say
            return [*words, "--config", f"{out}/settings.toml", "--out", "AGAIN"]
        words += [self.model, "--data", self.data]
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if setting.name not in ("model", "data", "tables") and value != setting.default:
                text = (
                    ",".join(map(str, value))
                    if isinstance(value, tuple)
                    else "none"
                    if value is None
                    else str(value)
                )
                words += [f"--{setting.name.replace('_', '-')}", text]
        return [*words, "--out", out]


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Texts, truth values and numbers are written in TOML as in JSON, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
