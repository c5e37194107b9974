"""A run that was cut off goes on from its last whole step to the same model."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import attrfast


def network() -> nn.Module:
    torch.manual_seed(0)
    return lived_in(Plain())


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(24, 3, 16, 16, generator=generator)
    labels = torch.randint(CLASSES, (24,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)


def prune(folder: Path, **options: Any) -> attrfast.PruneResult:
    options = {"finetune": 1, "keep_ratio": 0.5, "filters_per_step": 5, "progress": False, **options}
    return attrfast.prune(network(), loader(), output_dir=folder, **options)


class StopError(Exception):
    """Ends a run where a test wants it to end."""


def cut_off(folder: Path, after: int, **options: Any) -> None:
    def callback(row: attrfast.Step, _: nn.Module) -> None:
        if row.step == after:
            raise StopError

    with pytest.raises(attrfast.AttrfastError):
        prune(folder, callback=callback, **options)


def assert_same(a: attrfast.PruneResult, b: attrfast.PruneResult) -> None:
    left, right = a.model.state_dict(), b.model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(torch.equal(a.gates[name], b.gates[name]) for name in a.gates)
    for x, y in zip(a.history, b.history, strict=True):
        assert (x.step, x.filters, x.top1, x.loss, x.macs) == (y.step, y.filters, y.top1, y.loss, y.macs)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_that_was_cut_off_ends_in_the_same_model(tmp_path: Path, after: int) -> None:
    whole = prune(tmp_path / "whole")
    cut_off(tmp_path / "cut", after)
    assert_same(whole, prune(tmp_path / "cut", resume=True))


def test_a_run_by_classes_that_was_cut_off_ends_in_the_same_model(tmp_path: Path) -> None:
    options: dict[str, Any] = {"classes": [0, 1, 3], "balance": "worst_class"}
    whole = prune(tmp_path / "whole", **options)
    cut_off(tmp_path / "cut", 1, **options)
    assert_same(whole, prune(tmp_path / "cut", resume=True, **{**options, "classes": (3, 1, 0)}))


def test_resuming_a_finished_run_gives_its_result(tmp_path: Path) -> None:
    first = prune(tmp_path)
    assert_same(first, prune(tmp_path, resume=True))


def test_resuming_where_nothing_is_starts_anew(tmp_path: Path) -> None:
    assert_same(prune(tmp_path / "new", resume=True), prune(tmp_path / "other"))


def test_the_process_may_be_killed(tmp_path: Path) -> None:
    """SIGKILL in the middle of a step, then the same command again."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from pathlib import Path
            from test_resume import prune
            import torch
            def slow(row, model):
                print("step", row.step, flush=True)
                time.sleep(float(sys.argv[2]))
            result = prune(Path(sys.argv[1]), resume=True, callback=slow)
            torch.save(result.model.state_dict(), sys.argv[1] + ".pt")
            """
        )
    )
    folder = tmp_path / "steps"
    command = [sys.executable, str(script), str(folder)]
    with subprocess.Popen([*command, "60"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "step 1\n"
        process.send_signal(signal.SIGKILL)
    again = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    assert again.stdout.startswith("step 2\n")
    got = torch.load(tmp_path / "steps.pt")
    expected = prune(tmp_path / "whole").model.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(
    "options",
    [
        *({"seed": 1}, {"keep_ratio": 0.4}, {"criterion": "taylor"}, {"finetune": 2}),
        *({"classes": [0, 1]}, {"balance": "worst_class"}),
    ],
)
def test_a_run_with_other_settings_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    cut_off(tmp_path, 1)
    with pytest.raises(attrfast.InputError, match="belongs to another model or other settings"):
        prune(tmp_path, resume=True, **options)


@pytest.mark.parametrize(
    "damage", ["truncate state", "truncate weights", "remove weights", "nonsense", "other folder"]
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, damage: str) -> None:
    cut_off(tmp_path, 2)
    state = tmp_path / "pruning.json"
    (weights,) = tmp_path.glob("*.safetensors")
    if damage == "truncate state":
        state.write_text(state.read_text()[:100])
    elif damage == "truncate weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "remove weights":
        weights.unlink()
    elif damage == "other folder":
        weights.rename(tmp_path.parent / weights.name)
        state.write_text(state.read_text().replace(weights.name, f"../{weights.name}"))
    else:
        state.write_text('{"fingerprint": 3}')
    with pytest.raises(attrfast.InputError, match="can't be read"):
        prune(tmp_path, resume=True)


def test_only_the_last_step_is_kept(tmp_path: Path) -> None:
    prune(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
