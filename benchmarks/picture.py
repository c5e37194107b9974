"""Draws time and memory of every contender in every case, in the look of attrfast's own pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrfast import canvas
from benchmarks import passes

_ACCENT = "#b2182b"
# Shape, colour and size of every contender's mark; in the order in which they are drawn.
_MARKS = {
    "inference": ("|", canvas.MUTED, 60),
    "bare": ("D", "#9aa5b1", 24),
    "hooks": ("s", "#52606d", 26),
    "signed_batch": ("v", "#9aa5b1", 30),
    "torch_pruning": ("^", "#5aae61", 32),
    "captum": ("P", "#e08214", 40),
    "attrfast (call tier)": ("o", "#92c5de", 36),
    "attrfast": ("o", canvas.KEPT, 60),
}


@contextmanager
def new_figure(rows: int, path: Path) -> Iterator[Any]:
    """A grid of `rows` times two axes to draw on, written to `path` at the end."""
    with canvas.figure_for(path, 10.5, 3.5 * rows) as figure:
        figure.get_layout_engine().set(hspace=0.08, wspace=0.06)
        yield figure.subplots(rows, 2, squeeze=False)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws what `passes.json` holds, a row a case: time beside the floor's, memory beside the hooks'.

    Args:
        results: by case, as `benchmarks.passes.measure` gives them.
        path: file to write.
    """
    cases = list(results.values())
    names = [name for name in _MARKS if any(name in case["contenders"] for case in cases)]
    with canvas.figure_for(path, 11, 1.7 + 0.42 * len(cases)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
        for name in names:
            for axes, ratio in ((left, _of_floor), (right, _of_hooks)):
                found = [(ratio(case["contenders"], name), row) for row, case in enumerate(cases)]
                there = [(value, row) for value, row in found if value is not None]
                marker, colour, size = _MARKS[name]
                axes.scatter(
                    [value for value, _ in there],
                    [row for _, row in there],
                    marker=marker,
                    c=colour,
                    s=size,
                    zorder=4 if name == "attrfast" else 3,
                    label=name,
                )
        goals = {(goal.quantity, goal.against): goal.limit for goal in passes.TARGETS}
        _limits(left, "convolution floor", goals["time", "floor"])
        _limits(right, "hooks", goals["memory", "hooks"])
        left.set_xlabel("time of a pass / time of its convolutions alone")
        right.set_xlabel("peak memory of a pass / that of a hook-based script")
        left.set_yticks(range(len(cases)), [_row_name(case) for case in cases], color=canvas.INK)
        left.set_ylim(len(cases) - 0.5, -0.5)
        for axes in (left, right):
            axes.tick_params(axis="y", length=0)
            axes.set_xlim(left=0)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _row_name(case: dict[str, Any]) -> str:
    ours = case["contenders"]["attrfast"]
    size = "" if ours["bytes"] is None else f", {ours['bytes'] / 1e6:.0f} MB"
    return f"{case['label']}\nattrfast: {ours['seconds']:.2f} s{size}"


def _of_floor(rows: dict[str, Any], name: str) -> float | None:
    return passes.time_ratio(rows, name, "floor")[0] if name in rows else None


def _of_hooks(rows: dict[str, Any], name: str) -> float | None:
    return passes.memory_ratio(rows, name, "hooks") if name in rows else None


def _limits(axes: Any, what: str, limit: float) -> None:
    """A line at 1, which is `what`, and one where attrfast's target ends."""
    axes.axvline(1, color=_ACCENT, linewidth=1.4, zorder=2)
    axes.axvline(limit, color=canvas.KEPT, linewidth=1.2, linestyle=":", zorder=2)
    for x, text, colour in ((1, what, _ACCENT), (limit, f"target {limit:g}", canvas.KEPT)):
        axes.annotate(
            text,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 if x == 1 else 14),
            textcoords="offset points",
            ha="center",
            color=colour,
            fontsize=8,
        )


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
