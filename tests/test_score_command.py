"""`attrfast score` and `attrfast bench` print tables for people and JSON for machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from attrfast import cli
from attrfast.errors import AttrfastError

pytest.importorskip("sklearn")
runner = CliRunner()
SMALL = [
    "vgg_small:0.1",
    "--data",
    "digits:8",
    "--images",
    "50",
    "--max-batches",
    "1",
    "--device",
    "cpu",
]


def run(command: str, *arguments: str) -> Any:
    return runner.invoke(cli.app, [command, *arguments])


def test_scores_are_printed_layer_by_layer() -> None:
    result = run("score", *SMALL, "--criterion", "taylor,l1", "--lowest", "2")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    first, second = (lines.index(title) for title in ("taylor: 50 images", "l1: weights alone"))
    assert first < second
    (line,) = [line.split() for line in lines[second:] if line.strip().startswith("features.7 ")]
    assert line[1] == "6"
    assert len(line) == 7  # name, filters, three figures, two filters


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_the_file_and_the_json_hold_every_filter(tmp_path: Path, ending: str) -> None:
    out = tmp_path / "new" / f"scores{ending}"
    result = run("score", *SMALL, "--json", "--out", str(out))
    told = json.loads(result.stdout)["criteria"]["attribution"]
    assert told["samples"] == 50
    assert sum(map(len, told["filters"].values())) == 3 + 3 + 6 + 6 + 13 + 13
    if ending == ".json":
        assert json.loads(out.read_text())["attribution"] == told
    else:
        held = load_file(out)
        assert {k.partition("/")[2]: pytest.approx(v.tolist()) for k, v in held.items()} == told[
            "filters"
        ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--criterion", "tailor"], "did you mean 'taylor'"),
        (["--out", "scores.txt"], "must end in .json or .safetensors"),
        (["--normalize", "l3"], "normalize must be one of"),
    ],
)
def test_what_is_not_usable_is_said(arguments: list[str], named: str) -> None:
    result = run("score", *SMALL, *arguments)
    assert isinstance(result.exception, AttrfastError)
    assert named in str(result.exception)
    assert result.stdout == ""


def test_kernels_and_a_pass_are_timed_beside_pytorch() -> None:
    arguments = [
        "vgg_small:0.1",
        "--shape",
        "1,8,8",
        "--batch-size",
        "4",
        "--rounds",
        "3",
        "--device",
        "cpu",
    ]
    result = run("bench", *arguments, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [row["name"] for row in told["passes"]] == [
        "training step, bare",
        "forward pass alone",
        "attrfast, attribution",
    ]
    for row in told["passes"]:
        assert row["seconds"] > 0
        assert row["memory"] > 0
    assert told["passes"][0]["ratio"] == told["kernels"][0]["ratio"] == 1
    text = run("bench", *arguments).stdout
    assert "training step, bare" in text
    assert "PyTorch ops" in text
    assert isinstance(run("bench", "--shape", "3,32").exception, AttrfastError)
