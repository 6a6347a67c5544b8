"""ImageNet and ImageNet-C: classes by synset, preprocessing, files or made corruptions."""

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.trees import SYNSETS, pixels, write_imagenet, write_imagenet_c, write_jpeg
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights
from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

from it3_lightning.data import (
    ALEXNET_ERRORS,
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    SHIFTS,
    Corruption,
    ImageNetCDataModule,
)
from it3_lightning.data.imagenet import synsets
from it3_lightning.data.sampling import seeded

Loader = DataLoader[tuple[Tensor, Tensor]]
CLASSES = {0: "tench", 1: "goldfish", 2: "great white shark", 281: "tabby", 491: "chain saw"}
CLASSES[892] = "wall clock"


def made(root: Path, **settings: Any) -> ImageNetCDataModule:
    return ImageNetCDataModule(root, **{"val_size": 8, "image_size": 32, "shifts": [], **settings})


def gather(loader: Loader) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_imagenet(tmp_path)
    return tmp_path


@pytest.fixture
def both(root: Path) -> Path:
    write_imagenet_c(root, root / "ImageNet-C", ("fog", "jpeg_compression"))
    return root


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return [int(word) for word in state[1]]


# --- classes


def test_a_class_is_the_place_of_its_synset_among_all_thousand(root: Path) -> None:
    data = made(root)
    data.prepare_data()
    train, test = data.load()
    assert train.labels.tolist() == [index for index in CLASSES for _ in range(6)]
    assert test.labels.tolist() == [index for index in CLASSES for _ in range(3)]
    assert [name.split("/")[0] for name in test.names] == [s for s in SYNSETS for _ in range(3)]
    assert data.num_classes == 1000
    names = ResNet50_Weights.DEFAULT.meta["categories"]  # in the order of the pretrained outputs
    assert {index: names[index] for index in CLASSES} == CLASSES


def test_a_class_is_the_same_where_other_synsets_are_missing(root: Path) -> None:
    shutil.rmtree(root / "val" / SYNSETS[0])
    shutil.rmtree(root / "train" / SYNSETS[3])
    train, test = made(root).load()
    assert sorted(set(train.labels.tolist())) == [0, 1, 2, 491, 892]
    assert sorted(set(test.labels.tolist())) == [1, 2, 281, 491, 892]


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_unknown_synset_is_refused(root: Path, part: str) -> None:
    (root / part / "n01440765").mkdir()
    message = rf"{part} to be synsets .*'n01440765'.*'n01440764'"
    with pytest.raises(ValueError, match=message):
        made(root).prepare_data()
    with pytest.raises(ValueError, match=message):
        made(root).setup("fit")


def test_missing_and_empty_folders_are_refused(root: Path) -> None:
    shutil.rmtree(root / "val" / SYNSETS[2])
    (root / "val" / SYNSETS[2]).mkdir()
    with pytest.raises(ValueError, match=rf"Expected images .* in .*{SYNSETS[2]}, got none"):
        made(root).setup("fit")
    shutil.rmtree(root / "val")
    with pytest.raises(FileNotFoundError, match=r"n01440764, in .*val, got no such folder"):
        made(root).prepare_data()
    (root / "val").mkdir()
    write_jpeg(root / "val" / "ILSVRC2012_val_00000001.JPEG", pixels(1, 32, 0)[0])
    with pytest.raises(FileNotFoundError, match="got none in it"):
        made(root).prepare_data()


# --- images


def test_clean_images_are_resized_and_cropped_as_torchvision_does(root: Path) -> None:
    write_jpeg(root / "val" / SYNSETS[5] / "tall.JPEG", pixels(1, 300, 3)[0][:, :260])
    usual = Compose([Resize(256), CenterCrop(224), ToTensor()])
    reference = ImageFolder(root / "val", transform=usual)
    images, labels = gather(made(root, image_size=224).test_dataloader()[0])
    assert images.shape == (19, 3, 224, 224)
    assert torch.equal(images, torch.stack([image for image, _ in reference]))
    assert labels.tolist() == [list(CLASSES)[index] for _, index in reference]


def test_grey_and_palette_images_become_colour(root: Path) -> None:
    grey = Image.fromarray(pixels(1, 40, 1)[0]).convert("L")
    grey.save(root / "val" / SYNSETS[0] / "grey.JPEG", "JPEG")
    grey.convert("P").save(root / "val" / SYNSETS[0] / "palette.png")
    images = gather(made(root).test_dataloader()[0])[0]
    assert images.shape == (20, 3, 32, 32)
    assert torch.equal(images[3, 0], images[3, 1])


def test_a_damaged_image_is_named(root: Path) -> None:
    file = root / "val" / SYNSETS[1] / "ILSVRC2012_val_00000010.JPEG"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{file} to be a whole image, got 200 bytes"):
        gather(made(root).test_dataloader()[0])


def test_a_worker_names_the_damaged_image_too(root: Path) -> None:
    file = root / "val" / SYNSETS[1] / "ILSVRC2012_val_00000010.JPEG"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{file} to be a whole image, got 0 bytes"):
        gather(made(root, num_workers=1).test_dataloader()[0])


# --- training


def test_training_images_are_random_crops_by_the_seed_alone(root: Path) -> None:
    here, there = (made(root, num_workers=n, batch_size=5) for n in (0, 2))
    first, second = here.train_dataloader(), there.train_dataloader()
    epochs = [[gather(loader)[0] for _ in range(2)] for loader in (first, second)]
    assert epochs[0][0].shape == (28, 3, 32, 32)
    for a, b in zip(*epochs, strict=True):
        assert torch.equal(a, b)
    other = gather(made(root, seed=1, batch_size=5).train_dataloader())[0]
    assert not torch.equal(epochs[0][0], other)
    assert not torch.equal(*epochs[0])


def test_validation_and_test_images_are_no_random_crops(root: Path) -> None:
    augmented, plain = made(root), made(root, augment=False)
    assert torch.equal(gather(augmented.val_dataloader())[0], gather(plain.val_dataloader())[0])
    centre = gather(plain.train_dataloader())[0]
    crops = gather(augmented.train_dataloader())[0]
    assert not any((centre == crop).flatten(1).all(1).any() for crop in crops)


def test_the_global_random_states_are_not_touched(root: Path) -> None:
    before, numpy_before = torch.get_rng_state(), numpy_state()
    data = made(root, shifts=["gaussian_noise", "frost"], corruptions="made")
    for loader in (data.train_dataloader(), *data.test_dataloader()):
        gather(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert numpy_state() == numpy_before


def test_sets_can_be_sent_to_another_process(root: Path) -> None:
    data = made(root, shifts=["contrast"], corruptions="made")
    for loader in (data.train_dataloader(), *data.test_dataloader()):
        copied = pickle.loads(pickle.dumps(loader.dataset))
        assert torch.equal(copied[3][0], loader.dataset[3][0])


# --- ImageNet-C from files


@pytest.mark.parametrize("archive", ["", "weather"])
def test_files_are_found_as_published_and_as_unpacked_by_archive(root: Path, archive: str) -> None:
    write_imagenet_c(root, root / "ImageNet-C" / archive, ("fog",))
    for severity in (1, 4):
        data = made(root, shifts=["fog"], severity=severity)
        assert data.corruptions == "files"
        data.prepare_data()
        clean, fog = map(gather, data.test_dataloader())
        assert set((fog[0] * 255).round().flatten().tolist()) == {250 - 40 * severity}
        assert torch.equal(clean[1], fog[1])


def test_corrupted_images_are_taken_whole_as_in_the_published_evaluation(both: Path) -> None:
    folder = both / "ImageNet-C" / "fog" / "3"
    for number, file in enumerate(sorted(folder.glob("*/*"))):
        write_jpeg(file, pixels(18, 224, 7)[number])
    reference = ImageFolder(folder, transform=Compose([CenterCrop(224), ToTensor()]))
    fog = gather(made(both, image_size=224, shifts=["fog"]).test_dataloader()[1])
    assert torch.equal(fog[0], torch.stack([image for image, _ in reference]))


def test_corrupted_images_match_the_clean_ones_by_name(both: Path) -> None:
    extra = both / "ImageNet-C" / "fog" / "3" / "n02123159"  # tiger cat: not in val
    write_jpeg(extra / "ILSVRC2012_val_00000077.JPEG", pixels(1, 32, 0)[0])
    data = made(both, shifts=["fog"], test_size=7, stream="unequal")
    clean, fog = data.test_dataloader()
    assert clean.dataset.names == fog.dataset.names  # type: ignore[attr-defined]
    assert torch.equal(gather(clean)[1], gather(fog)[1])


def test_a_missing_corrupted_image_is_an_error(both: Path) -> None:
    (both / "ImageNet-C/fog/3" / SYNSETS[4] / "ILSVRC2012_val_00000041.JPEG").unlink()
    with pytest.raises(ValueError, match=r"all 18 clean .*fog/3, corrupted, got 17 .*00041\.JPEG"):
        made(both, shifts=["fog"]).setup("test")


def test_an_unknown_corrupted_synset_is_an_error(both: Path) -> None:
    (both / "ImageNet-C/fog/3/cat").mkdir()
    with pytest.raises(ValueError, match=r"to be synsets .* 'cat'"):
        made(both, shifts=["fog"]).setup("test")


def test_a_missing_corruption_is_an_error_before_any_work(both: Path) -> None:
    data = made(both, shifts=["fog", "snow"])
    with pytest.raises(FileNotFoundError, match=r"snow/3 of ImageNet-C in .*corruptions=\"made\""):
        data.prepare_data()
    with pytest.raises(FileNotFoundError, match="fog/3"):
        made(both, corrupted=both / "elsewhere", shifts=["fog"]).prepare_data()


def test_the_files_hold_no_validation_images(both: Path) -> None:
    with pytest.raises(ValueError, match=r"test images alone.*'made' or 'own'"):
        made(both, evaluate_on="validation")


# --- corruptions made as images are read


def test_without_a_folder_corruptions_are_made(root: Path) -> None:
    assert ImageNetCDataModule(root).corruptions == "made"
    assert list(ImageNetCDataModule(root).shifts) == list(CORRUPTIONS)
    own = ImageNetCDataModule(root, corruptions="own")
    assert list(own.shifts) == list(SHIFTS)


def test_a_made_corruption_is_drawn_from_the_seed_and_the_name_of_each_file(root: Path) -> None:
    names = ["impulse_noise", "spatter"]
    clean, *loaders = made(root, shifts=names, seed=2, severity=4).test_dataloader()
    source = gather(clean)[0]
    for name, loader in zip(names, loaders, strict=True):
        files = loader.dataset.names  # type: ignore[attr-defined]
        for image, corrupted, file in zip(source, gather(loader)[0], files, strict=True):
            expected = Corruption(name, 4)(image[None], seeded(2, name, 4, file))[0]
            assert torch.equal(expected, corrupted)


def test_made_corruptions_are_the_same_whatever_the_workers(root: Path) -> None:
    shifts = ["shot_noise", "motion_blur"]
    one, other = (made(root, shifts=shifts, num_workers=n, eval_batch_size=4 + n) for n in (0, 2))
    for first, second in zip(one.test_dataloader(), other.test_dataloader(), strict=True):
        assert torch.equal(gather(first)[0], gather(second)[0])


@pytest.mark.parametrize("package", ["imagecorruptions", "timm.data.imagenet_info"])
def test_a_missing_package_is_an_error_before_any_work(
    root: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    synsets.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'it3_lightning\[vision\]'"):
        made(root).prepare_data()


def test_validation_images_can_be_corrupted_to_choose_settings(root: Path) -> None:
    data = made(root, shifts=list(EXTRA_CORRUPTIONS), evaluate_on="validation")
    loaders = data.test_dataloader()
    assert [len(gather(loader)[1]) for loader in loaders] == [8] * 5
    assert all("ILSVRC" not in name for name in loaders[1].dataset.names)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shifts": ["blur"]}, "Unknown corruption 'blur'"),
        ({"shifts": ["fog"], "corruptions": "mad"}, "Unknown source of corruptions 'mad'"),
        ({"image_size": 31}, "image_size to be an integer of at least 32"),
        ({"severity": 0}, "severity to be one of 1, 2, 3, 4, 5, got 0"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **settings)


def test_the_baseline_is_given_only_where_all_of_the_published_files_are_tested_on(
    root: Path,
) -> None:
    whole: dict[str, Any] = {"shifts": CORRUPTIONS, "severity": "all", "corruptions": "files"}
    assert made(root, **whole).baseline_errors == ALEXNET_ERRORS
    assert len(made(root, **whole).test_names) == 76
    for changed in (
        {"severity": 5},
        {"corruptions": "made"},
        {"shifts": CORRUPTIONS[1:]},
        {"shifts": EXTRA_CORRUPTIONS},
    ):
        assert made(root, **{**whole, **changed}).baseline_errors is None


def test_the_first_and_the_last_synset_are_tench_and_toilet_paper() -> None:
    assert (synsets()["n01440764"], synsets()["n15075141"]) == (0, 999)
