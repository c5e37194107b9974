"""The command `python -m benchmarks`: measures, prints tables and writes `benchmarks/results/`."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Annotated, Any

import typer

from benchmarks import confident as confident_benchmark
from benchmarks import growth as growth_benchmark
from benchmarks import growth_report, latency_report, machine, picture, report
from benchmarks import kernels as kernel_benchmark
from benchmarks import latency as latency_benchmark
from benchmarks import passes as pass_benchmark
from benchmarks import recorder as recorder_benchmark
from benchmarks import whole as whole_benchmark
from benchmarks.networks import AMP_DTYPES, FIVE, NETWORKS, Case

app = typer.Typer(help="Measure attrfast beside other ways to score filters.", add_completion=False)

Rounds = Annotated[int, typer.Option(min=1, help="Rounds that count.")]
Patience = Annotated[
    float, typer.Option(help="Seconds to spend on waiting for a quiet machine, for each table.")
]


@app.callback(invoke_without_command=True)
def everything(context: typer.Context) -> None:
    """Without a command: all that `make bench` measures."""
    if context.invoked_subcommand is None:
        kernels()
        passes(resume=True)
        for network in recorder_benchmark.NETWORKS_MEASURED:
            recorder(network)
        growth()
        whole()


@app.command()
def passes(
    network: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(NETWORKS)}; may be given again.", show_default=False),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(AMP_DTYPES)}; may be given again. Without: fp32, and bf16 where the "
            f"processor has it.",
            show_default=False,
        ),
    ] = None,
    rounds: Rounds = 3,
    repeats: Annotated[int, typer.Option(min=0, help="Fresh processes for each peak of memory.")] = 3,
    patience: Patience = 60,
    resume: Annotated[
        bool, typer.Option(help="Leave out cases that were measured at this commit in as many rounds.")
    ] = False,
) -> None:
    """Whole importance passes: time and peak memory of every contender."""
    dtypes = dtype or (list(AMP_DTYPES) if machine.has_bf16() else ["fp32"])
    if dtype is None and len(dtypes) == 1:
        report.say("bf16 is left out: this processor has no instructions for it")
    chosen = [Case(_known(n, NETWORKS), _known(d, AMP_DTYPES)) for n in network or FIVE for d in dtypes]
    results = report.read("passes.json")
    for case in chosen:
        if resume and _measured(results.get(case.name), rounds, repeats):
            report.say(f"{case.label}: measured before")
            continue
        results[case.name] = pass_benchmark.measure(
            case, rounds=rounds, repeats=repeats, patience=patience, say=report.say
        )
        report.show([report.pass_sheet(results[case.name])])
        results = {name: results[name] for name in sorted(results, key=_place)}
        report.write("passes.json", results)
        _publish()
    report.show([report.overview_sheet(results)])


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
    results = report.read("recorder.json")
    results[_known(network, NETWORKS)] = recorder_benchmark.measure(
        network, rounds=rounds, patience=patience, say=report.say
    )
    report.show([report.recorder_sheet(results[network])])
    report.write("recorder.json", results)
    _publish()


@app.command()
def growth(
    repeats: Annotated[int, typer.Option(min=1, help="Fresh processes for each point.")] = 3,
    samples: Annotated[
        int, typer.Option(min=1000, help="The most samples of a pass.")
    ] = growth_benchmark.SAMPLES[-1],
    layers: Annotated[
        int, typer.Option(min=10, help="The most layers of a network.")
    ] = growth_benchmark.DEPTHS[-1],
    patience: Patience = 60,
) -> None:
    """How time and memory grow with samples, layers scored, and depth."""
    series = growth_benchmark.all_series(
        [value for value in growth_benchmark.SAMPLES if value <= samples],
        [value for value in growth_benchmark.DEPTHS if value <= layers],
    )
    result = growth_benchmark.measure(series, repeats=repeats, patience=patience, say=report.say)
    sheets = growth_report.sheets(result)
    report.show(sheets)
    report.write("growth.json", result)
    report.write_markdown(
        sheets,
        "growth.md",
        growth_report.INTRODUCTION,
        "growth.png",
        "time and memory against samples, layers scored and depth",
    )
    growth_report.draw(result, report.RESULTS / "growth.png")


@app.command()
def whole(
    network: Annotated[list[str], typer.Option(help="Networks that are trained.")] = [  # noqa: B006
        *whole_benchmark.NETWORKS
    ],
    epochs: Annotated[int, typer.Option(min=0, help="Of training.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Of the training of each network.")] = 3,
    rounds: Rounds = 1,
    patience: Patience = 60,
) -> None:
    """Fashion-MNIST scored by `stop="confident"`, and by hooks over all of it."""
    results = report.read("whole.json")
    for name in network:
        for seed in range(seeds):
            results[f"{name}, seed {seed}"] = whole_benchmark.measure(
                name, seed, epochs=epochs, rounds=rounds, patience=patience, say=report.say
            )
            report.write("whole.json", results)
            _publish()
    report.show([report.whole_sheet(results)])


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
    seeds: Annotated[int, typer.Option(min=1, help="Trained networks of each.")] = 3,
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
    seeds: Annotated[int, typer.Option(min=0, help="Of each network, that are pruned.")] = 3,
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
    for name in network:
        for seed in range(seeds):
            report.say(f"confident: {name}, pruned, seed {seed}")
            keep(
                "accuracy",
                f"{name}, seed {seed}",
                confident_benchmark.accuracy(name, seed, epochs=epochs),
            )
    report.show(report.confident_sheets(results))


def _known(name: str, names: Collection[str]) -> str:
    if name not in names:
        raise typer.BadParameter(f"unknown: {name!r}; known: {', '.join(names)}")
    return name


def _measured(result: dict[str, Any] | None, rounds: int, repeats: int) -> bool:
    """Whether a result is there already, from just this code and as thorough."""
    commit = machine.facts()["commit"]
    return (
        result is not None
        and result["machine"]["commit"] == commit
        and not str(commit).endswith("-dirty")
        and result["rounds"] >= rounds
        and result["repeats"] >= repeats
    )


def _place(case: str) -> tuple[int, int]:
    """Where a case stands in tables."""
    network, dtype = case.split(" ")
    order = [*FIVE, *(name for name in NETWORKS if name not in FIVE)]
    return order.index(network), list(AMP_DTYPES).index(dtype)


def _publish() -> None:
    """Draws the picture and writes the tables of all results that are there."""
    passes, kernels = report.read("passes.json"), report.read("kernels.json")
    recorded, settled = report.read("recorder.json"), report.read("confident.json")
    scored = report.read("whole.json")
    sheets = []
    if passes:
        sheets += [report.overview_sheet(passes), *map(report.pass_sheet, passes.values())]
    if scored:
        sheets.append(report.whole_sheet(scored))
    if kernels:
        sheets += report.kernel_sheets(kernels)
    sheets += [report.recorder_sheet(result) for result in recorded.values()]
    sheets += report.confident_sheets(settled)
    report.write_markdown(sheets)
    if passes:
        picture.draw(passes, report.RESULTS / "passes.png")


if __name__ == "__main__":
    app()
