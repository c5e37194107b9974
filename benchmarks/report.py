"""Results as tables: in the terminal, and as Markdown in `benchmarks/results/README.md`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import confident, kernels, machine, passes, recorder, whole
from benchmarks.quiet import LIMIT

RESULTS = Path(__file__).parent / "results"


@dataclass
class Sheet:
    """One table: a title, what stands above the columns, and rows of text."""

    title: str
    columns: Sequence[str]
    notes: list[str] = field(default_factory=list)
    rows: list[Sequence[str]] = field(default_factory=list)


def read(name: str) -> dict[str, Any]:
    """A result file, or an empty one where there is none yet."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else {}


def write(name: str, content: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def overview_sheet(results: dict[str, Any]) -> Sheet:
    """Whether attrfast's pass holds its targets, case by case."""
    goals = {f"{t.quantity} / {t.against}, at most {t.limit:.2f}": t for t in passes.TARGETS}
    sheet = Sheet(
        "Passes: targets of attrfast",
        ["", "time", "peak memory", *goals],
        ["Each figure is attrfast's, divided by that of another; a target that is missed says so."],
    )
    for result in results.values():
        ours = result["contenders"]["attrfast"]
        found = {(t["quantity"], t["against"]): t for t in result["targets"]}
        cells = []
        for goal in goals.values():
            target = found.get((goal.quantity, goal.against))
            verdict = "" if target is None or target["verdict"] == "held" else f" {target['verdict']}"
            cells.append(f"{_number(target['ratio'])}{verdict}".strip() if target else "")
        size = "" if ours["bytes"] is None else f"{ours['bytes'] / 1e6:.0f} MB"
        sheet.rows.append([result["label"], f"{ours['seconds']:.2f} s", size, *cells])
    return sheet


def pass_sheet(result: dict[str, Any]) -> Sheet:
    """Time and memory of every contender in one case."""
    rows = result["contenders"]
    sheet = Sheet(
        f"{result['label']}: one pass of 4 batches",
        ["", "format", "time", "× floor", "× bare", "× captum", "peak", "× hooks", "× inference"],
        [
            f"{result['rounds']} interleaved rounds, {result['repeats']} repeats of each peak. "
            + _disturbed(result["disturbed"]),
            machine.one_line(result["machine"]),
        ],
    )
    for name, row in rows.items():
        size = row["bytes"]
        sheet.rows.append(
            [
                name,
                row["format"],
                f"{row['seconds']:.2f} s",
                *(
                    _number(passes.time_ratio(rows, name, base)[0])
                    for base in ("floor", "bare", "captum")
                ),
                "" if size is None else f"{size / 1e6:.0f} MB",
                *(_number(passes.memory_ratio(rows, name, base)) for base in ("hooks", "inference")),
            ]
        )
    return sheet


def kernel_sheets(result: dict[str, Any]) -> list[Sheet]:
    """Every kernel beside its peers, and the targets."""
    size = "×".join(map(str, result["shape"]))
    sheet = Sheet(
        f"Kernels on {size}, fp32",
        ["", "format", "attrfast", "× copy", "PyTorch", "", "attrfast / PyTorch"],
        [
            f"{result['rounds']} interleaved rounds. “× copy”: beside a copy of the same bytes. "
            + _disturbed(result["disturbed"]),
            machine.one_line(result["machine"]),
        ],
    )
    for case in result["cases"]:
        seconds, ratios = case["seconds"], case["ratios"]
        start = [
            case["op"],
            case["format"],
            _milli(seconds[kernels.OURS]),
            _number(ratios[kernels.COPY]),
        ]
        for peer in seconds:
            if peer not in (kernels.OURS, kernels.COPY):
                sheet.rows.append([*start, peer, _milli(seconds[peer]), _number(ratios[peer])])
                start = ["", "", "", ""]
    return [sheet, _target_sheet("Kernels: targets of attrfast", result["targets"])]


def recorder_sheet(result: dict[str, Any]) -> Sheet:
    """A training loop with a recorder and without."""
    sheet = Sheet(
        f"{result['label']}: a training loop with ScoreRecorder",
        ["", "loop alone", "recorded", "recorded / alone", "at most", ""],
        [f"{result['rounds']} interleaved rounds.", machine.one_line(result["machine"])],
    )
    for layout, row in result["formats"].items():
        seconds = (f"{row[key]:.2f} s" for key in ("plain_seconds", "recorded_seconds"))
        limit = f"× {recorder.LIMIT:.2f}"
        sheet.rows.append([layout, *seconds, f"{row['ratio']:.3f}", limit, row["verdict"]])
    return sheet


def confident_sheets(results: dict[str, Any]) -> list[Sheet]:
    """What `stop="confident"` reads, and the accuracy after pruning with it; each where it was measured."""
    sheets = []
    if read := results.get("samples"):
        sheets.append(_samples_sheet(read))
    if pruned := results.get("accuracy"):
        sheets.append(_accuracy_sheet(pruned))
    return sheets


def _samples_sheet(results: dict[str, Any]) -> Sheet:
    first = next(iter(results.values()))
    orders = len(first["asked"][0]["orders"])
    sheet = Sheet(
        'Samples that `stop="confident"` reads of Fashion-MNIST',
        ["", "lowest filters", "of", "samples read", "of", "times fewer", "same filters", ""],
        [
            f"{first['criterion']}, confidence 0.95, {orders} random orders of the training set after "
            f"{first['epochs']} epochs of training: mean (range). “Same”: of the chosen, those that all "
            f"samples choose as well; at least {confident.SAME:.0%} and {confident.FEWER:g} times fewer asked.",
            machine.one_line(first["machine"]),
        ],
    )
    for name, found in results.items():
        for asked in found["asked"]:
            read = [row["samples"] for row in asked["orders"]]
            same = [row["same"] for row in asked["orders"]]
            fewer = found["samples"] * len(read) / sum(read)
            good = sum(same) / len(same) >= confident.SAME
            sheet.rows.append(
                [
                    name,
                    f"{asked['lowest']}",
                    f"{found['filters']:,}",
                    f"{sum(read) / len(read):,.0f} ({min(read):,} to {max(read):,})",
                    f"{found['samples']:,}",
                    f"{fewer:.1f}",
                    f"{sum(same) / len(same):.1%} ({min(same):.1%} to {max(same):.1%})",
                    "held" if good and fewer >= confident.FEWER else "missed",
                ]
            )
    return sheet


def _accuracy_sheet(results: dict[str, Any]) -> Sheet:
    first = next(iter(results.values()))
    sheet = Sheet(
        'Pruning Fashion-MNIST networks with `stop="confident"` and with all samples',
        ["", "before", "all samples", "confident", "difference", "samples scored"],
        [
            f"Test top-1 after {first['epochs']} epochs of training, pruning in steps to "
            f"{confident.MACS:.0%} of the multiply-adds and one epoch of fine-tuning; the same seeds for both. "
            f"The last column: of confident, as a share of all.",
            machine.one_line(first["machine"]),
        ],
    )
    for name, found in results.items():
        whole, early = (found["ways"][way] for way in ("everything", "confident"))
        sheet.rows.append(
            [
                name,
                f"{whole['before']:.2%}",
                f"{whole['top1']:.2%}",
                f"{early['top1']:.2%}",
                f"{100 * (early['top1'] - whole['top1']):+.2f} points",
                f"{early['samples'] / whole['samples']:.2f}",
            ]
        )
    return sheet


def whole_sheet(results: dict[str, Any]) -> Sheet:
    """A whole data set scored in three ways, network by network."""
    first = next(iter(results.values()))
    sheet = Sheet(
        f"A whole data set: Fashion-MNIST's {first['samples']:,} training images",
        ["", "epochs before", *first["seconds"], "read", "times faster", "at least", ""],
        [
            f"Medians of {first['rounds']} interleaved rounds; every run reads the samples in a new order, and "
            f'`stop="confident"` runs {first["orders"]} times a round. “Read”: the samples that it reads, '
            f"the least, the median and the most; “times faster”: than hooks over all samples.",
            machine.one_line(first["machine"]),
        ],
    )
    for name, row in results.items():
        seconds = (f"{taken:.1f} s" for taken in row["seconds"].values())
        few, middle, many = min(row["read"]), int(statistics.median(row["read"])), max(row["read"])
        read = f"{few:,} / {middle:,} / {many:,}"
        found = [read, f"{row['faster']:.1f}", f"{whole.FASTER:g}", row["verdict"]]
        sheet.rows.append([name, str(row["epochs"]), *seconds, *found])
    return sheet


def _disturbed(names: list[str]) -> str:
    if not names:
        return f"Other processes used at most {LIMIT:.0%} of the machine during the runs that count."
    return (
        f"Disturbed by other processes in every round, so that the time says little: {', '.join(names)}."
    )


def _target_sheet(title: str, targets: list[dict[str, Any]]) -> Sheet:
    sheet = Sheet(title, ["", "against", "at most", "found", ""])
    for target in targets:
        limit, found = f"× {target['limit']:.2f}", _number(target["ratio"])
        row = [target["quantity"], target["against"], limit, found, target["verdict"]]
        sheet.rows.append(row)
    return sheet


def show(sheets: list[Sheet]) -> None:
    """Prints tables in the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    for sheet in sheets:
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for index, column in enumerate(sheet.columns):
            table.add_column(column, justify="right" if _numeric(sheet, index) else "left")
        for row in sheet.rows:
            table.add_row(*row)
        console.print()
        console.print(table)
        for note in sheet.notes:
            console.print(note, style="dim")


def say(what: str) -> None:
    """Prints a line on what goes on."""
    Console(stderr=True).print(what, style="dim")


LATEST = """\
# Latest figures

Written by `make bench` (`python -m benchmarks`); [what is measured, and how](../README.md). Every ratio is \
the median of ratios within a round (time) or a repeat (memory), so it may differ a little from the ratio of \
the medians beside it.
"""


def write_markdown(
    sheets: list[Sheet],
    name: str = "README.md",
    introduction: str = LATEST,
    picture: str = "passes.png",
    caption: str = "time and memory of a pass, beside the convolutions' time and a hook-based script's memory",
) -> None:
    """Writes all tables to a file of `results/`."""
    parts = [introduction, f"![{caption}]({picture})\n"]
    for sheet in sheets:
        parts.append(f"## {sheet.title}\n")
        parts += [f"{note}\n" for note in sheet.notes]
        marks = ["--:" if _numeric(sheet, i) else "---" for i in range(len(sheet.columns))]
        lines = [sheet.columns, marks, *sheet.rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    (RESULTS / name).write_text("\n".join(parts))


def _numeric(sheet: Sheet, column: int) -> bool:
    cells = [row[column] for row in sheet.rows if row[column]]
    return bool(cells) and all(cell.lstrip("× ")[0].isdigit() for cell in cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _milli(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
