"""Draws what `benchmarks.gpu` measured: bandwidth of the kernels, time and memory of passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kernels import COPY
from benchmarks.picture import bars, new_figure


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the largest tensor's kernels, and the smallest batch's passes of every network, in fp32."""
    kernels = [row for row in result["kernels"] if row["dtype"] == "fp32"]
    largest = max((row["bytes"] for row in kernels), default=0)
    shape = next((row["shape"] for row in kernels if row["bytes"] == largest), None)
    shown = [row for row in kernels if row["shape"] == shape]
    smallest: dict[str, dict[str, Any]] = {}
    for one in result["passes"]:
        if one["dtype"] == "fp32":
            smallest.setdefault(one["network"], one)
    with new_figure(len(smallest) + bool(shown), path) as grid:
        for (left, right), (name, one) in zip(grid, smallest.items(), strict=False):
            rows = one["contenders"]
            bars(left, {key: 1000 * row["seconds"] for key, row in rows.items()}, "{:.1f} ms")
            left.set_title(f"{name}, {one['samples']} images a batch, fp32", pad=18)
            left.set_xlabel("time of one pass of 4 batches (ms)")
            sizes = {key: row["bytes"] / 1e6 for key, row in rows.items() if row["bytes"]}
            bars(right, sizes, "{:.0f} MB")
            right.set_xlabel("peak memory over model and data (MB)")
        for axes, layout in zip(grid[-1], ("contiguous", "channels_last"), strict=True) if shown else ():
            of_copy: dict[str, float] = {}
            for row in shown:
                if row["format"] == layout:
                    taken = row["seconds"]
                    best = min(t for name, t in taken.items() if name.startswith("attrfast"))
                    of_copy[f"attrfast: {row['op']}"] = 100 * taken[COPY] / best
            bars(axes, of_copy, "{:.0f}%")
            axes.set_title(f"kernels on {'×'.join(map(str, shape or ()))}, {layout}, fp32", pad=18)
            axes.set_xlabel("bandwidth, as a share of a copy's (%)")
