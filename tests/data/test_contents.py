"""Fingerprints of samples: of what they are, and never of the process that they are in."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data_modules import CASES, Case, write_all
from helpers.trees import write_image_folders
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from it3_lightning.data.contents import digest, is_known, places, yielded
from it3_lightning.data.images import ImageFiles, read_rgb
from it3_lightning.data.sampling import Rows

X, Y = torch.arange(12.0).view(6, 2), torch.arange(6)


class Own(Dataset[Any]):
    """Samples that are nowhere to be seen from outside."""

    def __init__(self, low: int, noise: bool = False) -> None:
        self.read, self.noise = low.__add__, noise

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(float(self.read(index))) + self.noise * torch.rand(())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X, X.double()),
        (X, X.view(3, 4)),
        (X, X + torch.eye(6, 2) * 1e-6),
        (X.bfloat16(), X.bfloat16() + 1),
        (np.arange(3), np.arange(3)[::-1]),
        (TensorDataset(X, Y), TensorDataset(X, Y.flip(0))),
        (Subset(TensorDataset(X), [0, 1]), Subset(TensorDataset(X), [0, 2])),
        (Rows(X, Y), Rows(X, Y + 1)),
        ({"a": [1, 2]}, {"a": [1, 3]}),
        ({"a": 1}, {"b": 1}),
        ([1, [2]], [[1], 2]),
        ({1, 2}, {1, 3}),
        (None, 0),
        ("a", "b"),
    ],
)
def test_other_content_has_another_fingerprint(one: object, other: object) -> None:
    assert digest(one) == digest(one) != digest(other)


def test_equal_content_in_another_place_or_process_has_the_same_fingerprint() -> None:
    strided = torch.stack([X, X], -1)[..., 0]
    assert digest(strided) == digest(X.clone())
    script = """
import torch
from it3_lightning.data.contents import digest
from torch.utils.data import TensorDataset
from torchvision.transforms import ToTensor
print(digest(TensorDataset(torch.arange(12.0).view(6, 2)), {"b", "a"}, ToTensor(), lambda x: x))
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert len(found) == 1


def test_what_holds_itself_ends() -> None:
    held: list[Any] = [1]
    held.append(held)
    assert digest(held) != digest([1])


def test_a_file_counts_by_size_and_time(tmp_path: Path) -> None:
    write_image_folders(tmp_path, each=2)
    folder = ImageFolder(tmp_path / "train")
    names = [str(Path(file).relative_to(tmp_path)) for file, _ in folder.samples]
    files = ImageFiles(tmp_path, names, torch.zeros(6).long(), read_rgb)  # type: ignore[arg-type]
    before = digest(folder), digest(files)
    assert before == (digest(ImageFolder(tmp_path / "train")), digest(files))
    path = tmp_path / "train" / "dog" / "1.jpg"
    path.write_bytes(path.read_bytes() + b" ")
    assert digest(folder) != before[0]
    assert digest(files) != before[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_data_module_has_the_same_fingerprint_of_the_same_samples(
    case: Case, root: Path
) -> None:
    before, again, other = (case.module(root, seed=seed).content() for seed in (0, 0, 1))
    assert {"train", "validation", "test"} <= before.keys()
    assert before == again
    assert before["train"] != other["train"]  # another split


def test_an_attribute_of_that_name_need_be_no_path() -> None:
    class Named:
        def __init__(self) -> None:
            self.paths, self.files = torch.arange(3), 3

    assert digest(Named()) == digest(Named())


def test_what_is_yielded_counts_and_random_views_are_those_of_a_seed() -> None:
    def read(low: int, noise: bool = False) -> str:
        return yielded(DataLoader(Own(low, noise), batch_size=3, shuffle=noise))

    assert read(0) == read(0) != read(1)
    before = torch.random.get_rng_state()
    assert read(0, noise=True) == read(0, noise=True) != read(0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_of_what_has_no_end_some_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield X

    monkeypatch.setattr("it3_lightning.data.contents._MOST", 3)
    assert yielded(endless()) == yielded([X, X, X])


def test_samples_of_one_place_are_the_same(tmp_path: Path) -> None:
    write_image_folders(tmp_path, each=2)
    rows, own = TensorDataset(X, Y), Own(0)
    folders = [ImageFolder(tmp_path / "train"), ImageFolder(tmp_path / "train" / ".." / "train")]
    assert places(TensorDataset(X[2:])) == places(rows)[2:]
    assert not set(places(TensorDataset(X.clone()))) & set(places(rows))
    assert places(ConcatDataset([own, Subset(own, [3, 0])])) == [
        *places(own),
        *(places(own)[row] for row in (3, 0)),
    ]
    assert places(folders[0]) == places(folders[1])
    assert not set(places(Own(0))) & set(places(own))
    assert [is_known(each) for each in (rows, Subset(folders[0], [1]), own)] == [True, True, False]
    assert not is_known(ConcatDataset([rows, own]))
