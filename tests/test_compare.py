"""A comparison is what its cells say, its cells are what `prune` gives, and nothing finished is lost."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import attrfast
from attrfast import data
from attrfast.compare import Comparison, Start, StartKey, tables
from attrfast.compare.footing import Footing
from attrfast.compare.peers import prune_by_peer
from attrfast.compare.records import Cell, CellKey, ClassCount, Measured
from attrfast.compare.scratch import narrow
from attrfast.criteria import L1, BNScale, Soft
from attrfast.errors import InputError, ModelError, TargetError
from attrfast.finetune import FineTune
from attrfast.names import limited

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


class Plain(nn.Module):
    """Two convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.two, self.head = nn.Conv2d(12, 16, 3, stride=2), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.two(torch.relu(self.norm(self.one(x)))))
        return self.head(x.amax((2, 3)))


class Residual(nn.Module):
    """A convolution beside an identity: two layers that can only shrink together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 10, 3, stride=2), nn.Conv2d(10, 14, 3, padding=1)
        self.back, self.head = nn.Conv2d(14, 10, 1), nn.Linear(10, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.back(torch.relu(self.inner(x))))
        return self.head(x.amax((2, 3)))


def digits(seed: int) -> data.Splits:
    return limited(data.digits(seed=seed, batch_size=50), 150, seed)


class Raises(attrfast.Criterion):
    """Fails on the second network."""

    name, needs_data = "raises", False

    def from_weights(self, model: nn.Module, units: Any, seed: int) -> torch.Tensor:
        if isinstance(model, Residual):
            raise ValueError("no such weights")
        return L1().from_weights(model, units, seed)


class Dies(Raises):
    """Ends the process on the second network."""

    name = "dies"

    def from_weights(self, model: nn.Module, units: Any, seed: int) -> torch.Tensor:
        if isinstance(model, Residual):
            os._exit(9)
        return super().from_weights(model, units, seed)


NETWORKS = {"plain": Plain, "residual": Residual}
SAME: Any = {"threads": 1, "progress": False, "filters_per_step": 8, "train": 2}
GRID: Any = {"methods": ["attribution", "l1", "scratch"], "budgets": [0.3, 0.6], "seeds": [0, 3], **SAME}
ONE: Any = {"methods": ["l1"], "budgets": [0.5], "seeds": [0], **SAME}


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """2 networks x 3 methods x 2 budgets x 2 seeds."""
    return attrfast.compare(NETWORKS, digits, out=tmp_path_factory.mktemp("grid"), **GRID)


def files(folder: Path) -> dict[str, Any]:
    """Every cell and start, by its path, without the times."""
    found = {}
    for path in sorted([*folder.glob("cells/**/*.json"), *folder.glob("starts/**/*.json")]):
        tree = json.loads(path.read_text())
        tree.pop("seconds", None)
        for row in tree.get("history", []):
            for name in [name for name in row if name.startswith("seconds")]:
                del row[name]
        found[str(path.relative_to(folder))] = tree
    return found


def right_by_class(model: nn.Module, loader: Any) -> dict[int, list[bool]]:
    """One image at a time."""
    model.eval()
    found: dict[int, list[bool]] = {}
    with torch.no_grad():
        for images, labels in loader:
            for image, label in zip(images, labels.tolist(), strict=True):
                found.setdefault(label, []).append(int(model(image[None])[0].argmax()) == label)
    return found


# --- cells -----------------------------------------------------------------------------------------


def test_every_cell_is_there_and_within_its_budget(grid: Comparison) -> None:
    assert not grid.failures
    assert len(grid.cells) == 24
    assert grid.budgets == (0.6, 0.3)
    for cell in grid.cells:
        assert cell.after.macs <= cell.key.budget * cell.before.macs
        assert cell.after.macs == cell.history[-1].macs
        assert cell.before.macs == cell.history[0].macs


@pytest.mark.parametrize(("network", "method"), [("plain", "attribution"), ("residual", "l1")])
def test_cell_is_what_prune_gives(grid: Comparison, network: str, method: str) -> None:
    splits, model = digits(3), NETWORKS[network]()
    model.load_state_dict(load_file(grid.folder / "starts" / network / "seed-3.safetensors"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = attrfast.prune(
            model,
            splits.train,
            method,
            max_macs=0.3,
            filters_per_step=8,
            val_loader=splits.val,
            finetune=1,
            seed=3,
            progress=False,
        )
    finally:
        torch.set_num_threads(threads)
    cell = grid[network, method, 0.3, 3]

    def timeless(history: Any) -> list[Any]:
        rows = [dataclasses.asdict(row) for row in history]
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]

    assert timeless(cell.history) == timeless(result.history)
    assert cell.gates is not None
    assert {name: [bit == "1" for bit in bits] for name, bits in cell.gates.items()} == {
        name: gate.tolist() for name, gate in result.gates.items()
    }
    for measured, network_there in ((cell.before, model), (cell.after, result.model)):
        expected = right_by_class(network_there, splits.test)
        for label, counted in zip(sorted(expected), measured.classes, strict=True):
            assert counted == ClassCount(label, str(label), len(expected[label]), sum(expected[label]))


def test_all_methods_start_from_the_same_network(grid: Comparison) -> None:
    for start in grid.starts:
        cells = [cell for cell in grid.cells if cell.key.start == start.key]
        assert {cell.before for cell in cells} == {start.measured}
        assert len({cell.history[0].loss for cell in cells}) == 1
    digests = {start.digest for start in grid.starts}
    assert len(digests) == len(grid.starts) == 4


def test_more_workers_give_the_same_bits(grid: Comparison, tmp_path: Path) -> None:
    other = attrfast.compare(NETWORKS, digits, out=tmp_path, workers=2, **GRID)
    assert not other.failures
    assert files(tmp_path) == files(grid.folder)
    assert len(files(tmp_path)) == 28


# --- resuming --------------------------------------------------------------------------------------


def test_what_is_missing_or_cut_off_is_computed_again_and_nothing_else(tmp_path: Path) -> None:
    settings = {**ONE, "methods": ["l1", "scratch:l1"], "seeds": [0, 1]}
    attrfast.compare({"plain": Plain}, digits, out=tmp_path, **settings)
    before = files(tmp_path)
    paths = sorted(tmp_path.glob("cells/**/*.json"))
    assert len(paths) == 4
    paths[0].unlink()
    paths[3].write_text(paths[3].read_text()[:500])
    (tmp_path / "starts/plain/seed-1.safetensors").write_bytes(b"cut off")
    times = {path: path.stat().st_mtime_ns for path in paths[1:3]}
    again = attrfast.compare({"plain": Plain}, digits, out=tmp_path, **settings)
    assert not again.failures
    assert files(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_cells_of_other_settings_are_refused_and_kept(tmp_path: Path) -> None:
    attrfast.compare({"plain": Plain}, digits, out=tmp_path, **ONE)
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"0\.5-seed-0\.json belongs to other settings.*resume=False"):
        attrfast.compare({"plain": Plain}, digits, out=tmp_path, finetune=2, **ONE)
    assert files(tmp_path) == before
    with pytest.raises(InputError, match=r"seed-0\.json belongs to another network.*resume=False"):
        attrfast.compare({"plain": Residual}, digits, out=tmp_path, **ONE)
    assert files(tmp_path) == before
    anew = attrfast.compare({"plain": Residual}, digits, out=tmp_path, resume=False, **ONE)
    assert not anew.failures
    assert files(tmp_path) != before


# --- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "workers"), [(Raises(), 1), (Dies(), 2)])
def test_a_failing_cell_takes_no_other_along(tmp_path: Path, method: Any, workers: int) -> None:
    settings = {**ONE, "methods": [method, f"scratch:{method.name}", "l1"]}
    methods = {method.name: method, "control": "scratch:raises", "l1": "l1"}
    if method.name == "raises":
        settings["methods"] = methods
    else:
        settings["methods"] = [method, "l1"]
    found = attrfast.compare(NETWORKS, digits, out=tmp_path, workers=workers, **settings)
    errors = {failure.key: failure.error for failure in found.failures}
    (key,) = [k for k in errors if k.method == method.name]  # type: ignore[union-attr]
    assert key == CellKey("residual", method.name, 0.5, 0)
    assert ("no such weights" if workers == 1 else "exit status 9") in errors[key]
    if workers == 1:
        control = CellKey("residual", "control", 0.5, 0)
        assert errors.keys() == {key, control}
        assert "needs what failed: residual, raises" in errors[control]
        assert "ValueError" in found.failures[0].details
    assert len(found.cells) == 2 * len(settings["methods"]) - len(errors)
    assert f"{key}: " in found.summary()


def test_a_network_that_cannot_be_built_takes_no_other_along(tmp_path: Path) -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no layers")

    found = attrfast.compare({"broken": broken, "plain": Plain}, digits, out=tmp_path, **ONE)
    assert [cell.key.network for cell in found.cells] == ["plain"]
    assert [str(failure.key) for failure in found.failures] == [
        "broken, seed 0",
        "broken, l1, 0.5 of the multiply-adds, seed 0",
    ]
    assert "no layers" in found.failures[0].error
    found.save()
    assert "no layers" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"budgets": [1.2]}, "1.2"),
        ({"budgets": [0.5, 0.5]}, "more than once"),
        ({"budgets": []}, "budgets is empty"),
        ({"seeds": [-1]}, "-1"),
        ({"methods": ["tailor"]}, "did you mean 'taylor'.*tp_magnitude"),
        ({"methods": "l1"}, "list of names"),
        ({"methods": ["l1", "l1"]}, "more than once"),
        ({"methods": ["scratch:tp_magnitude"]}, "does not tell"),
        ({"methods": ["scratch"], "finetune": print}, "does not tell how many"),
        ({"workers": 0}, "workers"),
        ({"networks": {"plain": Plain()}}, "function that builds it"),
        ({"networks": {"plain": lambda: Plain()}, "workers": 2}, "no lambdas"),
        ({"pretrained": {"other": print}}, "'other'"),
        ({"data": (iter([]), [], [])}, "only once"),
        ({"data": [[]]}, "three loaders"),
    ],
)
def test_unusable_arguments_are_refused(tmp_path: Path, changes: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        attrfast.compare(
            **{"networks": {"plain": Plain}, "data": digits, "out": tmp_path, **ONE, **changes}
        )
    assert not list(tmp_path.iterdir())


# --- tables ----------------------------------------------------------------------------------------


def test_tables_are_the_means_and_spreads_of_the_cell_files(grid: Comparison) -> None:
    written = {path.name for path in grid.save()}
    assert {"comparison.md", "comparison.csv", "comparison.json", "per_class.md"} <= written
    by_group: dict[tuple[str, str, float], list[Any]] = {}
    for path in grid.folder.glob("cells/**/*.json"):
        cell = json.loads(path.read_text())
        key = cell["key"]
        by_group.setdefault((key["network"], key["method"], key["budget"]), []).append(cell)
    with (grid.folder / "comparison.csv").open() as lines:
        rows = {
            (row["network"], row["method"], float(row["budget"])): row
            for row in csv.DictReader(lines)
            if row["method"]
        }
    assert rows.keys() == by_group.keys()
    text = (grid.folder / "comparison.md").read_text()
    for key, cells in by_group.items():
        top1 = [
            100 * sum(c["right"] for c in cell["after"]["classes"]) / 360 for cell in cells
        ]  # the test set has 360 images
        pruned = [100 - 100 * cell["after"]["macs"] / cell["before"]["macs"] for cell in cells]
        row = rows[key]
        assert int(row["n"]) == 2
        assert float(row["top1"]) == pytest.approx(sum(top1) / 2)
        assert float(row["top1_std"]) == pytest.approx(abs(top1[0] - top1[1]) / math.sqrt(2))
        assert float(row["macs_pruned"]) == pytest.approx(sum(pruned) / 2)
        assert float(row["params"]) == pytest.approx(sum(c["after"]["params"] for c in cells) / 2)
        assert f"{sum(top1) / 2:.2f} ± {statistics.stdev(top1):.2f}" in text
    tree = json.loads((grid.folder / "comparison.json").read_text())
    assert len(tree["rows"]) == 2 + len(rows)
    for definition in tables.DEFINITIONS:
        assert definition in text


def made_up(before: dict[str, int], after: dict[str, dict[str, int]], seeds: int = 1) -> Comparison:
    """A comparison in which every class has ten images."""

    def measured(right: dict[str, int], macs: int) -> Measured:
        classes = (ClassCount(i, name, 10, hits) for i, (name, hits) in enumerate(right.items()))
        return Measured(tuple(classes), macs, macs // 10)

    whole = measured(before, 1000)
    step = attrfast.Step(0, 1.0, 8, 0.9, 0.1, 1000, 100, 0.0, 0.0)
    history = [
        dataclasses.replace(step, step=i, macs=1000 - 250 * i, top1=0.9 - i / 20) for i in range(4)
    ]
    cells = [
        Cell(
            CellKey("net", method, budget, seed),
            "",
            whole,
            measured(right, int(1000 * budget)),
            tuple(history),
            None,
            3,
            "reached",
        )
        for method, right in after.items()
        for budget in (0.5, 0.25)
        for seed in range(seeds)
    ]
    starts = [Start(StartKey("net", seed), "", "", whole) for seed in range(seeds)]
    return Comparison(
        ("net",), tuple(after), (0.5, 0.25), tuple(range(seeds)), tuple(starts), tuple(cells), (), Path()
    )


def test_the_worst_class_is_the_one_that_loses_most() -> None:
    found = made_up({"cat": 3, "dog": 9}, {"a": {"cat": 1, "dog": 6}, "b": {"cat": 0, "dog": 9}})
    worst = {
        method: [row.name for row in found.class_rows("net", method, 0.5) if row.worst]
        for method in ("a", "b")
    }
    assert worst == {"a": ["dog"], "b": ["cat"]}
    lines = tables.per_class(found).splitlines()
    (dog,) = {line for line in lines if line.startswith("| dog")}
    cells = [cell.strip() for cell in dog.strip("|").split("|")]
    assert cells == ["dog", "10", "90.00", "**▼ 60.00 (-30.00)**", "90.00 (+0.00)"]


def test_classes_are_matched_by_their_label_where_test_sets_differ() -> None:
    found = made_up({"cat": 3, "dog": 9}, {"a": {"cat": 1, "dog": 6}}, seeds=2)

    def without_cat(measured: Measured) -> Measured:
        return dataclasses.replace(measured, classes=measured.classes[1:])

    cells = [
        cell
        if cell.key.seed == 0
        else dataclasses.replace(cell, before=without_cat(cell.before), after=without_cat(cell.after))
        for cell in found.cells
    ]
    (row,) = dataclasses.replace(found, cells=tuple(cells)).class_rows("net", "a", 0.5)
    assert (row.name, row.before.mean, row.after.mean, row.change.n) == ("dog", 90, 60, 2)


def test_a_single_seed_has_no_spread() -> None:
    text = made_up({"cat": 3}, {"a": {"cat": 1}}).summary()
    line = next(line for line in text.splitlines() if line.startswith("| a "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["a", "50%", "10.00", "-20.00", "5.00e2 (50.00)", "5.00e1 (50.00)", "3", "1"]


def test_pictures_have_a_panel_for_every_method(tmp_path: Path) -> None:
    import matplotlib

    from attrfast.compare import curves

    after = {f"method {i}": {"cat": i % 8, "dog": 5} for i in range(17)}
    found = made_up({"cat": 9, "dog": 9}, after, seeds=2)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        curves.panels(curves.reached(found, "net"), "title", tmp_path / "panels.svg")
    text = (tmp_path / "panels.svg").read_text()
    for method in after:
        assert f">{method}<" in text
    files = curves.draw(found, tmp_path)
    assert [path.name for path in files] == ["curves-net.png", "ways-net.png", "order-net.png"]


def test_methods_are_ordered_by_their_accuracy(tmp_path: Path) -> None:
    import matplotlib

    from attrfast.compare import curves

    after = {"low": {"cat": 2}, "high": {"cat": 8}, "middle": {"cat": 5}}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        curves.order(made_up({"cat": 9}, after), "net", tmp_path / "order.svg")
    text = (tmp_path / "order.svg").read_text()
    # Marks of an axis are written from the bottom upwards.
    assert text.index(">low<") < text.index(">middle<") < text.index(">high<")


def test_ways_are_means_of_interpolated_histories() -> None:
    found = made_up({"cat": 9}, {"a": {"cat": 9}}, seeds=2)
    from attrfast.compare import curves

    step = found.cells[0].history[0]

    def cell(seed: int, points: list[tuple[int, float]]) -> Cell:
        rows = tuple(dataclasses.replace(step, macs=macs, top1=top1) for macs, top1 in points)
        return dataclasses.replace(found.cells[0], key=CellKey("net", "a", 0.25, seed), history=rows)

    one = cell(0, [(1000, 0.8), (500, 0.6), (200, 0.3)])
    two = cell(1, [(1000, 0.9), (750, 0.8), (250, 0.4)])
    curve = curves.ways(dataclasses.replace(found, cells=(one, two)), "net")["a"]
    assert curve.share == (100.0, 75.0, 50.0, 25.0)
    # At 75%: 0.7 and 0.8. At 50%: 0.6 and 0.6. At 25%: 0.35 and 0.4.
    assert [point.mean for point in curve.top1] == pytest.approx([85, 75, 60, 37.5])
    assert curve.top1[1].std == pytest.approx(10 / math.sqrt(2))


# --- methods of their own --------------------------------------------------------------------------


def footing(budget: float, **changes: Any) -> Footing:
    splits = digits(0)
    settings: dict[str, Any] = {
        "train": splits.train,
        "val": splits.val,
        "budget": budget,
        "finetune": FineTune(epochs=1),
        "final_finetune": None,
        "filters_per_step": 8,
        "max_batches": 1,
        "device": torch.device("cpu"),
        "seed": 0,
    }
    return Footing(**{**settings, **changes})


@pytest.mark.parametrize("peer", ["tp_magnitude", "tp_group_taylor"])
@pytest.mark.parametrize("build", [Plain, Residual])
def test_peers_meet_the_budget_and_remove_no_more_than_it_needs(peer: str, build: Any) -> None:
    torch.manual_seed(1)
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = prune_by_peer(model, footing(0.4), peer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    last, whole = pruned.history[-1], pruned.history[0]
    assert last.macs <= 0.4 * whole.macs < pruned.history[-2].macs
    assert pruned.epochs == len(pruned.history) - 1
    for row, next_row in zip(pruned.history[:-2], pruned.history[1:-1], strict=True):
        assert row.filters - next_row.filters >= 8
        assert sum(next_row.removed.values()) == row.filters - next_row.filters
    assert sum(p.numel() for p in pruned.model.parameters()) == last.params
    logits = pruned.model(next(iter(digits(0).val))[0])
    assert logits.shape[1] == 10


class Recording:
    """A loader that notes the labels of every pass."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.generator = loader, loader.generator
        self.passes: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        seen: list[int] = []
        self.passes.append(seen)
        for images, labels in self.loader:
            seen.extend(labels.tolist())
            yield images, labels

    @property
    def whole_passes(self) -> list[list[int]]:
        return [seen for seen in self.passes if len(seen) == 150]


def test_peers_see_the_batches_in_the_same_order_as_criteria() -> None:
    orders = []
    for method in ("l1", "attribution", "tp_magnitude", "tp_group_taylor"):
        task = footing(0.5, train=Recording(digits(0).train), finetune=FineTune(epochs=2), seed=4)
        assert isinstance(task.train, Recording)
        if method.startswith("tp"):
            prune_by_peer(Plain(), task, method)
        else:
            attrfast.prune(
                Plain(),
                task.train,
                method,
                max_macs=0.5,
                filters_per_step=8,
                val_loader=task.val,
                finetune=task.finetune,
                max_batches=1,
                seed=4,
                progress=False,
            )
        orders.append(task.train.whole_passes)
    steps = min(map(len, orders))
    assert steps >= 2
    assert len({str(order[:steps]) for order in orders}) == 1
    assert orders[0][0] != orders[0][1]


def test_a_peer_ranks_by_magnitude_in_its_own_way() -> None:
    """The first step on a network without coupling: Torch-Pruning itself, asked directly."""
    import torch_pruning as tp

    torch.manual_seed(2)
    model = Plain().eval()
    pruned = prune_by_peer(
        model, footing(0.9, finetune=FineTune(epochs=0), filters_per_step=1), "tp_magnitude"
    )
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 1, 8, 8))
    importance = tp.importance.MagnitudeImportance()
    scores = {
        layer: importance(graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(width))))
        for layer, width in ((model.one, 12), (model.two, 16))
    }
    lowest = min(
        (float(value), i, layer) for layer in scores for i, value in enumerate(scores[layer].tolist())
    )
    first = pruned.history[1].removed
    assert first == {"one" if lowest[2] is model.one else "two": 1}


def test_a_network_that_a_peer_fails_on_is_named_as_its_limit() -> None:
    class FixedView(Plain):
        """A view whose sizes are written out in the code."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.two(torch.relu(self.norm(self.one(x)))))
            return self.head(x.view(-1, 16, 9).amax(2))

    with pytest.raises(ModelError, match="Torch-Pruning can't prune this network: RuntimeError"):
        prune_by_peer(FixedView(), footing(0.2), "tp_magnitude")


def test_gradients_that_do_not_reach_a_layer_count_as_zero() -> None:
    class Auxiliary(Plain):
        """A second output, which is no part of the loss."""

        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.relu(self.two(torch.relu(self.norm(self.one(x))))).amax((2, 3))
            return self.head(x), self.spare(x)

    pruned = prune_by_peer(Auxiliary(), footing(0.5), "tp_group_taylor")
    assert pruned.history[-1].macs <= 0.5 * pruned.history[0].macs


def test_a_peer_takes_fewer_filters_where_so_many_would_remove_none() -> None:
    """All filters but one at once: whole layers are among the lowest, and are passed over."""
    torch.manual_seed(0)
    task = footing(0.2, filters_per_step=27, finetune=FineTune(epochs=0))
    pruned = prune_by_peer(Plain(), task, "tp_magnitude")
    assert pruned.history[-1].macs <= 0.2 * pruned.history[0].macs


def test_a_peer_that_gets_no_further_says_so() -> None:
    with pytest.raises(TargetError, match="removes nothing more"):
        prune_by_peer(
            Plain(), footing(0.01, finetune=FineTune(epochs=0), filters_per_step=28), "tp_magnitude"
        )


def test_epochs_of_a_criterion_that_trains_count_too(tmp_path: Path) -> None:
    task = footing(0.5, final_finetune=FineTune(epochs=7), finetune=FineTune(epochs=2))
    assert task.epochs(3) == 3 * 2 + 7
    assert task.epochs(3, Soft(epochs=5)) == 3 * (2 + 5) + 7
    assert task.epochs(3, BNScale()) == 3 * 2 + 7  # trains where it is given a sparsity alone
    assert task.epochs(0) == 0
    assert footing(0.5, finetune=print).epochs(3) is None
    methods = {"soft": Soft(epochs=5), "scratch": "scratch:soft"}
    found = attrfast.compare({"plain": Plain}, digits, out=tmp_path, **{**ONE, "methods": methods})
    method, scratch = found.cells
    assert method.epochs == 6 * (len(method.history) - 1)
    assert scratch.epochs == 2 + method.epochs


def test_scratch_has_the_architecture_of_the_other_and_all_its_epochs(grid: Comparison) -> None:
    for cell in grid.cells:
        if cell.key.method == "scratch":
            donor = grid[cell.key.network, "attribution", cell.key.budget, cell.key.seed]
            assert cell.gates == donor.gates
            assert (cell.after.macs, cell.after.params) == (donor.after.macs, donor.after.params)
            assert donor.epochs == len(donor.history) - 1
            assert cell.epochs == 2 + donor.epochs
            assert cell.after.classes != donor.after.classes


def test_random_weights_are_scaled_for_the_inputs_that_are_left() -> None:
    torch.manual_seed(0)
    model, whole = Plain(), Plain()
    whole.load_state_dict(model.state_dict())
    one, two = torch.zeros(12, dtype=torch.bool), torch.ones(16, dtype=torch.bool)
    one[[1, 4, 7]], two[0] = True, False
    narrow(model, footing(0.5), {"one": one, "two": two})
    assert torch.equal(model.one.weight, whole.one.weight[one])
    torch.testing.assert_close(model.two.weight, 2 * whole.two.weight[two][:, one])
    torch.testing.assert_close(model.head.weight, math.sqrt(16 / 15) * whole.head.weight[:, two])
    assert torch.equal(model.two.bias, whole.two.bias[two])


def test_pretrained_weights_are_loaded_but_not_from_scratch(tmp_path: Path) -> None:
    loaded: list[nn.Module] = []

    def load(model: nn.Module) -> None:
        loaded.append(model)
        nn.init.ones_(model.two.weight)  # type: ignore[union-attr, arg-type]

    settings = {**ONE, "methods": ["l1", "scratch:l1"], "train": 0, "finetune": 0}
    found = attrfast.compare(
        {"plain": Plain}, digits, out=tmp_path, pretrained={"plain": load}, **settings
    )
    assert not found.failures
    assert bool((load_file(tmp_path / "starts/plain/seed-0.safetensors")["two.weight"] == 1).all())
    assert len(loaded) == 1  # for the start; cells have its weights, and from scratch there are none
    random = found["plain", "scratch:l1", 0.5, 0]
    assert random.history[-1].loss != found["plain", "l1", 0.5, 0].history[-1].loss


def test_loaders_criteria_and_names_of_ones_own_can_be_compared(tmp_path: Path) -> None:
    splits = digits(0)
    found = attrfast.compare(
        {"a/b: c": functools.partial(Plain)},
        (splits.train, splits.val, splits.test),
        out=tmp_path,
        **{**ONE, "methods": {"largest weights": L1(), "..": "random"}},
    )
    assert not found.failures
    assert all(path.is_relative_to(tmp_path / "cells") for path in tmp_path.glob("**/0.5-seed-0.json"))
    assert len(list(tmp_path.glob("cells/**/0.5-seed-0.json"))) == 2
    assert [c.name for c in found.cells[0].after.classes] == [str(i) for i in range(10)]
    found.save()
    with pytest.raises(InputError, match="there is no cell"):
        found["a/b: c", "l1", 0.5, 0]
