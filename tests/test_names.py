"""Networks and data of the user's own, and of other libraries, are found by name."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch

from attrfast import data, models
from attrfast.errors import BackendError, InputError
from attrfast.names import NamedData, network

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def splits() -> data.Splits:
    return NamedData("digits:8")(0)


def test_a_prefix_and_the_name_of_vgg16_for_small_images_are_known(splits: data.Splits) -> None:
    assert isinstance(network("attrfast:resnet20:0.5", splits)(), models.resnet.ResNet)
    assert network("attrfast:vgg16_bn_small", splits).func is models.vgg16_bn  # type: ignore[attr-defined]


def test_a_function_in_a_file_builds_the_network_in_any_process(
    splits: data.Splits, tmp_path: Path
) -> None:
    (tmp_path / "helper.py").write_text("WIDTH = 7\n")
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom helper import WIDTH\n"
        "def build(in_channels, kernel=3): return nn.Conv2d(in_channels, WIDTH, kernel)\n"
    )
    build = pickle.loads(pickle.dumps(network(f"{tmp_path / 'net.py'}:build", splits)))
    assert build().weight.shape == (7, 1, 3, 3)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("name", "code", "named"),
    [
        ("gone.py:build", None, "there is no file"),
        ("net.py", "x = 1", "names no function"),
        ("net.py:buid", "def build(): pass", "did you mean 'build'"),
        ("net.py:build", "def build(): return 3", "must return a torch.nn.Module, and gave a int"),
        ("net.py:build", "def build(): return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("net.py:build", "import no_such_thing", "can't be imported: ModuleNotFoundError"),
    ],
)
def test_mistakes_in_a_file_are_named(
    splits: data.Splits, tmp_path: Path, name: str, code: str | None, named: str
) -> None:
    if code is not None:
        (tmp_path / "net.py").write_text(code)
    with pytest.raises(InputError) as caught:
        network(str(tmp_path / name), splits)()
    assert named in str(caught.value)


def test_networks_of_timm_take_the_images_as_they_are(splits: data.Splits) -> None:
    pytest.importorskip("timm")
    model = network("timm:resnet10t", splits)().eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        network("timm:resnet81", splits)
    with pytest.raises(InputError, match="timm:resnet10t:pretrained"):
        network("timm:resnet10t:trained", splits)


def test_missing_timm_is_named(splits: data.Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BackendError, match=r"this network needs timm.*attrfast\[timm\]"):
        network("timm:resnet18", splits)


# --- folders of images -----------------------------------------------------------------------------


def write_images(root: Path, parts: dict[str, int], classes: tuple[str, ...] = ("cat", "dog")) -> None:
    image = pytest.importorskip("PIL.Image")
    for part, count in parts.items():
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image.new("RGB", (40, 30), (100 * label + i, 50, 0)).save(
                    root / part / name / f"{i}.png"
                )


def test_a_folder_of_images_has_its_three_parts(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    write_images(tmp_path, {"train": 6, "val": 2, "test": 3})
    splits = NamedData(f"imagefolder:{tmp_path}", loader_workers=0, batch_size=5, image_size=24)(0)
    assert splits.classes == ("cat", "dog")
    assert splits.image_shape == (3, 24, 24)
    assert [len(part.dataset) for part in (splits.train, splits.val, splits.test)] == [12, 4, 6]
    images, labels = next(iter(splits.train))
    assert images.shape == (5, 3, 24, 24)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("other", ["val", "test"])
def test_one_part_may_be_missing_and_images_are_held_out(tmp_path: Path, other: str) -> None:
    pytest.importorskip("torchvision")
    write_images(tmp_path, {"train": 10, other: 3})
    named = NamedData(f"imagefolder:{tmp_path}", images=8, loader_workers=0, image_size=16)
    splits = named(0)
    assert [len(part.dataset) for part in (splits.train, splits.val, splits.test)] == [8, 2, 6]
    assert torch.cat([labels for _, labels in splits.train]).bincount().tolist() == [4, 4]
    assert torch.equal(next(iter(named(0).val))[0], next(iter(splits.val))[0])


def test_folders_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(InputError, match="it has none of them"):
        data.image_folder(tmp_path)
    write_images(tmp_path, {"train": 2})
    write_images(tmp_path, {"val": 2}, classes=("cat", "cow"))
    with pytest.raises(InputError, match="different classes: cow, dog"):
        data.image_folder(tmp_path)
    (tmp_path / "val/cat/0.png").unlink()
    (tmp_path / "val/cat/1.png").unlink()
    with pytest.raises(InputError, match="can't be used"):
        data.image_folder(tmp_path)
