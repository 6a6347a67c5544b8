"""The data modules: seeded splits, lists of shifted loaders, streams, IDX files good and bad."""

import gzip
import struct
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST

from it3_lightning.data import (
    SHIFTS,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageSet,
    MNISTDataModule,
    Shift,
    ShiftedImages,
    unequal_stream,
)

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
Loader = DataLoader[tuple[Tensor, Tensor]]


class Numbered(ShiftedImages):
    """80 training and 60 test images whose first pixels hold their number (+ 100 for testing)."""

    loads = 0

    def load(self) -> tuple[ImageSet, ImageSet]:
        self.loads += 1
        return numbered(80, 0), numbered(60, 100)


def numbered(count: int, first: int) -> ImageSet:
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(first))
    images[:, 0, 0, 0] = torch.arange(first, first + count)
    return ImageSet(images.to(torch.uint8), torch.arange(count) % 10)


def small(**settings: Any) -> Numbered:
    return Numbered(**{"val_size": 20, "shifts": ["gaussian_noise", "fog"], **settings})


def gather(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def numbers(loader: Loader) -> list[int]:
    return (gather(loader)[0][:, 0, 0, 0] * 255).round().int().tolist()


# --- splits


def test_train_and_validation_are_disjoint_and_complete() -> None:
    data = small()
    train, validation = numbers(data.train_dataloader()), numbers(data.val_dataloader())
    assert len(validation) == 20
    assert sorted(train + validation) == list(range(80))


def test_seed_decides_the_split() -> None:
    same, other = small(seed=0), small(seed=1)
    assert numbers(small().val_dataloader()) == numbers(same.val_dataloader())
    assert numbers(small().val_dataloader()) != numbers(other.val_dataloader())


def test_train_size_and_test_size_are_seeded_subsets_in_the_order_of_the_file() -> None:
    data = small(train_size=30, test_size=15)
    train = numbers(data.train_dataloader())
    assert len(set(train)) == 30
    assert set(train).isdisjoint(numbers(data.val_dataloader()))
    assert numbers(data.val_dataloader()) == numbers(small().val_dataloader())
    test = numbers(data.test_dataloader()[0])
    assert len(test) == 15
    assert all(first < second for first, second in pairwise(test))
    assert test == numbers(small(train_size=30, test_size=15).test_dataloader()[0])


# --- test and prediction loaders


def test_loaders_are_clean_first_then_one_for_each_shift() -> None:
    data = small()
    assert data.test_names == ["clean", "gaussian_noise", "fog"]
    clean, noise, fog = (gather(loader) for loader in data.test_dataloader())
    assert torch.equal(clean[0] * 255, numbered(60, 100).images.float())
    for name, (images, labels) in (("gaussian_noise", noise), ("fog", fog)):
        difference = (images - clean[0]).abs().mean().item()
        expected = (Shift(name, 3)(clean[0]) - clean[0]).abs().mean().item()
        assert difference == pytest.approx(expected, rel=0.1)
        assert torch.equal(labels, clean[1])


def test_batches_are_float_images_in_range_and_integer_labels() -> None:
    data = small(batch_size=16, eval_batch_size=25)
    loaders = [data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()]
    for loader, size in zip(loaders, (16, 20, 25, 25, 25), strict=True):
        images, labels = next(iter(loader))
        assert images.shape == (size, 1, 8, 8)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert 0 <= images.min() <= images.max() <= 1
        assert labels.shape == (size,)


def test_a_shift_does_not_depend_on_the_shifts_beside_it() -> None:
    alone = small(shifts=["fog"]).test_dataloader()[1]
    assert torch.equal(gather(alone)[0], gather(small().test_dataloader()[2])[0])


def test_seed_and_severity_change_the_shifted_images() -> None:
    base = gather(small().test_dataloader()[1])[0]
    assert not torch.equal(base, gather(small(seed=1).test_dataloader()[1])[0])
    assert not torch.equal(base, gather(small(severity=4).test_dataloader()[1])[0])


def test_eight_bit_storage_is_within_half_a_grey_level_of_the_float_images() -> None:
    class Float(Numbered):
        def load(self) -> tuple[ImageSet, ImageSet]:
            train, test = super().load()
            return train, ImageSet(test.images.float() / 255, test.labels)

    exact = Float(val_size=20, shifts=["fog"]).test_dataloader()[1]
    error = gather(exact)[0] - gather(small(shifts=["fog"]).test_dataloader()[1])[0]
    assert 0 < error.abs().max().item() <= 0.5 / 255 + 1e-6


def test_evaluate_on_validation_never_holds_a_test_image() -> None:
    data = small(evaluate_on="validation")
    clean = data.test_dataloader()[0]
    assert numbers(clean) == numbers(small().val_dataloader())
    assert max(numbers(clean)) < 80  # test images are numbered from 100
    reference = Shift("fog", 3)(gather(clean)[0]).mean().item()
    assert gather(data.test_dataloader()[2])[0].mean().item() == pytest.approx(reference, rel=0.1)


# --- the unequal stream


def test_unequal_stream_makes_three_classes_ten_times_as_frequent() -> None:
    labels = torch.arange(10).repeat(100)
    chosen = unequal_stream(labels, seed=3)
    assert labels[chosen].bincount().sort().values.tolist() == [10] * 7 + [100] * 3
    assert len(set(chosen.tolist())) == len(chosen) == 370


def test_unequal_stream_is_shuffled_and_the_seed_picks_the_classes() -> None:
    labels = torch.arange(10).repeat(100)
    picked = {
        tuple(
            labels[unequal_stream(labels, seed)].bincount().topk(3).indices.sort().values.tolist()
        )
        for seed in range(8)
    }
    assert len(picked) > 4
    chosen = unequal_stream(labels, seed=0)
    assert torch.equal(chosen, unequal_stream(labels, seed=0))
    assert not torch.equal(chosen, chosen.sort().values)


def test_unequal_stream_of_three_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected more than 3 classes .* got 3"):
        unequal_stream(torch.arange(3).repeat(5), seed=0)


def test_unequal_loaders_hold_the_same_samples_under_every_shift() -> None:
    data = small(stream="unequal")
    loaders = data.test_dataloader()
    clean, noise, fog = (gather(loader)[1] for loader in loaders)
    assert clean.bincount().sort().values.tolist() == [1] * 7 + [6] * 3
    assert torch.equal(clean, noise)
    assert torch.equal(clean, fog)
    equal = gather(small().test_dataloader()[2])[0]
    order = torch.tensor(numbers(loaders[0])) - 100
    assert torch.equal(gather(loaders[2])[0], equal[order])


# --- settings and repeated setup


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_size": 81}, "val_size to be at most 80, .* got 81"),
        ({"train_size": 61}, "train_size to be at most 60, .* got 61"),
        ({"test_size": 61}, "test_size to be at most 60, .* got 61"),
    ],
)
def test_more_samples_than_there_are_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings).setup("fit")


def test_a_class_without_load_says_what_to_define() -> None:
    with pytest.raises(NotImplementedError, match="ShiftedImages to define load"):
        ShiftedImages().setup("fit")


def test_num_classes_counts_the_labels() -> None:
    assert small().num_classes == 10


def test_command_line_sees_the_settings_of_the_base_class() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FashionMNISTDataModule, "data")
    arguments = ["--data.root=/x", "--data.severity=5", '--data.shifts=["fog"]']
    data = FashionMNISTDataModule(**parser.parse_args(arguments).data.as_dict())
    assert (data.root, data.severity, list(data.shifts)) == ("/x", 5, ["fog"])
    assert (data.batch_size, data.val_size) == (128, 5000)


# --- image sets and loaders


def test_images_and_labels_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, C, H, W\).* got \(3, 8, 8\)"):
        ImageSet(torch.zeros(3, 8, 8), torch.zeros(3).long())
    with pytest.raises(ValueError, match="one int64 label for each of 3 images"):
        ImageSet(torch.zeros(3, 1, 8, 8), torch.zeros(2).long())
    with pytest.raises(ValueError, match="got 0 to 16"):
        ImageSet(torch.arange(17.0).view(17, 1, 1, 1), torch.zeros(17).long())


def test_one_sample_equals_its_row_of_the_batch_and_is_a_copy() -> None:
    images = ImageSet(torch.rand(4, 1, 2, 2), torch.arange(4))
    batch = images.__getitems__([2, 0])
    assert torch.equal(images[2][0], batch[0][0])
    assert int(images[2][1]) == int(batch[1][0]) == 2
    images[2][0].zero_()
    assert torch.equal(images[2][0], batch[0][0])


def test_a_loader_asks_for_whole_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = ImageSet.__getitems__

    def counted(self: ImageSet, indices: list[int]) -> tuple[Tensor, Tensor]:
        sizes.append(len(indices))
        return original(self, indices)

    monkeypatch.setattr(ImageSet, "__getitems__", counted)
    monkeypatch.delattr(ImageSet, "__getitem__")
    assert len(numbers(small(eval_batch_size=25).test_dataloader()[1])) == 60
    assert sizes == [25, 25, 10]


def test_worker_processes_give_the_same_batches() -> None:
    there = gather(small(shifts=[], num_workers=1).test_dataloader()[0])
    here = gather(small(shifts=[]).test_dataloader()[0])
    assert torch.equal(there[0], here[0])
    assert torch.equal(there[1], here[1])


class Counting(LightningModule):
    """Add up the images that each test loader hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        del batch_idx
        self.seen[dataloader_idx] = self.seen.get(dataloader_idx, 0) + len(batch[1])


# Lightning's loader tree asks for a class that PyTorch has deprecated.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_trainer_tests_every_loader() -> None:
    model = Counting()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(model, small(), verbose=False)
    assert model.seen == {0: 60, 1: 60, 2: 60}


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
