"""UTKFace: how old is the person, on clean and shifted faces and at ages never trained on."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from it3_lightning.data import utkface_files
from it3_lightning.data.augmentation import Augmented, crop_and_flip
from it3_lightning.data.decoding import Decode, InMemory, Resized
from it3_lightning.data.image_files import ImageFiles
from it3_lightning.data.images import Batch, Images
from it3_lightning.data.sampling import subset
from it3_lightning.data.settings import check_integer
from it3_lightning.data.shifted import ShiftedImages

_UNSEEN = "unseen_ages"


class UTKFaceDataModule(ShiftedImages):
    """UTKFace: 23,708 aligned faces of 0 to 116 years, for regression of the age.

    A batch is ``(images, ages)``: float32 ``(B, 3, S, S)`` in [0, 1] and float32 ``(B, 1)``, in
    years. The published images are used as they are in ``root`` or ``root/UTKFace``, there or in
    ``part1`` to ``part3``, and decoded only when they are read. Names that hold no age are left
    out, with one warning that counts them. Nothing is downloaded.

    With ``train_ages``, ages outside them are a shift of their own: training, validation and the
    test loaders hold ages inside, and one more loader, ``unseen_ages``, holds other samples, clean
    ones of the ages outside (at most ``test_size``).

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
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`; there are no classes, so
            ``stream`` must be ``"equal"``.

    Raises:
        FileNotFoundError: There are no images, or no such list.
        ValueError: An image is damaged, a list names what is not there, a setting is out of its
            range, or no image has the ages it asks for.

    Source: Z. Zhang, Y. Song and H. Qi, "Age Progression/Regression by Conditional Adversarial
    Autoencoder" (CVPR 2017).
    """

    def __init__(
        self,
        root: str | Path = "data",
        *,
        image_size: int = 128,
        train_ages: tuple[int, int] | None = None,
        train_list: str | Path | None = None,
        test_list: str | Path | None = None,
        test_share: float = 0.2,
        in_memory: bool = False,
        augment: bool = True,
        val_size: int = 2000,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self.image_size = image_size
        self.train_ages = train_ages
        self.train_list = train_list
        self.test_list = test_list
        self.test_share = test_share
        self.in_memory = in_memory
        self.augment = augment
        super().__init__(val_size=val_size, **kwargs)

    @property
    def test_names(self) -> list[str]:
        """Names of the test and prediction loaders, in their order: clean first."""
        return [*super().test_names, *([] if self.train_ages is None else [_UNSEEN])]

    def prepare_data(self) -> None:
        """Refuse missing images before any work; nothing is downloaded."""
        self._check()
        utkface_files.find(Path(self.root))

    def source(self) -> tuple[object, ...]:
        """Return which images are read, and how."""
        ages = None if self.train_ages is None else tuple(self.train_ages)
        split = (self.train_list, self.test_list, self.test_share)
        return (self.root, self.image_size, ages, *split, self.in_memory)

    def load(self) -> tuple[ImageFiles, ImageFiles]:
        """Return the images to train and to test on, of the ages to train on."""
        folder, names, odd = utkface_files.find(Path(self.root))
        if odd:
            rank_zero_warn(
                f"Left {len(odd)} of {len(names) + len(odd)} images out in {folder}: their names "
                f"are not age_gender_race_datetime.jpg, e.g. {odd[0]}."
            )
        decode: Decode = Resized(self.image_size)
        if self.in_memory:
            decode = InMemory(decode, [folder / name for name in names])
        ages = [utkface_files.age_of(Path(name).name) for name in names]
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

    def _parts(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Return which images to train and to test on, by the lists or the seed."""
        if self.train_list is None or self.test_list is None:
            size = max(1, round(self.test_share * len(names)))
            test, train = subset(len(names), size, self.seed, "test faces")
            return train, test
        lists = [Path(self.train_list), Path(self.test_list)]
        parts = [utkface_files.read_list(path, names) for path in lists]
        both = set(parts[0]) & set(parts[1])
        if both:
            raise ValueError(
                f"Expected no image in both {lists[0]} and {lists[1]}, got {len(both)}, e.g. "
                f"{names[min(both)]}. Test on images that are not trained on."
            )
        return torch.tensor(parts[0]), torch.tensor(parts[1])

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

    def _test_sets(self) -> list[Images]:
        sets = super()._test_sets()
        return sets if self.train_ages is None else [*sets, self._unseen()]

    def _unseen(self) -> ImageFiles:
        """Return held-out faces of the ages outside, clean."""
        unseen = self._aged(self._all_ages[self.evaluate_on], inside=False)
        size = min(self.test_size or len(unseen), len(unseen))
        return unseen.select(subset(len(unseen), size, self.seed, _UNSEEN)[0])

    def _check(self) -> None:
        super()._check()
        check_integer("image_size", self.image_size, 1)
        if self.stream != "equal":
            raise ValueError(
                f"Expected stream 'equal', got {self.stream!r}: ages are no classes. Leave "
                "'unequal' out."
            )
        if not 0 < self.test_share < 1:
            raise ValueError(
                f"Expected test_share between 0 and 1, got {self.test_share}. Take e.g. 0.2."
            )
        if (self.train_list is None) != (self.test_list is None):
            raise ValueError(
                f"Expected both train_list and test_list or neither, got {self.train_list!r} and "
                f"{self.test_list!r}. Give the other, or leave both out."
            )
        self._check_ages()

    def _check_ages(self) -> None:
        ages = self.train_ages
        if ages is not None and not (len(ages) == 2 and 0 <= ages[0] <= ages[1]):
            raise ValueError(
                f"Expected train_ages to be the youngest and the oldest age, got {ages!r}. Write "
                "e.g. (20, 60)."
            )
