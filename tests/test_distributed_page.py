"""The commands and the script in docs/distributed.md run, and go on where a process was killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import attrfast
from attrfast import cli, models

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "distributed.md").read_text()
pytest.importorskip("sklearn")

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}

# Kills its process, once, after the first step was saved.
MORTAL = """
import os, signal
from pathlib import Path

from torch import nn


class Mortal(nn.Sequential):
    def forward(self, x):
        first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
        if first_life and Path("run/steps/pruning.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def build(num_classes, in_channels):
    return Mortal(
        nn.Conv2d(in_channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return subprocess.run(
        [*python, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def test_the_script_runs_as_printed(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "shrink.py").write_text(code)
    (words,) = re.findall(r"`torchrun (.*? shrink\.py)`", PAGE)
    done = torchrun(tmp_path, *words.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("max_macs reached") == 1
    smaller = attrfast.load(
        tmp_path / "smaller", lambda: models.vgg_small(num_classes=10, in_channels=1)
    )
    assert sum(p.numel() for p in smaller.parameters()) > 0


def command(name: str) -> list[str]:
    """What stands after `torchrun` in the page's command."""
    (line,) = re.findall(rf"^torchrun (.* attrfast {name} .*)$", PAGE, flags=re.MULTILINE)
    return shlex.split(line)


def test_the_command_scores_as_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*command("score"), "--images", "75", "--device", "cpu"]
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("taylor: 75 images") == 1
    together = json.loads((tmp_path / "scores.json").read_text())
    (tmp_path / "scores.json").unlink()
    monkeypatch.chdir(tmp_path)
    alone = CliRunner().invoke(cli.app, words[words.index("score") :])
    assert alone.exit_code == 0, alone.output
    for name, scores in json.loads((tmp_path / "scores.json").read_text()).items():
        for conv, values in scores["filters"].items():
            assert together[name]["filters"][conv] == pytest.approx(values, rel=1e-4, abs=1e-7)


def test_the_command_goes_on_where_a_process_was_killed(tmp_path: Path) -> None:
    """The page's command, on a small network of which one process dies."""
    (tmp_path / "net.py").write_text(MORTAL)
    instead = {"vgg_small": "net.py:build", "digits": "digits:8"}
    words = [instead.get(word, word) for word in command("prune")]
    short = ["--images", "100", "--step", "4", "--device", "cpu", "--no-report"]
    done = torchrun(tmp_path, "--max-restarts=1", *words, *short, "--json")
    assert done.returncode == 0, done.stderr
    assert "lost the others" in done.stderr
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert told["reached"]
    history = json.loads((tmp_path / "run" / "steps" / "pruning.json").read_text())["history"]
    assert [row["step"] for row in history] == list(range(told["steps"] + 1))
    attrfast.read_recipe(tmp_path / "run")
