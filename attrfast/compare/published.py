"""Published figures to set ours beside, from the data file `published.json`.

Knows nothing of our own figures.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from importlib import resources

from attrfast.errors import InputError


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    Attributes:
        label: as it is printed there.
        method: our name of the same method; None where we have none.
        top1: in percent.
        macs, params: counts as printed; None where the source gives percentages alone.
        macs_pruned, params_pruned: in percent; None where the source does not say.
    """

    label: str
    method: str | None
    top1: float
    macs: float | None
    macs_pruned: float | None
    params: float | None
    params_pruned: float | None

    @property
    def budget(self) -> float | None:
        """The share of the multiply-adds that is left."""
        return None if not self.macs_pruned else round(1 - self.macs_pruned / 100, 6)


@dataclass(frozen=True)
class Published:
    """A published table.

    Attributes:
        title: network and data.
        source: where the rows are from.
        rows: the unpruned network first.
        classes: class -> top-1 in percent before and after, of the table's last row; may be empty.
        later: rows of later work, with its name as label.
        caveats: what a reader must know, a sentence each.
    """

    title: str
    source: str
    rows: tuple[PublishedRow, ...]
    classes: dict[str, tuple[float, float]]
    later: tuple[PublishedRow, ...]
    caveats: tuple[str, ...]

    @property
    def budgets(self) -> tuple[float, ...]:
        """The shares of the multiply-adds that are left in its rows, from large to small."""
        return tuple(sorted({row.budget for row in self.rows if row.budget is not None}, reverse=True))

    def beside(self, method: str | None, budget: float | None) -> PublishedRow | None:
        """The row of this method at this budget, if there is one."""
        for row in self.rows:
            same = row.budget == budget or (
                row.budget is not None and budget is not None and f"{row.budget:g}" == f"{budget:g}"
            )
            if same and row.method == method:
                return row
        return None


def published(name: str) -> Published:
    """A table of the data file.

    Raises:
        InputError: there is none of this name.
    """
    tree = json.loads((resources.files(__package__) / "published.json").read_text())
    if name not in tree["tables"]:
        near = difflib.get_close_matches(name, tree["tables"], n=1, cutoff=0.0)
        raise InputError(f"there is no published table {name!r}; did you mean {near[0]!r}?")
    table = tree["tables"][name]
    columns = tree["columns"]

    def rows(of: str) -> tuple[PublishedRow, ...]:
        return tuple(PublishedRow(**dict(zip(columns, row, strict=True))) for row in table.get(of, []))

    return Published(
        title=table["title"],
        source=tree["source"],
        rows=rows("rows"),
        classes={k: (before, after) for k, (before, after) in table.get("classes", {}).items()},
        later=rows("later"),
        caveats=tuple(tree["caveats"] + table.get("caveats", [])),
    )
