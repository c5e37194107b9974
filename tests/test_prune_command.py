"""`attrfast prune` keeps a run in a folder, refuses what is not its own, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import attrfast
from attrfast import cli
from attrfast.errors import AttrfastError, InputError
from attrfast.runs import PruneSettings, work

pytest.importorskip("sklearn")
runner = CliRunner()

NETWORK = """
from torch import nn

def build(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
SHORT = ["--data", "digits:8", "--images", "100", "--step", "6", "--device", "cpu"]


@pytest.fixture
def network(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK)
    return f"{tmp_path / 'net.py'}:build"


def prune(*arguments: str) -> Any:
    return runner.invoke(cli.app, ["prune", *arguments])


def test_a_run_is_made_tested_saved_and_told(network: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = prune(network, *SHORT, "--train", "1", "--max-macs", "0.5", "--out", str(run), "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    told = json.loads(result.stdout)
    assert told["reached"]
    assert told["macs"]["after"] <= 0.5 * told["macs"]["before"]
    assert [row["name"] for row in told["phases"]][:2] == ["training", "testing the original"]
    assert all(row["seconds"] > 0 and row["memory"] > 1e6 for row in told["phases"])
    figures = json.loads((run / "figures.json").read_text())
    for key in ("before", "after"):
        right = sum(row[key] for row in figures["classes"])
        assert right / 360 == pytest.approx(told["top1"][key])
    assert len(json.loads((run / "scores.json").read_text())["filters"]["4"]) == 16
    assert (run / "report.html").stat().st_size > 10_000
    loaded = attrfast.load(run, lambda: work.built(network, PruneSettings(network, "digits:8").opener()(0),
                                                   None, 0))  # fmt: skip
    assert sum(p.numel() for p in loaded.parameters()) == told["params"]["after"]


def test_the_settings_and_the_command_that_are_kept_repeat_the_run(network: str, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("first", "second", "third")]
    options = ["--max-params", "0.6", "--classes", "1,2", "--normalize", "none", "--finetune", "0"]
    assert prune(network, *SHORT, *options, "--out", str(runs[0]), "--no-report").exit_code == 0
    settings = str(runs[0] / "settings.toml")
    assert prune("--config", settings, "--out", str(runs[1]), "--no-report").exit_code == 0
    words = json.loads((runs[0] / "figures.json").read_text())["command"]
    assert words[:2] == ["attrfast", "prune"]
    assert shlex.split(shlex.join(words))[-1] == str(runs[0])
    assert prune(*words[2:-1], str(runs[2]), "--no-report").exit_code == 0
    first, *others = (load_file(run / "weights.safetensors") for run in runs)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[key], other[key]) for key in first)
    assert len({(run / "settings.toml").read_text() for run in runs}) == 1


def test_a_killed_run_goes_on_where_it_was(network: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        network,
        *SHORT,
        "--train",
        "1",
        "--keep-ratio",
        "0.3",
        "--no-report",
        "--out",
        str(run),
    ]
    command = [sys.executable, "-m", "attrfast", "prune", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet) as process:
        until = time.monotonic() + 120
        while not (run / "steps/pruning.json").exists() and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (run / "recipe.json").exists()
    start = (run / "start.safetensors").stat().st_mtime_ns
    rows = json.loads((run / "steps/pruning.json").read_text())["history"]
    again = prune(*arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert (run / "start.safetensors").stat().st_mtime_ns == start  # not trained again
    history = json.loads((run / "recipe.json").read_text())["history"]
    assert len(history) > len(rows) > 1
    assert history[: len(rows)] == rows


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_holds_something_else_is_refused(
    network: str, tmp_path: Path, resume: bool
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    arguments = [network, *SHORT, "--finetune", "0", "--no-report", "--out", str(run)]
    assert prune(*arguments, "--max-macs", "0.8").exit_code == 0
    again = ["--resume"] if resume else []
    refused = prune(*arguments, "--max-macs", "0.7" if resume else "0.8", *again)
    assert isinstance(refused.exception, InputError)
    expected = "max-macs is 0.8 there, and 0.7 here" if resume else "holds a run already"
    assert expected in str(refused.exception)
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    refused = prune(*arguments[:-1], str(other), "--max-macs", "0.8", *again)
    assert "holds something that is no run" in str(refused.exception)
    assert [path.name for path in other.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "needs a target"),
        (["--max-macs", "0"], "max_macs must be"),
        (["--max-macs", "0.5", "--criterion", "tailor"], "taylor"),
        (["--max-macs", "0.5", "--balance", "best"], "worst_class"),
        (["--max-macs", "0.5", "--weights", "nowhere.pt"], "nowhere.pt can't be read"),
        (["--max-macs", "0.5", "--image-size", "32"], "images of one size"),
    ],
)
def test_what_is_not_usable_is_said_before_anything_is_made(
    network: str, tmp_path: Path, arguments: list[str], named: str
) -> None:
    result = prune(network, *SHORT, *arguments, "--train", "1", "--out", str(tmp_path / "run"))
    assert isinstance(result.exception, AttrfastError)
    assert named in str(result.exception)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_says_how_to_go_on(network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "prune", stopped)
    result = prune(network, *SHORT, "--max-macs", "0.5", "--out", str(tmp_path / "run"))
    assert result.exit_code == 130
    assert result.stderr.startswith("attrfast: stopped; the same command with --resume goes on in ")
    assert result.stdout == ""


def steps_in(run: Path) -> int:
    """Whole steps of a run; 0 before there are any."""
    file = run / "steps/pruning.json"
    return len(json.loads(file.read_text())["history"]) - 1 if file.exists() else 0


def test_a_signal_in_the_middle_leaves_a_network_and_resume_goes_on(
    network: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # A process in the background may have been told to ignore the signal; this one answers as in a terminal.
    start = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from attrfast.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", start, "prune", network, *SHORT, "--train", "1", "--finetune", "1"]
    command += ["--keep-ratio", "0.3", "--step", "2", "--loader-workers", "0", "--out", str(run)]
    command += ["--no-progress"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 240
        while steps_in(run) < 1 and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"--resume goes on in {run}" in err
    partly = json.loads((run / "recipe.json").read_text())["history"]
    assert 1 <= len(partly) - 1 == steps_in(run)
    build = runpy.run_path(network.rpartition(":")[0])["build"]
    smaller = attrfast.load(run, lambda: build(10, 1))
    assert smaller(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    done = subprocess.run([*command, "--resume", "--json"], check=True, text=True, capture_output=True)
    told = json.loads(done.stdout)
    assert told["reached"]
    whole = json.loads((run / "recipe.json").read_text())["history"]
    assert whole[: len(partly)] == partly
    assert len(whole) > len(partly)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_pruning_starts_from_a_file_of_weights(network: str, tmp_path: Path, ending: str) -> None:
    splits = PruneSettings(network, "digits:8").opener()(0)
    state = work.built(network, splits, None, seed=5).state_dict()
    file = tmp_path / f"weights{ending}"
    torch.save(state, file) if ending == ".pt" else save_file(state, file)
    found = work.built(network, splits, str(file), seed=0).state_dict()
    assert all(torch.equal(found[key], state[key]) for key in state)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt does not fit"):
        work.built(network, splits, str(tmp_path / "other.pt"), seed=0)


def test_a_pickle_is_not_run(network: str, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")  # a whole module, which needs its code
    with pytest.raises(InputError, match="can't be read as weights"):
        work.built(
            network, PruneSettings(network, "digits:8").opener()(0), str(tmp_path / "model.pt"), 0
        )


# --- the settings file -----------------------------------------------------------------------------


def test_options_on_the_line_override_the_file(network: str, tmp_path: Path) -> None:
    file = tmp_path / "long.toml"
    file.write_text(
        f"[prune]\nmodel = {json.dumps(network)}\ndata = 'digits:8'\nimages = 100\nmax-macs = 0.9\n"
        "classes = [0, 1]\n[prune.finetune]\nepochs = 0\nlr = 0.02\noptimizer = 'adam'\n[score]\nlowest = 3\n"
    )
    run = tmp_path / "run"
    result = prune("--config", str(file), "--images", "120", "--out", str(run), "--no-report")
    assert result.exit_code == 0, result.output
    kept = tomllib.loads((run / "settings.toml").read_text())["prune"]
    assert (kept["images"], kept["max_macs"], kept["classes"]) == (120, 0.9, [0, 1])
    assert kept["finetune"] == {"lr": 0.02, "optimizer": "adam", "epochs": 0}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[prune]\nmax_mac = 0.5", "did you mean 'max_macs'"),
        ("[prun]\nmax_macs = 0.5", "did you mean 'prune'"),
        ("[score]\nlowest = 1", "has no table [prune]"),
        ("[prune.finetune]\nepoch = 1", "did you mean 'epochs'"),
        ("[prune.data]\nname = 1", "must be one value"),
        ("[prune\n", "can't be read as TOML"),
        ("[prune]\nmax_macs = 0.5\n[prune.finetune]\nlr = 'high'", "[prune.finetune] is not usable"),
    ],
)
def test_mistakes_in_the_file_are_named(network: str, tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "long.toml"
    file.write_text(text)
    result = prune(network, *SHORT, "--config", str(file), "--out", str(tmp_path / "run"))
    assert isinstance(result.exception, InputError)
    assert named in str(result.exception)


def test_texts_are_written_so_that_they_are_read_again() -> None:
    settings = PruneSettings('a "b"\\ü\x7f\n', "digits", ignore=("x'y",), tables={"train": {"lr": 1e-5}})
    read = tomllib.loads(settings.to_toml())["prune"]
    assert (read["model"], read["ignore"]) == ('a "b"\\ü\x7f\n', ["x'y"])
    assert read["train"] == {"lr": 1e-5, "epochs": 0}
