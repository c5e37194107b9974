"""A run that was cut off goes on from its last whole step to the same model."""

from __future__ import annotations

import copy
import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lived_in
from small_networks import CLASSES, Plain
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import attrfast
from attrfast import checkpoint
from attrfast.epochs import EpochKeeper


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


def stopped_by_a_full_disk(monkeypatch: pytest.MonkeyPatch, after: int, number: int) -> None:
    """After so many files and folders, nothing more reaches the disk."""
    real, written = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal written
        written += 1
        if written > after:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("after", "number"), [(4, errno.ENOSPC), (5, errno.ENOSPC), (6, errno.ENOSPC), (7, errno.EROFS)]
)
def test_a_full_disk_leaves_the_step_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, number: int
) -> None:
    with monkeypatch.context() as full:
        stopped_by_a_full_disk(full, after, number)
        with pytest.raises(attrfast.InputError, match=re.escape(f"{tmp_path}: [Errno {number}]")):
            prune(tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert checkpoint.progress(tmp_path / "pruning.json")[0][-1].step in (1, 2)
    assert_same(prune(tmp_path, resume=True), prune(tmp_path / "whole"))


def test_a_disk_that_is_full_while_tensors_are_written_is_an_error_too(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; the tensors are written by safetensors."""
    script = textwrap.dedent(
        f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import attrfast
        from test_resume import prune
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            prune(Path(sys.argv[1]))
        except attrfast.InputError as error:
            print(error)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "steps")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "step 1 can't be written" in done.stdout
    assert "make room there" in done.stdout
    assert list((tmp_path / "steps").iterdir()) == []


@pytest.mark.parametrize("place", ["a file", "below a file", "read-only"])
def test_a_folder_that_cant_be_written_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    folder = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "steps"}.get(
        place, tmp_path
    )
    if place == "read-only":  # root may write there, so the error is made

        def write_bytes(path: Path, data: bytes) -> int:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    def never(model: nn.Module, step: int) -> None:
        raise AssertionError("the run has begun")

    with pytest.raises(attrfast.InputError, match="can't be saved in output_dir"):
        prune(folder, finetune=never)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, which a process that was started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_in(step: int) -> Callable[[nn.Module, int], None]:
    def tune(model: nn.Module, now: int) -> None:
        if now >= step:
            signal.raise_signal(signal.SIGINT)

    return tune


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_gives_what_is_pruned_so_far(tmp_path: Path) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"keep_ratio": 0.5, "filters_per_step": 5, "progress": False}
    with pytest.warns(UserWarning, match="interrupted after step 2; resume=True goes on"):
        result = attrfast.prune(
            model, loader(), finetune=interrupt_in(3), output_dir=tmp_path, **options
        )
    assert result.interrupted
    assert [row.step for row in result.history] == [0, 1, 2]
    assert result.stopped.startswith("interrupted after step 2")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    result.save(tmp_path / "saved")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        again = attrfast.load(tmp_path / "saved", network)(images)
        assert torch.equal(again, result.model.eval()(images))
    widths = sum(int(gate.sum()) for gate in result.gates.values())
    assert widths == result.history[-1].filters


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_place_leaves_the_last_whole_step_in_the_model() -> None:
    model = network()
    with pytest.warns(UserWarning, match="interrupted after step 1"):
        result = attrfast.prune(
            model, loader(), finetune=interrupt_in(2), keep_ratio=0.5, inplace=True, progress=False
        )
    assert result.model is model
    assert (
        sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        == result.history[1].filters
    )


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_before_the_first_step_is_whole_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, finetune=interrupt_in(1))


def test_a_fine_tuning_goes_on_after_the_epoch_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not from the beginning: the loss of what is left to do alone is asked for."""
    tuning = attrfast.FineTune(epochs=4, optimizer="adamw", schedule="onecycle")
    whole = prune(tmp_path / "whole", finetune=tuning)
    real, kept = EpochKeeper.save, []

    def save(keeper: EpochKeeper, state: dict[str, Any]) -> None:
        real(keeper, state)
        kept.append(state["epoch"])
        if len(kept) == 5:  # three epochs of step 1, two of step 2
            raise KeyboardInterrupt

    monkeypatch.setattr(EpochKeeper, "save", save)
    with pytest.warns(UserWarning, match="interrupted after step 1"):
        prune(tmp_path / "cut", finetune=tuning)
    assert kept == [1, 2, 3, 1, 2]
    monkeypatch.setattr(EpochKeeper, "save", lambda keeper, state: kept.append(state["epoch"]))
    assert_same(whole, prune(tmp_path / "cut", finetune=tuning, resume=True))
    assert kept[5:7] == [3, 1]


class Odd(torch.optim.SGD):
    """An optimiser with a state that is no plain value."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "odd": object()}


def odd(parameters: Any) -> torch.optim.Optimizer:
    return Odd(parameters, lr=0.01)


def test_an_optimiser_that_files_cant_hold_is_resumed_from_its_step(tmp_path: Path) -> None:
    tuning = attrfast.FineTune(epochs=2, optimizer=odd)
    cut_off(tmp_path / "cut", 1, finetune=tuning)
    assert not (tmp_path / "cut" / "epoch.safetensors").exists()
    whole = prune(tmp_path / "whole", finetune=tuning)
    assert_same(whole, prune(tmp_path / "cut", finetune=tuning, resume=True))
