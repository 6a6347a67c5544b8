"""Digits, IDX files of MNIST and its kin, CIFAR-10 and CIFAR-10-C: good files and bad ones."""

import gzip
import pickle
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.trees import (
    CIFAR_FILES,
    CIFAR_TEST,
    cifar_batch,
    cifar_images,
    corrupted_cifar,
    pixels,
    write_cifar10,
    write_cifar10_c,
)
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, MNIST

from it3_lightning.data import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    SHIFTS,
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    MNISTDataModule,
    Shift,
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
    with pytest.raises(FileNotFoundError, match="Expected the 4 files"):
        mnist(tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\) has not been called"):
        mnist(tmp_path).setup("fit")


Damage = Callable[[bytes], bytes]
DAMAGES: list[tuple[Damage, str]] = [
    (lambda _: b"", "begin with 2051 .* in 16 bytes, got none. It is empty, cut off"),
    (lambda data: data[:10], "in 16 bytes, got 00000803000000140000. It is empty, cut off"),
    (lambda data: data[:-7], r"hold 616 bytes for its shape \(20, 6, 5\).*, got at least 609"),
    (lambda data: data + b"x", "hold 616 bytes .*, got at least 617"),
    (lambda data: b"\0\0\x08\x01" + data[4:], "begin with 2051 .*, got 00000801"),
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
    with pytest.raises(
        ValueError, match=r"each of 30 images of .* in .*train-labels.*, got \(29,\)"
    ):
        mnist(tmp_path).setup("fit")
    file.write_bytes(idx_bytes(torch.arange(30)))
    with pytest.raises(ValueError, match=r"labels from 0 to 9 in .*train-labels.*, got 0 to 29"):
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


# --- CIFAR-10 and CIFAR-10-C


Loader = DataLoader[tuple[Tensor, Tensor]]
BATCHES = "cifar-10-batches-py"


def made(root: Path, **settings: Any) -> CIFAR10DataModule:
    return CIFAR10DataModule(root, **{"val_size": 30, "download": False, **settings})


def as_tensor(images: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 255


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_cifar10(tmp_path)
    return tmp_path


@pytest.fixture
def both(root: Path) -> Path:
    write_cifar10_c(root / "CIFAR-10-C", ("fog", "jpeg_compression", *EXTRA_CORRUPTIONS))
    return root


# --- the batches


@pytest.mark.parametrize("place", ["", BATCHES])
def test_batches_of_python_2_are_read_in_both_places(tmp_path: Path, place: str) -> None:
    write_cifar10(tmp_path, place)
    data = made(tmp_path, shifts=[])
    data.prepare_data()
    train = data.load()[0]
    images, labels = cifar_images()
    expected = np.concatenate([images[name] for name in CIFAR_FILES[:5]])
    assert torch.equal(train.images.permute(0, 2, 3, 1), torch.from_numpy(expected))
    assert train.labels.tolist() == [label for name in CIFAR_FILES[:5] for label in labels[name]]
    batch = gather(data.test_dataloader()[0])
    assert torch.equal(batch[0], as_tensor(images["test_batch"]))
    assert batch[1].tolist() == labels["test_batch"]
    assert data.num_classes == 10


def test_torchvision_reads_the_tests_files_as_the_library_does(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    reference = CIFAR10(root, train=True)
    train, _ = made(root).load()
    assert torch.equal(train.images.permute(0, 2, 3, 1), torch.from_numpy(reference.data))
    assert train.labels.tolist() == reference.targets


def test_missing_batches_are_downloaded_by_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(self: CIFAR10) -> None:
        calls.append(self.root)
        write_cifar10(tmp_path)

    monkeypatch.setattr(CIFAR10, "download", download)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = CIFAR10DataModule(tmp_path, val_size=30)
    data.prepare_data()
    data.prepare_data()
    assert calls == [tmp_path]


@pytest.mark.parametrize("download", [True, False])
def test_missing_batches_error_says_which_files_go_where(
    root: Path, monkeypatch: pytest.MonkeyPatch, download: bool
) -> None:
    def fail(self: CIFAR10) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(CIFAR10, "download", fail)
    (root / BATCHES / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        made(root, download=download).prepare_data()
    words = (*CIFAR_FILES, str(root / BATCHES), "no network" if download else "download=False")
    assert all(word in str(caught.value) for word in words)
    with pytest.raises(FileNotFoundError, match=r"prepare_data\(\) has not been called"):
        made(root).setup("fit")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def pickled(**changed: Any) -> bytes:
    content = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 9], **changed}
    return pickle.dumps(content, protocol=2)


BATCH_DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda _: b"", "got 0 bytes that are none"),
    (lambda data: data[: len(data) // 2], "UnpicklingError"),
    (lambda data: data[:-5], r"bytes that are none \(\w+: .*Delete it and fetch it again"),
    (lambda _: b"<html>not found</html>", "pickled batch of CIFAR-10, got 22 bytes"),
    (lambda _: pickle.dumps([1, 2]), "TypeError"),
    (lambda _: pickle.dumps({"data": Evil()}), "print, which is not loaded"),
    (lambda _: pickle.dumps({"fine_labels": [1]}), "KeyError: 'data'"),
    (lambda _: pickled(data=np.zeros((4, 3071), np.uint8)), r"\(N, 3072\) of uint8 .* \(4, 3071\)"),
    (lambda _: pickled(data=np.zeros((4, 3072))), "got .* of float64"),
    (lambda _: pickled(labels=[0, 1, 2]), r"each of 4 images .*, got \(3,\)"),
    (lambda _: pickled(labels=[0, 1, 2, 10]), "labels from 0 to 9 .*, got 0 to 10"),
    (lambda _: pickled(labels=[0, 1, 2.5, 3]), "one integer label"),
    (lambda _: cifar_batch(pixels(2, 32, 0)[:0], [], "x"), "at least one"),
]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
@pytest.mark.parametrize(("damage", "message"), BATCH_DAMAGES)
def test_a_damaged_batch_is_refused_by_name(
    root: Path,
    name: str,
    damage: Callable[[bytes], bytes],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = root / BATCHES / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        made(root).setup("fit")
    assert str(file) in str(caught.value)
    assert capsys.readouterr().out == ""  # nothing that the pickle names has run


# --- CIFAR-10-C


def test_the_files_give_the_images_of_each_corruption_at_the_severity_asked_for(
    both: Path,
) -> None:
    for severity in (1, 3, 5):
        data = made(both, shifts=["fog", "spatter"], severity=severity)
        data.prepare_data()
        assert data.test_names == ["clean", "fog", "spatter"]
        clean, fog, spatter = map(gather, data.test_dataloader())
        assert torch.equal(fog[0], as_tensor(corrupted_cifar("fog", severity)))
        assert torch.equal(spatter[0], as_tensor(corrupted_cifar("spatter", severity)))
        assert torch.equal(clean[1], fog[1])
        assert torch.equal(clean[1], spatter[1])


def test_all_severities_get_a_loader_each(both: Path) -> None:
    data = made(both, shifts=["fog", "jpeg_compression"], severity="all")
    loaders = data.test_dataloader()
    expected = [f"{name}/{s}" for name in ("fog", "jpeg_compression") for s in range(1, 6)]
    assert data.test_names == ["clean", *expected]
    for name, loader in zip(expected, loaders[1:], strict=True):
        kind, severity = name.split("/")
        assert torch.equal(gather(loader)[0], as_tensor(corrupted_cifar(kind, int(severity))))


def test_a_subset_and_an_unequal_stream_choose_the_same_images_of_every_file(both: Path) -> None:
    whole = [gather(loader) for loader in made(both, shifts=["fog"]).test_dataloader()]
    for settings in ({"test_size": 9}, {"stream": "unequal", "seed": 3}):
        clean, fog = map(gather, made(both, shifts=["fog"], **settings).test_dataloader())
        distance = (clean[0][:, None] - whole[0][0]).abs().flatten(2).sum(2)
        rows = distance.argmin(1)
        assert distance.amin(1).max() == 0
        assert torch.equal(fog[0], whole[1][0][rows])
        assert torch.equal(fog[1], whole[1][1][rows])


def test_a_file_is_mapped_and_read_only_where_a_batch_needs_it(both: Path) -> None:
    data = made(both, shifts=["fog"], severity=2)
    loader = data.test_dataloader()[1]
    file = both / "CIFAR-10-C" / "fog.npy"
    stored = np.load(file, mmap_mode="r+")
    stored[CIFAR_TEST : CIFAR_TEST + 3] = 7  # after setup, before anybody has read them
    stored.flush()
    images = gather(loader)[0]
    assert set(images[:3].flatten().tolist()) == {np.float32(7 / 255)}
    images.zero_()
    assert int(np.load(file)[CIFAR_TEST, 0, 0, 0]) == 7


def test_the_folder_decides_between_files_and_own_shifts(root: Path) -> None:
    own = made(root)
    assert (own.corruptions, list(own.shifts)) == ("own", list(SHIFTS))
    write_cifar10_c(root / "CIFAR-10-C")
    files = made(root)
    assert (files.corruptions, list(files.shifts)) == ("files", list(CORRUPTIONS))
    assert len(files.test_dataloader()) == 16
    forced = made(root, corruptions="own", shifts=["fog"])
    clean, fog = (gather(loader)[0] for loader in forced.test_dataloader())
    difference = (fog - clean).abs().mean().item()
    expected = (Shift("fog", 3)(clean) - clean).abs().mean().item()
    assert difference == pytest.approx(expected, rel=0.2)


def test_another_root_has_the_corruptions_in_it(both: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("other")
    write_cifar10(other)
    write_cifar10_c(other / "CIFAR-10-C", ("fog",))
    stored = np.load(other / "CIFAR-10-C" / "fog.npy")
    np.save(other / "CIFAR-10-C" / "fog.npy", 255 - stored)
    data = made(both, shifts=["fog"])
    data.setup("test")
    data.root = other
    expected = as_tensor(255 - corrupted_cifar("fog", 3))
    assert torch.equal(gather(data.test_dataloader()[1])[0], expected)


def test_a_folder_that_is_named_must_be_there(root: Path) -> None:
    data = made(root, corrupted=root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"elsewhere, got no gaussian_noise\.npy"):
        data.prepare_data()
    with pytest.raises(FileNotFoundError, match='corruptions="own"'):
        data.setup("test")


def test_the_files_hold_no_validation_images(both: Path) -> None:
    with pytest.raises(ValueError, match="the published files hold test images alone"):
        made(both, evaluate_on="validation")
    data = made(both, evaluate_on="validation", corruptions="own", shifts=["gamma"])
    assert [len(gather(loader)[1]) for loader in data.test_dataloader()] == [30, 30]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shifts": ["fgo"]}, "Unknown corruption 'fgo'. Did you mean 'fog'"),
        ({"shifts": ["rotation"]}, "Unknown corruption 'rotation'"),
        ({"severity": 6}, "severity to be one of 1, 2, 3, 4, 5, got 6"),
        ({"severity": "al"}, "severity to be one of 1, 2, 3, 4, 5, got 'al'"),
        ({"corruptions": "file"}, "Unknown source of corruptions 'file'"),
        ({"corruptions": "own"}, "Unknown shift 'jpeg_compression'"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(
    both: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(both, **{"shifts": ["jpeg_compression"], **settings})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def shorter(file: Path) -> None:
    np.save(file, np.load(file)[:-CIFAR_TEST])


def floating(file: Path) -> None:
    np.save(file, np.load(file) / 255)


def objects(file: Path) -> None:
    np.save(file, np.array([{}], dtype=object))


def other_values(file: Path) -> None:
    labels = np.load(file)
    labels[2 * CIFAR_TEST + 4] += 1  # one label of severity 3
    np.save(file, labels)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("fog", cut, "to be a whole .npy file"),
        ("fog", emptied, "to be a whole .npy file, got 0 bytes"),
        ("fog", shorter, r"to hold \(100, 32, 32, 3\) of uint8.*got \(80, 32, 32, 3\)"),
        ("fog", floating, "got .* of float64"),
        ("fog", objects, "to be a whole .npy file"),
        ("labels", cut, "to be a whole .npy file"),
        ("labels", shorter, r"each of 100 images .*, got \(80,\)"),
        ("labels", other_values, "20 test images of CIFAR-10, got 1 others at severity 3"),
        ("labels", floating, "one integer label"),
    ],
)
def test_a_damaged_file_of_corruptions_is_refused_by_name(
    both: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    file = both / "CIFAR-10-C" / f"{name}.npy"
    damage(file)
    with pytest.raises(ValueError, match=message) as caught:
        made(both, shifts=["fog"]).setup("test")
    assert str(file) in str(caught.value)


def test_changed_settings_give_the_data_of_a_new_module(both: Path) -> None:
    data = made(both, shifts=["fog"])
    data.setup("test")
    data.corruptions, data.severity, data.shifts = "own", 5, ["blur"]
    fresh = made(both, corruptions="own", severity=5, shifts=["blur"])
    for first, second in zip(data.test_dataloader(), fresh.test_dataloader(), strict=True):
        assert torch.equal(gather(first)[0], gather(second)[0])


# --- training


def test_training_images_are_cropped_and_mirrored_and_no_others(root: Path) -> None:
    data, plain = made(root, shifts=["fog"]), made(root, shifts=["fog"], augment=False)
    augmented, labels = gather(data.train_dataloader())
    source = gather(plain.train_dataloader())[0]
    assert augmented.shape == source.shape == (170, 3, 32, 32)
    kept = [(source == image).flatten(1).all(1).any().item() for image in augmented]
    assert sum(kept) < 8  # 1 in 162 stays as it is by chance
    assert labels.bincount().tolist() == gather(plain.train_dataloader())[1].bincount().tolist()
    for mine, theirs in (
        (data.val_dataloader(), plain.val_dataloader()),
        *zip(data.test_dataloader(), plain.test_dataloader(), strict=True),
    ):
        assert torch.equal(gather(mine)[0], gather(theirs)[0])


def test_training_images_are_the_same_with_any_number_of_workers(root: Path) -> None:
    here, there = (gather(made(root, num_workers=n).train_dataloader())[0] for n in (0, 2))
    assert torch.equal(here, there)
    assert not torch.equal(here, gather(made(root, seed=1).train_dataloader())[0])
