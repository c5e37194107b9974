"""The command prints what it is asked for, and turns attrfast's errors into one line."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

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
    for command in ("env", "demo"):
        assert command in done.stdout


def test_env_names_python_torch_and_the_backends() -> None:
    result = runner.invoke(cli.app, ["env"])
    assert result.exit_code == 0
    for expected in ("attrfast", "torch", "python"):
        assert expected in result.output.lower()


def test_unknown_command_is_an_error() -> None:
    assert runner.invoke(cli.app, ["prun"]).exit_code != 0


def test_errors_of_attrfast_become_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise InputError("value 3 is wrong; use 2")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err == "attrfast: value 3 is wrong; use 2\n"


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
