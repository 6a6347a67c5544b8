"""ImageNet, clean, and under the corruptions of ImageNet-C, from files or made as it is read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from it3_lightning.data.corruption_error import ALEXNET_ERRORS
from it3_lightning.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, Corruption, corrupting
from it3_lightning.data.decoding import CenterCropped
from it3_lightning.data.image_files import ImageFiles
from it3_lightning.data.imagenet_files import (
    check_same_images,
    corrupted_folder,
    listing,
    synset_folders,
    synsets,
)
from it3_lightning.data.images import Batch, Change, Images
from it3_lightning.data.random_crops import RandomCrops
from it3_lightning.data.settings import check_corrupted, check_integer
from it3_lightning.data.shifted import ShiftedImages
from it3_lightning.data.shifts import SHIFTS, TUNING_SHIFTS

Source = Literal["auto", "files", "made", "own"]


class ImageNetCDataModule(ShiftedImages):
    """ImageNet: 1,281,167 training and 50,000 test images ``(B, 3, S, S)`` of 1,000 classes.

    ``root`` holds ``train`` and ``val`` with a folder for each synset, as torchvision's
    ``ImageFolder`` reads them; the published validation images are the test images here, and
    validation images are taken from the training images. A class is the place of its synset among
    all 1,000, whichever of them are there, so pretrained weights fit. Nothing is downloaded.

    Clean images are evaluated as usual: the shorter side resized to ``256 / 224 * S`` pixels, the
    middle cut out. Corrupted images of the published files have that behind them and are 224
    pixels large: as in the published evaluation they are taken whole (for another ``S``, resized),
    and match the clean ones by synset and file name. Values stay in [0, 1]: normalise inside the
    network (:class:`~it3_lightning.networks.TorchvisionNetwork` does).

    Args:
        root: Folder of the data.
        image_size: Height and width ``S``, in pixels.
        corruptions: ``"files"``: the published ImageNet-C; ``"made"``: the same kinds, made as the
            images are read, see :class:`~it3_lightning.data.Corruption`; ``"own"``: the library's
            shifts; ``"auto"``: the files where there is a folder of them, else made. It is decided
            when the module is made.
        corrupted: Folder of ImageNet-C. None stands for ``root/ImageNet-C``.
        shifts: Names of what to test on; None for the fifteen corruptions (``CORRUPTIONS``), or
            the nine own shifts. ``EXTRA_CORRUPTIONS`` are for choosing settings.
        augment: Whether training images are cut out and resized at random, and half of them
            mirrored.
        val_size: Samples taken from the training images for validation.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`. With ``severity="all"``,
            all fifteen corruptions and the published files, the benchmark reports the mean
            corruption error.

    Raises:
        FileNotFoundError: A folder is missing.
        ImportError: timm, or for ``"made"`` imagecorruptions-imaug, is not installed.
        ValueError: A synset is unknown, an image is damaged, the corrupted images are others than
            the clean ones, or a setting is out of its range.

    Source: D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations" (ICLR 2019).
    """

    def __init__(
        self,
        root: str | Path = "data/imagenet",
        *,
        image_size: int = 224,
        corruptions: Source = "auto",
        corrupted: str | Path | None = None,
        shifts: Sequence[str] | None = None,
        augment: bool = True,
        val_size: int = 10_000,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self.image_size = image_size
        self.corrupted = Path(root) / "ImageNet-C" if corrupted is None else corrupted
        there = corrupted is not None or Path(self.corrupted).is_dir()
        self.corruptions: Source = corruptions
        if corruptions == "auto":
            self.corruptions = "files" if there else "made"
        self.augment = augment
        standard = SHIFTS if self.corruptions == "own" else CORRUPTIONS
        super().__init__(shifts=standard if shifts is None else shifts, val_size=val_size, **kwargs)

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return SHIFTS if self.corruptions == "own" else CORRUPTIONS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return TUNING_SHIFTS if self.corruptions == "own" else EXTRA_CORRUPTIONS

    @property
    def num_classes(self) -> int:
        """All 1,000, whichever are there."""
        return len(synsets())

    @property
    def baseline_errors(self) -> Mapping[str, float] | None:
        """AlexNet's, where what is tested on is what its errors were measured on."""
        whole = self.severity == "all" and set(self.shifts) == set(ALEXNET_ERRORS)
        return ALEXNET_ERRORS if whole and self.corruptions == "files" else None

    def prepare_data(self) -> None:
        """Refuse missing folders and packages before any work; nothing is downloaded."""
        self._check()
        if self.corruptions == "made":
            corrupting()
        for part in ("train", "val"):
            synset_folders(Path(self.root) / part)
        for name, severity in self._wanted().values() if self.corruptions == "files" else ():
            corrupted_folder(Path(self.corrupted), name, severity)

    def source(self) -> tuple[object, ...]:
        """Return which images are read, and how."""
        return (self.root, self.image_size, self.corruptions, self.corrupted)

    def load(self) -> tuple[ImageFiles, ImageFiles]:
        """Return all training and all test images."""
        decode = CenterCropped(round(self.image_size * 256 / 224), self.image_size)
        train, test = (
            ImageFiles(folder, *listing(folder), decode)
            for folder in (Path(self.root) / part for part in ("train", "val"))
        )
        self._clean = test
        return train, test

    def training(self, images: Images) -> Dataset[Batch]:
        """Return images that are cut out at random, where that is asked for."""
        if not self.augment or not isinstance(images, ImageFiles):
            return images
        return RandomCrops(images, self.image_size)

    def change(self, name: str, severity: int) -> Change:
        """Return the function behind a name; that of a published corruption is never called."""
        return (
            super().change(name, severity)
            if self.corruptions == "own"
            else Corruption(name, severity)
        )

    def published(self, name: str, severity: int) -> ImageFiles | None:
        """Return all test images under a corruption of ImageNet-C, where these are asked for."""
        if self.corruptions != "files":
            return None
        folder = corrupted_folder(Path(self.corrupted), name, severity)
        check_same_images(folder, self._clean.names)
        return self._clean.elsewhere(folder, CenterCropped(self.image_size, self.image_size))

    def _check(self) -> None:
        check_corrupted(self.corruptions, ("files", "made", "own"), self.evaluate_on)
        least = 32 if self.corruptions == "made" else 1
        check_integer("image_size", self.image_size, least)
        super()._check()
