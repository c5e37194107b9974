"""The command prints what it is asked for, and turns attrfast's errors into one line."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attrfast import cli
from attrfast.errors import InputError

runner = CliRunner()


def test_version_is_that_of_the_package() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"attrfast {metadata.version('attrfast')}"


def test_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "attrfast", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("score", "prune", "compare", "report", "bench", "env", "demo"):
        assert command in done.stdout


def test_env_names_python_torch_and_the_backends() -> None:
    result = runner.invoke(cli.app, ["env"])
    assert result.exit_code == 0
    for expected in ("attrfast", "torch", "python"):
        assert expected in result.output.lower()
    told = json.loads(runner.invoke(cli.app, ["env", "--json"]).output)
    assert told["attrfast"] == metadata.version("attrfast")


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["score", "vgg_smal"], 1, "attrfast: unknown network 'vgg_smal'; did you mean 'vgg_small'?"),
        (["report", "no/where"], 1, "attrfast: there is no folder no/where; "),
        (["prun"], 2, "attrfast: No such command 'prun'"),
        (["score", "vgg_small", "--lowst", "3"], 2, "attrfast: No such option: --lowst"),
        (["score"], 2, "attrfast: Missing argument '"),
        (["score", "vgg_small", "--lowest", "few"], 2, "attrfast: Invalid value for '--lowest'"),
    ],
)
def test_errors_are_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    told: str,
) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr("sys.argv", ["attrfast", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(told)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (InputError("value 3 is wrong;\nuse 2"), 1, "attrfast: value 3 is wrong; use 2\n"),
        (KeyboardInterrupt(), 130, "attrfast: stopped\n"),
        (ZeroDivisionError("a fault"), 70, "ZeroDivisionError: a fault\nattrfast: this is a fault"),
    ],
)
def test_every_kind_of_error_has_its_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    status: int,
    told: str,
) -> None:
    def fail(**_: Any) -> None:
        raise raised

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == status
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("attrfast score resnet1", {"resnet110"}),
        ("attrfast prune vgg_small --criterion l1,taylor_", {"l1,taylor_fo", "l1,taylor_guided"}),
        ("attrfast prune vgg_small --data f", {"fashion-mnist", "flowers102:"}),
        ("attrfast re", {"report"}),
    ],
)
def test_shells_complete_names(words: str, completed: set[str]) -> None:
    asked = {
        "_ATTRFAST_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = runner.invoke(cli.app, [], env=asked, prog_name="attrfast")
    assert set(done.stdout.split()) == completed


def test_demo_reaches_its_target_and_keeps_the_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    result = runner.invoke(cli.app, ["demo", "--out", str(out), "--no-progress"], catch_exceptions=False)
    assert result.exit_code == 0
    figures = json.loads((out / "figures.json").read_text())
    assert figures["macs_after"] <= 0.4 * figures["macs_before"]
    assert figures["params_after"] < figures["params_before"]
    assert figures["top1_before"] >= 0.95
    assert figures["top1_after"] >= figures["top1_before"] - 0.03
    for name in ("trade_off.png", "kept_filters.png"):
        assert (out / name).stat().st_size > 10_000
        assert name in result.output
    assert f"{figures['top1_after']:.2%}" in result.output
