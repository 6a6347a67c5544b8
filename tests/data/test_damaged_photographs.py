"""What `it3 fit` says of photographs that are missing, empty, cut off or mislabelled."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.vision import vision_arguments

from it3_lightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
Damage = Callable[[Path], object]


def fit(config: str, folder: Path, damage: Damage | None = None) -> None:
    arguments = vision_arguments(config, folder)
    if damage is not None:
        damage(Path(arguments[0].removeprefix("--data.root=")))
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    folders = [f"--trainer.default_root_dir={folder}", "--trainer.max_epochs=1"]
    main(["fit", f"--config={CONFIGS / config}.yaml", *quiet, *folders, *arguments])


def every(pattern: str, change: Callable[[Path], object]) -> Damage:
    """Damage all files of a pattern."""

    def act(root: Path) -> None:
        files = sorted(root.rglob(pattern))
        assert files
        for file in files:
            change(file)

    return act


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:300])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def unlabelled(file: Path) -> None:
    file.rename(file.with_name(f"face{file.name.partition('_')[2]}"))


def other_labels(file: Path) -> None:
    np.save(file, 9 - np.load(file))


@pytest.mark.parametrize(
    ("config", "damage", "error", "message"),
    [
        (
            "cifar10",
            every("data_batch_2", Path.unlink),
            FileNotFoundError,
            "Expected the 6 files",
        ),
        ("cifar10", every("data_batch_2", emptied), ValueError, "data_batch_2 to be a pickled"),
        ("cifar10", every("data_batch_2", cut), ValueError, "data_batch_2 to be a pickled"),
        ("cifar10", every("snow.npy", Path.unlink), FileNotFoundError, r"got no snow\.npy"),
        ("utkface", every("*.jpg", Path.unlink), FileNotFoundError, "got none. Unpack UTKFace"),
        ("utkface", every("*.jpg", emptied), ValueError, "a whole image, got 0 bytes"),
        ("utkface", every("*.jpg", cut), ValueError, "a whole image, got 300 bytes"),
        ("utkface", every("*.jpg", unlabelled), ValueError, "got 200 others, e.g. face"),
        (
            "imagenet_c_vit",
            every("*.JPEG", Path.unlink),
            ValueError,
            r"Expected images .* got none",
        ),
        ("imagenet_c_vit", every("*.JPEG", emptied), ValueError, "a whole image, got 0 bytes"),
        ("imagenet_c_vit", every("*.JPEG", cut), ValueError, "a whole image, got 300 bytes"),
        (
            "imagenet_c_vit",
            lambda root: (root / "train" / "n01440764").rename(root / "train" / "tench"),
            ValueError,
            "Unknown synset 'tench'",
        ),
    ],
)
def test_damaged_data_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str,
    damage: Damage,
    error: type[Exception],
    message: str,
) -> None:
    def no_network(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
    with pytest.raises(error, match=message):
        fit(config, tmp_path, damage)


def test_damaged_corruptions_are_named_before_a_test(tmp_path: Path) -> None:
    arguments = vision_arguments("cifar10", tmp_path)
    other_labels(tmp_path / "cifar10" / "CIFAR-10-C" / "labels.npy")
    with pytest.raises(ValueError, match=r"labels\.npy to repeat the labels of the 20 test images"):
        main(["test", f"--config={CONFIGS}/cifar10.yaml", "--trainer.accelerator=cpu", *arguments])
