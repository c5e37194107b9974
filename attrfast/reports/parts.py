"""What the parts of the page show: places in percent, texts and small images, out of a run's figures.

Must not know the page's markup.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from attrfast.history import Step
from attrfast.map_pictures import HEAT, shown_image
from attrfast.reports.gathered import Gathered
from attrfast.runs.phases import Phase


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page."""

    label: str
    value: str
    detail: str


def tiles(found: Gathered) -> list[Tile]:
    """Accuracy and size in a few words."""
    first, last = found.history[0], found.history[-1]
    out = []
    tested = [row for row in found.figures.classes if "after" in row]
    if tested:
        images = sum(row["images"] for row in tested)
        before, after = (sum(row[key] for row in tested) / images for key in ("before", "after"))
        out.append(_accuracy("top-1 on test images", before, after))
    elif not math.isnan(last.top1):
        out.append(_accuracy("top-1 on validation images", first.top1, last.top1))
    for label, before, after in (
        ("multiply-adds left", first.macs, last.macs),
        ("parameters left", first.params, last.params),
        ("filters left", first.filters, last.filters),
    ):
        out.append(Tile(label, f"{after / before:.1%}", f"{amount(after)} of {amount(before)}"))
    return out


def _accuracy(label: str, before: float, after: float) -> Tile:
    change = 100 * (after - before)
    return Tile(label, f"{after:.2%}", f"{before:.2%} before ({signed(change)} points)")


def signed(change: float) -> str:
    """With a sign that is as wide as a digit."""
    return f"{change:+.2f}".replace("-", "−")


def amount(count: float) -> str:
    """Three digits and a unit."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


@dataclass(frozen=True)
class Curve:
    """Accuracy against size; places in percent of the plot, from its lower left corner.

    Attributes:
        points: x, y and a text for each step.
        line: the points as an SVG path in a box of 100 x 100.
        x_ticks, y_ticks: place and text.
    """

    points: list[tuple[float, float, str]]
    line: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    summary: str


def curve(history: Sequence[Step]) -> Curve | None:
    """None for a model that does not classify."""
    if any(math.isnan(row.top1) for row in history):
        return None
    share = [100 * row.macs / history[0].macs for row in history]
    top1 = [100 * row.top1 for row in history]
    left = max(0.0, 10 * math.floor((min(share) - 5) / 10))
    # At least two points of accuracy, so that a few images more or less don't look like a fall.
    high = min(100.0, max(top1) + max(0.0, 2 - (max(top1) - min(top1))) / 2)
    y_step = _step(max(high - min(top1), 2.0))
    low = max(0.0, y_step * math.floor(min(min(top1), high - 2) / y_step))
    high = min(100.0, y_step * math.ceil(high / y_step))

    def x(value: float) -> float:
        return 100 * (100 - value) / (100 - left)

    def y(value: float) -> float:
        return 100 * (value - low) / (high - low)

    points = [
        (x(s), y(t), f"step {row.step}: {t:.2f}% at {s:.1f}% of the multiply-adds")
        for row, s, t in zip(history, share, top1, strict=True)
    ]
    line = "M" + "L".join(f"{a:.2f} {100 - b:.2f}" for a, b, _ in points)
    x_step = _step(100 - left)
    x_ticks = [(x(100 - v), f"{100 - v:g}%") for v in _ticks(0, 100 - left, x_step)]
    y_ticks = [(y(v), f"{v:g}%") for v in _ticks(low, high, y_step)]
    summary = (
        f"Top-1 on validation images against multiply-adds left, over {len(history) - 1} steps: from "
        f"{top1[0]:.2f}% to {top1[-1]:.2f}% at {share[-1]:.1f}%"
    )
    return Curve(points, line, x_ticks, y_ticks, summary)


def _step(span: float) -> float:
    """A round number that divides a span into at most five."""
    raw = max(span, 0.5) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw * 0.999)


def _ticks(low: float, high: float, step: float) -> list[float]:
    count = math.floor((high - low) / step + 1e-6)
    return [low + i * step for i in range(count + 1)]


@dataclass(frozen=True)
class Width:
    """Filters of a convolution, and how wide its bars are in percent of the widest."""

    name: str
    before: int
    after: int
    whole: float
    kept: float


def widths(gates: dict[str, torch.Tensor]) -> list[Width]:
    """Every convolution, in the model's order."""
    most = max((gate.numel() for gate in gates.values()), default=1)
    return [
        Width(name, len(g), int(g.sum()), 100 * len(g) / most, 100 * int(g.sum()) / most)
        for name, g in gates.items()
    ]


@dataclass(frozen=True)
class Strip:
    """The scores of a convolution as strokes in a box of 1000 x 10; filters that went, and that stayed."""

    name: str
    kept: str
    gone: str
    median: float
    summary: str


def strips(found: Gathered) -> dict[str, Any] | None:
    """Scores of the original's filters, on one scale; None where there are none."""
    if found.scores is None:
        return None
    filters: dict[str, list[float]] = found.scores["filters"]
    values = torch.tensor([v for row in filters.values() for v in row], dtype=torch.float64)
    positive = values[values > 0]
    if len(positive) == 0:
        return None
    low, high = float(positive.quantile(0.002)), float(values.max())
    logarithmic = bool((values >= 0).all()) and high > 30 * low
    if not logarithmic:
        low = min(0.0, float(values.min()))

    def place(value: float) -> float:
        if not logarithmic:
            return 1000 * (value - low) / ((high - low) or 1.0)
        if value <= low:
            return 0.0
        return 1000 * math.log(value / low) / math.log(high / low)

    rows = []
    for name, row in filters.items():
        gate = found.gates.get(name, torch.ones(len(row), dtype=torch.bool)).tolist()
        if len(gate) != len(row):  # the scores of another network
            return None
        strokes = {
            kept: "".join(f"M{place(v):.0f} 0V10" for v, g in zip(row, gate, strict=True) if g is kept)
            for kept in (True, False)
        }
        middle = sorted(row)[len(row) // 2]
        rows.append(
            Strip(
                name,
                strokes[True],
                strokes[False],
                place(middle) / 10,
                f"{name}: {len(row)} filters, scores from {min(row):.3g} to {max(row):.3g}, median "
                f"{middle:.3g}",
            )
        )
    return {
        "rows": rows,
        "low": f"{low:.2g}",
        "high": f"{high:.2g}",
        "logarithmic": logarithmic,
        "normalize": found.scores["normalize"],
        "samples": found.scores["samples"],
    }


def drawable_scores(scores: dict[str, Any] | None) -> Any:
    """The stored scores as `pictures.score_distributions` reads them; None where there are none."""
    if scores is None or not any(v > 0 for row in scores["layers"] for v in row["raw"]):
        return None
    layers, start = [], 0
    for row in scores["layers"]:
        layers.append(SimpleNamespace(name=row["name"], units=range(start, start + len(row["raw"]))))
        start += len(row["raw"])
    raw, importance = (
        torch.tensor([v for row in scores["layers"] for v in row[key]], dtype=torch.float64)
        for key in ("raw", "importance")
    )
    return SimpleNamespace(
        units=SimpleNamespace(layers=layers),
        raw=raw,
        importance=importance,
        criterion=scores["criterion"],
        normalize=scores["normalize"],
    )


@dataclass(frozen=True)
class ClassRow:
    """Accuracy of a class in percent; `after` is None for a run that is not done."""

    name: str
    images: int
    before: float
    after: float | None

    @property
    def change(self) -> str:
        return "" if self.after is None else signed(self.after - self.before)


def classes(rows: Sequence[dict[str, Any]]) -> list[ClassRow]:
    """Every class of the test set."""
    return [
        ClassRow(
            str(row["name"]),
            row["images"],
            100 * row["before"] / row["images"],
            100 * row["after"] / row["images"] if "after" in row else None,
        )
        for row in rows
    ]


def maps(found: Gathered) -> list[dict[str, Any]]:
    """Extreme filters of some layers: number, score, whether it is left, and its map as an image."""
    if found.maps is None:
        return []
    out = []
    for seen in found.maps.layers:
        most = max(float(m.max()) for m in seen.maps.values()) or 1.0
        gate = found.gates.get(seen.layer)

        def shown(indices: Sequence[int], seen: Any = seen, most: float = most, gate: Any = gate) -> Any:
            return [
                {
                    "index": index,
                    "score": f"{float(seen.scores[index]):.3g}",
                    "kept": gate is None or bool(gate[index]),
                    "uri": _heat_uri(seen.maps[index] / most),
                }
                for index in indices
            ]

        rows = [("most important", shown(seen.highest)), ("least important", shown(seen.lowest))]
        out.append({"layer": seen.layer, "rows": rows})
    return out


def image_uri(image: torch.Tensor) -> str:
    """(C, H, W) as a PNG inside an address."""
    return _png_uri(shown_image(image).numpy())


def _heat_uri(heat: torch.Tensor) -> str:
    """(H, W) from 0 to 1, in the colours that all maps have."""
    import matplotlib

    return _png_uri(matplotlib.colormaps[HEAT](heat.numpy())[..., :3])


def _png_uri(pixels: Any) -> str:
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, pixels.clip(0, 1), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True)
class Spent:
    """A row of the table of time and memory, its bar in percent of the longest."""

    name: str
    time: str
    memory: str
    bar: float


def spent(found: Gathered) -> list[Spent]:
    """The seconds of all steps, by what they went into."""
    parts = (
        ("scoring filters", "seconds_scoring"),
        ("cutting", "seconds_cutting"),
        ("fine-tuning", "seconds_tuning"),
    )
    seconds = {name: sum(getattr(row, key) for row in found.history) for name, key in parts}
    return _rows([Phase(name, value, 0) for name, value in seconds.items()])


def phases(rows: Sequence[Phase]) -> list[Spent]:
    """The parts of the whole run."""
    return _rows(rows)


def _rows(rows: Sequence[Phase]) -> list[Spent]:
    most = max((row.seconds for row in rows), default=0) or 1.0
    return [
        Spent(row.name, _duration(row.seconds), _bytes(row.memory), 100 * row.seconds / most)
        for row in rows
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _bytes(count: int) -> str:
    return "" if count == 0 else f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
