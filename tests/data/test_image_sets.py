"""Scikit-learn's digits, and IDX files of MNIST and its kin, good and bad."""

import gzip
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.datasets import MNIST

from it3_lightning.data import (
    SHIFTS,
    DigitsDataModule,
    FashionMNISTDataModule,
    MNISTDataModule,
)

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def gather(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


# --- digits


def test_digits_are_split_1000_200_597_and_hold_every_image_once() -> None:
    data = DigitsDataModule(shifts=[])
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()[0])
    parts = [gather(loader)[0] for loader in loaders]
    assert [len(part) for part in parts] == [1000, 200, 597]
    datasets = pytest.importorskip("sklearn.datasets")
    everything = torch.from_numpy(datasets.load_digits().images).float()[:, None] / 16
    assert torch.cat(parts).sum().item() == pytest.approx(everything.sum().item(), rel=1e-6)
    assert data.num_classes == 10


def test_digits_of_another_seed_are_other_test_images() -> None:
    first, second = (
        gather(DigitsDataModule(shifts=[], seed=seed).test_dataloader()[0])[0] for seed in (0, 1)
    )
    assert not torch.equal(first, second)


def test_digits_without_scikit_learn_say_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'it3_lightning\[data\]'"):
        DigitsDataModule().setup("fit")


# --- IDX files


def idx_bytes(values: Tensor) -> bytes:
    """Write the format from its description: magic, sizes, bytes; independent of the reader."""
    magic = {3: 2051, 1: 2049}[values.ndim]
    header = struct.pack(f">{1 + values.ndim}I", magic, *values.shape)
    return header + bytes(values.flatten().tolist())


def write_mnist(folder: Path, end: str = "", mark: str = "-") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 30), ("t10k", 20)):
        generator = torch.Generator().manual_seed(count)
        images = torch.randint(0, 256, (count, 6, 5), generator=generator)
        for kind, values in (("images", images), ("labels", torch.arange(count) % 10)):
            data = idx_bytes(values)
            name = f"{part}-{kind}{mark}idx{values.ndim}-ubyte{end}"
            (folder / name).write_bytes(gzip.compress(data) if end else data)


def mnist(root: Path, **settings: Any) -> MNISTDataModule:
    return MNISTDataModule(root, val_size=10, shifts=[], download=False, **settings)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("place", ["", "MNIST/raw"])
def test_idx_files_are_read_in_every_form_and_place(
    tmp_path: Path, end: str, mark: str, place: str
) -> None:
    write_mnist(tmp_path / place, end, mark)
    data = mnist(tmp_path)
    data.prepare_data()
    images, labels = gather(data.test_dataloader()[0])
    generator = torch.Generator().manual_seed(20)
    expected = torch.randint(0, 256, (20, 1, 6, 5), generator=generator)
    assert torch.equal(images * 255, expected.float())
    assert labels.tolist() == list(range(10)) * 2
    assert len(gather(data.train_dataloader())[0]) == 20


def test_files_that_are_there_are_used_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mnist(tmp_path)
    monkeypatch.setattr(MNIST, "download", lambda self: pytest.fail(f"downloads into {self.root}"))
    MNISTDataModule(tmp_path).prepare_data()


def test_missing_files_are_downloaded_by_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MNIST, "download", lambda self: write_mnist(Path(self.raw_folder)))
    data = MNISTDataModule(tmp_path, val_size=10, shifts=[])
    data.prepare_data()
    assert len(gather(data.test_dataloader()[0])[1]) == 20


FOUR = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@pytest.mark.parametrize("download", [True, False])
def test_missing_files_error_says_which_files_go_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    def fail(self: MNIST) -> None:
        raise RuntimeError(f"no network for {type(self).__name__}")

    monkeypatch.setattr(MNIST, "download", fail)
    with pytest.raises(FileNotFoundError) as caught:
        FashionMNISTDataModule(tmp_path, download=download).prepare_data()
    words = (*FOUR, str(tmp_path), str(tmp_path / "FashionMNIST" / "raw"))
    assert all(word in str(caught.value) for word in words)
    assert ("no network for FashionMNIST" if download else "download=False") in str(caught.value)


def test_three_of_four_files_are_missing_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="Expected the four files"):
        mnist(tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\) has not been called"):
        mnist(tmp_path).setup("fit")


Damage = Callable[[bytes], bytes]
DAMAGES: list[tuple[Damage, str]] = [
    (lambda _: b"", "at least 16 bytes, got 0. It is empty or cut off"),
    (lambda data: data[:10], "at least 16 bytes, got 10. It is empty or cut off"),
    (lambda data: data[:-7], r"hold 616 bytes for its shape \(20, 6, 5\).*, got 609"),
    (lambda data: data + b"x", "hold 616 bytes .*, got 617"),
    (lambda data: b"\0\0\x08\x01" + data[4:], "begin with 2051 .*, got 2049"),
    (lambda data: data[:4] + bytes(4) + data[8:16], r"shape \(0, 6, 5\)"),
]


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_file_is_refused_by_name_with_expected_and_got(
    tmp_path: Path, end: str, damage: Damage, message: str
) -> None:
    write_mnist(tmp_path, end)
    file = tmp_path / f"t10k-images-idx3-ubyte{end}"
    data = file.read_bytes()
    data = damage(gzip.decompress(data) if end else data)
    file.write_bytes(gzip.compress(data) if end else data)
    with pytest.raises(ValueError, match=message) as caught:
        mnist(tmp_path).setup("test")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"no gzip" + data])
def test_a_damaged_gzip_file_is_refused_by_name(tmp_path: Path, damage: Damage) -> None:
    write_mnist(tmp_path, ".gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz to be a whole gzip file"):
        mnist(tmp_path).setup("fit")


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "train-labels-idx1-ubyte"
    file.write_bytes(idx_bytes(torch.arange(29) % 10))
    with pytest.raises(ValueError, match=r"each of the 30 images of .*, got 29 in .*train-labels"):
        mnist(tmp_path).setup("fit")
    file.write_bytes(idx_bytes(torch.arange(30)))
    with pytest.raises(ValueError, match=r"labels from 0 to 9 in .*train-labels.*, got 29"):
        mnist(tmp_path).setup("fit")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_read_as_it_is() -> None:
    data = FashionMNISTDataModule(DEBIAN, shifts=["fog"], test_size=200, download=False)
    data.prepare_data()
    data.setup("test")
    train, test = data.load()
    assert (tuple(train.images.shape), tuple(test.images.shape)) == (
        (60_000, 1, 28, 28),
        (10_000, 1, 28, 28),
    )
    assert test.labels.bincount().tolist() == [1000] * 10
    assert [len(gather(loader)[1]) for loader in data.test_dataloader()] == [200, 200]
    assert len(SHIFTS) == 9
