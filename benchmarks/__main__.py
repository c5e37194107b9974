"""The command `python -m benchmarks`: measures, prints tables and writes `benchmarks/results/`."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks import kernels as kernel_benchmark
from benchmarks import passes as pass_benchmark
from benchmarks import picture, report
from benchmarks import recorder as recorder_benchmark
from benchmarks.networks import DEFAULT, NETWORKS

app = typer.Typer(help="Measure attrfast beside other ways to score filters.", add_completion=False)

Rounds = Annotated[int, typer.Option(min=1, help="Rounds that count.")]
Patience = Annotated[
    float, typer.Option(help="Seconds to spend on waiting for a quiet machine, for each table.")
]


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """Without a command: everything, in about seven minutes on two quiet cores."""
    if context.invoked_subcommand is None:
        kernels()
        passes()
        for network in DEFAULT:
            recorder(network)


@app.command()
def passes(
    network: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(NETWORKS)}; may be given again.", show_default=False),
    ] = None,
    rounds: Rounds = 3,
    repeats: Annotated[int, typer.Option(min=0, help="Fresh processes for each peak of memory.")] = 3,
    patience: Patience = 60,
) -> None:
    """Whole importance passes: time and peak memory of every contender."""
    chosen = network or list(DEFAULT)
    unknown = [name for name in chosen if name not in NETWORKS]
    if unknown:
        raise typer.BadParameter(f"unknown network {unknown[0]!r}; known: {', '.join(NETWORKS)}")
    results = report.read("passes.json")
    for name in chosen:
        results[name] = pass_benchmark.measure(
            name, rounds=rounds, repeats=repeats, patience=patience, say=report.say
        )
        report.show(report.pass_sheets(results[name]))
        report.write("passes.json", results)
    _publish()


@app.command()
def kernels(rounds: Rounds = 9, patience: Patience = 60) -> None:
    """Each CPU kernel beside PyTorch's eager ops and a copy of the same bytes."""
    result = kernel_benchmark.measure_alone(rounds=rounds, patience=patience, say=report.say)
    report.show(report.kernel_sheets(result))
    report.write("kernels.json", result)
    _publish()


@app.command()
def recorder(
    network: Annotated[str, typer.Option(help=f"One of {', '.join(NETWORKS)}.")] = "vgg16_bn",
    rounds: Rounds = 9,
    patience: Patience = 60,
) -> None:
    """A training loop with ScoreRecorder and without."""
    if network not in NETWORKS:
        raise typer.BadParameter(f"unknown network {network!r}; known: {', '.join(NETWORKS)}")
    results = report.read("recorder.json")
    results[network] = recorder_benchmark.measure(
        network, rounds=rounds, patience=patience, say=report.say
    )
    report.show([report.recorder_sheet(results[network])])
    report.write("recorder.json", results)
    _publish()


def _publish() -> None:
    """Draws the picture and writes the tables of all results that are there."""
    passes, kernels = report.read("passes.json"), report.read("kernels.json")
    recorded = report.read("recorder.json")
    sheets = [sheet for result in passes.values() for sheet in report.pass_sheets(result)]
    if kernels:
        sheets += report.kernel_sheets(kernels)
    sheets += [report.recorder_sheet(result) for result in recorded.values()]
    report.write_markdown(sheets)
    if passes:
        picture.draw(passes, report.RESULTS / "passes.png")


if __name__ == "__main__":
    app()
