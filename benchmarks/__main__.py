"""The command `python -m benchmarks`: measures, prints tables and writes `benchmarks/results/`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from benchmarks import confident as confident_benchmark
from benchmarks import kernels as kernel_benchmark
from benchmarks import latency as latency_benchmark
from benchmarks import latency_report, picture, report
from benchmarks import passes as pass_benchmark
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


class Part(StrEnum):
    """What `latency` measures."""

    PREDICTIONS = "predictions"
    REACHED = "reached"
    ACCURACY = "accuracy"


@app.command()
def latency(
    part: Annotated[
        list[Part] | None, typer.Option(help="Leave out for all.", show_default=False)
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {'; '.join(latency_benchmark.CASES)}.", show_default=False),
    ] = None,
    network: Annotated[list[str], typer.Option(help="Small networks that are trained.")] = [  # noqa: B006
        "vgg_small",
        "resnet20",
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Trained networks of each.")] = 2,
) -> None:
    """Pruning to a measured latency: its prediction, what is reached, and the accuracy."""
    results = report.read("latency.json")

    def keep(part: Part, name: str, found: dict[str, Any]) -> None:
        results.setdefault(part.value, {})[name] = found
        report.write("latency.json", results)
        latency_report.publish(results)

    parts = part or list(Part)
    for name in case or list(latency_benchmark.CASES):
        if Part.PREDICTIONS in parts:
            report.say(f"predictions: {name}")
            keep(Part.PREDICTIONS, name, latency_benchmark.predictions(name))
        if Part.REACHED in parts:
            report.say(f"reached: {name}")
            keep(Part.REACHED, name, latency_benchmark.reached(name))
    if Part.ACCURACY in parts:
        for seed in range(seeds):
            for name in network:
                report.say(f"accuracy: {name}, seed {seed}")
                keep(Part.ACCURACY, f"{name}, seed {seed}", latency_benchmark.accuracy(name, seed))
    report.show(latency_report.sheets(results))


@app.command()
def confident(
    network: Annotated[list[str], typer.Option(help="Networks that are trained.")] = [  # noqa: B006
        *confident_benchmark.NETWORKS
    ],
    criterion: Annotated[str, typer.Option(help="What filters are scored by.")] = "attribution",
    epochs: Annotated[int, typer.Option(min=0, help="Of training.")] = 2,
    orders: Annotated[int, typer.Option(min=1, help="Random orders of the training set.")] = 10,
    seeds: Annotated[int, typer.Option(min=0, help="Of each small network, that are pruned.")] = 3,
) -> None:
    """How many samples of Fashion-MNIST are read until the lowest filters are settled, and the accuracy."""
    results = report.read("confident.json")

    def keep(part: str, name: str, found: dict[str, Any]) -> None:
        results.setdefault(part, {})[name] = found
        report.write("confident.json", results)
        _publish()

    for name in network:
        report.say(f"confident: {name}")
        keep("samples", name, confident_benchmark.measure(name, criterion, epochs=epochs, orders=orders))
    for name in [name for name in network if name in confident_benchmark.SMALL]:
        for seed in range(seeds):
            report.say(f"confident: {name}, pruned, seed {seed}")
            keep(
                "accuracy",
                f"{name}, seed {seed}",
                confident_benchmark.accuracy(name, seed, epochs=epochs),
            )
    report.show(report.confident_sheets(results))


def _publish() -> None:
    """Draws the picture and writes the tables of all results that are there."""
    passes, kernels = report.read("passes.json"), report.read("kernels.json")
    recorded, settled = report.read("recorder.json"), report.read("confident.json")
    sheets = [sheet for result in passes.values() for sheet in report.pass_sheets(result)]
    if kernels:
        sheets += report.kernel_sheets(kernels)
    sheets += [report.recorder_sheet(result) for result in recorded.values()]
    sheets += report.confident_sheets(settled)
    report.write_markdown(sheets)
    if passes:
        picture.draw(passes, report.RESULTS / "passes.png")


if __name__ == "__main__":
    app()
