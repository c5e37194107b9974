"""`attrfast compare` finds what it is asked for by name, and says by its exit status how it went."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_data
import torch
import typer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from attrfast import cli, data, models, names
from attrfast.compare import published, recipes, run
from attrfast.errors import AttrfastError, InputError

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

cifar_root, flowers_root = test_data.cifar_root, test_data.flowers_root  # fixtures
runner = CliRunner()
SHORT = ["--epochs", "1", "--finetune", "0", "--step", "60", "--score-batches", "1", "--threads", "1"]


def compare(out: Path, *arguments: str) -> Any:
    return runner.invoke(cli.app, ["compare", *arguments, *SHORT, "--device", "cpu", "--out", str(out)])


def test_tables_are_printed_and_everything_is_filed(tmp_path: Path) -> None:
    arguments = ["vgg_small:0.25", "--images", "100", "--methods", "l1, random", "--seeds", "1"]
    result = compare(tmp_path, *arguments, "--budgets", "0.5")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "## vgg_small:0.25" in result.stdout
    assert "on 100 training images only" in result.stdout
    for name in ("comparison.md", "comparison.csv", "comparison.json", "per_class.md", "cells.csv"):
        assert str(tmp_path / name) in result.stdout
        assert (tmp_path / name).stat().st_size > 100
    assert (tmp_path / "curves-vgg_small-0.25.png").read_bytes()[:4] == b"\x89PNG"
    (cell,) = tmp_path.glob("cells/*/random/*.json")
    written = cell.stat().st_mtime_ns
    again = compare(tmp_path, *arguments, "--budgets", "0.5,0.4")
    assert again.exit_code == 0
    assert cell.stat().st_mtime_ns == written
    assert len(list(tmp_path.glob("cells/*/random/*.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["vgg_smal"], 1, "did you mean 'vgg_small'"),
        (["torchvision:resnet18"], 1, "takes images of 3 channels"),
        (["--data", "cifar10"], 1, "cifar10:DIR"),
        (["--data", "mnist"], 1, "unknown data"),
        (["--methods", "tailor"], 1, "did you mean 'taylor'"),
        (["--images", "5000"], 1, "1257 training images"),
        (["--recipe", "cifar10-vgg16"], 1, "--data cifar10:DIR"),
        (["--recipe", "flowers"], 1, "did you mean"),
        (["--budgets", "a,b"], 2, "numbers"),
        (["--workers", "0"], 2, "workers"),
    ],
)
def test_what_is_not_usable_is_said(
    tmp_path: Path, arguments: list[str], status: int, named: str
) -> None:
    result = compare(tmp_path / "out", *arguments)
    if status == 1:  # what `main` turns into one line and exit status 1
        assert isinstance(result.exception, AttrfastError)
        assert named in str(result.exception)
    else:
        assert result.exit_code == 2
        assert named in result.stderr
    assert not (tmp_path / "out").exists()


def test_failed_cells_have_an_exit_status_of_their_own(tmp_path: Path) -> None:
    """With everything gone but one filter a layer, more than that share is left."""
    result = compare(
        tmp_path, "vgg_small:0.05", "--images", "50", "--methods", "l1", "--budgets", "0.5,0.001",
        "--seeds", "0",
    )  # fmt: skip
    assert result.exit_code == 3
    assert "1 cells or starts failed" in result.stderr
    assert "## Failed" in result.stdout
    assert "the target can't be reached" in result.stdout
    assert "| l1 " in result.stdout


def test_ctrl_c_has_an_exit_status_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "compare", interrupted)
    result = compare(tmp_path)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr


def test_options_in_the_docs_exist() -> None:
    text = (Path(__file__).parent.parent / "docs" / "compare.md").read_text()
    command = typer.main.get_command(cli.app).commands["compare"]  # type: ignore[attr-defined]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert len(named) >= 8
    assert named <= known


# --- recipes ---------------------------------------------------------------------------------------


def test_recipe_for_flowers_prints_the_published_figures_beside_ours(
    flowers_root: Path, tmp_path: Path
) -> None:
    result = compare(
        tmp_path / "out", "vgg_small:0.1", "--recipe", "flowers-resnet18", "--data",
        f"flowers102:{flowers_root}", "--loader-workers", "0", "--methods", "attribution",
        "--seeds", "0", "--images", "5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("| attribution")]
    cells = {c[1].strip(): [x.strip() for x in c] for c in (x.strip("|").split("|") for x in lines)}
    assert cells.keys() == {"39.95%", "37.55%", "32.07%"}
    assert cells["32.07%"][-2:] == ["74.53", "67.93 / 78.32"]
    assert cells["39.95%"][-2:] == ["", ""]
    assert "| Taylor-guided " in result.stdout
    for caveat in published("flowers-resnet18").caveats:
        assert caveat in result.stdout


def test_recipe_for_cifar_has_the_published_classes_and_later_results(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener = functools.partial(data.cifar10, val_size=20)
    monkeypatch.setattr(data, "cifar10", opener)
    result = compare(
        tmp_path / "out", "vgg_small:0.1", "--recipe", "cifar10-vgg16", "--data",
        f"cifar10:{cifar_root}", "--methods", "l1", "--budgets", "0.6561", "--seeds", "0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "93.40" in next(line for line in result.stdout.splitlines() if line.startswith("| l1"))
    assert "HRankPlus" in result.stdout
    assert "| truck |  93.59 | 92.31 |  -1.28 |" in (tmp_path / "out/per_class.md").read_text()
    tree = json.loads((tmp_path / "out/comparison.json").read_text())
    assert tree["published"]["title"] == "VGG-16, CIFAR-10"


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipe_is_complete_and_its_cost_is_what_it_says(name: str) -> None:
    recipe = recipes.recipe(name)
    table = published(name)
    assert {row.method for row in table.rows} >= {None, "taylor", "taylor_guided"}
    assert len(recipe.budgets) == len(table.rows) - 1
    cells = len(recipe.methods) * len(recipe.budgets)
    epochs = recipe.train.epochs + 16 * cells * recipe.finetune.epochs
    assert f"{cells} cells a seed" in recipe.cost()
    assert f"At most {epochs} epochs" in recipe.cost()
    assert names.pretrained(recipe.network) is None or recipe.data == "flowers102"
    assert f"{name}: " in runner.invoke(cli.app, ["compare", "--list-recipes"]).stdout


@pytest.mark.parametrize(
    ("name", "size", "params"),
    [
        ("flowers-vgg16", 224, 1.35e8),
        ("flowers-resnet18", 224, 1.12e7),
        ("flowers-resnet50", 224, 2.37e7),
        ("cifar10-vgg16", 32, 1.47e7),
    ],
)
def test_recipe_has_the_network_whose_size_is_known(name: str, size: int, params: float) -> None:
    pytest.importorskip("torchvision")
    recipe = recipes.recipe(name)
    classes = tuple(str(i) for i in range(102 if recipe.data == "flowers102" else 10))
    splits = dataclasses.replace(
        names.NamedData("digits:8")(0), classes=classes, image_shape=(3, size, size)
    )
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # counts need no values
        model = names.network(recipe.network, splits)().eval()
        model(torch.empty(1, 3, size, size))
    assert counter.get_total_flops() / 2 == pytest.approx(recipe.macs, rel=0.005)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(params, rel=0.005)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_published_percentages_fit_the_published_counts(name: str) -> None:
    """To the rounding of the printed counts."""
    rows = published(name).rows
    whole = rows[0]
    # The CIFAR table's unpruned counts are not those its percentages refer to; see its caveats.
    macs, params = (whole.macs or 3.14e8), (whole.params or 1.47e7)
    for row in rows[1:]:
        assert row.macs is not None
        assert row.params is not None
        assert 100 - 100 * row.macs / macs == pytest.approx(row.macs_pruned, abs=0.5)
        assert 100 - 100 * row.params / params == pytest.approx(row.params_pruned, abs=0.5)


# --- names -----------------------------------------------------------------------------------------


def test_images_are_limited_with_the_classes_in_their_shares() -> None:
    splits = names.NamedData("digits:8", images=50)(0)
    batches = list(splits.train)
    assert sum(len(labels) for _, labels in batches) == 50
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [5] * 10
    assert splits.image_shape == (1, 8, 8)
    every = list(names.NamedData("digits:8", images=1257)(0).train)
    assert sum(len(labels) for _, labels in every) == 1257


def test_networks_are_found_by_name() -> None:
    splits = names.NamedData("digits:8")(0)
    half = names.network("resnet20:0.5", splits)()
    assert isinstance(half, models.resnet.ResNet)
    assert half.conv1.weight.shape == (8, 1, 3, 3)
    with pytest.raises(InputError, match="'wide' is no width"):
        names.network("resnet20:wide", splits)


def test_torchvision_networks_get_the_right_head() -> None:
    pytest.importorskip("torchvision")
    splits = names.NamedData("digits:8")(0)
    colour = dataclasses.replace(splits, image_shape=(3, 8, 8))
    model = names.network("torchvision:squeezenet1_1:pretrained", colour)()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        names.network("torchvision:resnet81", colour)
    with pytest.raises(InputError, match="pretrained"):
        names.pretrained("torchvision:resnet18:trained")


def test_pretrained_weights_leave_the_last_layer_random(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("torchvision").models
    state = {k: torch.full_like(v, 2) for k, v in library.squeezenet1_1().state_dict().items()}

    class Weights:
        class DEFAULT:
            @staticmethod
            def get_state_dict(**_: Any) -> dict[str, torch.Tensor]:
                return state

    monkeypatch.setattr(library, "get_model_weights", lambda kind: Weights)
    model = library.squeezenet1_1(num_classes=10)
    before = model.classifier[1].weight.clone()
    load = names.pretrained("torchvision:squeezenet1_1:pretrained")
    assert load is not None
    load(model)
    assert torch.equal(model.classifier[1].weight, before)
    convolutions = [m for m in model.features.modules() if isinstance(m, nn.Conv2d)]
    assert all(bool((m.weight == 2).all()) for m in convolutions)


def test_pretrained_weights_that_cannot_be_had_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("torchvision").models

    def fail(kind: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(library, "get_model_weights", fail)
    with pytest.raises(InputError, match=r"no route to host.*leave out `:pretrained`"):
        names.load_imagenet(nn.Identity(), "resnet18")
