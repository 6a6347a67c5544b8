"""UTKFace: ages from file names, splits by lists or seed, unseen ages, lazy and exact decoding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trees import face_name, pixels, write_faces, write_jpeg
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from it3_lightning.data import Shift, UTKFaceDataModule
from it3_lightning.data.sampling import seeded

Loader = DataLoader[tuple[Tensor, Tensor]]
AGES = [1 + 3 * number % 89 for number in range(60)]


def made(root: Path, **settings: Any) -> UTKFaceDataModule:
    return UTKFaceDataModule(root, **{"val_size": 8, "image_size": 40, "shifts": [], **settings})


def gather(loader: Loader) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def ages(loader: Loader) -> list[float]:
    return [float(age) for age in gather(loader)[1][:, 0]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_faces(tmp_path / "UTKFace", AGES)
    return tmp_path


# --- names and places


@pytest.mark.parametrize("place", ["", "UTKFace", "UTKFace/part2", "part1"])
@pytest.mark.parametrize("end", [".jpg", ".jpg.chip.jpg", " .jpg", ".JPG"])
def test_images_are_found_in_every_place_and_form(tmp_path: Path, place: str, end: str) -> None:
    write_faces(tmp_path / place, AGES, end=end)
    data = made(tmp_path)
    data.prepare_data()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()[0])
    found = [ages(loader) for loader in loaders]
    assert [len(part) for part in found] == [40, 8, 12]
    assert sorted(age for part in found for age in part) == sorted(map(float, AGES))


def test_parts_are_one_set_and_a_face_in_two_of_them_is_refused(tmp_path: Path) -> None:
    for part in (1, 2, 3):
        write_faces(tmp_path / f"part{part}", [10 * part] * (4 + part), end=f"{part}.jpg")
    found = sum(len(part) for part in made(tmp_path, val_size=2).load())
    assert found == 5 + 6 + 7
    write_faces(tmp_path / "part2", [10], end="1.jpg")
    with pytest.raises(ValueError, match=r"in several parts, e\.g\. 10_0_0_.*1\.jpg"):
        made(tmp_path).prepare_data()


MALFORMED = [
    "39_1_20170116174525125.jpg.chip.jpg",  # these four are in the published set
    "61_1_20170109142408075.jpg.chip.jpg",
    "61_1_20170109150557335.jpg.chip.jpg",
    "55_0_0_20170116232725357jpg",
    "_0_1_20170116174525125.jpg",
    "x5_0_1_20170116174525125.jpg",
    "holiday.jpg",
]


def prepared(data: UTKFaceDataModule) -> list[Loader]:
    """Do what a Trainer does for fitting and testing."""
    data.prepare_data()
    loaders = [data.train_dataloader()]
    data.prepare_data()
    return [*loaders, *data.test_dataloader()]


def test_names_without_an_age_are_left_out_with_one_warning(root: Path) -> None:
    for name in MALFORMED:
        (root / "UTKFace" / name).write_bytes(b"never read")
    data = made(root)
    with pytest.warns(UserWarning, match=r"Left 7 of 67 images out .*, e\.g\. ") as caught:
        loaders = prepared(data)
    assert (len(caught), len(loaders)) == (1, 2)
    assert len(gather(data.test_dataloader()[0])[1]) == 12


def test_no_image_and_no_age_are_errors_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"25_0_1_20170116174525125\.jpg in .*, got none"):
        made(tmp_path).prepare_data()
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"got 1 others, e\.g\. holiday\.jpg"):
        made(tmp_path).prepare_data()


# --- images


def test_images_are_those_of_the_files_with_their_ages(root: Path) -> None:
    loader = made(root).test_dataloader()[0]
    images, labels = gather(loader)
    assert (labels.shape, labels.dtype) == ((12, 1), torch.float32)
    files = {path.name: pil_to_tensor(Image.open(path)) for path in (root / "UTKFace").iterdir()}
    for image, age in zip(images, labels, strict=True):
        names = [n for n, pixels in files.items() if torch.equal(pixels.float() / 255, image)]
        assert [int(name.split("_")[0]) for name in names] == [int(age)]


def test_images_are_resized_to_one_size(root: Path) -> None:
    write_jpeg(root / "UTKFace" / face_name(50, 99), pixels(1, 64, 0)[0][:, :30])
    images = gather(made(root, image_size=24, augment=False).train_dataloader())[0]
    assert images.shape[1:] == (3, 24, 24)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b""])
def test_a_damaged_image_is_named_where_it_is_read(root: Path, damage: Any) -> None:
    for file in (root / "UTKFace").iterdir():
        file.write_bytes(damage(file.read_bytes()))
    data = made(root)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"UTKFace/\d+_.*to be a whole image, got \d+ bytes"):
        gather(data.val_dataloader())
    with pytest.raises(ValueError, match="to be a whole image"):
        made(root, in_memory=True).setup("fit")


def test_images_kept_in_memory_are_the_same_and_read_no_file_again(root: Path) -> None:
    settings = {"shifts": ["gaussian_noise"], "image_size": 32}
    lazy, kept = made(root, **settings), made(root, in_memory=True, **settings)
    pairs = [(lazy.train_dataloader(), kept.train_dataloader())]
    pairs += zip(lazy.test_dataloader(), kept.test_dataloader(), strict=True)
    expected = [gather(first) for first, _ in pairs]
    for file in (root / "UTKFace").iterdir():
        file.unlink()
    for first, (_, second) in zip(expected, pairs, strict=True):
        again = gather(second)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


# --- shifts, the same whatever reads them


def test_a_shift_is_drawn_from_the_seed_and_the_name_of_each_file(root: Path) -> None:
    clean, noise = made(root, shifts=["gaussian_noise"], seed=4).test_dataloader()
    names = noise.dataset.names  # type: ignore[attr-defined]
    for image, shifted, name in zip(gather(clean)[0], gather(noise)[0], names, strict=True):
        generator = seeded(4, "gaussian_noise", 3, name)
        assert torch.equal(Shift("gaussian_noise", 3)(image[None], generator)[0], shifted)


@pytest.mark.parametrize("settings", [{"num_workers": 2}, {"eval_batch_size": 5}])
def test_loaders_give_the_same_whatever_the_workers_and_batch_size(
    root: Path, settings: dict[str, Any]
) -> None:
    shifts = ["shot_noise", "rotation"]
    one, other = made(root, shifts=shifts), made(root, shifts=shifts, **settings)
    loaders = [(one.train_dataloader(), other.train_dataloader())]
    for first, second in [
        *loaders,
        *zip(one.test_dataloader(), other.test_dataloader(), strict=True),
    ]:
        assert torch.equal(gather(first)[0], gather(second)[0])


def test_a_subset_shifts_its_images_as_the_whole_does(root: Path) -> None:
    whole = made(root, shifts=["gaussian_noise"]).test_dataloader()
    part = made(root, shifts=["gaussian_noise"], test_size=5).test_dataloader()
    clean, shifted = gather(whole[0])[0], gather(whole[1])[0]
    rows = [int((clean == image).flatten(1).all(1).nonzero()[0]) for image in gather(part[0])[0]]
    assert len(rows) == 5
    assert torch.equal(gather(part[1])[0], shifted[rows])


def test_the_global_random_state_is_not_touched(root: Path) -> None:
    before = torch.get_rng_state()
    data = made(root, shifts=["shot_noise"])
    for loader in (data.train_dataloader(), *data.test_dataloader()):
        gather(loader)
    assert torch.equal(torch.get_rng_state(), before)


# --- splits


def test_seed_decides_the_split(root: Path) -> None:
    first, same, other = (ages(made(root, seed=s).test_dataloader()[0]) for s in (0, 0, 1))
    assert first == same
    assert sorted(first) != sorted(other)


def test_lists_decide_the_split(root: Path) -> None:
    names = sorted(path.name for path in (root / "UTKFace").iterdir())
    (root / "train.txt").write_text("\n".join([*names[:30], "", f"UTKFace/{names[30]}"]) + "\n")
    (root / "test.txt").write_text("\n".join(names[40:50]))
    lists = {"train_list": root / "train.txt", "test_list": root / "test.txt"}
    data = made(root, **lists)
    told = [float(name.split("_")[0]) for name in names]
    trained = ages(data.train_dataloader()) + ages(data.val_dataloader())
    assert sorted(trained) == sorted(told[:31])
    assert sorted(ages(data.test_dataloader()[0])) == sorted(told[40:50])


def test_lists_of_other_names_are_refused(root: Path) -> None:
    names = sorted(path.name for path in (root / "UTKFace").iterdir())
    good, bad = root / "good.txt", root / "bad.txt"
    good.write_text("\n".join(names[:20]))
    for text, message in (
        (face_name(5, 1234), r"got 1 others of 1, e\.g\. \['5_0_4_"),
        (f"{names[30]}\n61_1_20170109142408075.jpg", "got 1 others of 2"),
        ("\n", "got 0 others of 0"),
        ("\n".join(names[19:]), "no image in both .*, got 1, e.g."),
    ):
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            made(root, train_list=good, test_list=bad).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"gone\.txt, got no such file"):
        made(root, train_list=root / "gone.txt", test_list=good).setup("fit")


# --- unseen ages


def test_ages_outside_are_neither_trained_nor_validated_on_but_tested_on(root: Path) -> None:
    data = made(root, train_ages=(20, 60), shifts=["blur"])
    assert data.test_names == ["clean", "blur", "unseen_ages"]
    clean, blur, unseen = map(ages, data.test_dataloader())
    trained = ages(data.train_dataloader()) + ages(data.val_dataloader())
    assert all(20 <= age <= 60 for age in trained + clean)
    assert clean == blur
    assert not any(20 <= age <= 60 for age in unseen)
    assert sorted(clean + unseen) == sorted(ages(made(root).test_dataloader()[0]))
    assert sum(20 <= age <= 60 for age in AGES) == len(trained + clean)


def test_unseen_ages_of_validation_are_no_test_images(root: Path) -> None:
    test = gather(made(root, train_ages=(20, 60)).test_dataloader()[1])[0]
    data = made(root, train_ages=(20, 60), evaluate_on="validation")
    chosen = gather(data.test_dataloader()[1])
    assert not any((test == image).flatten(1).all(1).any() for image in chosen[0])
    assert not any(20 <= age <= 60 for age in chosen[1])


def test_unseen_ages_are_at_most_test_size(root: Path) -> None:
    data = made(root, train_ages=(20, 60), test_size=2)
    assert [len(gather(loader)[1]) for loader in data.test_dataloader()] == [2, 2]


def test_ages_may_change_between_runs(root: Path) -> None:
    data = made(root)
    assert len(data.test_dataloader()) == 1
    data.train_ages = (30, 50)
    assert len(data.test_dataloader()) == 2
    assert all(30 <= age <= 50 for age in ages(data.train_dataloader()))


def test_ages_that_nobody_has_are_refused_before_training(root: Path) -> None:
    with pytest.raises(ValueError, match="inside train_ages 100 to 110, got none among 48 of"):
        made(root, train_ages=(100, 110)).setup("fit")
    with pytest.raises(ValueError, match="outside train_ages 0 to 110, got none"):
        made(root, train_ages=(0, 110)).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stream": "unequal"}, "stream='equal', got 'unequal': ages are no classes"),
        ({"image_size": 0}, "image_size to be an integer of at least 1"),
        ({"test_share": 1.0}, "test_share to be between 0 and 1"),
        ({"train_list": "a.txt"}, "both train_list and test_list or neither"),
        ({"train_ages": (60, 20)}, "youngest and the oldest age"),
        ({"train_ages": (20,)}, "youngest and the oldest age"),
        ({"shifts": ["fgo"]}, "Unknown shift 'fgo'"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(tmp_path, **settings)


def test_ages_have_no_number_of_classes(root: Path) -> None:
    with pytest.raises(ValueError, match=r"UTKFaceDataModule is for regression"):
        _ = made(root).num_classes


def test_training_faces_are_cropped_and_mirrored_and_no_others(root: Path) -> None:
    plain = gather(made(root, augment=False).train_dataloader())
    changed = gather(made(root).train_dataloader())
    assert sorted(changed[1].flatten().tolist()) == sorted(plain[1].flatten().tolist())
    kept = [(plain[0] == image).flatten(1).all(1).any().item() for image in changed[0]]
    assert sum(kept) < 10  # 1 in 50 by chance, of 40
    again = gather(made(root).train_dataloader())
    assert torch.equal(changed[0], again[0])
