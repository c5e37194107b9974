"""Whatever stands in a recipe or a checkpoint: it loads right, or an InputError says why not."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_networks import CLASSES, Plain
from torch import nn

import attrfast
from attrfast import checkpoint, epochs, schema, state_tree, tensor_file

STRANGE: list[Any] = [
    *(
        None,
        True,
        -1,
        0,
        1,
        2**70,
        -0.5,
        float("nan"),
        float("inf"),
        "",
        "0101",
        "../../x",
        "/etc/passwd",
    ),
    *("__class__", "features.0.__init__", "..", "\x00", [], [[]], {}, {"": {}}, {"dict": [[[], 1]]}),
    *([1] * 700, {"tensor": "model.nothing"}),
]
OFTEN = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Saved:
    """A pruned model, a step and an epoch of its run, as they were written."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = Plain(4)
        batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
        result = attrfast.prune(
            self.model,
            batches,
            keep_ratio=0.5,
            finetune=attrfast.FineTune(epochs=2, optimizer="adam"),
            final_finetune=2,
            output_dir=folder / "steps",
            progress=False,
        )
        self.folder = result.save(folder / "saved")
        self.steps = folder / "steps"
        self.mark = checkpoint.load(self.steps, self._mark()).fingerprint  # type: ignore[union-attr]

    def _mark(self) -> str:
        return str(json.loads((self.steps / checkpoint.STATE).read_text())["fingerprint"])

    def readers(self) -> dict[Path, Callable[[Path], Any]]:
        """File -> what reads it, given the folder that it was copied to."""
        return {
            self.folder / "recipe.json": lambda path: attrfast.load(path, self.model),
            self.folder / "weights.safetensors": lambda path: attrfast.load(path, self.model),
            self.steps / checkpoint.STATE: lambda path: checkpoint.load(path, self.mark),
            next(self.steps.glob("weights-*")): lambda path: checkpoint.load(path, self.mark),
            self.steps / epochs.FILE: lambda path: epochs.load(path, self.mark, alone=False),
        }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A file's folder beside itself, to be spoilt, fresh at every call."""

    def fresh(file: Path) -> Path:
        shutil.rmtree(tmp_path / "spoilt", ignore_errors=True)
        return Path(shutil.copytree(file.parent, tmp_path / "spoilt"))

    return fresh


def read(reader: Callable[[Path], Any], folder: Path) -> Any:
    """What is read, or the InputError that says why nothing is."""
    try:
        return reader(folder)
    except attrfast.InputError as error:
        return error


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, taken out or put in; or the file cut off."""
    held = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(held) + 1)
        some = bytes(draw.choices(range(256), k=draw.randint(0, 8)))
        held[at : at + draw.choice((0, 1, len(some)))] = some
    return bytes(held[: draw.randrange(len(held))] if draw.random() < 0.2 and held else held)


@pytest.mark.parametrize("number", range(5))
def test_changed_bytes_are_refused(saved: Saved, copied: Callable[[Path], Path], number: int) -> None:
    file, reader = list(saved.readers().items())[number]
    data = file.read_bytes()
    folder = copied(file)
    assert not isinstance(read(reader, folder), Exception)

    @given(st.randoms(use_true_random=False))
    @OFTEN
    def check(draw: random.Random) -> None:
        spoilt = mutated(data, draw)
        (folder / file.name).write_bytes(spoilt)
        if spoilt != data:
            assert isinstance(read(reader, folder), attrfast.InputError)

    check()


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a tree of dictionaries and lists."""
    for key in list(tree if isinstance(tree, dict) else range(len(tree))):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from places(tree[key])


def bent(tree: Any, draw: random.Random) -> Any:
    """A tree with a few of its values, keys or entries replaced by what no run writes there."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        spots = list(places(tree))
        if not spots:
            break
        container, key = draw.choice(spots)
        what = draw.random()
        if what < 0.6:
            container[key] = copy.deepcopy(draw.choice(STRANGE))
        elif what < 0.8:
            del container[key]
        elif isinstance(container, dict):
            container[draw.choice(("__class__", "..", "", "features.0.weight"))] = container.pop(key)
        else:
            container.append(container[key])
    return tree


@pytest.mark.parametrize("name", ["recipe.json", checkpoint.STATE])
def test_a_forged_tree_with_the_right_checksum_is_refused_or_right(
    saved: Saved, copied: Callable[[Path], Path], name: str
) -> None:
    file, reader = next((f, r) for f, r in saved.readers().items() if f.name == name)
    tree = json.loads(file.read_text())
    tree.pop("checksum")
    folder = copied(file)
    before = copy.deepcopy(saved.model.state_dict())

    @given(st.randoms(use_true_random=False))
    @OFTEN
    def check(draw: random.Random) -> None:
        (folder / name).write_text(schema.sealed(bent(tree, draw)))
        got = read(reader, folder)
        if isinstance(got, nn.Module):
            with torch.no_grad():
                assert got(torch.randn(1, 3, 8, 8)).shape == (1, CLASSES)

    check()
    assert all(torch.equal(before[n], tensor) for n, tensor in saved.model.state_dict().items())


@pytest.mark.parametrize("name", ["step", "epoch"])
def test_a_forged_header_of_tensors_is_refused_or_right(
    saved: Saved, copied: Callable[[Path], Path], name: str
) -> None:
    number = {"step": 3, "epoch": 4}[name]
    file, reader = list(saved.readers().items())[number]
    kind = f"attrfast {name} 1"
    tensors, about = tensor_file.read(file, kind)
    folder = copied(file)

    @given(st.randoms(use_true_random=False))
    @OFTEN
    def check(draw: random.Random) -> None:
        forged = json.loads(schema.sealed(bent({"about": about}, draw))).get("about")
        tensor_file.write(folder / file.name, kind, tensors, forged)
        read(reader, folder)

    check()


@pytest.mark.parametrize("change", ["gates", "weights", "random", "taken"])
def test_a_forged_checkpoint_of_another_model_leaves_the_run_unbegun(
    saved: Saved, copied: Callable[[Path], Path], change: str
) -> None:
    found = checkpoint.load(saved.steps, saved.mark)
    assert found is not None
    folder = copied(saved.steps / checkpoint.STATE)
    if change == "gates":
        found.gates["features.0"] = torch.ones(3, dtype=torch.bool)
    elif change == "weights":
        found.weights.popitem()
    elif change == "random":
        found.random["torch"] = torch.zeros(3, dtype=torch.uint8)
    else:
        found.taken = [attrfast.residual.ResidualBranch("", "features.0", ("features",))]
    (folder / epochs.FILE).unlink()
    checkpoint.save(folder, found)
    batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
    state = torch.get_rng_state()
    with pytest.raises(attrfast.InputError, match=r"fit the model|random generators"):
        attrfast.prune(
            saved.model,
            batches,
            keep_ratio=0.5,
            finetune=attrfast.FineTune(epochs=2, optimizer="adam"),
            output_dir=folder,
            resume=True,
            progress=False,
        )
    assert torch.equal(state, torch.get_rng_state())


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inside: (
        st.lists(inside)
        | st.lists(inside).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inside)
    ),
    max_leaves=20,
)


@given(plain)
@settings(max_examples=200, deadline=None)
def test_a_state_comes_back_from_json_as_it_was(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    told = json.dumps(state_tree.packed(tree, "state", tensors), allow_nan=False)
    assert repr(state_tree.unpacked(json.loads(told), tensors)) == repr(tree)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, '{"a": 1e999}', "", "null", "\ufeff{}"])
def test_hostile_json_is_an_input_error_or_a_plain_value(text: str) -> None:
    try:
        found = schema.parsed(text)
    except attrfast.InputError:
        return
    assert found in (None, {"a": float("inf")})
