"""Pictures of a pruning run, written as files. Knows results, and nothing of how they came about.

matplotlib is imported when a picture is drawn, and never opens a window.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from attrfast.errors import BackendError, InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Path = str | os.PathLike[str]

_INK, _MUTED, _RULE = "#1f2933", "#7b8794", "#e4e7eb"
_KEPT, _GONE = "#2166ac", "#d5dde5"
_BLANK: Final = {
    "facecolor": "white",
    "edgecolor": "none",
    "pad": 1.0,
}  # hides the grid behind text
_STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


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
    with _axes(path, 7.2, 4.2) as axes:
        axes.plot(share, top1, color=_KEPT, linewidth=1.6, marker="o", markersize=4)
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
                color=_INK,
                bbox=_BLANK,
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
    with _axes(path, 7.2, 1.3 + 0.26 * len(names)) as axes:
        rows = range(len(names))
        axes.barh(rows, total, color=_GONE, height=0.72, label="removed")
        axes.barh(rows, kept, color=_KEPT, height=0.72, label="kept")
        for row, (left, whole) in enumerate(zip(kept, total, strict=True)):
            axes.annotate(
                f"{left} of {whole}",
                (whole, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_MUTED,
                bbox=_BLANK,
            )
        axes.set_yticks(rows, names, fontsize=8, color=_INK)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(total))
        axes.grid(visible=False, axis="y")
        axes.set_title(f"Filters kept: {sum(kept):,} of {sum(total):,}", pad=26)
        axes.set_xlabel("filters")
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=2,
            frameon=False,
            reverse=True,
            handlelength=1.0,
        )


@contextmanager
def _axes(path: Path, width: float, height: float) -> Iterator[Axes]:
    """One set of axes of a figure of `width` x `height` inches, saved to `path` on leaving."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError(
            f"pictures need matplotlib, which could not be imported ({error}); "
            f'pip install "attrfast[data]"'
        ) from error
    # A figure without pyplot: no global state, and no window system.
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure.add_subplot()
        figure.savefig(path)
