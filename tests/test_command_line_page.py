"""What docs/command_line.md shows works: commands, options, the settings file and the Python block."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from attrfast import cli
from attrfast.runs import PruneSettings
from attrfast.runs.settings import TABLES

PAGE = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
GROUP: Any = typer.main.get_command(cli.app)
runner = CliRunner()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_commands_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a narrower network, on fewer images and in larger steps."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("sh")
    shorter = ["--images", "60", "--device", "cpu"]
    quick = {"score": shorter, "prune": [*shorter, "--step", "40", "--finetune", "0", "--train", "0"]}
    for line in code.splitlines():
        words = shlex.split(line.replace("vgg_small", "vgg_small:0.25"))
        assert words[0] == "attrfast"
        result = runner.invoke(cli.app, [*words[1:], *quick.get(words[1], [])])
        assert result.exit_code == 0, result.output
    told = set(re.findall(r"`([\w./]+)`", PAGE.split("## A run")[1].split("A run that was")[0]))
    for path in Path("run").iterdir():
        assert {path.name, f"{path.name}/"} & told


def test_the_settings_file_is_one() -> None:
    tree = tomllib.loads(blocks("toml")[0])
    for command, table in tree.items():
        options = {param.name for param in GROUP.commands[command].params}
        assert {key.replace("-", "_") for key in table} <= options
    settings = PruneSettings(
        **{k.replace("-", "_"): v for k, v in tree["prune"].items() if not isinstance(v, dict)},
        tables={k: v for k, v in tree["prune"].items() if k in TABLES and isinstance(v, dict)},
    )
    settings.check()


def test_the_python_block_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    (code,) = blocks("python")
    exec(compile(code, "command_line.md", "exec"), scope)
    assert scope["page"] == Path("smaller/report.html")
    assert scope["page"].exists()


def test_every_option_and_command_on_the_page_exists() -> None:
    known = {"--install-completion", "--help"}
    for command in GROUP.commands.values():
        known |= {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", PAGE))
    assert len(named) >= 15
    assert named <= known
    commands = re.findall(r"^\| `attrfast (\w+)", PAGE, flags=re.MULTILINE)
    assert sorted(commands) == sorted(GROUP.commands)
