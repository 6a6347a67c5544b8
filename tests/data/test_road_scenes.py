"""Drawn scenes: the simple painter, and files of scenes read or refused."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from draw_road_scenes import main
from torch import Tensor

from it3_lightning.data import RoadScenes, RoadScenesDataModule
from it3_lightning.data.roads import scene_file


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


def test_the_global_random_state_is_not_touched() -> None:
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
    sizes = {"size": 16, "train_size": 4, "val_size": 2, "test_size": 3}
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
