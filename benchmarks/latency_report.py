"""Tables and a picture of what `benchmarks.latency` found."""

from __future__ import annotations

from typing import Any

from attrfast import canvas
from attrfast.measure import in_words
from benchmarks import machine, report
from benchmarks.latency import EPOCHS, ERROR, SMALL_TARGET, SPEEDUP, TARGET, WEIGHTS, error, worst
from benchmarks.report import Sheet

_TITLE = """\
# Pruning to a latency

Written by `python -m benchmarks latency`. [How it works](../../docs/latency.md).
"""
_COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#e08214")


def sheets(results: dict[str, Any]) -> list[Sheet]:
    """One table for each part that was measured."""
    makers = {"predictions": _predictions, "reached": _reached, "accuracy": _accuracy}
    return [make(results[part]) for part, make in makers.items() if part in results]


def _about(found: dict[str, Any]) -> str:
    return machine.one_line(next(iter(found.values()))["machine"])


def _predictions(found: dict[str, Any]) -> Sheet:
    told = "; ".join(
        f"{case}: {worst(result['rows']):.1%} ({'met' if worst(result['rows']) <= ERROR else 'missed'}), "
        f"blocks of {result['block']}"
        for case, result in found.items()
    )
    sheet = Sheet(
        "Predicted and measured",
        ["", "kept", "predicted", "measured", "off by"],
        [
            f"The layers are timed once; then a pass of the real model is measured beside the original. "
            f"Largest error, at most {ERROR:.0%} asked: {told}.",
            _about(found),
        ],
    )
    for case, result in found.items():
        for row in result["rows"]:
            sheet.rows.append(
                [
                    case,
                    row["kept"],
                    in_words(row["predicted"]),
                    in_words(row["seconds"]),
                    f"{error(row):+.1%}",
                ]
            )
    return sheet


def _reached(found: dict[str, Any]) -> Sheet:
    sheet = Sheet(
        f"Pruned to {TARGET}, and to the same multiply-adds without a latency",
        ["", "multiply-adds", "original", "`max_latency`", "faster", "`max_macs`", "faster", "asked"],
        [
            "Random weights, ranked by `l1`; medians, original and pruned in turns, measured once more "
            "after pruning.",
            _about(found),
        ],
    )
    for case, result in found.items():
        timed, counted = result["max_latency"], result["max_macs"]
        verdict = "met" if timed["faster"] >= SPEEDUP else "missed"
        sheet.rows.append(
            [
                case,
                f"{result['macs']:.1%}",
                in_words(timed["before"]),
                in_words(timed["after"]),
                f"{timed['faster']:.2f}",
                in_words(counted["after"]),
                f"{counted['faster']:.2f}",
                f"{SPEEDUP}: {verdict}",
            ]
        )
    return sheet


def _accuracy(found: dict[str, Any]) -> Sheet:
    sheet = Sheet(
        f"Accuracy: pruned to {SMALL_TARGET}, and to the same multiply-adds without a latency",
        [
            *("", "`latency_weight`", "multiply-adds", "top-1 before"),
            *("`max_latency`", "steps", "faster", "`max_macs`", "steps", "faster"),
        ],
        [
            f"Fashion-MNIST, 4,000 training images, 10,000 test images; {EPOCHS} epochs of fine-tuning in "
            "each way: one after every step, the others at the end. 32 images a pass, one thread. "
            + _differences(found),
            _about(found),
        ],
    )
    for name, result in found.items():
        for row in result["rows"]:
            sheet.rows.append(
                [
                    name,
                    f"{row['weight']:g}",
                    f"{row['macs']:.1%}",
                    f"{result['before']:.2%}",
                    f"{row['max_latency top1']:.2%}",
                    f"{row['max_latency steps']}",
                    f"{row['max_latency faster']:.2f}",
                    f"{row['max_macs top1']:.2%}",
                    f"{row['max_macs steps']}",
                    f"{row['max_macs faster']:.2f}",
                ]
            )
    return sheet


def _differences(found: dict[str, Any]) -> str:
    told = []
    for weight in WEIGHTS:
        each = [
            100 * (row["max_latency top1"] - row["max_macs top1"])
            for result in found.values()
            for row in result["rows"]
            if row["weight"] == weight
        ]
        mean = sum(each) / len(each)
        told.append(f"{mean:+.2f} points with weight {weight:g} ({min(each):+.2f} to {max(each):+.2f})")
    return f"Top-1 against that of the same multiply-adds: {' and '.join(told)}."


def publish(results: dict[str, Any]) -> None:
    """Writes the tables and the picture of what there is."""
    if "predictions" in results:
        _draw(results["predictions"])
    report.write_markdown(
        sheets(results), "latency.md", _TITLE, "latency.png", "predicted against measured latency"
    )


def _draw(found: dict[str, Any]) -> None:
    with canvas.axes_for(report.RESULTS / "latency.png", 6.4, 5.6) as axes:
        ends = [
            row[name] * 1e3
            for r in found.values()
            for row in r["rows"]
            for name in ("seconds", "predicted")
        ]
        low, high = min(ends) / 1.5, max(ends) * 1.5
        axes.plot([low, high], [low, high], color=canvas.MUTED, linewidth=1)
        axes.fill_between(
            [low, high],
            [low * (1 - ERROR), high * (1 - ERROR)],
            [low * (1 + ERROR), high * (1 + ERROR)],
            color=canvas.GONE,
            alpha=0.6,
            linewidth=0,
            label=f"within {ERROR:.0%}",
        )
        for colour, (case, result) in zip(_COLOURS, found.items(), strict=False):
            axes.scatter(
                [row["seconds"] * 1e3 for row in result["rows"]],
                [row["predicted"] * 1e3 for row in result["rows"]],
                s=26,
                color=colour,
                label=case,
                zorder=3,
            )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.set_xlabel("measured (ms)")
        axes.set_ylabel("predicted from the table (ms)")
        axes.set_title("One pass of pruned models")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
