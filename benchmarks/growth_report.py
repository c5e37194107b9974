"""What `benchmarks.growth` measured: tables and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrfast import canvas
from benchmarks import growth, machine
from benchmarks.picture import new_figure
from benchmarks.report import Sheet

INTRODUCTION = """\
# How time and memory grow

Written by `python -m benchmarks growth`, which `make bench` runs; [what it measures](../README.md#growth).
"""
_COLOURS = {"attrfast": canvas.KEPT, growth.BOUNDED: "#67a9cf", "hooks": "#b2182b", "captum": "#e08214"}


def sheets(result: dict[str, Any]) -> list[Sheet]:
    """Every point of every series, and how each contender grows over them."""
    return [_points(result, key) for key in result["series"]] + [_fits(result)]


def _points(result: dict[str, Any], key: str) -> Sheet:
    series = result["series"][key]
    kept = series["kept"]
    notes = [f"Medians of {result['repeats']} fresh processes."]
    columns = [series["title"], "", "time", "peak memory"]
    if kept[0] is not None:
        columns.append("× activations")
        notes.append(
            "“× activations”: beside what one batch leaves between the layers, each activation once."
        )
    notes.append(machine.one_line(result["machine"]))
    sheet = Sheet(f"Growth with {series['title']}", columns, notes)
    for index, value in enumerate(series["points"]):
        start = f"{value:,}"
        for name, rows in series["contenders"].items():
            row = rows[index]
            cells = [start, name, f"{row['seconds']:.2f} s", f"{row['bytes'] / 1e6:.0f} MB"]
            if kept[index] is not None:
                cells.append(f"{row['bytes'] / kept[index]:.2f}")
            sheet.rows.append(cells)
            start = ""
    return sheet


def _fits(result: dict[str, Any]) -> Sheet:
    sheet = Sheet(
        "Growth: how time and memory follow",
        ["with", "", "time ~ n to the", "memory for each one more", "highest / lowest peak", ""],
        [
            f"The exponent is that of the larger half of the points; time counts as linear up to "
            f"{growth.LINEAR:.2f}, memory as flat up to {growth.FLAT:.2f} times the lowest peak. "
            f"“{growth.BOUNDED}” may take {growth.MEMORY_LIMIT / 1e6:.0f} MB."
        ],
    )
    for series in result["series"].values():
        start = series["title"]
        for name, fit in series["fits"].items():
            verdicts = ", ".join(f"{what} {verdict}" for what, verdict in fit["verdicts"].items())
            each = f"{fit['bytes_each'] / 1e3:,.2f} kB"
            numbers = [f"{fit['exponent']:.2f}", each, f"{fit['spread']:.2f}"]
            sheet.rows.append([start, name, *numbers, verdicts])
            start = ""
    return sheet


def draw(result: dict[str, Any], path: Path) -> None:
    """Time and peak memory of every series, on logarithmic axes.

    Args:
        result: as `benchmarks.growth.measure` gives it.
        path: file to write.
    """
    with new_figure(len(result["series"]), path) as grid:
        for (left, right), (key, series) in zip(grid, result["series"].items(), strict=True):
            for name, rows in series["contenders"].items():
                colour = _COLOURS[name]
                for axes, values in (
                    (left, [row["seconds"] for row in rows]),
                    (right, [row["bytes"] / 1e6 for row in rows]),
                ):
                    axes.plot(series["points"], values, "o-", color=colour, markersize=4, label=name)
            if key == "depth":
                kept = [bytes_ / 1e6 for bytes_ in series["kept"]]
                right.plot(
                    series["points"], kept, "--", color=canvas.MUTED, label="a batch's activations"
                )
            for axes, what in ((left, "time of a pass (s)"), (right, "peak memory (MB)")):
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.set_xlabel(series["title"])
                axes.set_ylabel(what)
                axes.legend(frameon=False, fontsize=8)
            low, high = right.get_ylim()
            right.set_ylim(min(low, 10), max(high, 1000))  # or noise would fill the axis of what is flat
            left.set_title(f"growth with {series['title']}")
