"""Scores as plain data and as files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import lived_in
from safetensors.torch import load_file, save_file
from small_networks import CLASSES, Grouped, Plain
from torch import nn

import attrfast
from attrfast import InputError, Scores


def scores_of(model: nn.Module, **options: object) -> Scores:
    torch.manual_seed(0)
    batch = torch.randn(6, 3, 16, 16), torch.arange(6) % CLASSES
    return attrfast.attribute(lived_in(model), [batch], progress=False, **options)


def test_plain_data_says_what_the_scores_say() -> None:
    scores = scores_of(Plain(), by_class=True)
    told = json.loads(json.dumps(scores.to_dict()))
    assert list(told["scores"]) == list(scores)
    for name, values in told["scores"].items():
        assert torch.equal(torch.tensor(values), scores[name])
        assert torch.equal(torch.tensor(told["by_class"][name]), scores.class_scores(name))
    assert (told["criterion"], told["reduction"], told["normalize"]) == ("taylor", "abs_sample", "l2")
    assert (told["samples"], sum(told["class_samples"])) == (6, 6)


def test_arrays_are_the_scores_and_not_views_of_them() -> None:
    scores = scores_of(Plain())
    arrays = scores.to_numpy()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, scores[name].numpy())
        array[:] = -1
    assert float(scores.importance.min()) >= 0


@pytest.mark.parametrize("by_class", [False, True])
def test_a_file_gives_back_everything(by_class: bool, tmp_path: Path) -> None:
    scores = scores_of(Grouped(), by_class=by_class)
    found = Scores.load(scores.save(tmp_path / "deep" / "scores.safetensors"))
    for field in dataclasses.fields(Scores):
        mine, theirs = getattr(scores, field.name), getattr(found, field.name)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype
        elif field.name != "units":
            assert mine == theirs
    assert list(found) == list(scores)
    for field in dataclasses.fields(scores.units):
        mine, theirs = getattr(scores.units, field.name), getattr(found.units, field.name)
        if isinstance(mine, dict):
            assert list(mine) == list(theirs)
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        elif isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs)
        else:
            assert mine == theirs
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scores.safetensors"]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_bit, "checksum"),
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "can't be read"),
        (lambda file: file.write_bytes(b""), "can't be read"),
        (lambda file: file.unlink(), "can't be read"),
        (lambda file: save_file(load_file(file), file), "kind"),
    ],
    ids=["a bit", "cut off", "empty", "missing", "another kind"],
)
def test_a_damaged_file_is_refused_with_the_reason(damage: object, named: str, tmp_path: Path) -> None:
    file = scores_of(Plain()).save(tmp_path / "scores.safetensors")
    damage(file)  # type: ignore[operator]
    with pytest.raises(InputError, match=named):
        Scores.load(file)


def test_a_path_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="another path"):
        scores_of(Plain()).save(tmp_path / "file" / "scores.safetensors")
