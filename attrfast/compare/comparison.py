"""A comparison as a whole: its cells, and their means and spreads over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attrfast.compare.published import Published
from attrfast.compare.records import Cell, ClassCount, Failure, Measured, Start
from attrfast.errors import InputError


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and the sample standard deviation (NaN for a single seed)."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        items = list(values)
        std = statistics.stdev(items) if len(items) > 1 else math.nan
        return cls(statistics.fmean(items), std, len(items))


@dataclass(frozen=True)
class Row:
    """A network made smaller by one method to one budget, over seeds.

    Attributes:
        method, budget: None for the whole network.
        top1: in percent, on the test set.
        macs, params: multiply-adds of one image, and parameters.
        macs_pruned, params_pruned: in percent of the whole network's.
        change: of top-1 against the same seed's whole network, in percentage points.
        epochs: passes over the training images that the method made, mean over seeds; None for the whole
            network and where a callable fine-tunes.
    """

    network: str
    method: str | None
    budget: float | None
    top1: Spread
    macs: Spread
    macs_pruned: Spread
    params: Spread
    params_pruned: Spread
    change: Spread
    epochs: float | None


@dataclass(frozen=True)
class ClassRow:
    """One class of the test set under one method and budget.

    Attributes:
        images: of the class in the test set.
        before, after, change: top-1 in percent, and percentage points.
        worst: whether no class of this method and budget lost more.
    """

    network: str
    method: str
    budget: float
    name: str
    images: int
    before: Spread
    after: Spread
    change: Spread
    worst: bool


@dataclass(frozen=True)
class Comparison:
    """What `attrfast.compare` gives back.

    Attributes:
        networks, methods, budgets, seeds: what was compared; budgets from large to small.
        starts: the trained networks.
        cells: those that went well.
        failures: those that did not.
        folder: where the cells are filed.
        published: figures to print beside ours, or None.
        notes: what a reader must know, a sentence each.
    """

    networks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    starts: tuple[Start, ...]
    cells: tuple[Cell, ...]
    failures: tuple[Failure, ...]
    folder: Path
    published: Published | None = None
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, key: tuple[str, str, float, int]) -> Cell:
        """The cell of (network, method, budget, seed).

        Raises:
            InputError: there is none.
        """
        network, method, budget, seed = key
        for cell in self.of(network, method, budget):
            if cell.key.seed == seed:
                return cell
        raise InputError(f"there is no cell {key}; see `failures` for what went wrong")

    def of(self, network: str, method: str, budget: float) -> list[Cell]:
        """The cells of all seeds, in their order."""
        wanted = (network, method, f"{budget:g}")
        return [c for c in self.cells if (c.key.network, c.key.method, f"{c.key.budget:g}") == wanted]

    def rows(self, network: str) -> list[Row]:
        """The whole network, then every budget from large to small with the methods in their order."""
        starts = [start.measured for start in self.starts if start.key.network == network]
        if not starts:
            return []
        rows = [_row(network, None, None, [(whole, whole) for whole in starts], [None])]
        for budget in self.budgets:
            for method in self.methods:
                cells = self.of(network, method, budget)
                if cells:
                    pairs = [(cell.before, cell.after) for cell in cells]
                    epochs = [cell.epochs for cell in cells]
                    rows.append(_row(network, method, budget, pairs, epochs))
        return rows

    def class_rows(self, network: str, method: str, budget: float) -> list[ClassRow]:
        """The classes before and after, in the order of their labels.

        Where the test set depends on the seed, a class that a seed has no images of is left out.
        """
        cells = self.of(network, method, budget)
        if not cells:
            return []
        found = []
        sides = [(_by_label(cell.before), _by_label(cell.after)) for cell in cells]
        for known in cells[0].before.classes:
            pairs = [(b[known.label], a[known.label]) for b, a in sides if known.label in b]
            if len(pairs) < len(cells):
                continue
            before = [100 * b.top1 for b, _ in pairs]
            after = [100 * a.top1 for _, a in pairs]
            change = [b - a for a, b in zip(before, after, strict=True)]
            spreads = (Spread.of(before), Spread.of(after), Spread.of(change))
            found.append((known, spreads))
        lowest = min((change.mean for _, (_, _, change) in found), default=0.0)
        return [
            ClassRow(network, method, budget, k.name, k.images, b, a, c, worst=c.mean == lowest)
            for k, (b, a, c) in found
        ]

    def summary(self) -> str:
        """The tables in the paper's form, as Markdown."""
        from attrfast.compare.tables import summary

        return summary(self)

    def save(self, folder: str | Path | None = None) -> list[Path]:
        """Writes tables (Markdown, CSV, JSON) and pictures (PNG).

        Args:
            folder: None: where the cells are.

        Returns:
            The files.
        """
        from attrfast.compare.curves import draw
        from attrfast.compare.tables import write

        place = self.folder if folder is None else Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        return write(self, place) + draw(self, place)

    def __repr__(self) -> str:
        return (
            f"Comparison({len(self.networks)} networks, {len(self.methods)} methods, "
            f"{len(self.budgets)} budgets, {len(self.seeds)} seeds: {len(self.cells)} cells, "
            f"{len(self.failures)} failures)"
        )


def _by_label(measured: Measured) -> dict[int, ClassCount]:
    return {known.label: known for known in measured.classes}


def _row(
    network: str,
    method: str | None,
    budget: float | None,
    pairs: Sequence[tuple[Measured, Measured]],
    epochs: Sequence[int | None],
) -> Row:
    known = [count for count in epochs if count is not None]

    def pruned(before: int, after: int) -> float:
        return 100 * (1 - after / before)

    return Row(
        network=network,
        method=method,
        budget=budget,
        top1=Spread.of(100 * after.top1 for _, after in pairs),
        macs=Spread.of(after.macs for _, after in pairs),
        macs_pruned=Spread.of(pruned(before.macs, after.macs) for before, after in pairs),
        params=Spread.of(after.params for _, after in pairs),
        params_pruned=Spread.of(pruned(before.params, after.params) for before, after in pairs),
        change=Spread.of(100 * (after.top1 - before.top1) for before, after in pairs),
        epochs=statistics.fmean(known) if known else None,
    )
