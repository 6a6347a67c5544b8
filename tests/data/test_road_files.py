"""Files of roads: the layouts of the datasets, tiles of them, and what is wrong with a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.road_files import SIDE, massachusetts, pairs, roadtracer, scenes, write_pair
from PIL import Image
from torch import Tensor

from it3_lightning.data import RoadsDataModule, images, road_files
from it3_lightning.data.road_files import ROADTRACER_TEST_REGIONS, Pair, Tiles
from it3_lightning.data.roads import FILES_AT_ONCE


def data(root: Path, **settings: Any) -> RoadsDataModule:
    return RoadsDataModule(root, **{"tile": 32, "shifts": [], "augment": False, **settings})


def gather(loader: Any) -> tuple[Tensor, Tensor]:
    images, masks = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(masks)


def parts(module: RoadsDataModule) -> tuple[list[str], ...]:
    """The names of the image files of each part."""
    module.setup("fit")
    sets = (module._splits[part] for part in ("train", "validation", "test"))
    return tuple(sorted({pair.image.name for pair in tiles.pairs}) for tiles in sets)


# Layouts


def test_massachusetts_comes_in_three_parts(tmp_path: Path) -> None:
    module = data(massachusetts(tmp_path, (3, 2, 1)))
    loaders = module.train_dataloader(), module.val_dataloader(), module.test_dataloader()[0]
    assert [len(gather(loader)[0]) for loader in loaders] == [12, 8, 4]
    image, mask = (value[0] for value in scenes(1, seed=2))
    found = gather(loaders[2])
    for tile, top, left in ((0, 0, 0), (1, 0, 32), (2, 32, 0), (3, 32, 32)):
        window = slice(top, top + 32), slice(left, left + 32)
        assert torch.equal(found[0][tile] * 255, image[:, *window].float())
        assert torch.equal(found[1][tile], mask[:, *window].float())


@pytest.mark.parametrize("flat", [False, True])
def test_roadtracer_tests_on_its_authors_cities(tmp_path: Path, flat: bool) -> None:
    roadtracer(tmp_path)
    if flat:
        for path in [*tmp_path.rglob("*.png")]:
            path.rename(tmp_path / path.name)
        (tmp_path / "imagery").rmdir()
        (tmp_path / "masks").rmdir()
    train, validation, test = parts(data(tmp_path, layout="roadtracer"))
    assert test == ["boston_0_-1_sat.png", "new york_0_0_sat.png"]
    assert len(validation) == 1
    assert sorted(train + validation) == [
        f"{name}_sat.png" for name in ("austin_-1_0", "austin_0_0", "st louis_0_0")
    ]


def test_roadtracer_images_lose_their_alpha_channel(tmp_path: Path) -> None:
    module = data(roadtracer(tmp_path), layout="roadtracer", tile=SIDE)
    images, masks = gather(module.test_dataloader()[0])
    expected = [value[3:] for value in scenes(5, seed=7)]
    assert torch.equal(images * 255, expected[0].float())
    assert torch.equal(masks, expected[1].float())


def test_there_are_fifteen_cities_to_test_on() -> None:
    assert len(set(ROADTRACER_TEST_REGIONS)) == 15


def test_cities_to_test_on_may_be_others(tmp_path: Path) -> None:
    module = data(roadtracer(tmp_path), layout="roadtracer", test_regions=["st louis"])
    assert parts(module)[2] == ["st louis_0_0_sat.png"]


def test_pairs_are_parted_by_the_seed(tmp_path: Path) -> None:
    pairs(tmp_path, 10)
    splits = [parts(data(tmp_path, layout="pairs", seed=seed)) for seed in range(6)]
    for split in splits:
        assert [len(part) for part in split] == [7, 1, 2]
        assert sorted(name for part in split for name in part) == [
            f"{number}.png" for number in range(10)
        ]
    assert len({str(split) for split in splits}) > 3
    assert splits[0] == parts(data(tmp_path, layout="pairs", seed=0))


def test_other_files_in_the_folders_do_not_matter(tmp_path: Path) -> None:
    massachusetts(tmp_path)
    (tmp_path / "train" / "sat" / "index.html").write_text("a list")
    assert len(parts(data(tmp_path))[0]) == 3


# Tiles


def test_what_does_not_fill_a_tile_is_not_used(tmp_path: Path) -> None:
    module = data(massachusetts(tmp_path, (1, 1, 1), size=80), tile=32)
    assert len(gather(module.val_dataloader())[0]) == 4


def test_masks_of_0_and_1_are_those_of_0_and_255(tmp_path: Path) -> None:
    module = data(pairs(tmp_path), layout="pairs", tile=SIDE)
    before = gather(module.val_dataloader())[1]
    for path in (tmp_path / "masks").iterdir():
        with Image.open(path) as mask:
            ones = mask.point(lambda value: value // 255)
        ones.save(path)
    after = gather(data(tmp_path, layout="pairs", tile=SIDE).val_dataloader())[1]
    assert torch.equal(before, after)
    assert 0 < before.mean() < 1


def test_nothing_is_decoded_before_a_tile_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = data(massachusetts(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
        module.setup("fit")
        loader = module.train_dataloader()
    assert next(iter(loader))[0].shape == (12, 3, 32, 32)


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    reads: list[Path] = []
    original = images.read_image

    def read(path: Path, mode: str) -> Image.Image:
        reads.append(path)
        return original(path, mode)

    for module in (images, road_files):
        monkeypatch.setattr(module, "read_image", read)
    return reads


def test_an_epoch_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 3 * FILES_AT_ONCE
    module = data(massachusetts(tmp_path, (count, 1, 1)), batch_size=3)
    reads = counted_reads(monkeypatch)
    gather(module.train_dataloader())
    assert len(reads) == len(set(reads)) == 2 * count  # images and masks
    reads.clear()
    gather(module.val_dataloader())
    assert len(reads) == len(set(reads)) == 2


def test_few_decoded_files_are_kept_and_none_travel_to_workers(tmp_path: Path) -> None:
    module = data(massachusetts(tmp_path, (FILES_AT_ONCE + 3, 1, 1)))
    gather(module.train_dataloader())
    tiles = module._splits["train"]
    assert isinstance(tiles, Tiles)
    assert len(tiles._kept) == FILES_AT_ONCE
    assert tiles.__getstate__()["_kept"] == {}


def test_sizes_choose_tiles_by_the_seed(tmp_path: Path) -> None:
    massachusetts(tmp_path)
    module, again = (data(tmp_path, train_size=5, val_size=3, test_size=4) for _ in range(2))
    assert len(gather(module.train_dataloader())[0]) == 5
    images = gather(module.test_dataloader()[0])[0]
    assert torch.equal(images, gather(again.test_dataloader()[0])[0])
    whole = {image.sum().item() for image in gather(data(tmp_path).test_dataloader()[0])[0]}
    assert {image.sum().item() for image in images} < whole


# What is wrong


def write_grey(path: Path, value: int) -> None:
    with Image.open(path) as mask:
        changed = mask.point(lambda old: value if old else 0)
    changed.save(path)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def some(folder: Path) -> Path:
    return min(folder.iterdir())


def shrink(mask: Path) -> None:
    write_pair(mask.with_name("x.png"), mask, *(value[0] for value in scenes(1, 32)))
    mask.with_name("x.png").unlink()


SPOILT: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no folder": (
        lambda root: (root / "valid").rename(root / "val"),
        FileNotFoundError,
        "valid/sat, got none. Set root",
    ),
    "an empty folder": (
        lambda root: empty_folder(root / "test/sat"),
        FileNotFoundError,
        r"\.tiff or \.jpg in .*test/sat, got none",
    ),
    "no mask": (
        lambda root: some(root / "train/map").unlink(),
        ValueError,
        r"got 1 without: .*train/sat/1",
    ),
    "no image": (
        lambda root: some(root / "train/sat").unlink(),
        ValueError,
        r"got 1 without: .*train/map/1",
    ),
    "another size": (
        lambda root: shrink(some(root / "train/map")),
        ValueError,
        "same size, got 64 x 64 in .*sat.* and 32 x 32 in .*map",
    ),
    "an empty file": (
        lambda root: some(root / "valid/sat").write_bytes(b""),
        ValueError,
        "valid/sat.* to be a whole image, got 0 bytes",
    ),
    "a name twice": (
        lambda root: (root / "test/sat/10000000_15.png").touch(),
        ValueError,
        r"each name once in .*sat, got several 10000000_15\. Keep one",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_folder_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    spoil, error, message = SPOILT[kind]
    spoil(massachusetts(tmp_path))
    with pytest.raises(error, match=message):
        data(tmp_path).setup("fit")


@pytest.mark.parametrize("layout", ["massachusetts", "roadtracer"])
@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_truncated_file_is_named(tmp_path: Path, layout: Any, kind: str) -> None:
    make = massachusetts if layout == "massachusetts" else roadtracer
    make(tmp_path)
    names = {"image": ("*_15.tiff", "*_sat.png"), "mask": ("*_15.tif", "*_osm.png")}[kind]
    spoilt = list(tmp_path.rglob(names[layout == "roadtracer"]))
    for path in spoilt:
        cut(path)
    module = data(tmp_path, layout=layout)
    with pytest.raises(
        ValueError, match=r"to be a whole image, got .* Delete it and fetch it again"
    ):
        gather(module.train_dataloader())


@pytest.mark.parametrize("value", [76, 254, 2])
def test_a_mask_with_other_values_is_named(tmp_path: Path, value: int) -> None:
    massachusetts(tmp_path)
    for path in (tmp_path / "train" / "map").iterdir():
        write_grey(path, value)
    with pytest.raises(
        ValueError, match=rf"0 and 255, or of 0 and 1, in .*got the values 0, {value}\."
    ):
        gather(data(tmp_path).train_dataloader())


def test_an_image_in_the_place_of_a_mask_is_named(tmp_path: Path) -> None:
    massachusetts(tmp_path)
    for path in (tmp_path / "train" / "map").iterdir():
        path.write_bytes((path.parents[1] / "sat" / f"{path.stem}.tiff").read_bytes())
    with pytest.raises(ValueError, match=r"is it perhaps the image\?"):
        gather(data(tmp_path).train_dataloader())


def test_a_tile_larger_than_the_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"at least tile=65 pixels a side, got 64 x 64.*Lower tile"
    ):
        data(massachusetts(tmp_path), tile=65).setup("fit")


def test_cities_that_are_not_there_are_refused(tmp_path: Path) -> None:
    root = roadtracer(tmp_path, ["austin_0_0", "dallas_0_0"])
    with pytest.raises(ValueError, match=r"got austin, dallas\. Set test_regions to some of these"):
        data(root, layout="roadtracer").setup("fit")


def test_too_few_files_to_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"more than 2 pairs of files to part in .*images, got 2"):
        data(pairs(tmp_path, 2), layout="pairs").setup("fit")


def test_more_tiles_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train_size to be at most 12.* got 13"):
        data(massachusetts(tmp_path), train_size=13).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layout": "roadtracers"}, "Unknown layout 'roadtracers'. Did you mean 'roadtracer'"),
        ({"tile": 0}, "tile to be an integer of at least 1, got 0"),
        ({"val_share": 1.0}, r"val_share to be between 0 and 1, got 1\.0"),
        ({"test_share": 0}, "test_share to be between 0 and 1, got 0"),
        ({"test_regions": "boston"}, "test_regions to be a list of names, got 'boston'"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RoadsDataModule(**settings)


def test_tiles_without_files_are_none() -> None:
    assert len(Tiles([], 32)) == 0
    assert Pair(Path("a"), Path("b")) == Pair(Path("a"), Path("b"))
