"""Draws time and memory of every contender, in the look of attrfast's own pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrfast import pictures as look

_ACCENT = "#b2182b"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws what `passes.json` holds.

    Args:
        results: by network, as `benchmarks.passes.measure` gives them.
        path: file to write.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    apart = {"figure.constrained_layout.hspace": 0.08, "figure.constrained_layout.wspace": 0.06}
    with matplotlib.rc_context(look._STYLE | apart):
        figure = Figure(figsize=(10.5, 3.5 * len(results)))
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(results), 2, squeeze=False)
        for (left, right), result in zip(grid, results.values(), strict=True):
            rows = result["contenders"]
            floor = rows["floor"]["seconds"]
            times = {name: row["seconds"] for name, row in rows.items() if name != "floor"}
            _bars(left, times, "{:.2f} s")
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
            _bars(right, sizes, "{:.0f} MB")
            right.set_xlabel("peak memory over model and data (MB)")
        figure.savefig(path)


def _bars(axes: Any, values: dict[str, float], text: str) -> None:
    names = list(values)
    colours = [look._KEPT if name.startswith("attrfast") else look._GONE for name in names]
    axes.barh(range(len(names)), list(values.values()), color=colours, height=0.72)
    for row, value in enumerate(values.values()):
        axes.annotate(
            text.format(value),
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=look._MUTED,
            bbox=look._BLANK,
        )
    axes.set_yticks(range(len(names)), names, fontsize=8, color=look._INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(values.values(), default=1.0))
    axes.grid(visible=False, axis="y")
