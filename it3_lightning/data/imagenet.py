"""Reader of ImageNet, and of ImageNet-C from files or made as images are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms as tv
from torchvision.datasets.folder import make_dataset

from it3_lightning.data.base import check_integer
from it3_lightning.data.corruptions import ALEXNET_ERRORS, corrupting
from it3_lightning.data.images import Decode, ImageFiles, Images, ShiftedImages, as_float, read_rgb
from it3_lightning.data.sampling import Batch, Views
from it3_lightning.utils.messages import not_installed, unknown

_ENDS = (".jpeg", ".jpg", ".png")


@dataclass(eq=False)
class ImageNetCDataModule(ShiftedImages):
    """ImageNet: 1,281,167 training and 50,000 test images ``(B, 3, S, S)`` of 1,000 classes.

    ``root`` holds ``train`` and ``val`` with a folder for each synset, as torchvision's
    ``ImageFolder`` reads them; the published validation images are the test images here. A class is
    the place of its synset among all 1,000, whichever of them are there, so pretrained weights fit.
    Nothing is downloaded.

    Clean images are evaluated as usual: the shorter side resized to ``256 / 224 * S`` pixels, the
    middle cut out. Corrupted images of the published files have that behind them: as in the
    published evaluation they are taken whole (for another ``S`` than 224, resized), and match the
    clean ones by synset and file name. Values stay in [0, 1]: normalise inside the network
    (:class:`~it3_lightning.networks.TorchvisionNetwork` does). With ``severity="all"``, all fifteen
    ``CORRUPTIONS`` and the published files, the benchmark reports the mean corruption error.

    Args:
        root: Folder of the data.
        image_size: Height and width ``S``, in pixels.
        corruptions: ``"files"``: ImageNet-C, in ``root/ImageNet-C`` or ``corrupted``; ``"made"``:
            the same kinds, made as images are read, see :class:`~it3_lightning.data.Corruption`;
            ``"own"``: the library's shifts; ``"auto"``: the files where there is a folder of them,
            else made. It is decided when the module is made.
        corrupted: Folder of the published files; None for the one in ``root``.
        augment: Whether training images are cut out at random and half of them mirrored.
        val_size: Samples taken from the training images for validation.

    Raises:
        FileNotFoundError: A folder is missing.
        ImportError: timm, or for ``"made"`` imagecorruptions-imaug, is not installed.
        ValueError: A synset is unknown, an image is damaged, the corrupted images are others than
            the clean ones, or a setting is out of its range.

    Source: D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common
    Corruptions and Perturbations" (ICLR 2019).
    """

    SOURCES = ("files", "made", "own")
    PUBLISHED = "ImageNet-C"
    sample_settings = ("root", "corruptions", "corrupted", "image_size")

    root: str | Path = "data/imagenet"
    _: KW_ONLY
    image_size: int = 224
    corruptions: Literal["auto", "files", "made", "own"] = "auto"
    corrupted: str | Path | None = None
    augment: bool = True
    val_size: int = 10_000

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
            _synset_folders(Path(self.root) / part)
        for name, severity in self.wanted().values() if self.corruptions == "files" else ():
            _corrupted_folder(self.corrupted_folder, name, severity)

    def load(self) -> tuple[ImageFiles, ImageFiles]:
        """Return all training and all test images."""
        decode = _decoder(round(self.image_size * 256 / 224), self.image_size)
        train, test = (
            ImageFiles(folder, *_listing(folder), decode)
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
        folder = _corrupted_folder(self.corrupted_folder, name, severity)
        names, there = self._clean.names, set(_listing(folder)[0])
        missing = [name for name in names if name not in there]
        if missing:
            raise ValueError(
                f"Expected all {len(names)} clean test images in {folder}, corrupted, got "
                f"{len(names) - len(missing)} of them; e.g. {missing[0]} is not there. Unpack the "
                "archive anew, or keep as many images in val."
            )
        return self._clean.elsewhere(folder, _decoder(self.image_size, self.image_size))

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        super().check()
        check_integer("image_size", self.image_size, 32 if self.corruptions == "made" else 1)


class RandomCrops(Views):
    """Cuts 8 to 100 % of each file's image out at random, resizes it, mirrors half of them.

    Source: C. Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015), as torchvision's
    ``RandomResizedCrop`` has it.
    """

    def __init__(self, source: ImageFiles, size: int) -> None:
        super().__init__(source)
        steps = tv.RandomResizedCrop(size), tv.RandomHorizontalFlip(), tv.PILToTensor()
        self._view = tv.Compose([read_rgb, *steps])

    def views(self, rows: list[int], draws: list[int]) -> Batch:
        """Return a crop of each of these samples, and their labels."""
        crops = []
        with torch.random.fork_rng([]):  # torchvision draws from the global state, on the CPU
            for row, draw in zip(rows, draws, strict=True):
                torch.default_generator.manual_seed(draw)
                crops.append(self._view(self.source.path(row)))
        return as_float(torch.stack(crops)), self.source.labels[torch.tensor(rows)]


def _decoder(resize: int, size: int) -> Decode:
    """Return what brings the shorter side to ``resize`` pixels and cuts the middle out."""
    steps = read_rgb, tv.Resize([resize]), tv.CenterCrop([size]), tv.PILToTensor()
    decode: Decode = tv.Compose(steps)
    return decode


@cache
def synsets() -> dict[str, int]:
    """Return the class of each synset: its place among the 1,000 of ILSVRC 2012, sorted."""
    try:
        from timm.data.imagenet_info import ImageNetInfo
    except ImportError as error:
        raise ImportError(
            not_installed("timm", "which lists ImageNet's classes", "vision", error)
        ) from error
    info: Any = ImageNetInfo()
    return {str(name): index for index, name in enumerate(info.label_names())}


def _synset_folders(folder: Path) -> list[str]:
    """Return the synsets that a folder has folders of, sorted; not all need be there."""
    found = sorted(e.name for e in folder.iterdir() if e.is_dir()) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"Expected folders named by synsets, such as n01440764, in {folder.resolve()}, got "
            f"{'none in it' if folder.is_dir() else 'no such folder'}. Unpack ImageNet there, each "
            "image in the folder of its class."
        )
    strange = [name for name in found if name not in synsets()]
    if strange:
        raise ValueError(
            f"Expected folders of {folder} to be synsets of ImageNet's 1,000 classes, got "
            f"{len(strange)} others. {unknown('synset', strange[0], synsets())} Move them away."
        )
    return found


def _listing(folder: Path) -> tuple[list[str], Tensor]:
    """Return the paths of the images in synset folders, sorted, and their classes ``(N,)``."""
    classes = {synset: synsets()[synset] for synset in _synset_folders(folder)}
    found = make_dataset(str(folder), classes, extensions=_ENDS, allow_empty=True)
    labels = {label for _, label in found}
    empty = [synset for synset, label in classes.items() if label not in labels]
    if empty:
        raise ValueError(
            f"Expected images ({', '.join(_ENDS)}) in {folder / empty[0]}, got none. Unpack the "
            "synset's archive there, or remove the folder."
        )
    names = [str(Path(file).relative_to(folder)) for file, _ in found]
    return names, torch.tensor([label for _, label in found])


def _corrupted_folder(folder: Path, name: str, severity: int) -> Path:
    """Return where ImageNet-C has a corruption at a severity."""
    for place in (folder / name, *sorted(folder.glob(f"*/{name}"))):
        if (place / str(severity)).is_dir():
            return place / str(severity)
    raise FileNotFoundError(
        f"Expected {name}/{severity} of ImageNet-C in {folder.resolve()} or in a folder of it, got "
        "no such folder. Unpack the archive that holds it there, set corrupted to the folder that "
        'does, or have the corruptions made with corruptions="made".'
    )
