"""A comparison as pictures: accuracy against multiply-adds, one small panel a method.

With many methods one set of axes is a tangle; here every panel shows its method in colour, with the
spread over seeds, before all others in grey. A second picture has the methods in their order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attrfast.canvas import INK, KEPT, MUTED, figure_for
from attrfast.compare.comparison import Comparison, Spread
from attrfast.compare.records import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_GREY, _BAND = "#cbd2d9", "#c7d9ea"


@dataclass(frozen=True)
class Curve:
    """Accuracy against size: share of the multiply-adds left in percent, and top-1 in percent."""

    share: tuple[float, ...]
    top1: tuple[Spread, ...]

    @property
    def band(self) -> tuple[list[float], list[float]]:
        """Mean less and plus the standard deviation (the mean itself for a single seed)."""
        spreads = [0.0 if math.isnan(point.std) else point.std for point in self.top1]
        low = [point.mean - std for point, std in zip(self.top1, spreads, strict=True)]
        high = [point.mean + std for point, std in zip(self.top1, spreads, strict=True)]
        return low, high


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Draws, for every network, what was reached (test set) and the way there (validation set)."""
    files = []
    for network in comparison.networks:
        stem = re.sub(r"[^\w.+-]+", "-", network)
        for name, curves, title in (
            ("curves", reached(comparison, network), "test images, after fine-tuning at each budget"),
            (
                "ways",
                ways(comparison, network),
                "validation images, after every step of the longest run",
            ),
        ):
            if curves:
                path = folder / f"{name}-{stem}.png"
                panels(curves, f"{network}: {title}", path)
                files.append(path)
        if comparison.rows(network)[1:]:
            files.append(folder / f"order-{stem}.png")
            order(comparison, network, files[-1])
    return files


def reached(comparison: Comparison, network: str) -> dict[str, Curve]:
    """Method -> the whole network and one point a budget, on the test set."""
    rows = comparison.rows(network)
    found = {}
    for method in comparison.methods:
        mine = [row for row in rows if row.method == method]
        if mine:
            shares = (100.0, *(100 - row.macs_pruned.mean for row in mine))
            found[method] = Curve(shares, (rows[0].top1, *(row.top1 for row in mine)))
    return found


def ways(comparison: Comparison, network: str) -> dict[str, Curve]:
    """Method -> the mean of the seeds' histories at the smallest budget, on the validation set.

    Seeds differ in where their steps end; each history is interpolated at the steps of all of them, as
    far as all of them go.
    """
    found = {}
    for method in comparison.methods:
        for budget in reversed(comparison.budgets):
            cells = comparison.of(network, method, budget)
            if cells:
                if any(len(cell.history) > 2 for cell in cells):  # one step is no way
                    found[method] = _mean_way(cells)
                break
    return found


def _mean_way(cells: Sequence[Cell]) -> Curve:
    ways = []
    for cell in cells:
        share = np.array([100 * row.macs / cell.history[0].macs for row in cell.history])
        top1 = np.array([100 * row.top1 for row in cell.history])
        ways.append((share[::-1], top1[::-1]))  # numpy interpolates from left to right
    end = max(share[0] for share, _ in ways)
    places = sorted({float(s) for share, _ in ways for s in share if s >= end}, reverse=True)
    values = np.array([np.interp(places, share, top1) for share, top1 in ways])
    return Curve(tuple(places), tuple(Spread.of(column.tolist()) for column in values.T))


def panels(curves: Mapping[str, Curve], title: str, path: Path) -> None:
    """Draws one panel a method; all have the same axes.

    Raises:
        BackendError: matplotlib is not installed.
    """
    columns = min(_COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    with figure_for(path, max(4.8, 2.7 * columns), 0.9 + 2.1 * rows) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for ax, method in zip(axes, curves, strict=False):
            _panel(ax, curves, method)
        for ax in axes[len(curves) :]:
            ax.set_axis_off()
        # Above an empty place of the last row, the axis belongs to the panel over it.
        for ax in axes[max(0, len(curves) - columns) : len(curves)]:
            ax.tick_params(labelbottom=True)
        _scale(axes[0], curves)
        figure.supxlabel(
            "multiply-adds left (% of the whole network)\n"
            "grey: the other methods; band: one standard deviation over seeds each way",
            fontsize=9,
            color=INK,
        )
        figure.supylabel("top-1 accuracy (%)", fontsize=10, color=INK)


def order(comparison: Comparison, network: str, path: Path) -> None:
    """Draws the methods in the order of their accuracy on the test set, one panel a budget.

    Raises:
        BackendError: matplotlib is not installed.
    """
    whole, *rows = comparison.rows(network)
    by_budget = {
        budget: sorted((r for r in rows if r.budget == budget), key=lambda r: r.top1.mean)
        for budget in comparison.budgets
    }
    shown = {budget: mine for budget, mine in by_budget.items() if mine}
    longest = max(len(mine) for mine in shown.values())
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    size = max(5.6, 0.8 + 3.3 * columns), 1.0 + lines * (0.5 + 0.24 * longest)
    with figure_for(path, *size) as figure:
        title = f"{network}: test images, best method first"
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        axes = figure.subplots(lines, columns, sharex=True, squeeze=False).flatten()
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        for ax in axes[len(shown) - columns : len(shown)]:
            ax.tick_params(labelbottom=True)
        for ax, (budget, mine) in zip(axes, shown.items(), strict=False):
            ax.axvline(whole.top1.mean, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            ax.errorbar(
                [row.top1.mean for row in mine],
                range(longest - len(mine), longest),
                xerr=[0.0 if math.isnan(row.top1.std) else row.top1.std for row in mine],
                fmt="o",
                color=KEPT,
                ecolor=_BAND,
                elinewidth=4,
                markersize=4.5,
            )
            names = [str(row.method) for row in mine]
            ax.set_yticks(range(longest - len(mine), longest), names, fontsize=8.5, color=INK)
            ax.set_ylim(-0.7, longest - 0.3)
            ax.tick_params(axis="y", length=0)
            ax.set_title(f"{100 * budget:g}% of the multiply-adds", fontsize=10)
        figure.supxlabel(
            "top-1 accuracy (%); bar: one standard deviation over seeds each way; dashed: whole network",
            fontsize=9,
            color=INK,
        )


def _panel(ax: Axes, curves: Mapping[str, Curve], method: str) -> None:
    for other, curve in curves.items():
        if other != method:
            ax.plot(curve.share, [p.mean for p in curve.top1], color=_GREY, linewidth=0.8, zorder=1)
    mine = curves[method]
    means = [point.mean for point in mine.top1]
    ax.fill_between(mine.share, *mine.band, color=KEPT, alpha=0.22, linewidth=0, zorder=2)
    size = 3.5 if len(means) <= 8 else 2.0
    ax.plot(mine.share, means, color=KEPT, linewidth=1.6, marker="o", markersize=size, zorder=3)
    last = mine.top1[-1]
    spread = "" if math.isnan(last.std) else f" ± {last.std:.1f}"
    ax.set_title(method, fontsize=10, color=INK)
    ax.text(
        1.0,
        1.02,
        f"{last.mean:.1f}{spread} at {mine.share[-1]:.3g}%",
        transform=ax.transAxes,
        ha="right",
        va="bottom",
        fontsize=7.5,
        color=MUTED,
    )


def _scale(ax: Axes, curves: Mapping[str, Curve]) -> None:
    """Shared limits: from the whole network rightwards, by factors where that goes far."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    least = min(min(curve.share) for curve in curves.values())
    if least < 20:
        ax.set_xscale("log")
        marks = [t for t in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if t >= 0.8 * least]
        ax.xaxis.set_major_locator(FixedLocator(marks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xlim(110, 0.85 * least)
    else:
        ax.set_xlim(103, least - 0.05 * (100 - least))
    low = min(min(curve.band[0]) for curve in curves.values())
    high = max(max(curve.band[1]) for curve in curves.values())
    margin = max(0.06 * (high - low), 0.5)
    ax.set_ylim(max(0.0, low - margin), min(100.0 + margin, high + margin))
