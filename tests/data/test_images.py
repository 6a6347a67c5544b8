"""Images in memory and their data modules: splits, shifted loaders, settings, random views."""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from it3_lightning.data import (
    FashionMNISTDataModule,
    ImageSet,
    Shift,
    ShiftedData,
    ShiftedImages,
)
from it3_lightning.data.images import Augmented, as_float, check_labels, crop_and_flip
from it3_lightning.data.sampling import DrawSampler

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


def test_test_images_of_another_shape_are_refused() -> None:
    class Mixed(Numbered):
        def load(self) -> tuple[ImageSet, ImageSet]:
            train, test = super().load()
            return train, ImageSet(test.images[..., :4], test.labels)

    with pytest.raises(ValueError, match=r"test images of Mixed .* \(1, 8, 8\), got \(1, 8, 4\)"):
        Mixed(val_size=20).setup("fit")


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
    monkeypatch.setattr(ImageSet, "__getitem__", None)
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


# --- random views of training images


def views(image: Tensor, padding: int) -> list[Tensor]:
    """All crops of a framed image `(C, H, W)` and their mirror images, by slicing."""
    channels, height, width = image.shape
    frame = torch.zeros(channels, height + 2 * padding, width + 2 * padding)
    frame[:, padding : padding + height, padding : padding + width] = image
    places = range(2 * padding + 1)
    crops = [frame[:, y : y + height, x : x + width] for y in places for x in places]
    return [*crops, *(crop.flip(2) for crop in crops)]


def coloured(count: int = 12) -> ImageSet:
    images = torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    images[:, 0] = torch.arange(count).view(-1, 1, 1) / 100 + 0.2
    return ImageSet(images, torch.arange(count))


def augmented(source: ImageSet) -> Augmented:
    return Augmented(source, partial(crop_and_flip, padding=2))


def epochs(workers: int, count: int = 2, batch_size: int = 5, seed: int = 0) -> list[Tensor]:
    data = ShiftedData(seed=seed, num_workers=workers)
    batches = data._loader(augmented(coloured()), batch_size, shuffle=True)
    return [torch.cat([images for images, _ in batches]) for _ in range(count)]


def test_draws_reach_every_view_equally_often_and_no_other() -> None:
    image = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = views(image[0], 1)
    seen = crop_and_flip(image.expand(36, -1, -1, -1), torch.arange(36), padding=1)
    found = [[k for k, view in enumerate(expected) if torch.equal(view, one)] for one in seen]
    assert sorted(index for indices in found for index in indices) == sorted([*range(18)] * 2)


def test_a_view_depends_on_its_own_draw_alone() -> None:
    images = torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    draws = torch.tensor([5, 17, 2**31 - 1, 0, 91, 17])
    together = crop_and_flip(images, draws)
    for index in range(6):
        alone = crop_and_flip(images[index : index + 1], draws[index : index + 1])
        assert torch.equal(together[index], alone[0])


def test_the_sampler_shuffles_every_sample_once_with_new_draws() -> None:
    sampler = DrawSampler(7, torch.Generator().manual_seed(0))
    first, second = list(sampler), list(sampler)
    assert len(sampler) == 7
    for codes in (first, second):
        assert sorted(code % 7 for code in codes) == list(range(7))
        assert all(0 <= code // 7 < 2**31 for code in codes)
    assert {code // 7 for code in first}.isdisjoint(code // 7 for code in second)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_same_views(workers: int) -> None:
    here, there = epochs(0), epochs(workers)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_views_are_new_in_every_epoch_and_repeat_with_the_seed() -> None:
    first, second = epochs(0)
    labels = [(epoch[:, 0].amax((1, 2)) * 100 - 20).round().int() for epoch in (first, second)]
    assert [sorted(found.tolist()) for found in labels] == [list(range(12))] * 2
    ordered = [epoch[found.argsort()] for epoch, found in zip((first, second), labels, strict=True)]
    assert (ordered[0] != ordered[1]).flatten(1).any(1).sum() >= 9  # of 12, 1 in 50 by chance
    assert torch.equal(epochs(0)[1], second)
    assert not torch.equal(epochs(0, seed=1)[0], first)


def test_processes_share_the_samples_of_an_epoch_and_their_draws() -> None:
    ranks = [
        DistributedSamplerWrapper(
            DrawSampler(12, torch.Generator().manual_seed(0)), num_replicas=2, rank=rank
        )
        for rank in (0, 1)
    ]
    for _ in range(2):
        first, second = (list(rank) for rank in ranks)
        assert sorted(code % 12 for code in [*first, *second]) == list(range(12))
    alone = DrawSampler(12, torch.Generator().manual_seed(0))
    _, epoch = list(alone), list(alone)
    assert sorted([*first, *second]) == sorted(epoch)


def test_a_plain_index_gives_the_label_of_its_sample() -> None:
    source = augmented(coloured())
    assert [int(source[index][1]) for index in (0, 11)] == [0, 11]
    assert source.__getitems__([3, 8])[1].tolist() == [3, 8]


def test_views_do_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    epochs(0)
    assert torch.equal(torch.get_rng_state(), before)


# --- labels and pixels


def test_labels_may_be_values() -> None:
    check_labels(torch.tensor([[25.0], [61.0]]), 2)
    with pytest.raises(ValueError, match=r"float32 values \(N, K\), got \(2,\) of torch.float32"):
        check_labels(torch.tensor([25.0, 61.0]), 2)


def test_8_bit_values_are_divided_by_255() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert as_float(pixels).tolist() == pytest.approx([0, 0.2, 1])
