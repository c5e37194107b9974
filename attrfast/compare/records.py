"""What a comparison leaves behind: one record for every start and one for every cell.

Plain figures, to and from JSON. Knows nothing of how they came about, nor of files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from attrfast.history import Step, row_from_json


@dataclass(frozen=True, order=True)
class StartKey:
    """One network with one seed: where all methods start from."""

    network: str
    seed: int

    def __str__(self) -> str:
        return f"{self.network}, seed {self.seed}"


@dataclass(frozen=True)
class CellKey:
    """One cell of the comparison; `budget` is the share of the multiply-adds that may be left."""

    network: str
    method: str
    budget: float
    seed: int

    @property
    def start(self) -> StartKey:
        return StartKey(self.network, self.seed)

    def __str__(self) -> str:
        return f"{self.network}, {self.method}, {self.budget:g} of the multiply-adds, seed {self.seed}"


@dataclass(frozen=True)
class ClassCount:
    """A class of the test set: its images, and how many of them a model gets right."""

    label: int
    name: str
    images: int
    right: int

    @property
    def top1(self) -> float:
        return self.right / self.images


@dataclass(frozen=True)
class Measured:
    """A model on the test set.

    Attributes:
        classes: the classes that the test set has images of, in the order of their labels.
        macs: multiply-adds of one image, see `attrfast.cost`.
        params: number of parameters.
    """

    classes: tuple[ClassCount, ...]
    macs: int
    params: int

    @property
    def top1(self) -> float:
        """Share of the test images that are right."""
        return sum(c.right for c in self.classes) / sum(c.images for c in self.classes)


@dataclass(frozen=True)
class Start:
    """A trained network before anything is removed.

    Attributes:
        mark: of the untrained weights and of all that training depends on.
        digest: of the trained weights.
    """

    key: StartKey
    mark: str
    digest: str
    measured: Measured


@dataclass(frozen=True)
class Cell:
    """A network made smaller by a method, and how that went.

    Attributes:
        mark: of the trained weights and of all settings that the cell depends on.
        before, after: the trained network, and the smaller one after fine-tuning, on the test set.
        history: one row a step, with accuracy on the validation set.
        gates: convolution -> one character a filter of the whole network, "1" for those that are left;
            None where the method does not tell.
        epochs: passes over the training images that the method made (after the start, where it begins
            there); None where a callable fine-tunes.
        stopped: why it ended, in words.
        warnings: what was warned of on the way.
        seconds: wall time.
    """

    key: CellKey
    mark: str
    before: Measured
    after: Measured
    history: tuple[Step, ...]
    gates: dict[str, str] | None
    epochs: int | None
    stopped: str
    warnings: tuple[str, ...] = field(default=())
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """A start or a cell that came to nothing; the next run tries it again.

    Attributes:
        key: what failed.
        error: in one line.
        details: the traceback, where there is one.
    """

    key: StartKey | CellKey
    error: str
    details: str = ""


def as_json(record: Start | Cell | Failure) -> dict[str, Any]:
    """A record as plain dictionaries and lists."""
    return dataclasses.asdict(record)


def start_from_json(tree: dict[str, Any]) -> Start:
    """Raises TypeError or KeyError where something is missing or too much."""
    return Start(**{**tree, "key": StartKey(**tree["key"]), "measured": _measured(tree["measured"])})


def cell_from_json(tree: dict[str, Any]) -> Cell:
    """Raises TypeError or KeyError where something is missing or too much."""
    return Cell(
        **{
            **tree,
            "key": CellKey(**tree["key"]),
            "before": _measured(tree["before"]),
            "after": _measured(tree["after"]),
            "history": tuple(row_from_json(row) for row in tree["history"]),
            "warnings": tuple(tree["warnings"]),
        }
    )


def _measured(tree: dict[str, Any]) -> Measured:
    return Measured(**{**tree, "classes": tuple(ClassCount(**c) for c in tree["classes"])})
