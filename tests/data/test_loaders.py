"""Own Datasets and DataLoaders as a data module: in their order, apart, and refused in time."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.trees import write_image_folders
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

import it3_lightning
from it3_lightning.data import ImageFolders, ShiftedLoaders
from it3_lightning.data.loaders import target_in
from it3_lightning.data.sampling import Rows, correlated_stream
from it3_lightning.utils import TARGET_NAMES

DRAWS = torch.Generator()


def rows(seed: int, count: int = 40) -> TensorDataset:
    DRAWS.manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=DRAWS), torch.arange(count) % 4)


class Mapped(Dataset[Any]):
    """Samples of another form, changed as they are read."""

    def __init__(self, source: Any, change: Callable[[Any, Any], Any]) -> None:
        self.source, self.change = source, change

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.change(*self.source[index])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(rows(0))


def module(**changed: Any) -> ShiftedLoaders:
    given: dict[str, Any] = {
        "train": rows(0),
        "val": rows(1),
        "tests": {"clean": rows(2), "night": rows(3, 30), "fog/1": rows(4)},
        "tuning": {"blur": rows(5)},
    }
    return ShiftedLoaders(**{**given, **changed})


def content(loader: Any) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*loader, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def test_it_is_public() -> None:
    assert it3_lightning.ShiftedLoaders is ShiftedLoaders


def test_loaders_have_the_own_samples_in_their_order() -> None:
    data = module(eval_batch_size=7)
    assert data.test_names == ["clean", "night", "fog/1"]
    for loader, (given, count) in zip(
        data.test_dataloader(), [(2, 40), (3, 30), (4, 40)], strict=True
    ):
        assert len(next(iter(loader))[1]) == 7
        for part, own in zip(content(loader), rows(given, count).tensors, strict=True):
            assert torch.equal(part, own)
    assert torch.equal(content(data.val_dataloader())[0], rows(1).tensors[0])
    assert torch.equal(content(data.plain_train_dataloader())[0], rows(0).tensors[0])
    first, second = (content(data.train_dataloader()) for _ in range(2))
    assert torch.equal(first[0], second[0])  # of one epoch
    assert not torch.equal(first[0], rows(0).tensors[0])
    assert first[1].bincount().tolist() == [10] * 4


def test_validation_has_the_shifts_to_tune_on() -> None:
    data = module(evaluate_on="validation")
    assert data.test_names == ["clean", "blur"]
    for loader, given in zip(data.test_dataloader(), (1, 5), strict=True):
        assert torch.equal(content(loader)[0], rows(given).tensors[0])
    assert (data.reporting_shifts, data.tuning_shifts) == (("night", "fog/1"), ("blur",))


def test_settings_of_loaders_are_taken() -> None:
    def joined(batch: list[Any]) -> tuple[Tensor, Tensor]:
        inputs, targets = zip(*batch, strict=True)
        return 2 * torch.stack(inputs), torch.stack(targets)

    train = DataLoader(rows(0), batch_size=5, shuffle=True, drop_last=True)
    clean = DataLoader(rows(2), batch_size=6, collate_fn=joined)
    data = module(train=train, tests={"clean": clean, "night": rows(3)})
    assert (data.batch_size, data.eval_batch_size, data.num_workers) == (5, 6, 0)
    assert data.train_dataloader() is train
    loaders = data.test_dataloader()
    assert [loader.batch_size for loader in loaders] == [6, 6]
    assert torch.equal(content(loaders[0])[0], 2 * rows(2).tensors[0])
    assert [len(loader.dataset) for loader in (*loaders, data.plain_train_dataloader())] == [40] * 3  # type: ignore[arg-type]
    assert module().batch_size == 128


def test_batches_may_be_mappings_and_own_sets_of_batches() -> None:
    named = Mapped(rows(3), lambda x, y: {"image": x, "label": y})
    data = module(tests={"clean": Rows(*rows(2).tensors), "night": named}, stream="unequal")
    clean, night = data.test_dataloader()
    batch = next(iter(night))
    assert batch["image"].shape == (len(batch["label"]), 3)
    assert len(next(iter(clean))[1]) == 22  # two classes of four whole, of two a tenth


def test_sizes_take_a_seeded_subset_of_every_set() -> None:
    data = module(train_size=12, val_size=6, test_size=8, evaluate_on="test")
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [8, 8, 8]  # type: ignore[arg-type]
    assert len(content(data.train_dataloader())[1]) == 12
    chosen = content(data.test_dataloader()[0])[0]
    data.seed = 1
    assert not torch.equal(content(data.test_dataloader()[0])[0], chosen)
    data.evaluate_on, data.shifts = "validation", data.tuning_shifts
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [6, 6]  # type: ignore[arg-type]


def test_streams_of_classes_and_values_follow_the_targets() -> None:
    data = module(stream="correlated", seed=3)
    order = correlated_stream(rows(2).tensors[1], 3)
    assert torch.equal(data.test_orders()[0], order)
    assert torch.equal(content(data.test_dataloader()[0])[1], rows(2).tensors[1][order])
    inputs = {"clean": rows(2).tensors[0], "night": rows(3).tensors[0]}
    values = {name: TensorDataset(x, x[:, :1]) for name, x in inputs.items()}
    tested = content(module(tests=values, stream="unequal").test_dataloader()[0])
    assert 0 < len(tested[0]) < 40


def test_all_shifts_may_be_one_stream() -> None:
    data = module(stream="continual")
    assert len(content(data.test_dataloader()[1])[0]) == 70
    data.stream = "mixed"
    mixed = content(data.test_dataloader()[1])[0]
    both = torch.cat([rows(3, 30).tensors[0], rows(4).tensors[0]])
    assert all((both == row).all(1).any() for row in mixed)


def test_masks_have_no_stream_of_classes() -> None:
    masks = {
        name: TensorDataset(torch.randn(9, 3, 4, 4), torch.zeros(9, 1, 4, 4))
        for name in ("clean", "night")
    }
    data = module(tests=masks)
    assert len(data.test_dataloader()) == 2
    data.stream = "unequal"
    with pytest.raises(ValueError, match=r"Expected stream='equal'.*tests\['clean'\] has no class"):
        data.check()


def same(seed: int) -> dict[str, Any]:
    return {"tests": {"clean": rows(2), "night": rows(seed)}}


SHARED = rows(7, 50)
SHARING: dict[str, dict[str, Any]] = {
    "tuning is a test set": {
        "tuning": {"blur": (own := rows(6))},
        "tests": {"clean": rows(2), "n": own},
    },
    "val is the clean test set": {"val": own, "tests": {"clean": own, "night": rows(3)}},
    "overlapping subsets": {
        "val": Subset(SHARED, range(30)),
        "tests": {"clean": Subset(SHARED, range(29, 50)), "night": rows(3)},
    },
    "slices of one tensor": {
        "tuning": {"blur": TensorDataset(SHARED.tensors[0][:30], SHARED.tensors[1][:30])},
        "tests": {"clean": rows(2), "n": TensorDataset(*(t[29:] for t in SHARED.tensors))},
    },
    "a copy": {"tuning": {"blur": copy.deepcopy(rows(3, 30))}},
    "a copy that is read otherwise": {"val": Mapped(rows(2), lambda x, y: {"x": x, "y": y})},
    "train is val": {"train": own, "val": own},
}


@pytest.mark.parametrize("case", list(SHARING))
def test_sets_that_share_samples_are_refused_before_any_other_work(case: str) -> None:
    with pytest.raises(ValueError, match=r"Expected .* and .* to share no samples, got \d+ of"):
        module(**SHARING[case]).setup("fit")


def test_sets_that_are_apart_may_come_of_one_dataset() -> None:
    whole = rows(8, 50)
    parts = [Subset(whole, range(start, start + 10)) for start in range(0, 50, 10)]
    night = Mapped(parts[2], lambda x, y: (x * 0.1, y))  # of the same samples as the clean ones
    data = module(
        train=parts[0],
        val=parts[1],
        tests={"clean": parts[2], "night": night, "rain": parts[3]},
        tuning={"dark": Mapped(parts[1], lambda x, y: (x * 0.2, y))},
    )
    data.setup("test")
    slices = [TensorDataset(*(t[s : s + 20] for t in SHARED.tensors)) for s in (0, 20)]
    module(val=slices[0], tests={"clean": slices[1], "night": rows(3)}).setup("test")


def noisy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x + torch.rand(()), y


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no clean": ({"tests": {"night": rows(3)}}, ValueError, 'tests with "clean" and a shift'),
    "no shift": ({"tests": {"clean": rows(2)}}, ValueError, 'tests with "clean" and a shift'),
    "path": ({"tuning": {"../x": rows(5)}}, ValueError, r"names of letters.*got '\.\./x'"),
    "severity": ({"tuning": {"fog/6": rows(5)}}, ValueError, "got 'fog/6'. Rename it"),
    "column": ({"tuning": {"a|b": rows(5)}}, ValueError, r"got 'a\|b'"),
    "taken": ({"tuning": {"mixed": rows(5)}}, ValueError, "none of train, .*got 'mixed'"),
    "clean twice": ({"tuning": {"clean": rows(5)}}, ValueError, "'clean' twice.*are val"),
    "twice": ({"tuning": {"Night": rows(5)}}, ValueError, "got 'night' twice"),
    "one pass": ({"val": Stream()}, TypeError, "of val that can be read again.*TensorDataset"),
    "loader of one pass": ({"train": DataLoader(Stream())}, TypeError, "the Stream, an Iterable"),
    "generator": ({"val": iter(rows(1))}, TypeError, "as val, got .*TensorDataset"),
    "tensor": ({"val": torch.zeros(3)}, TypeError, "as val, got Tensor"),
    "list": ({"val": [1, 2]}, TypeError, "as val, got list"),
    "shuffled": (
        {"val": DataLoader(rows(1), shuffle=True)},
        ValueError,
        "DataLoader of val that has all samples.*RandomSampler.*Leave shuffle",
    ),
    "dropping": (
        {"tuning": {"blur": DataLoader(rows(1), 3, drop_last=True)}},
        ValueError,
        r"tuning\['blur'\].*drop_last",
    ),
    "no batches": ({"val": DataLoader(rows(1), None)}, ValueError, "batches of its own"),
    "unknown shift": ({"shifts": ["nigth"]}, ValueError, "Unknown shift 'nigth'.*night"),
    "shift to tune on": ({"shifts": ["blur"]}, ValueError, "with evaluate_on='validation'"),
    "shift to test on": (
        {"shifts": ["night"], "evaluate_on": "validation"},
        ValueError,
        "with evaluate_on='test'",
    ),
    "batch size": (
        {"train": DataLoader(rows(0), 4), "batch_size": 5},
        ValueError,
        "batch_size=4, those of the DataLoader",
    ),
    "train size": ({"train": DataLoader(rows(0), 4), "train_size": 5}, ValueError, "got 5 and 4"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_followed_is_refused_at_once(case: str) -> None:
    changed, kind, words = REFUSED[case]
    with pytest.raises(kind, match=f"(?s){words}"):
        module(**changed)


UNFIT: dict[str, tuple[Any, str]] = {
    "no target": (TensorDataset(rows(1).tensors[0]), r"\(inputs, target\) of val, got a list of 1"),
    "a tensor": (Mapped(rows(1), lambda x, _: x), r"of val, got a Tensor \(32, 3\)"),
    "none": (TensorDataset(torch.zeros(0, 3), torch.zeros(0)), "Expected samples in val, got none"),
    "objects": (Mapped(rows(1), lambda _, y: (object(), y)), "of val that can be put into a batch"),
    "other sizes": (
        Mapped(rows(1), lambda _, y: (torch.zeros(1 + int(y)), y)),
        "put into a batch.*collate_fn",
    ),
    "random": (Mapped(rows(1), noisy), "the same samples of val whenever.*Leave random transforms"),
}


@pytest.mark.parametrize("case", list(UNFIT))
def test_samples_that_do_not_fit_are_refused_in_setup(case: str) -> None:
    val, words = UNFIT[case]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        module(val=val).setup("fit")


def test_random_samples_to_train_on_are_fine_and_leave_the_random_state() -> None:
    before = torch.random.get_rng_state()
    data = module(train=Mapped(rows(0), noisy))
    found = data.content()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert module(train=Mapped(rows(0), noisy)).content() == found


class Drawing(Dataset[Any]):
    """Draws by a generator of its own."""

    def __init__(self) -> None:
        self.draws = np.random.default_rng()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.tensor([row + self.draws.random()]), row % 3


def test_samples_to_train_on_that_draw_by_themselves_are_the_same_data_again() -> None:
    one, two = (module(train=Drawing()).content() for _ in range(2))
    assert one == two
    assert module(train=Subset(Drawing(), range(30))).content() != one


def test_workers_do_not_change_the_fingerprint_of_random_samples() -> None:
    noisy_ones = [
        DataLoader(Mapped(rows(0), noisy), 10, shuffle=True, num_workers=count) for count in (0, 1)
    ]
    assert module(train=noisy_ones[0]).content() == module(train=noisy_ones[1]).content()


def test_batches_put_together_in_a_way_of_their_own_are_trained_on() -> None:
    batches = BatchSampler(RandomSampler(rows(0)), 8, drop_last=False)
    for given, size in ((batches, 8), ([[0, 1], [2]], 1)):
        train = DataLoader(rows(0), batch_sampler=given)
        data = module(train=train)
        assert data.train_dataloader() is train
        assert data.batch_size == size


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_targets_are_found_under_the_names_that_a_module_finds_them(name: str) -> None:
    assert target_in({"image": torch.zeros(2, 1), name: torch.ones(2)}).tolist() == [1, 1]


def test_content_tells_every_set_apart() -> None:
    before = module().content()
    assert list(before) == [
        *("train", "validation", "tests['clean']", "tests['night']", "tests['fog/1']"),
        "tuning['blur']",
    ]
    assert module(seed=3, stream="correlated", num_workers=1).content() == before
    opaque = {"clean": rows(2), "night": Mapped(rows(3, 30), lambda x, y: (x + 1, y))}
    found, again = (module(tests=opaque).content() for _ in range(2))
    assert found == again
    assert {k for k in found if found[k] != before[k]} == {"tests['night']"}
    relabelled = TensorDataset(rows(1).tensors[0], rows(1).tensors[1].flip(0))
    changed = module(val=relabelled).content()
    assert {k for k in before if changed[k] != before[k]} == {"validation"}


def test_targets_are_found_in_pairs_mappings_and_objects() -> None:
    assert target_in((1, 2)) == target_in([1, 2]) == target_in({"x": 1, "label": 2}) == 2
    assert target_in({"x": 1}) is None


def test_folders_of_images_are_samples_and_shifts(tmp_path: Path) -> None:
    write_image_folders(tmp_path, each=2)
    data = ImageFolders(tmp_path, image_size=16, batch_size=4)
    assert data.test_names == ["clean", "night", "rain"]
    assert data.tuning_shifts == ("blurred",)
    images, labels = next(iter(data.test_dataloader()[1]))
    assert images.shape == (6, 3, 16, 16)
    assert images.min() >= 0 < images.max() <= 1
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert content(data.train_dataloader())[1].bincount().tolist() == [2, 2, 2]
    before = data.content()
    file = tmp_path / "tests" / "night" / "dog" / "0.jpg"
    file.write_bytes(file.read_bytes() + b" ")
    changed = ImageFolders(tmp_path, image_size=16).content()
    assert {k for k in before if changed[k] != before[k]} == {"tests['night']"}


def test_folders_that_number_classes_otherwise_are_refused(tmp_path: Path) -> None:
    write_image_folders(tmp_path, each=2)
    (tmp_path / "tests" / "night" / "car").rename(tmp_path / "away")
    data = ImageFolders(tmp_path, image_size=16)
    with pytest.raises(ValueError, match=r"classes of train in tests\['night'\].*others: car"):
        data.setup("test")
    (tmp_path / "tests" / "night" / "car").mkdir()
    assert len(ImageFolders(tmp_path, image_size=16).test_dataloader()) == 3
    (tmp_path / "val").rename(tmp_path / "validation")
    with pytest.raises(FileNotFoundError, match=r"got no val\. Put the images there"):
        ImageFolders(tmp_path)
