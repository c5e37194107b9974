"""A saved model comes back as it was, from its folder and the code of the unpruned one alone."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, family, images_for, lived_in
from safetensors.torch import load_file, save_file
from small_networks import CLASSES, NETWORKS, Grouped, Plain, UpAndDown
from test_surgery import some_removed
from torch import nn

import attrfast
from attrfast.channels import find_units
from attrfast.surgery import cut
from attrfast.trace import tensors_in


def outputs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(tensors_in(model.eval()(*inputs)))


def cut_down(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], share: float = 0.3, seed: int = 0
) -> attrfast.PruneResult:
    """What `prune` gives, with units chosen at random."""
    units = find_units(model, inputs)
    removed = some_removed(units, share, seed)
    smaller = copy.deepcopy(model)
    cut(smaller, units, removed)
    gates = {name: ~removed[row] for name, row in units.filters.items()}
    row = attrfast.Step(0, 1.0, units.total_filters, math.nan, 0.5, 1, 1, 0.0, 0.0)
    return attrfast.PruneResult(smaller, [row], gates, "random", "by the test")


def assert_same(
    loaded: nn.Module, saved: nn.Module, inputs: tuple[torch.Tensor, ...], whole: nn.Module
) -> None:
    """Same widths, same bits, same outputs; and not those of the unpruned model."""
    assert str(loaded) == str(saved)
    got, want = loaded.state_dict(), saved.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in want.items())
    for a, b, before in zip(*(outputs(m, inputs) for m in (loaded, saved, whole)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, before)


def blank(model: nn.Module) -> nn.Module:
    """The same architecture with other values."""
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1)
    return model


# vgg11_bn stands for vgg11 as well: half a gigabyte of weights each.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"vgg11"}))
def test_family_comes_back(tmp_path: Path, name: str) -> None:
    whole, images = family(name), (images_for(name, 2),)
    result = cut_down(whole, images)
    result.save(tmp_path)
    loaded = attrfast.load(tmp_path, lambda: blank(whole))
    assert_same(loaded, result.model, images, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"fixed view"}))
def test_small_network_comes_back(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    make, example = NETWORKS[name]
    torch.manual_seed(0)
    whole = lived_in(make()).to(dtype)
    inputs = tuple(x.to(dtype) for x in example(2))
    result = cut_down(whole, inputs, 0.5)
    result.save(tmp_path)
    loaded = attrfast.load(tmp_path, make)
    assert_same(loaded, result.model, inputs, whole)
    assert not any(module.training for module in loaded.modules())


# -- what a model may hold -----------------------------------------------------------------------------


class Shared(nn.Module):
    """One batch norm under two names, a bias of two convolutions, tied linear layers, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.bias = self.first.bias
        self.norm = self.again = nn.BatchNorm2d(8)
        self.body = nn.Linear(8, 6)
        self.head = nn.Linear(6, 6)
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.head.weight
        self.logits = nn.Linear(12, CLASSES)
        self.register_buffer("shift", torch.zeros(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x * self.scale + self.shift)))
        x = torch.relu(self.body(torch.relu(self.again(self.second(x))).mean((2, 3))))
        return self.logits(torch.relu(torch.cat([self.head(x), self.twin(x)], 1)))


def shared_result() -> tuple[Shared, attrfast.PruneResult]:
    torch.manual_seed(0)
    whole = lived_in(Shared())
    with torch.no_grad():
        whole.shift.fill_(0.25)
        whole.seen.fill_(7)
    return whole, cut_down(whole, (IMAGES,), 0.4)


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def test_tensors_that_are_one_stay_one_and_buffers_come_back(tmp_path: Path) -> None:
    whole, result = shared_result()
    result.save(tmp_path)
    loaded = attrfast.load(tmp_path, Shared)
    assert_same(loaded, result.model, (IMAGES,), whole)
    for model in (result.model, loaded):
        assert model.norm is model.again
        assert model.twin.weight is model.head.weight
    # Surgery gives each of the two convolutions a bias of its own.
    assert result.model.first.bias is not result.model.second.bias
    assert loaded.first.bias is not loaded.second.bias
    assert float(loaded.shift) == 0.25
    assert int(loaded.seen) == 7
    assert [type(p) for p in loaded.parameters()] == [nn.Parameter] * len(list(loaded.parameters()))


def test_a_model_without_the_ties_is_refused(tmp_path: Path) -> None:
    def untied() -> nn.Module:
        model = Shared()
        model.twin.weight = nn.Parameter(torch.zeros_like(model.head.weight))
        return model

    shared_result()[1].save(tmp_path)
    with pytest.raises(attrfast.InputError, match=r"head\.weight and twin\.weight were one tensor.*tie"):
        attrfast.load(tmp_path, untied)


def test_a_pruned_model_that_is_pruned_again_loads_from_either_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = lived_in(Grouped())
    first = cut_down(whole, (IMAGES,), 0.3)
    second = cut_down(first.model, (IMAGES,), 0.3, seed=1)
    assert str(second.model) != str(first.model)
    second.save(tmp_path / "second")
    assert_same(attrfast.load(tmp_path / "second", Grouped), second.model, (IMAGES,), whole)
    first.save(tmp_path / "first")
    again = attrfast.load(tmp_path / "first", Grouped)
    assert_same(attrfast.load(tmp_path / "second", again), second.model, (IMAGES,), whole)
    assert str(again) == str(first.model)
    third = cut_down(attrfast.load(tmp_path / "second", Grouped), (IMAGES,), 0.2, seed=2)
    third.save(tmp_path / "third")
    assert_same(attrfast.load(tmp_path / "third", Grouped), third.model, (IMAGES,), whole)


def test_a_model_may_be_given_and_is_left_as_it_is(tmp_path: Path) -> None:
    whole = lived_in(Plain()).train()
    result = cut_down(whole, (IMAGES,))
    before = copy.deepcopy(whole.state_dict())
    result.save(tmp_path)
    loaded = attrfast.load(tmp_path, whole)
    assert loaded is not whole
    assert whole.training
    assert whole.features[0].out_channels == 8
    assert all(torch.equal(before[n], t) for n, t in whole.state_dict().items())
    assert str(loaded) == str(result.model.eval())


def test_the_built_model_says_what_is_trained(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        model = Plain()
        model.features.requires_grad_(False)
        return model

    result = cut_down(lived_in(Plain()), (IMAGES,))
    result.save(tmp_path)
    loaded = attrfast.load(tmp_path, frozen)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in loaded.named_parameters() if name.startswith("classifier")}


def test_wrappers_of_torch_compile_are_looked_through(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = lived_in(Plain())
    result = cut_down(whole, (IMAGES,))
    plain, result.model = result.model, torch.compile(result.model, backend="eager")
    result.save(tmp_path)
    loaded = attrfast.load(tmp_path, lambda: torch.compile(Plain(), backend="eager"))
    assert_same(loaded, plain, (IMAGES,), whole)


def test_weights_trained_after_pruning_are_saved(tmp_path: Path) -> None:
    result = cut_down(lived_in(Plain()), (IMAGES,))
    result.save(tmp_path)
    with torch.no_grad():
        result.model.features[0].weight.add_(1)
    result.save(tmp_path)
    loaded = attrfast.load(tmp_path, Plain)
    assert torch.equal(loaded.features[0].weight, result.model.features[0].weight)
    assert {file.name for file in tmp_path.iterdir()} == {"recipe.json", "weights.safetensors"}


def test_a_model_that_was_pruned_in_place_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lived_in(UpAndDown())
    whole = copy.deepcopy(model)
    data = [(torch.randn(8, 3, 16, 16), torch.arange(8) % CLASSES)]
    result = attrfast.prune(model, data, keep_ratio=0.6, finetune=0, inplace=True, progress=False)
    result.save(tmp_path)
    assert_same(attrfast.load(tmp_path, UpAndDown), model, (IMAGES,), whole)


def test_what_prune_gives_loads_in_another_process(tmp_path: Path) -> None:
    """The other process knows the architecture's code and the folder, and no data."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 3, 16, 16), torch.arange(8) % CLASSES)]
    result = attrfast.prune(lived_in(UpAndDown()), data, keep_ratio=0.6, finetune=0, progress=False)
    result.save(tmp_path / "model")
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import attrfast, torch
        from small_networks import UpAndDown
        model = attrfast.load(sys.argv[1], UpAndDown)
        with torch.no_grad():
            torch.save(model(torch.load(sys.argv[2])), sys.argv[2])
    """
    torch.save(IMAGES, tmp_path / "images.pt")
    command = [sys.executable, "-c", textwrap.dedent(script), tmp_path / "model", tmp_path / "images.pt"]
    subprocess.run(command, check=True, timeout=60)
    (want,) = outputs(result.model, (IMAGES,))
    assert torch.equal(torch.load(tmp_path / "images.pt"), want)


# -- the recipe ----------------------------------------------------------------------------------------


def test_the_recipe_tells_how_the_model_came_about(tmp_path: Path) -> None:
    data = [(torch.randn(8, 3, 16, 16), torch.arange(8) % CLASSES)]
    result = attrfast.prune(
        lived_in(Plain()), data, criterion="l2", keep_ratio=0.6, finetune=0, progress=False
    )
    result.history[0] = dataclasses.replace(result.history[0], top1=math.nan, loss=math.inf)
    assert result.save(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    recipe = attrfast.read_recipe(tmp_path / "a" / "b")
    assert (recipe.criterion, recipe.stopped) == ("l2", result.stopped)
    assert recipe.gates.keys() == result.gates.keys()
    assert all(torch.equal(recipe.gates[name], gate) for name, gate in result.gates.items())
    assert [attrfast.Step(**row) for row in recipe.history[1:]] == result.history[1:]
    assert math.isnan(recipe.history[0]["top1"])
    assert math.isnan(recipe.history[0]["loss"])  # JSON knows no infinity either
    assert recipe.modules["features.0"].widths["out_channels"] == int(recipe.gates["features.0"].sum())
    assert recipe.versions["torch"] == torch.__version__
    text = (tmp_path / "a" / "b" / "recipe.json").read_text()
    json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON


# -- what is refused -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved `Plain`."""
    torch.manual_seed(0)
    return cut_down(lived_in(Plain()), (IMAGES,)).save(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def flipped(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "No such file"),
    "no recipe": (lambda f: (f / "recipe.json").unlink(), "No such file.*recipe.json"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "No such file.*weights"),
    "short recipe": (lambda f: (f / "recipe.json").write_text('{"format": '), "recipe.json.*no JSON"),
    "binary recipe": (lambda f: (f / "recipe.json").write_bytes(b"\xff\xfe\x00"), "recipe.json"),
    "deep recipe": (lambda f: (f / "recipe.json").write_text("[" * 100_000), "no JSON"),
    "other JSON": (lambda f: (f / "recipe.json").write_text("[1]"), "must be an object, got list"),
    "changed recipe": (
        lambda f: (f / "recipe.json").write_text(
            (f / "recipe.json").read_text().replace("random", "l1")
        ),
        "checksum.*changed or damaged",
    ),
    "short weights": (
        lambda f: (f / "weights.safetensors").write_bytes((f / "weights.safetensors").read_bytes()[:-1]),
        "bytes where.*were saved",
    ),
    "changed weight": (lambda f: flipped(f / "weights.safetensors", -3), "checksum differs"),
    "changed header": (lambda f: flipped(f / "weights.safetensors", 20), "checksum differs"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(copied: Path, damage: str) -> None:
    change, reason = DAMAGES[damage]
    change(copied)
    with pytest.raises(attrfast.InputError, match=reason):
        attrfast.load(copied, Plain)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A recipe by someone who knows how checksums are made."""
    file = folder / "recipe.json"
    raw = json.loads(file.read_text())
    del raw["checksum"]
    change(raw)
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    raw["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps(raw))


def renamed(raw: dict[str, Any], part: str, old: str, new: str) -> None:
    raw[part] = {new if name == old else name: value for name, value in raw[part].items()}


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "format": (lambda r: r.update(format="other"), "format is 'other'"),
    "version": (lambda r: r.update(version=2), "version 2.*reads version 1"),
    "no modules": (lambda r: r.pop("modules"), "no 'modules'"),
    "modules a list": (lambda r: r.update(modules=[]), "modules must be an object, got list"),
    "history a number": (lambda r: r.update(history=3), "history must be a list, got int"),
    "criterion a number": (lambda r: r.update(criterion=3), "criterion must be text, got int"),
    "gate of words": (lambda r: r["gates"].update({"features.0": "10x1"}), "made of 0 and 1"),
    "gate of another layer": (lambda r: r["gates"].update({"gone": "11"}), "gone has None filters"),
    "gate more open": (lambda r: r["gates"].update({"features.0": "1" * 8}), "though 8 gates are open"),
    "module outside": (
        lambda r: renamed(r, "modules", "features.2", "features.2.__class__"),
        "'features.2.__class__' among its modules, yours has not",
    ),
    "another kind": (lambda r: r["modules"]["features.2"].update(kind="GELU"), "is a ReLU, and a GELU"),
    "method as a width": (
        lambda r: r["modules"]["features.2"].update(widths={"forward": 1}),
        r"features.2 is a ReLU with the widths \[\], and the recipe gives \['forward'\]",
    ),
    "width of text": (
        lambda r: r["modules"]["features.1"]["widths"].update(num_features="6"),
        "num_features must be a whole number of at least 1, got str",
    ),
    "width true": (
        lambda r: r["modules"]["features.1"]["widths"].update(num_features=True),
        "num_features must be a whole number",
    ),
    "width zero": (
        lambda r: r["modules"]["features.1"]["widths"].update(num_features=0),
        "num_features must be a whole number of at least 1, got int 0",
    ),
    "wider": (
        lambda r: r["modules"]["features.1"]["widths"].update(num_features=900),
        "num_features=8, and num_features=900 in the recipe, which pruning can't",
    ),
    "width that the weights have not": (
        lambda r: r["modules"]["features.1"]["widths"].update(num_features=1),
        r"features\.1\.\w+ was saved with the shape .*must be \(1,\)",
    ),
    "another stride": (
        lambda r: r["modules"]["features.0"]["settings"].update(stride=[2, 2]),
        r"stride=\[1, 1\], and stride=\[2, 2\] in the recipe",
    ),
    "shared with nothing": (
        lambda r: r.update(shared={"features.0.bias": "nothing"}),
        "features.0.bias is among the weights, and said to be nothing",
    ),
    "shared with itself": (
        lambda r: r.update(shared={"features.0.bias": "features.0.bias"}),
        "under which no tensor is held",
    ),
    "weights of no size": (lambda r: r["weights"].pop("bytes"), "weights.bytes must be a whole number"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_recipe_that_was_forged_is_refused(copied: Path, forgery: str) -> None:
    change, reason = FORGERIES[forgery]
    rewritten(copied, change)
    model = Plain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(attrfast.InputError, match=reason):
        attrfast.load(copied, lambda: model)
    assert str(model) == str(Plain())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in nested dicts and lists."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        yield (*above, key)
        yield from places(value, (*above, key))


@pytest.mark.parametrize("value", [None, 3, {"a": 1}], ids=repr)
def test_whatever_a_recipe_says_the_model_is_the_saved_one_or_refused(copied: Path, value: Any) -> None:
    """Every entry of the recipe in turn, replaced; all checksums right."""
    original = (copied / "recipe.json").read_text()
    want = attrfast.load(copied, Plain)
    refused = 0
    for path in places(json.loads(original)):
        if path == ("checksum",):
            continue

        def change(raw: dict[str, Any], path: tuple[Any, ...] = path) -> None:
            for key in path[:-1]:
                raw = raw[key]
            raw[path[-1]] = value

        (copied / "recipe.json").write_text(original)
        rewritten(copied, change)
        try:
            got = attrfast.load(copied, Plain)
        except attrfast.InputError:
            refused += 1
        else:
            assert str(got) == str(want), path
            assert torch.equal(got(IMAGES), want(IMAGES))
    assert refused > 50


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Weights by someone who knows how checksums are made."""
    file = folder / "weights.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    data = file.read_bytes()
    told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewritten(folder, lambda raw: raw.update(weights=told))


WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "one more": (lambda w: w.update(other=torch.zeros(1)), "'other' among its tensors, yours has not"),
    "one less": (
        lambda w: w.pop("features.0.bias"),
        "your model has 'features.0.bias' among its tensors",
    ),
    "another shape": (
        lambda w: w.update({"classifier.3.bias": torch.zeros(7)}),
        r"classifier\.3\.bias was saved with the shape \(7,\), and must be \(5,\)",
    ),
    "another type": (
        lambda w: w.update({"classifier.3.bias": torch.zeros(CLASSES, dtype=torch.int32)}),
        r"classifier\.3\.bias was saved as torch.int32",
    ),
}


@pytest.mark.parametrize("forgery", WEIGHTS)
def test_weights_that_were_forged_are_refused(copied: Path, forgery: str) -> None:
    change, reason = WEIGHTS[forgery]
    reweighted(copied, change)
    with pytest.raises(attrfast.InputError, match=reason):
        attrfast.load(copied, Plain)


def test_names_that_stand_for_one_tensor_cannot_be_forged(tmp_path: Path) -> None:
    _, result = shared_result()
    result.save(tmp_path)
    rewritten(tmp_path, lambda raw: raw["shared"].update({"again.weight": "nothing"}))
    with pytest.raises(
        attrfast.InputError, match=r"nothing under the name that stands for again\.weight"
    ):
        attrfast.load(tmp_path, Shared)
    rewritten(tmp_path, lambda raw: raw["shared"].pop("again.weight"))
    reweighted(
        tmp_path, lambda weights: weights.update({"again.weight": weights["norm.weight"].clone()})
    )
    with pytest.raises(attrfast.InputError, match=r"norm\.weight and again\.weight were two tensors"):
        attrfast.load(tmp_path, Shared)


def test_no_pickle_is_opened(copied: Path) -> None:
    """Weights that would run code when unpickled, with all checksums right."""
    file = copied / "weights.safetensors"
    torch.save({"features.0.bias": Bomb()}, file)
    data = file.read_bytes()
    told = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewritten(copied, lambda raw: raw.update(weights=told))
    with pytest.raises(attrfast.InputError, match="holds no weights"):
        attrfast.load(copied, Plain)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was opened",)


def with_stride() -> nn.Module:
    model = Plain()
    model.features[0].stride = (2, 2)
    return model


def with_another_head() -> nn.Module:
    model = Plain()
    model.classifier[3] = nn.Linear(12, 3)
    return model


def without_a_bias() -> nn.Module:
    model = Plain()
    model.features[0].bias = None
    return model


def raising() -> nn.Module:
    raise KeyError("config")


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Plain()


@pytest.mark.parametrize(
    ("model_fn", "reason"),
    [
        (Grouped, "the model itself is a Grouped, and a Plain|among its modules"),
        (lambda: Plain(width=4), "features.0 is a Conv2d with out_channels=4, and out_channels=. in"),
        (with_stride, r"features.0 is a Conv2d with stride=\[2, 2\], and stride=\[1, 1\]"),
        (with_another_head, "classifier.3 is a Linear with out_features=3, and out_features=5"),
        (without_a_bias, "the saved model has 'features.0.bias' among its tensors, yours has not"),
        (on_meta, "features.0.weight has no memory yet"),
        (raising, r"model_fn\(\) raised KeyError: 'config'"),
        (dict, r"model_fn\(\) must return a torch.nn.Module, got a dict"),
        ("plain", "model_fn must be a function that builds the model, or the model, got 'plain'"),
    ],
)
def test_another_architecture_is_refused(folder: Path, model_fn: Any, reason: str) -> None:
    with pytest.raises(attrfast.InputError, match=reason):
        attrfast.load(folder, model_fn)


def test_a_model_that_differs_in_training_alone_is_accepted(folder: Path) -> None:
    def other() -> nn.Module:
        model = Plain()
        model.features[1].momentum = 0.01
        model.features[2].inplace = False
        return model

    loaded = attrfast.load(folder, other)
    assert loaded.features[1].momentum == 0.01
    assert torch.equal(loaded(IMAGES), attrfast.load(folder, Plain)(IMAGES))


def test_extra_state_is_refused_when_saving(tmp_path: Path) -> None:
    class Extra(Plain):
        def get_extra_state(self) -> Any:
            return {"epoch": 3}

    result = cut_down(lived_in(Extra()), (IMAGES,))
    with pytest.raises(attrfast.ModelError, match=r"extra state \(Extra\.get_extra_state\).*buffer"):
        result.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_attributes_that_lie_are_refused_when_saving(tmp_path: Path) -> None:
    result = cut_down(lived_in(Plain()), (IMAGES,))
    result.model.features[1].num_features = 8
    with pytest.raises(attrfast.ModelError, match=r"features\.1\.\w+ has the shape .*say \(8,\)"):
        result.save(tmp_path)


def test_a_model_that_is_not_the_one_with_these_gates_is_refused_when_saving(tmp_path: Path) -> None:
    result = cut_down(lived_in(Plain()), (IMAGES,))
    result.model = Plain()
    with pytest.raises(attrfast.InputError, match=r"features\.\d has \d+ filters, though"):
        result.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    """A layer without outputs is legal in torch, and no width that a recipe may give."""
    result = cut_down(lived_in(Plain()), (IMAGES,))
    with pytest.warns(UserWarning, match="zero-element"):
        result.model.nothing = nn.Linear(3, 0)
    with pytest.raises(attrfast.InputError, match="out_features must be a whole number of at least 1"):
        result.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tensors_that_safetensors_cannot_hold_are_refused(tmp_path: Path) -> None:
    result = cut_down(lived_in(Plain()), (IMAGES,))
    result.model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(attrfast.ModelError, match="can't be written"):
        result.save(tmp_path)


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    result = cut_down(lived_in(Plain()), (IMAGES,))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(attrfast.InputError, match=r"can't be saved in .*file"):
        result.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_save_that_fails_leaves_the_older_one(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the recipe is written."""
    result = cut_down(lived_in(Plain()), (IMAGES,), seed=1)
    write = Path.write_text

    def full(path: Path, data: str) -> int:
        if path.name.startswith("recipe"):
            raise OSError("No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_text", full)
    before = attrfast.load(copied, Plain)
    with pytest.raises(attrfast.InputError, match="No space left"):
        result.save(copied)
    assert str(attrfast.load(copied, Plain)) == str(before)
    assert len(list(copied.iterdir())) == 2, "no halves are left lying about"
