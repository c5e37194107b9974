"""A comparison as tables: Markdown in the paper's form, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attrfast.compare.comparison import ClassRow, Comparison, Row, Spread
from attrfast.compare.files import write_json
from attrfast.compare.published import Published, PublishedRow
from attrfast.compare.records import as_json
from attrfast.files import replace_file

_NONE = "–"

DEFINITIONS = (
    "Top-1: share of the test images whose largest logit is that of their label, in percent.",
    "Multiply-adds: of convolutions and matrix products for one image, counted by torch's flop counter "
    "(two flops each) in an eval-mode pass; batch norm, activations and pooling count nothing.",
    "Parameters: all of them, buffers not included.",
    "In brackets: percent of the whole network's that are gone.",
    "mean ± spread: over seeds; the spread is the sample standard deviation, n the number of seeds "
    "(none is given for n = 1).",
    "Change: top-1 against the whole network of the same seed, in percentage points.",
    "Epochs: passes over the training images that a method made in all, mean over seeds; for a network "
    "trained from scratch those of its whole training.",
)


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Writes all tables into a folder that exists; returns the files."""
    texts = {
        "comparison.md": summary(comparison),
        "per_class.md": per_class(comparison),
        "comparison.csv": _csv(_flat(row) for row in _rows(comparison)),
        "per_class.csv": _csv(_flat(row) for row in _class_rows(comparison)),
        "cells.csv": _csv(_cells(comparison)),
    }
    for name, text in texts.items():
        replace_file(folder / name, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
    write_json(folder / "comparison.json", tree(comparison))
    return [folder / name for name in (*texts, "comparison.json")]


def summary(comparison: Comparison) -> str:
    """One table a network, the failures, the published figures, and what everything means."""
    parts = ["# Comparison"]
    for network in comparison.networks:
        rows = comparison.rows(network)
        if rows:
            parts += [f"## {network}", _main_table(rows, comparison.published)]
    if comparison.failures:
        lines = [f"- {failure.key}: {failure.error}" for failure in comparison.failures]
        parts += ["## Failed", "\n".join(lines)]
    if comparison.published is not None:
        parts += _published(comparison.published, comparison)
    warned = dict.fromkeys(warning for cell in comparison.cells for warning in cell.warnings)
    notes = [*comparison.notes, *(f"Warned: {warning}" for warning in warned)]
    parts += ["## What the figures are", _bullets([*DEFINITIONS, *notes])]
    return "\n\n".join(parts) + "\n"


def _main_table(rows: Sequence[Row], published: Published | None) -> str:
    head = [
        "method",
        "budget",
        "Top-1",
        "change",
        "multiply-adds (pruned %)",
        "parameters (pruned %)",
        "epochs",
        "n",
    ]
    if published is not None:
        head += ["published Top-1", "published pruned %, multiply-adds / parameters"]
    body = []
    for row in rows:
        whole = row.method is None
        line = [
            row.method or "unpruned",
            _NONE if row.budget is None else f"{100 * row.budget:g}%",
            _spread(row.top1, "{:.2f}"),
            _NONE if whole else _spread(row.change, "{:+.2f}"),
            f"{_count(row.macs.mean)}" + ("" if whole else f" ({_spread(row.macs_pruned, '{:.2f}')})"),
            f"{_count(row.params.mean)}"
            + ("" if whole else f" ({_spread(row.params_pruned, '{:.2f}')})"),
            _NONE if row.epochs is None else f"{row.epochs:.4g}",
            str(row.top1.n),
        ]
        if published is not None:
            line += _beside(published.beside(row.method, row.budget))
        body.append(line)
    return _markdown(head, body, left=1)


def _beside(row: PublishedRow | None) -> list[str]:
    if row is None:
        return ["", ""]
    pruned = f"{_percent(row.macs_pruned)} / {_percent(row.params_pruned)}"
    return [f"{row.top1:.2f}", "" if row.macs_pruned is None else pruned]


def _published(table: Published, comparison: Comparison) -> list[str]:
    head = ["published", "as", "Top-1", "multiply-adds (pruned %)", "parameters (pruned %)"]

    def lines(rows: Iterable[PublishedRow]) -> list[list[str]]:
        return [
            [
                row.label,
                row.method or _NONE,
                f"{row.top1:.2f}",
                _printed(row.macs, row.macs_pruned),
                _printed(row.params, row.params_pruned),
            ]
            for row in rows
        ]

    parts = [
        f"## Published: {table.title}",
        f"Source: {table.source}.",
        _markdown(head, lines(table.rows), left=2),
    ]
    if table.later:
        parts += ["Later results:", _markdown(head, lines(table.later), left=2)]
    return [*parts, "Read with care:", _bullets(table.caveats)]


def per_class(comparison: Comparison) -> str:
    """Top-1 of every class before and after, one table a network and budget."""
    parts = [
        "# Top-1 by class",
        "In percent: before, and after each method with the change in brackets (means over seeds, and "
        "the sample standard deviation of the change). **▼** marks the worst class of a method: it "
        "loses most there.",
    ]
    for network in comparison.networks:
        for budget in comparison.budgets:
            columns = {m: comparison.class_rows(network, m, budget) for m in comparison.methods}
            columns = {method: rows for method, rows in columns.items() if rows}
            if not columns:
                continue
            first = next(iter(columns.values()))
            head = ["class", "images", "before", *columns]
            body = [
                [
                    known.name,
                    str(known.images),
                    f"{known.before.mean:.2f}",
                    *(_class_cell(rows[i]) for rows in columns.values()),
                ]
                for i, known in enumerate(first)
            ]
            parts += [f"## {network}, {100 * budget:g}% of the multiply-adds", _markdown(head, body, 1)]
    table = comparison.published
    if table is not None and table.classes:
        body = [
            [name, f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"] for name, (a, b) in table.classes.items()
        ]
        parts += [
            f"## Published: {table.title}, the last row of its table",
            _markdown(["class", "before", "after", "change"], body, 1),
        ]
    return "\n\n".join(parts) + "\n"


def _class_cell(row: ClassRow) -> str:
    text = f"{row.after.mean:.2f} ({_spread(row.change, '{:+.2f}')})"
    return f"**▼ {text}**" if row.worst else text


def tree(comparison: Comparison) -> dict[str, Any]:
    """All figures as dictionaries and lists; what is not a number is null."""
    found: dict[str, Any] = _finite(
        {
            "networks": comparison.networks,
            "methods": comparison.methods,
            "budgets": comparison.budgets,
            "seeds": comparison.seeds,
            "definitions": DEFINITIONS,
            "notes": comparison.notes,
            "rows": [dataclasses.asdict(row) for row in _rows(comparison)],
            "classes": [dataclasses.asdict(row) for row in _class_rows(comparison)],
            "failures": [as_json(failure) for failure in comparison.failures],
            "published": comparison.published and dataclasses.asdict(comparison.published),
        }
    )
    return found


def _finite(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_finite(value) for value in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item


def _rows(comparison: Comparison) -> list[Row]:
    return [row for network in comparison.networks for row in comparison.rows(network)]


def _class_rows(comparison: Comparison) -> list[ClassRow]:
    return [
        row
        for network in comparison.networks
        for budget in comparison.budgets
        for method in comparison.methods
        for row in comparison.class_rows(network, method, budget)
    ]


def _cells(comparison: Comparison) -> list[dict[str, Any]]:
    return [
        {
            **dataclasses.asdict(cell.key),
            "top1_before": cell.before.top1,
            "top1": cell.after.top1,
            "macs_before": cell.before.macs,
            "macs": cell.after.macs,
            "params_before": cell.before.params,
            "params": cell.after.params,
            "steps": len(cell.history) - 1,
            "epochs": cell.epochs,
            "seconds": round(cell.seconds, 3),
        }
        for cell in comparison.cells
    ]


def _flat(row: Row | ClassRow) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(row):
        value = getattr(row, item.name)
        if isinstance(value, Spread):
            flat[item.name] = value.mean
            flat[f"{item.name}_std"] = "" if math.isnan(value.std) else value.std
            flat["n"] = value.n
        else:
            flat[item.name] = "" if value is None else value
    return flat


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    items = list(rows)
    text = io.StringIO()
    if items:
        writer = csv.DictWriter(text, items[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(items)
    return text.getvalue()


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]], left: int) -> str:
    """A table whose columns line up as plain text too; the first `left` are flush left."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, *body)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]

    def line(items: Sequence[str]) -> str:
        padded = [
            item.ljust(width) if i < left else item.rjust(width)
            for i, (item, width) in enumerate(zip(items, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * (width + 2) if i < left else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), "|" + "|".join(rule) + "|", *map(line, cells[1:])])


def _bullets(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _spread(value: Spread, form: str) -> str:
    mean = form.format(value.mean)
    return mean if math.isnan(value.std) else f"{mean} ± {value.std:.2f}"


def _count(count: float) -> str:
    """1.56e10, as such counts are usually given."""
    mantissa, exponent = f"{count:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"


def _printed(count: float | None, pruned: float | None) -> str:
    if count is None and pruned is None:
        return _NONE
    left = "" if count is None else _count(count)
    return f"{left} ({pruned:g})".strip() if pruned is not None else left
