"""Data modules of roads: order, orientations, shifts that leave the masks, drawn scenes."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draw_road_scenes import main
from helpers.road_files import massachusetts
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from it3_lightning.data import (
    ROAD_SHIFTS,
    ROAD_TUNING_SHIFTS,
    SHIFTS,
    TUNING_SHIFTS,
    RoadScenes,
    RoadScenesDataModule,
    RoadsDataModule,
    Shift,
    ShiftedMasks,
)
from it3_lightning.data.roads import MaskedImages, Shifted, TileOrder, Turned, scene_file

MASKABLE = [name for name in SHIFTS + TUNING_SHIFTS if name not in ("rotation", "shear")]


def small(**settings: Any) -> RoadScenesDataModule:
    sizes = {"size": 16, "train_size": 20, "val_size": 10, "test_size": 12}
    return RoadScenesDataModule(**{**sizes, "shifts": ["gaussian_noise", "fog"], **settings})


def gather(loader: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, masks = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(masks)


def same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(gather(one), gather(other), strict=True))


def random_set(count: int = 6, size: int = 4) -> MaskedImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return MaskedImages(images, images[:, :1] > 127)


# Loaders


def test_batches_are_float_images_and_float_masks_of_0_and_1() -> None:
    data = small(batch_size=8, eval_batch_size=5)
    loaders = [data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()]
    for loader, size in zip(loaders, (8, 5, 5, 5, 5), strict=True):
        images, masks = next(iter(loader))
        assert (images.shape, masks.shape) == ((size, 3, 16, 16), (size, 1, 16, 16))
        assert (images.dtype, masks.dtype) == (torch.float32, torch.float32)
        assert 0 <= images.min() <= images.max() <= 1
        assert set(masks.unique().tolist()) == {0.0, 1.0}


def test_parts_and_seeds_have_other_scenes_and_a_smaller_size_the_first_ones() -> None:
    images = {
        name: {image.sum().item() for image in gather(loader)[0]}
        for name, loader in (
            ("train", small(augment=False).train_dataloader()),
            ("validation", small().val_dataloader()),
            ("test", small().test_dataloader()[0]),
            ("other", small(seed=1).test_dataloader()[0]),
        )
    }
    assert sum(map(len, images.values())) == len(set().union(*images.values())) == 20 + 10 + 12 + 12
    fewer = gather(small(test_size=7).test_dataloader()[0])[0]
    assert torch.equal(fewer, gather(small().test_dataloader()[0])[0][:7])


def test_loaders_are_clean_first_then_one_for_each_shift_with_the_same_masks() -> None:
    data = small()
    assert data.test_names == ["clean", "gaussian_noise", "fog"]
    clean, *others = (gather(loader) for loader in data.test_dataloader())
    for name, (images, masks) in zip(data.shifts, others, strict=True):
        assert torch.equal(masks, clean[1])
        difference = (images - clean[0]).abs().mean().item()
        expected = (Shift(name, 3)(clean[0]) - clean[0]).abs().mean().item()
        assert difference == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("other", [{"eval_batch_size": 5}, {"num_workers": 1}])
def test_shifted_images_do_not_depend_on_how_they_are_loaded(other: dict[str, int]) -> None:
    for one, two in zip(small().test_dataloader(), small(**other).test_dataloader(), strict=True):
        assert same(one, two)


def test_a_shift_does_not_depend_on_the_shifts_beside_it_but_on_seed_and_severity() -> None:
    noise = gather(small().test_dataloader()[1])[0]
    assert torch.equal(noise, gather(small(shifts=["gaussian_noise"]).test_dataloader()[1])[0])
    clean = random_set()
    values = [
        Shifted(clean, Shift("gaussian_noise", severity), seed)[0][0]
        for severity, seed in ((3, 0), (3, 1), (4, 0))
    ]
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_two_samples_of_one_image_get_noise_of_their_own() -> None:
    grey = MaskedImages(
        torch.full((2, 3, 4, 4), 100, dtype=torch.uint8), torch.ones(2, 1, 4, 4) > 0
    )
    images = Shifted(grey, Shift("gaussian_noise"), 0).__getitems__([0, 1])[0]
    assert not torch.equal(images[0], images[1])


def test_the_global_random_state_is_not_touched(tmp_path: Path) -> None:
    files = RoadsDataModule(massachusetts(tmp_path), tile=32)
    for data in (small(), files):
        before = torch.get_rng_state()
        for loader in (data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()):
            gather(loader)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 20},
        {"augment": False},
    ],
)
def test_changed_settings_give_the_data_of_a_new_module(changed: dict[str, Any]) -> None:
    data, fresh = small(), small(**changed)
    data.setup("test")
    for name, value in changed.items():
        setattr(data, name, value)
    assert data.test_names == fresh.test_names
    assert same(data.train_dataloader(), fresh.train_dataloader())
    for one, other in zip(data.test_dataloader(), fresh.test_dataloader(), strict=True):
        assert same(one, other)


def test_another_root_is_followed(tmp_path: Path) -> None:
    data = RoadsDataModule(massachusetts(tmp_path / "one"), tile=32, shifts=[])
    data.setup("fit")
    data.root = massachusetts(tmp_path / "two", (1, 1, 4))
    assert len(gather(data.test_dataloader()[0])[0]) == 16


# Order and orientations


def test_an_epoch_goes_through_all_tiles_a_few_files_at_a_time() -> None:
    files = torch.arange(5).repeat_interleave(torch.tensor([3, 1, 4, 2, 6])) * 10
    order = TileOrder(files, generator=torch.Generator(), at_once=2)
    orders = [list(order) for _ in range(3)]
    for indices in orders:
        assert sorted(indices) == list(range(16))
        assert len(order) == 16
        met = files[torch.tensor(indices)].tolist()
        ends = [max(i for i, f in enumerate(met) if f == file) for file in set(met)]
        starts = [met.index(file) for file in set(met)]
        assert (
            max(sum(s <= i <= e for s, e in zip(starts, ends, strict=True)) for i in range(16)) == 2
        )
    assert len({tuple(indices) for indices in orders}) == 3


def test_no_tiles_have_an_empty_order() -> None:
    order = TileOrder(torch.zeros(0, dtype=torch.int64), generator=torch.Generator(), at_once=2)
    assert list(order) == []


def test_orientations_are_the_eight_of_a_square_for_image_and_mask() -> None:
    source = random_set(2)
    turned = Turned(source)
    assert len(turned) == 2
    for sample in range(2):
        image, mask = source[sample]
        mirrored = [value.flip(2) for value in (image, mask)]
        for how in range(8):
            found = turned[sample + 2 * how]
            assert torch.equal(found[1], (found[0][:1] * 255 > 127).float())
        images = [turned[sample + 2 * how][0] for how in range(8)]
        expected = [value.rot90(k, (1, 2)) for value in (image, mirrored[0]) for k in range(4)]
        for value in expected:
            assert sum(torch.equal(value, found) for found in images) == 1


def test_augmentation_shows_each_image_once_an_epoch_in_many_orientations() -> None:
    plain = gather(small(augment=False).train_dataloader())[0]
    turned = gather(small(batch_size=20).train_dataloader())[0]
    sums = [values.sum((1, 2, 3)).sort().values for values in (plain, turned)]
    torch.testing.assert_close(*sums)
    unchanged = sum(any(torch.equal(image, other) for other in plain) for image in turned)
    assert unchanged < 10


def test_selection_goes_through_shifts_and_orientations() -> None:
    source, chosen = random_set(), torch.tensor([4, 1])
    assert torch.equal(source.select(chosen)[0][0], source[4][0])
    assert torch.equal(Turned(source.select(chosen))[1][0], source[1][0])
    shifted = Shifted(source, Shift("contrast"), 0)
    assert torch.equal(Shifted(source.select(chosen), shifted.shift, 0)[0][0], shifted[4][0])
    assert torch.equal(source.files, torch.zeros(6))


# Shifts on tiles


@pytest.mark.parametrize("name", MASKABLE)
def test_allowed_shifts_change_colour_images_and_leave_no_pixel_out_of_place(name: str) -> None:
    images = torch.full((1, 3, 32, 32), 0.3)
    images[..., 16:] = 0.7  # an edge in the middle
    shifted = Shift(name, 3, 2.0)(images)
    assert not torch.equal(shifted, images)
    left, right = shifted[..., :12].mean().item(), shifted[..., 20:].mean().item()
    assert left < right


@pytest.mark.parametrize("name", ["blur", "motion_blur"])
def test_lengths_in_pixels_do_not_grow_with_the_tile(name: str) -> None:
    def spread(size: int, shift: Shift) -> float:
        images = torch.zeros(1, 1, size, size)
        images[..., size // 2, size // 2] = 1
        peak: float = shift(images).max().item()
        return peak

    small = spread(56, Shift(name, 3, 2.0))
    assert small == pytest.approx(spread(56, Shift(name, 3)))
    assert spread(112, Shift(name, 3, 2.0)) == pytest.approx(small, rel=1e-4)
    assert spread(112, Shift(name, 3)) < 0.7 * spread(56, Shift(name, 3))


def test_a_pixel_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="pixel > 0 or None, got 0"):
        Shift("blur", 3, 0)


def test_shifts_to_report_on_and_to_tune_on_are_kept_apart() -> None:
    assert set(ROAD_SHIFTS) <= set(SHIFTS)
    assert set(ROAD_TUNING_SHIFTS) <= set(TUNING_SHIFTS)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shifts": ["rotation"]}, "leave every pixel in its place, got rotation"),
        ({"shifts": ["fog", "shear"]}, "leave every pixel in its place, got shear"),
        ({"train_size": None}, "train_size to be an integer of at least 1, got None"),
        ({"size": 8}, "size to be an integer of at least 16, got 8"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_images_and_masks_that_do_not_fit_are_refused() -> None:
    images, masks = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\).* got \(3, 4, 4\)"):
        MaskedImages(images[0], masks)
    for wrong in (masks[:1], masks[:, :, :2], masks.float()):
        with pytest.raises(ValueError, match=r"one bool mask \(1, 4, 4\) for each of 2"):
            MaskedImages(images, wrong)


class Counting(LightningModule):
    """Adds up the images that each test loader hands out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int) -> None:
        self.seen[dataloader_idx] = self.seen.get(dataloader_idx, 0) + len(batch[1])


@pytest.mark.parametrize("kind", ["drawn", "files"])
def test_a_trainer_tests_every_loader(tmp_path: Path, kind: str) -> None:
    data: ShiftedMasks = small(test_size=16)
    if kind == "files":
        data = RoadsDataModule(massachusetts(tmp_path, (1, 1, 4)), tile=32, shifts=["fog", "blur"])
    model = Counting()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(model, data, verbose=False)
    assert model.seen == {0: 16, 1: 16, 2: 16}


def test_8_bit_images_are_divided_by_255_and_masks_are_numbers() -> None:
    images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    image, mask = MaskedImages(images, torch.ones(2, 1, 4, 4, dtype=torch.bool))[1]
    assert image[0, 0, 0].item() == pytest.approx(0.2)
    assert mask.sum().item() == 16


def test_the_order_of_tiles_repeats_with_its_generator() -> None:
    order = TileOrder(torch.tensor([0, 0, 1, 1]), generator=torch.Generator(), at_once=1)
    assert (list(order), list(order)) == ([0, 1, 3, 2], [3, 2, 1, 0])


# --- drawn scenes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    return RoadScenes(64)(32, seeded())


# --- simple scenes


def test_images_are_8_bit_colour_and_masks_are_bool(drawn: tuple[Tensor, Tensor]) -> None:
    images, masks = drawn
    assert (images.shape, images.dtype) == ((32, 3, 64, 64), torch.uint8)
    assert (masks.shape, masks.dtype) == ((32, 1, 64, 64), torch.bool)


def test_every_scene_has_a_road_and_no_scene_is_all_road(drawn: tuple[Tensor, Tensor]) -> None:
    share = drawn[1].float().mean((1, 2, 3))
    assert 0.02 < share.min() < share.max() < 0.45


def test_scenes_differ_and_use_the_range_of_values(drawn: tuple[Tensor, Tensor]) -> None:
    images = drawn[0].float() / 255
    assert images.mean((1, 2, 3)).std() > 0.03
    assert images.std((2, 3)).mean() > 0.07


def test_the_same_seed_draws_the_same_scenes(drawn: tuple[Tensor, Tensor]) -> None:
    for value, again in zip(drawn, RoadScenes(64)(32, seeded()), strict=True):
        assert torch.equal(value, again)
    assert not torch.equal(drawn[1], RoadScenes(64)(32, seeded(1))[1])


def test_the_painter_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    RoadScenes(16)(2, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_brightness_alone_does_not_tell_the_roads(drawn: tuple[Tensor, Tensor]) -> None:
    grey, masks = drawn[0].float().mean(1, keepdim=True), drawn[1]
    scores = []
    for low in range(0, 250, 25):
        for high in range(low + 25, 275, 25):
            found = (grey >= low) & (grey < high)
            scores.append(((found & masks).sum() / (found | masks).sum()).item())
    assert max(scores) < 0.4


def test_scenes_too_small_to_draw_are_refused() -> None:
    assert math.prod(RoadScenes(16)(1, seeded())[0].shape) == 768
    with pytest.raises(ValueError, match="at least 16 pixels, got 15"):
        RoadScenes(15)


# --- files of scenes


def made(root: Path, **settings: int) -> RoadScenesDataModule:
    sizes: dict[str, Any] = {"size": 16, "train_size": 4, "val_size": 2, "test_size": 3}
    return RoadScenesDataModule(root, **{**sizes, **settings})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    main(
        [f"--root={tmp_path}", "--seeds=0", "--size=16", "--train=4", "--validation=2", "--test=3"]
    )
    return tmp_path


def test_a_missing_file_says_what_to_run(root: Path) -> None:
    made(root).setup("fit")
    for changed in ({"size": 32}, {"seed": 1}):
        with pytest.raises(
            FileNotFoundError, match=r"no such file\. Run: python .*scenes\.py --root .* --seeds"
        ):
            made(root, **changed).setup("fit")


def test_too_few_scenes_say_how_many_to_draw(root: Path) -> None:
    with pytest.raises(ValueError, match=r"at least 9 scenes of 16 pixels for test .*--test 9"):
        made(root, test_size=9).setup("fit")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def without_masks(file: Path) -> None:
    with np.load(file) as arrays:
        np.savez(file, **{name: arrays[name] for name in arrays if name != "test_masks"})


def of_numbers(file: Path) -> None:
    with np.load(file) as arrays:
        np.savez(file, **{name: arrays[name].astype("float32") * 2 for name in arrays})


def of_objects(file: Path) -> None:
    np.savez(file, train_images=np.array([{}], dtype=object))


@pytest.mark.parametrize("damage", [cut, emptied, without_masks, of_numbers, of_objects])
def test_a_damaged_file_is_refused_by_name(root: Path, damage: Callable[[Path], None]) -> None:
    file = scene_file(root, 16, 0)
    damage(file)
    with pytest.raises(ValueError, match=rf"Expected .*{file.name}.*Delete it\. Run"):
        made(root).setup("fit")
