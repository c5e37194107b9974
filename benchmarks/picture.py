"""Draws time and memory of every contender, in the look of attrfast's own pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrfast import canvas

_ACCENT = "#b2182b"


@contextmanager
def new_figure(rows: int, path: Path) -> Iterator[Any]:
    """A grid of `rows` times two axes to draw on, written to `path` at the end."""
    with canvas.figure_for(path, 10.5, 3.5 * rows) as figure:
        figure.get_layout_engine().set(hspace=0.08, wspace=0.06)
        yield figure.subplots(rows, 2, squeeze=False)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws what `passes.json` holds.

    Args:
        results: by network, as `benchmarks.passes.measure` gives them.
        path: file to write.
    """
    with new_figure(len(results), path) as grid:
        for (left, right), result in zip(grid, results.values(), strict=True):
            rows = result["contenders"]
            floor = rows["floor"]["seconds"]
            times = {name: row["seconds"] for name, row in rows.items() if name != "floor"}
            bars(left, times, "{:.2f} s")
            left.axvline(floor, color=_ACCENT, linewidth=1.4)
            left.annotate(
                f"floor {floor:.2f} s",
                (floor, -0.5),
                xytext=(4, 5),
                textcoords="offset points",
                color=_ACCENT,
                fontsize=8,
            )
            left.set_title(result["label"], pad=18)
            left.set_xlabel("time of one pass of 4 batches (s)")
            sizes = {name: row["bytes"] / 1e6 for name, row in rows.items() if row["bytes"] is not None}
            bars(right, sizes, "{:.0f} MB")
            right.set_xlabel("peak memory over model and data (MB)")


def bars(axes: Any, values: dict[str, float], text: str) -> None:
    """Horizontal bars with their values beside them; attrfast's stand out."""
    names = list(values)
    colours = [canvas.KEPT if name.startswith("attrfast") else canvas.GONE for name in names]
    axes.barh(range(len(names)), list(values.values()), color=colours, height=0.72)
    for row, value in enumerate(values.values()):
        axes.annotate(
            text.format(value),
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=canvas.MUTED,
            bbox=canvas.BLANK,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8, color=canvas.INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(values.values(), default=1.0))
    axes.grid(visible=False, axis="y")
