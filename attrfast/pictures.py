"""Pictures, written as files: of a pruning run, of scores, and of what attribution sees.

What is drawn here comes from results alone; `attrfast.map_pictures` runs the model for its pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from attrfast.canvas import BLANK, GONE, INK, KEPT, MUTED, Path, axes_for, figure_for
from attrfast.errors import InputError
from attrfast.map_pictures import attribution_map, filter_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "attribution_map",
    "class_accuracy",
    "filter_maps",
    "kept_filters",
    "score_distributions",
    "time_and_memory",
    "trade_off",
]


class Row(Protocol):
    """What `trade_off` reads of a row of `PruneResult.history`."""

    @property
    def macs(self) -> float: ...
    @property
    def top1(self) -> float: ...


class Result(Protocol):
    """What `kept_filters` reads of a `PruneResult`."""

    @property
    def gates(self) -> Mapping[str, torch.Tensor]: ...


class LayerScores(Protocol):
    """What `score_distributions` reads of `Scores`; of its units the names and members of the layers."""

    @property
    def raw(self) -> torch.Tensor: ...
    @property
    def importance(self) -> torch.Tensor: ...
    @property
    def criterion(self) -> str: ...
    @property
    def normalize(self) -> str | None: ...
    @property
    def units(self) -> Any: ...


class OfClass(Protocol):
    """What `class_accuracy` reads of a class, in percent; `after` may be missing (None)."""

    @property
    def name(self) -> str: ...
    @property
    def before(self) -> float: ...
    @property
    def after(self) -> float | None: ...


class Spent(Protocol):
    """What `time_and_memory` reads of a part of a run: seconds and bytes."""

    @property
    def name(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def memory(self) -> int: ...


def trade_off(history: Sequence[Row], path: Path) -> None:
    """Draws accuracy against multiply-adds, one point a step, from the whole model rightwards.

    Args:
        history: rows of `PruneResult.history`; the first gives the 100%.
        path: file to write; its ending (.png, .svg, .pdf) gives the format.

    Raises:
        InputError: the history is empty or its first row has no multiply-adds.
        BackendError: matplotlib is not installed.
    """
    if not history or history[0].macs <= 0:
        raise InputError("the history has no first row with multiply-adds, so there is nothing to draw")
    share = [100 * row.macs / history[0].macs for row in history]
    top1 = [100 * row.top1 for row in history]
    with axes_for(path, 7.2, 4.2) as axes:
        axes.plot(share, top1, color=KEPT, linewidth=1.6, marker="o", markersize=4)
        axes.invert_xaxis()
        axes.set_title("Accuracy while filters are removed")
        axes.set_xlabel("multiply-adds left (% of the whole model)")
        axes.set_ylabel("top-1 accuracy (%)")
        low, high = min(top1), max(top1)
        margin = max(0.15 * (high - low), 1.0)
        axes.set_ylim(max(0.0, low - margin), high + margin)
        axes.set_yticks([tick for tick in axes.get_yticks() if low - margin <= tick <= 100])
        # Above the first point and below the last: the curve seldom passes there.
        for index, shift in ((0, (0, 8)), (-1, (0, -16))):
            axes.annotate(
                f"{top1[index]:.1f}% at {share[index]:.0f}%",
                (share[index], top1[index]),
                xytext=shift,
                textcoords="offset points",
                ha="left" if index == 0 else "right",
                color=INK,
                bbox=BLANK,
            )


def kept_filters(result: Result, path: Path) -> None:
    """Draws how many filters every convolution keeps, one bar a convolution in the model's order.

    Args:
        result: a `PruneResult`.
        path: file to write; its ending (.png, .svg, .pdf) gives the format.

    Raises:
        InputError: the result has no convolution.
        BackendError: matplotlib is not installed.
    """
    if not result.gates:
        raise InputError("the result has no gates, so there is nothing to draw")
    names = list(result.gates)
    total = [gate.numel() for gate in result.gates.values()]
    kept = [int(gate.sum()) for gate in result.gates.values()]
    with axes_for(path, 7.2, 1.3 + 0.26 * len(names)) as axes:
        rows = range(len(names))
        axes.barh(rows, total, color=GONE, height=0.72, label="removed")
        axes.barh(rows, kept, color=KEPT, height=0.72, label="kept")
        for row, (left, whole) in enumerate(zip(kept, total, strict=True)):
            _beside(axes, whole, row, f"{left} of {whole}")
        _name_rows(axes, names)
        axes.set_xlim(0, 1.12 * max(total))
        axes.grid(visible=False, axis="y")
        axes.set_title(f"Filters kept: {sum(kept):,} of {sum(total):,}", pad=26)
        axes.set_xlabel("filters")
        _legend(axes, reverse=True)


def score_distributions(scores: LayerScores, path: Path) -> None:
    """Draws the scores of every layer before and after normalisation, one dot a unit.

    On the left as they were measured, on the right as filters of all layers are compared. A line marks each
    layer's median. Scores that differ much have a logarithmic axis; how many are zero stands at its edge.

    Args:
        scores: what `attribute` gave.
        path: file to write; its ending (.png, .svg, .pdf) gives the format.

    Raises:
        InputError: no score is above zero.
        BackendError: matplotlib is not installed.
    """
    if not bool((scores.raw > 0).any()):
        raise InputError("no score is above zero, so there is nothing to draw")
    layers = scores.units.layers
    with figure_for(path, 9.6, 1.5 + 0.24 * len(layers)) as figure:
        before, after = figure.subplots(1, 2, sharey=True)
        positive = scores.raw[scores.raw > 0]
        if bool((scores.raw >= 0).all()) and float(positive.max()) > 30 * float(positive.min()):
            before.set_xscale("log")
        how = {None: "not normalised", "l2": "L2-normalised in each layer"}
        after_title = how.get(scores.normalize, f"over the {scores.normalize} of each layer")
        for axes, values, title in (
            (before, scores.raw, f"{scores.criterion}, as measured"),
            (after, scores.importance, after_title),
        ):
            for row, layer in enumerate(layers):
                _strip(axes, row, values[list(layer.units)])
            axes.set_title(title)
            axes.set_xlabel("score")
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
        _name_rows(before, [layer.name for layer in layers])


def class_accuracy(classes: Sequence[OfClass], path: Path) -> None:
    """Draws top-1 of every class before and after pruning, one line a class.

    Args:
        classes: in the order of the labels.
        path: file to write; its ending (.png, .svg, .pdf) gives the format.

    Raises:
        InputError: there is no class.
        BackendError: matplotlib is not installed.
    """
    if not classes:
        raise InputError("there is no class, so there is nothing to draw")
    rows = range(len(classes))
    before = [row.before for row in classes]
    after = [row.before if row.after is None else row.after for row in classes]
    with axes_for(path, 7.2, 1.5 + 0.26 * len(classes)) as axes:
        axes.hlines(rows, before, after, color=GONE, linewidth=3)
        axes.scatter(before, rows, color=MUTED, s=26, label="before", zorder=3)
        if any(row.after is not None for row in classes):
            axes.scatter(after, rows, color=KEPT, s=26, label="after", zorder=4)
        _name_rows(axes, [row.name for row in classes])
        axes.set_title("Accuracy of every class", pad=26)
        axes.set_xlabel("top-1 on test images (%)")
        _legend(axes)


def time_and_memory(parts: Sequence[Spent], path: Path) -> None:
    """Draws the seconds of every part of a run, with the most memory that it held.

    Args:
        parts: in order.
        path: file to write; its ending (.png, .svg, .pdf) gives the format.

    Raises:
        InputError: there is no part.
        BackendError: matplotlib is not installed.
    """
    if not parts:
        raise InputError("there is no part of the run, so there is nothing to draw")
    rows = range(len(parts))
    with axes_for(path, 7.2, 1.3 + 0.34 * len(parts)) as axes:
        axes.barh(rows, [part.seconds for part in parts], color=KEPT, height=0.6)
        for row, part in enumerate(parts):
            _beside(axes, part.seconds, row, f"{part.seconds:.1f} s, {part.memory / 1e6:,.0f} MB")
        _name_rows(axes, [part.name for part in parts], fontsize=None)
        axes.set_xlim(0, 1.3 * max(part.seconds for part in parts))
        axes.grid(visible=False, axis="y")
        axes.set_title("Time, and the most memory at once")
        axes.set_xlabel("seconds")


def _name_rows(axes: Axes, names: Sequence[str], fontsize: float | None = 8) -> None:
    """Rows from the top down, one a name; None: of the size of other ticks."""
    size: dict[str, Any] = {} if fontsize is None else {"fontsize": fontsize}
    axes.set_yticks(range(len(names)), list(names), color=INK, **size)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _beside(axes: Axes, end: float, row: int, text: str) -> None:
    """A figure behind the end of a row's bar."""
    axes.annotate(
        text,
        (end, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=MUTED,
        bbox=BLANK,
    )


def _legend(axes: Axes, **style: Any) -> None:
    """Between the title and the axes."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2, frameon=False, handlelength=1.0, **style
    )


def _strip(axes: Axes, row: int, values: torch.Tensor) -> None:
    """The scores of one layer as dots in a row, and their median."""
    seen = values[values != 0] if axes.get_xscale() == "log" else values
    # Rasterised, so that a large network's picture stays small in every format.
    style: dict[str, Any] = {"s": 9, "color": KEPT, "alpha": 0.3, "linewidths": 0, "rasterized": True}
    axes.scatter(seen.tolist(), [row] * len(seen), **style)
    middle = float(values.double().median())
    if axes.get_xscale() != "log" or middle > 0:
        axes.plot([middle, middle], [row - 0.36, row + 0.36], color=INK, linewidth=1.4)
    zeros = len(values) - len(seen)
    if zeros:
        axes.annotate(
            f"{zeros} at 0",
            (0, row),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=MUTED,
            bbox=BLANK,
        )
