"""ImageNet, clean, and under the corruptions of ImageNet-C, from files or made as it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from it3_lightning.data.checks import check_integer
from it3_lightning.data.contract import Batch
from it3_lightning.data.images.base import Images
from it3_lightning.data.images.corrupted import CorruptedImages
from it3_lightning.data.images.corruption_error import ALEXNET_ERRORS
from it3_lightning.data.images.corruptions import corrupting
from it3_lightning.data.images.decoding import CenterCropped
from it3_lightning.data.images.image_files import ImageFiles
from it3_lightning.data.images.imagenet_files import (
    check_same_images,
    corrupted_folder,
    listing,
    synset_folders,
    synsets,
)
from it3_lightning.data.images.random_crops import RandomCrops

Source = Literal["auto", "files", "made", "own"]


class ImageNetCDataModule(CorruptedImages):
    """ImageNet: 1,281,167 training and 50,000 test images ``(B, 3, S, S)`` of 1,000 classes.

    ``root`` holds ``train`` and ``val`` with a folder for each synset, as torchvision's
    ``ImageFolder`` reads them; the published validation images are the test images here, and
    validation images are taken from the training images. A class is the place of its synset among
    all 1,000, whichever of them are there, so pretrained weights fit. Nothing is downloaded.

    Clean images are evaluated as usual: the shorter side resized to ``256 / 224 * S`` pixels, the
    middle cut out. Corrupted images of the published files have that behind them and are 224
    pixels large: as in the published evaluation they are taken whole (for another ``S``, resized),
    and match the clean ones by synset and file name. Values stay in [0, 1]: normalise inside the
    network (:class:`~it3_lightning.networks.TorchvisionNetwork` does). Shifts are
    the fifteen corruptions (``CORRUPTIONS``), and ``EXTRA_CORRUPTIONS`` for choosing settings, or
    the library's own.

    Args:
        root: Folder of the data.
        image_size: Height and width ``S``, in pixels.
        corruptions: ``"files"``: ImageNet-C, in ``root/ImageNet-C`` or ``corrupted``; ``"made"``:
            the same kinds, made as images are read, see :class:`~it3_lightning.data.Corruption`;
            ``"own"``: the library's shifts; ``"auto"``: the files where there is a folder of them,
            else made. It is decided when the module is made.
        val_size: Samples taken from the training images for validation.
        kwargs: Settings of :class:`~it3_lightning.data.images.corrupted.CorruptedImages`. With
            ``severity="all"``, all fifteen corruptions and the published files, the benchmark
            reports the mean corruption error.

    Raises:
        FileNotFoundError: A folder is missing.
        ImportError: timm, or for ``"made"`` imagecorruptions-imaug, is not installed.
        ValueError: A synset is unknown, an image is damaged, the corrupted images are others than
            the clean ones, or a setting is out of its range.

    Source: D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations" (ICLR 2019).
    """

    SOURCES = ("files", "made", "own")
    CORRUPTED = "ImageNet-C"

    def __init__(
        self,
        root: str | Path = "data/imagenet",
        *,
        image_size: int = 224,
        corruptions: Source = "auto",
        val_size: int = 10_000,
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        super().__init__(root=root, corruptions=corruptions, val_size=val_size, **kwargs)

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
        self.check()
        if self.corruptions == "made":
            corrupting()
        for part in ("train", "val"):
            synset_folders(Path(self.root) / part)
        for name, severity in self._wanted().values() if self.corruptions == "files" else ():
            corrupted_folder(Path(self.corrupted), name, severity)

    def source(self) -> tuple[object, ...]:
        """Return which images are read, and how."""
        return (*super().source(), self.image_size)

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

    def published(self, name: str, severity: int) -> ImageFiles | None:
        """Return all test images under a corruption of ImageNet-C, where these are asked for."""
        if self.corruptions != "files":
            return None
        folder = corrupted_folder(Path(self.corrupted), name, severity)
        check_same_images(folder, self._clean.names)
        return self._clean.elsewhere(folder, CenterCropped(self.image_size, self.image_size))

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        super().check()
        check_integer("image_size", self.image_size, 32 if self.corruptions == "made" else 1)
