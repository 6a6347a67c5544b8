"""Reader of UTKFace: how old is the person, on clean and shifted faces and at ages never seen."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose, PILToTensor, Resize

from it3_lightning.data.base import check_equal, check_integer, check_share, reading
from it3_lightning.data.images import (
    Augmented,
    Decode,
    ImageFiles,
    Images,
    ShiftedImages,
    crop_and_flip,
    read_rgb,
)
from it3_lightning.data.sampling import Batch, chosen, subset

_UNSEEN = "unseen_ages"
_NAME = re.compile(r"(\d{1,3})_[01]_[0-4]_\d+\s*\.jpg(\.chip\.jpg)?", re.IGNORECASE)


@dataclass(eq=False)
class UTKFaceDataModule(ShiftedImages):
    """UTKFace: 23,708 aligned faces of 0 to 116 years, for regression of the age.

    A batch is ``(images, ages)``: float32 ``(B, 3, S, S)`` in [0, 1] and float32 ``(B, 1)``, in
    years. The published images are used as they are in ``root`` or ``root/UTKFace``, there or in
    ``part1`` to ``part3``, and decoded only when they are read. Names that hold no age are left
    out, with one warning that counts them. Nothing is downloaded. There are no classes, so
    ``stream`` must be ``"equal"``.

    With ``train_ages``, ages outside them are a shift of their own: all loaders hold ages inside,
    and one more, ``unseen_ages``, other samples: clean ones of the ages outside (at most
    ``test_size``).

    Args:
        root: Folder of the data.
        image_size: Height and width ``S`` that the images are resized to, in pixels.
        train_ages: Youngest and oldest age to train on, in years, both included; None for all.
        train_list: Text file of the images to train (and validate) on, one name a line.
        test_list: The same of the images to test on. Both lists or neither: without them, the seed
            splits the images.
        test_share: Share of the images that the seed takes for testing.
        in_memory: Decode all images at once and keep them: ``3 * S**2`` bytes each.
        augment: Whether training images are cut out at random places of a frame wider by an
            eighth, and half of them mirrored.
        val_size: Samples taken from the training images for validation.

    Raises:
        FileNotFoundError: There are no images, or no such list.
        ValueError: An image is damaged, a list names what is not there, a setting is out of its
            range, or no image has the ages it asks for.

    Source: Z. Zhang, Y. Song and H. Qi, "Age Progression/Regression by Conditional Adversarial
    Autoencoder" (CVPR 2017).
    """

    sample_settings = (
        *("root", "image_size", "train_ages", "train_list", "test_list", "test_share"),
        "in_memory",
    )

    root: str | Path = "data"
    _: KW_ONLY
    image_size: int = 128
    train_ages: tuple[int, int] | None = None
    train_list: str | Path | None = None
    test_list: str | Path | None = None
    test_share: float = 0.2
    in_memory: bool = False
    augment: bool = True
    val_size: int = 2000

    @property
    def shifted_names(self) -> list[str]:
        """Names of the shifts, and of the unseen ages where there are some."""
        return [*super().shifted_names, *([] if self.train_ages is None else [_UNSEEN])]

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        super().check()
        check_integer("image_size", self.image_size, 1)
        check_equal(self.stream, "ages are no classes")
        check_share("test_share", self.test_share)
        if (self.train_list is None) != (self.test_list is None):
            raise ValueError(
                f"Expected both train_list and test_list or neither, got {self.train_list!r} and "
                f"{self.test_list!r}. Give the other, or leave both out."
            )
        ages = self.train_ages
        if ages is not None and not (len(ages) == 2 and 0 <= ages[0] <= ages[1]):
            raise ValueError(
                f"Expected train_ages to be the youngest and the oldest age, got {ages!r}. Write "
                "e.g. (20, 60)."
            )

    def prepare_data(self) -> None:
        """Refuse missing images before any work; nothing is downloaded."""
        self.check()
        _find(Path(self.root))

    def load(self) -> tuple[ImageFiles, ImageFiles]:
        """Return the images to train and to test on, of the ages to train on."""
        folder, names, odd = _find(Path(self.root))
        if odd:
            rank_zero_warn(
                f"Left {len(odd)} of {len(names) + len(odd)} images out in {folder}: their names "
                f"are not age_gender_race_datetime.jpg, e.g. {odd[0]}."
            )
        size = [self.image_size, self.image_size]
        decode: Decode = Compose([read_rgb, Resize(size), PILToTensor()])
        if self.in_memory:
            decode = InMemory(decode, [folder / name for name in names])
        ages = [age_of(Path(name).name) for name in names]
        labels = torch.tensor(ages, dtype=torch.float32)[:, None]
        faces = ImageFiles(folder, names, labels, decode)
        train, test = (faces.select(rows) for rows in self._parts(names))
        self._all_ages = {"validation": train, "test": test}
        if self.train_ages is not None:
            self._unseen()  # say now that there are none, not after the training
        return self._aged(train, inside=True), self._aged(test, inside=True)

    def training(self, images: Images) -> Dataset[Batch]:
        """Return images that are cropped and mirrored at random, where that is asked for."""
        augment = partial(crop_and_flip, padding=max(1, self.image_size // 16))
        return Augmented(images, augment) if self.augment else images

    def shifted(self, name: str) -> Images:
        """Return the held-out faces under a shift, or those of the ages outside."""
        return self._unseen() if name == _UNSEEN else super().shifted(name)

    def _parts(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Return which images to train and to test on, by the lists or the seed."""
        if self.train_list is not None and self.test_list is not None:
            train, test = (_read_list(Path(f), names) for f in (self.train_list, self.test_list))
            both = set(train) & set(test)
            if both:
                raise ValueError(
                    f"Expected no image in both {self.train_list} and {self.test_list}, got "
                    f"{len(both)}, e.g. {names[min(both)]}. Test on images that are not trained on."
                )
            return torch.tensor(train), torch.tensor(test)
        size = max(1, round(self.test_share * len(names)))
        held_out, others = subset(len(names), size, self.seed, "test faces")
        return others, held_out

    def _aged(self, faces: ImageFiles, *, inside: bool) -> ImageFiles:
        """Return the faces inside the ages to train on, or outside of them."""
        if self.train_ages is None:
            return faces
        low, high = self.train_ages
        ages = faces.labels[:, 0]
        found = (((ages >= low) & (ages <= high)) == inside).nonzero()[:, 0]
        if not len(found):
            raise ValueError(
                f"Expected images {'inside' if inside else 'outside'} train_ages {low} to {high}, "
                f"got none among {len(faces)} of {ages.min():.0f} to {ages.max():.0f} years. "
                "Choose other ages."
            )
        return faces.select(found)

    def _unseen(self) -> ImageFiles:
        """Return held-out faces of the ages outside, clean."""
        unseen = self._aged(self._all_ages[self.evaluate_on], inside=False)
        size = None if self.test_size is None else min(self.test_size, len(unseen))
        return chosen(unseen, size, self.seed, _UNSEEN)


class InMemory:
    """Decodes some files once and keeps the 8-bit images; what reads them then reads no file."""

    def __init__(self, decode: Decode, paths: Sequence[Path]) -> None:
        self._rows = {path: row for row, path in enumerate(paths)}
        self._images = torch.empty(len(paths), *decode(paths[0]).shape, dtype=torch.uint8)
        for path, row in self._rows.items():
            self._images[row] = decode(path)

    def __call__(self, path: Path) -> Tensor:
        """Return the image, uint8 ``(3, H, W)``."""
        return self._images[self._rows[path]]


def age_of(name: str) -> int | None:
    """Return the age in years that a file name tells; None where a field is missing or odd.

    The names are ``age_gender_race_datetime.jpg``, of aligned faces ``.jpg.chip.jpg``. Gender is 0
    or 1, race 0 to 4.

    >>> age_of("25_0_1_20170116174525125.jpg.chip.jpg")
    25
    >>> age_of("61_1_20170109142408075.jpg.chip.jpg") is None  # no race
    True
    """
    found = _NAME.fullmatch(name)
    return None if found is None else int(found[1])


def _find(root: Path) -> tuple[Path, list[str], list[str]]:
    """Return the folder of the images, the paths in it that tell an age, and the others, sorted."""
    for folder in (root, root / "UTKFace"):
        places = [folder, *sorted(folder.glob("part[123]"))]
        files = [file for place in places for file in place.glob("*")]
        files = [file for file in files if file.name.lower().endswith("jpg")]
        if files:
            break
    else:
        raise FileNotFoundError(
            f"Expected images named like 25_0_1_20170116174525125.jpg in {root.resolve()}, in "
            "UTKFace of it, or in part1 to part3 of one of them, got none. Unpack UTKFace.tar.gz "
            "there, or set root to the folder that holds them."
        )
    names = sorted(str(file.relative_to(folder)) for file in files)
    twice = [name for name, times in Counter(Path(n).name for n in names).items() if times > 1]
    if twice:
        raise ValueError(
            f"Expected each image once in {folder}, got {len(twice)} of them in several parts, "
            f"e.g. {twice[0]}: they could be trained and tested on. Remove one copy."
        )
    kept = [name for name in names if age_of(Path(name).name) is not None]
    odd = sorted(set(names) - set(kept))
    if not kept:
        raise ValueError(
            f"Expected names like 25_0_1_20170116174525125.jpg in {folder}, got {len(odd)} others, "
            f"e.g. {odd[0]}. The age is told by the name alone: keep the published names."
        )
    return folder, kept, odd


def _read_list(path: Path, names: Sequence[str]) -> list[int]:
    """Return which of the images a file lists, one name a line, in their own order."""
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a list of file names at {path.resolve()}, got no such file. Write one name "
            "a line, or leave the lists out for a split by the seed."
        )
    rows = {Path(name).name: row for row, name in enumerate(names)}
    with reading(path, "a text file of names", "Write one name a line."):
        lines = path.read_text().splitlines()
    listed = [Path(line.strip()).name for line in lines if line.strip()]
    strange = [name for name in listed if name not in rows]
    if strange or not listed:
        raise ValueError(
            f"Expected {path} to list images that are there and whose names tell an age, one a "
            f"line, got {len(strange)} others of {len(listed)}, e.g. {strange[:3]}. Correct the "
            "list, or fetch the images."
        )
    return sorted({rows[name] for name in listed})
