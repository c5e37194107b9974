"""Data helpers read the real file formats, split reproducibly and refuse what they cannot read."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attrfast import data
from attrfast.data import fashion, idx, loaders
from attrfast.errors import BackendError, InputError


def idx_bytes(values: np.ndarray) -> bytes:
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return head + values.astype(np.uint8).tobytes()


def write_fashion(folder: Path, pack: Callable[[bytes], bytes], suffix: str) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28))
        labels = np.arange(count) % 10
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(pack(idx_bytes(values)))


def everything(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader)
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


# --- what all sets have in common --------------------------------------------------------------


def test_digits_are_normalised_and_split_without_overlap() -> None:
    splits = data.digits()
    assert splits.image_shape == (1, 8, 8)
    assert splits.num_classes == 10
    images = torch.cat([everything(part)[0] for part in (splits.train, splits.val, splits.test)])
    assert len(images) == 1797
    assert len({image.numpy().tobytes() for image in images}) == 1797
    assert images.mean().abs() < 0.01
    assert images.std() == pytest.approx(1.0, abs=0.01)


def test_digits_are_scaled_up_on_request() -> None:
    images, _ = everything(data.digits(image_size=28).test)
    assert images.shape == (360, 1, 28, 28)
    small, _ = everything(data.digits().test)
    expected = torch.nn.functional.interpolate(small, 28, mode="bilinear")
    half_a_level = 0.5 / 240 / 0.3760
    torch.testing.assert_close(images, expected, rtol=0, atol=1.01 * half_a_level)


@pytest.mark.parametrize("augment", [False, True])
def test_same_seed_gives_the_same_batches(augment: bool) -> None:
    def two_epochs(seed: int) -> torch.Tensor:
        loader = data.digits(augment=augment, seed=seed).train
        return torch.cat([everything(loader)[0], everything(loader)[0]])

    first = two_epochs(1)
    assert torch.equal(first, two_epochs(1))
    assert not torch.equal(first, two_epochs(2))
    one, two = first.chunk(2)
    assert not torch.equal(one, two)


def test_loaders_leave_the_global_random_state_alone() -> None:
    splits = data.digits(augment=True)
    before = torch.get_rng_state()
    for loader in (splits.train, splits.val, splits.test):
        everything(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_test_images_do_not_depend_on_the_seed() -> None:
    first, second = everything(data.digits(seed=0).test), everything(data.digits(seed=5).test)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("size", [1, 7, 30, 119])
def test_held_out_images_have_the_classes_in_their_shares(size: int) -> None:
    labels = torch.arange(120) % 4
    rest, held = loaders.hold_out(labels, size, seed=0)
    assert torch.equal(torch.cat([rest, held]).sort().values, torch.arange(120))
    assert len(held) == size
    counts = labels[held].bincount(minlength=4)
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("size", [-1, 0, 10, 11])
def test_impossible_hold_outs_are_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"hold out {size} of 10"):
        loaders.hold_out(torch.zeros(10), size, seed=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"batch_size": 0}, "batch_size is 0"), ({"image_size": 4}, "image_size is 4")],
)
def test_unusable_sizes_are_refused(options: dict[str, int], named: str) -> None:
    with pytest.raises(InputError, match=named):
        data.digits(**options)  # type: ignore[arg-type]


def test_shift_moves_whole_images_and_fills_with_zeros() -> None:
    images = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).repeat(200, 2, 1, 1)
    generator = torch.Generator().manual_seed(0)
    moved = loaders.Augmentation(shift=1)(images, generator)
    padded = torch.nn.functional.pad(images[0], [1] * 4)
    possible = [padded[:, i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
    matches = torch.stack([(moved == p).flatten(1).all(1) for p in possible])
    assert bool(matches.any(0).all())  # each image is one of the nine shifts
    assert bool(matches.any(1).all())  # and each shift occurs


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).repeat(400, 1, 1, 1)
    flipped = loaders.Augmentation(flip=True)(images, torch.Generator().manual_seed(0))
    kept = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert bool((kept ^ mirrored).all())
    assert 140 < int(mirrored.sum()) < 260


def test_single_item_is_one_image_and_its_label() -> None:
    dataset = data.digits().val.dataset
    image, label = dataset[3]
    batch, labels = everything(data.digits().val)
    assert torch.equal(image, batch[3])
    assert torch.equal(label, labels[3])


# --- Fashion-MNIST and its file format ----------------------------------------------------------


@pytest.mark.parametrize(("pack", "suffix"), [(bytes, ""), (gzip.compress, ".gz")])
def test_fashion_mnist_reads_plain_and_compressed_files(
    tmp_path: Path, pack: Callable[[bytes], bytes], suffix: str
) -> None:
    write_fashion(tmp_path, pack, suffix)
    splits = data.fashion_mnist(tmp_path, val_size=10)
    images, labels = everything(splits.test)
    pixels = np.frombuffer(
        idx_bytes(np.random.default_rng(0).integers(0, 256, (60, 28, 28)))[16:], np.uint8
    )
    assert images.shape == (20, 1, 28, 28)
    assert torch.equal(labels, torch.arange(20) % 10)
    every = torch.cat([everything(splits.train)[0], everything(splits.val)[0]])
    expected = torch.from_numpy(pixels / 255.0 - 0.2860).float() / 0.3530
    assert every.sum() == pytest.approx(float(expected.sum()), rel=1e-3)
    assert every.max() == pytest.approx((1 - 0.2860) / 0.3530, abs=1e-5)


def test_fashion_mnist_says_where_to_get_missing_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="apt install dataset-fashion-mnist") as caught:
        data.fashion_mnist(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_fashion_mnist_refuses_images_and_labels_of_different_sets(tmp_path: Path) -> None:
    write_fashion(tmp_path, bytes, "")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(59)))
    with pytest.raises(InputError, match="do not belong together"):
        data.fashion_mnist(tmp_path)


def test_fashion_mnist_refuses_foreign_labels(tmp_path: Path) -> None:
    write_fashion(tmp_path, bytes, "")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(60)))
    with pytest.raises(InputError, match="label 59"):
        data.fashion_mnist(tmp_path)


@pytest.mark.skipif(not fashion.DEBIAN_ROOT.is_dir(), reason="the package is not installed")
def test_debian_package_is_found_by_itself() -> None:
    splits = data.fashion_mnist()
    sizes = [len(everything(part)[1]) for part in (splits.train, splits.val, splits.test)]
    assert sizes == [55_000, 5_000, 10_000]
    images, labels = everything(splits.test)
    assert labels.bincount().tolist() == [1000] * 10
    assert images.mean().abs() < 0.01


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 28, 28)])
def test_idx_gives_back_what_was_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).integers(0, 256, shape)
    path = tmp_path / "file"
    path.write_bytes(idx_bytes(values))
    assert torch.equal(idx.read_idx(path), torch.from_numpy(values.astype(np.uint8)))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "not an IDX file"),  # floats
        (b"\x00\x00\x08\x03\x00\x00", "within its header"),
        (idx_bytes(np.zeros((2, 3)))[:-1], "holds 5 values"),
        # Without the time, which would give the case another name in every process.
        (gzip.compress(idx_bytes(np.zeros(100)), mtime=0)[:-12], "cannot be read"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match=named):
        idx.read_idx(path)


# --- sets that torchvision reads ----------------------------------------------------------------


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small set in CIFAR-10's format, with its own checksums in torchvision's list."""
    dataset = pytest.importorskip("torchvision").datasets.CIFAR10
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5(folder / name)]

    def batch(name: str) -> list[str]:
        pixels = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        pixels[:, :1024] = 255  # the red plane comes first
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(20)]})

    monkeypatch.setattr(dataset, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(dataset, "test_list", [batch("test_batch")])
    name, checksum = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(dataset, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return tmp_path


def test_cifar10_reads_its_pickles(cifar_root: Path) -> None:
    splits = data.cifar10(cifar_root, val_size=20, augment=False)
    assert splits.classes[3] == "class 3"
    assert splits.image_shape == (3, 32, 32)
    sizes = [len(everything(part)[0]) for part in (splits.train, splits.val, splits.test)]
    assert sizes == [80, 20, 20]
    images, labels = everything(splits.test)
    assert torch.equal(labels, torch.arange(20) % 10)
    assert torch.allclose(images[:, 0], torch.tensor((1 - 0.4914) / 0.2470))
    assert images.is_contiguous()
    assert bool(images[:, 1:].std() > 0.5)


def test_cifar10_augments_training_images_alone(cifar_root: Path) -> None:
    splits = data.cifar10(cifar_root, val_size=20)
    first, second = everything(splits.val)[0], everything(splits.val)[0]
    assert torch.equal(first, second)
    images, _ = everything(splits.train)
    # A shift brings in zeros, which no red plane of this set has.
    assert float(images[:, 0].min()) == pytest.approx(-0.4914 / 0.2470, abs=1e-4)


@pytest.fixture
def flowers_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small set in Flowers-102's format, with its own checksums in torchvision's list."""
    dataset = pytest.importorskip("torchvision").datasets.Flowers102
    scipy_io = pytest.importorskip("scipy.io")
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(1, 13):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        image.fromarray(pixels).save(folder / "jpg" / f"image_{number:05d}.jpg")
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": np.arange(1, 13)[None]})
    scipy_io.savemat(
        folder / "setid.mat",
        {"trnid": [[1, 2, 3, 4, 5, 6]], "valid": [[7, 8, 9]], "tstid": [[10, 11, 12]]},
    )
    files = dict(dataset._file_dict)
    for key in ("label", "setid"):
        files[key] = (files[key][0], md5(folder / files[key][0]))
    monkeypatch.setattr(dataset, "_file_dict", files)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_flowers102_reads_photographs_and_labels(flowers_root: Path, workers: int) -> None:
    splits = data.flowers102(
        flowers_root, image_size=32, batch_size=4, eval_batch_size=2, workers=workers
    )
    assert splits.num_classes == 102
    images, labels = everything(splits.train)
    assert images.shape == (6, 3, 32, 32)
    assert sorted(labels.tolist()) == [0, 1, 2, 3, 4, 5]
    images, labels = everything(splits.test)
    assert images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [9, 10, 11]
    assert float(images.min()) >= -0.485 / 0.229 - 1e-5


@pytest.mark.parametrize("options", [{"workers": -1}, {"image_size": 0}, {"batch_size": 0}])
def test_flowers102_refuses_unusable_sizes(flowers_root: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        data.flowers102(flowers_root, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("open_set", [data.cifar10, data.flowers102])
def test_nothing_is_downloaded_unasked(tmp_path: Path, open_set: Callable[[Path], object]) -> None:
    with pytest.raises(InputError, match="download=True") as caught:
        open_set(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_failed_download_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = pytest.importorskip("torchvision").datasets.CIFAR10

    def fail(_self: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(dataset, "download", fail)
    with pytest.raises(InputError, match="no route to host"):
        data.cifar10(tmp_path, download=True)


@pytest.mark.parametrize(
    ("missing", "open_set"),
    [
        ("sklearn.datasets", lambda _: data.digits()),
        ("torchvision.datasets", data.cifar10),
        ("scipy.io", data.flowers102),
    ],
)
def test_missing_library_names_the_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    open_set: Callable[[Path], object],
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # makes its import fail
    with pytest.raises(BackendError, match=r"attrfast\[data\]"):
        open_set(tmp_path)
