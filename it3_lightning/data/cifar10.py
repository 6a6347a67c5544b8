"""Reader of CIFAR-10, from files that are there already or downloaded, and of CIFAR-10-C."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10

from it3_lightning.data.base import Batch
from it3_lightning.data.files import damaged, mapped
from it3_lightning.data.image_sets import download_files
from it3_lightning.data.images import (
    Augmented,
    Images,
    ImageSet,
    ShiftedImages,
    crop_and_flip,
    found_corruptions,
)
from it3_lightning.data.shifts import SEVERITIES

_CLASSES = 10
_TRAIN_FILES: tuple[str, ...] = tuple(name for name, _ in CIFAR10.train_list)
_TEST_FILES: tuple[str, ...] = tuple(name for name, _ in CIFAR10.test_list)
_PIXELS = 3 * 32 * 32
_PADDING = 4
_SAFE = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class CIFAR10DataModule(ShiftedImages):
    """CIFAR-10: 50,000 training and 10,000 test images ``(B, 3, 32, 32)`` of ten classes.

    The six pickled batches of the "python version" are used as they are in ``root``, or in
    ``root/cifar-10-batches-py`` where torchvision puts them. Where one is missing, torchvision
    downloads them into ``root`` and compares their checksums.

    The test images are shifted either by the published files of CIFAR-10-C, fifteen corruptions
    (``CORRUPTIONS``) and four for choosing settings (``EXTRA_CORRUPTIONS``), or by the library's
    own shifts. The published files hold test images alone; to choose settings without a look at
    these, have ``evaluate_on="validation"`` and ``corruptions="own"``.

    Args:
        root: Folder of the data.
        corruptions: ``"files"``: those of CIFAR-10-C, with ``gaussian_noise.npy`` and the like, and
            ``labels.npy``, in ``root/CIFAR-10-C`` or ``corrupted``; ``"own"``: the library's
            shifts; ``"auto"``: the files where there is a folder of them, else the own. It is
            decided when the module is made.
        corrupted: Folder of the published files; None for the one in ``root``.
        download: Whether missing files may be downloaded. CIFAR-10-C never is.
        augment: Whether training images are cut out at random places of a frame 4 pixels wider,
            and half of them mirrored.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`.

    Raises:
        FileNotFoundError: Files are missing and were not, or could not be, downloaded.
        ValueError: A file is damaged, or a setting is out of its range.
    """

    SOURCES = ("files", "own")
    sample_settings = ("root", "corruptions", "corrupted")
    num_classes = _CLASSES

    def __init__(
        self,
        root: str | Path = "data",
        *,
        corruptions: Literal["auto", "files", "own"] = "auto",
        corrupted: str | Path | None = None,
        download: bool = True,
        augment: bool = True,
        **kwargs: Any,
    ) -> None:
        self.root = root
        self.corrupted = Path(root) / "CIFAR-10-C" if corrupted is None else Path(corrupted)
        self.corruptions = found_corruptions(
            corruptions, self.corrupted, named=corrupted is not None, sources=self.SOURCES
        )
        self.download = download
        self.augment = augment
        super().__init__(**kwargs)

    def prepare_data(self) -> None:
        """Make sure that the files are there: look first, then download if that is allowed."""
        self.check()
        if self.corruptions == "files":
            self._look_for_corrupted()
        if self._folder() is None:
            download_files(CIFAR10, Path(self.root), allowed=self.download, missing=self._missing)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training and all test images; nothing is downloaded here."""
        folder = self._folder()
        if folder is None:
            raise self._missing("prepare_data() has not been called")
        if self.corruptions == "files":
            self._look_for_corrupted()
        train, test = (_read_batches(folder, names) for names in (_TRAIN_FILES, _TEST_FILES))
        self._test_labels = test.labels
        return train, test

    def training(self, images: Images) -> Dataset[Batch]:
        """Return images that are cropped and mirrored at random, where that is asked for."""
        views = partial(crop_and_flip, padding=_PADDING)
        return Augmented(images, views) if self.augment else images

    def published(self, name: str, severity: int) -> ImageSet | None:
        """Return all test images under a corruption of CIFAR-10-C, where these are asked for."""
        if self.corruptions != "files":
            return None
        return _read_corrupted(Path(self.corrupted), name, severity, self._test_labels)

    def _folder(self) -> Path | None:
        """Return the first folder that holds all six batches."""
        for folder in self._folders():
            if all((folder / name).is_file() for name in _TRAIN_FILES + _TEST_FILES):
                return folder
        return None

    def _folders(self) -> tuple[Path, Path]:
        return Path(self.root), Path(self.root) / CIFAR10.base_folder

    def _missing(self, why: str) -> FileNotFoundError:
        """Build the error that says which files to place where."""
        place, other = (folder.resolve() for folder in self._folders())
        return FileNotFoundError(
            f"Expected the six files {', '.join(_TRAIN_FILES + _TEST_FILES)} in {place} or in "
            f"{other}, got not all of them in either ({why}). Unpack cifar-10-python.tar.gz there, "
            "or set root to the folder that holds them."
        )

    def _look_for_corrupted(self) -> None:
        """Refuse before any training that files of CIFAR-10-C are missing."""
        folder = Path(self.corrupted)
        names = [f"{name}.npy" for name in (*self.shifts, "labels")]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"Expected {', '.join(names)} of CIFAR-10-C in {folder.resolve()}, got no "
                f"{', '.join(missing)}. Unpack CIFAR-10-C.tar there, set corrupted to the folder "
                'that holds them, or take the library\'s own shifts with corruptions="own".'
            )


class _Unpickler(pickle.Unpickler):
    """Builds arrays of numbers, and nothing else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")
        return super().find_class(module, name)


def _read_batches(folder: Path, names: Sequence[str]) -> ImageSet:
    """Return the samples of several batches, in order."""
    parts = [_read_batch(folder / name) for name in names]
    return ImageSet(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def _read_batch(path: Path) -> ImageSet:
    """Read a pickled batch; only arrays, lists and text are unpickled: no file can run code.

    Source: A. Krizhevsky, the page of the CIFAR-10 dataset, "python version".
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        pixels, labels = np.asarray(content["data"]), np.asarray(content["labels"])
    except (EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, "a pickled batch of CIFAR-10", error) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise ValueError(
            f"Expected data (N, {_PIXELS}) of uint8 in {path}, got {pixels.shape} of "
            f"{pixels.dtype}. Put the file of CIFAR-10 in its place."
        )
    _check_classes(path, labels, len(pixels))
    images = torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32)
    return ImageSet(images, torch.from_numpy(labels.astype(np.int64)))


def _check_classes(path: Path, labels: NDArray[Any], count: int) -> None:
    """Refuse labels that are not ``count`` integers from 0 to 9."""
    integers = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not integers or len(labels) != count or not count:
        raise ValueError(
            f"Expected one integer label for each of {count} images (at least one) in {path}, got "
            f"{labels.shape} of {labels.dtype}. Put files there that belong together."
        )
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise ValueError(
            f"Expected labels from 0 to {_CLASSES - 1} in {path}, got {labels.min()} to "
            f"{labels.max()}. Put the file of CIFAR-10 in its place."
        )


def _read_corrupted(folder: Path, name: str, severity: int, labels: Tensor) -> ImageSet:
    """Read one severity of one corruption of CIFAR-10-C; the file is mapped, not loaded.

    Source: D. Hendrycks and T. Dietterich (ICLR 2019), ``make_cifar_c.py``.
    """
    count = len(labels)
    block = slice(count * (severity - 1), count * severity)
    there = mapped(folder / "labels.npy")
    _check_classes(folder / "labels.npy", there, count * len(SEVERITIES))
    wrong = int((torch.from_numpy(there[block].astype(np.int64)) != labels).sum())
    if wrong:
        raise ValueError(
            f"Expected {folder / 'labels.npy'} to repeat the labels of the {count} test images of "
            f"CIFAR-10 for each severity, got {wrong} others at severity {severity}. Put files "
            "there that belong together."
        )
    pixels = mapped(folder / f"{name}.npy")
    shape = (count * len(SEVERITIES), 32, 32, 3)
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(
            f"Expected {folder / f'{name}.npy'} to hold {shape} of uint8, five severities of "
            f"{count} images, got {pixels.shape} of {pixels.dtype}. Put the file of CIFAR-10-C in "
            "its place."
        )
    return ImageSet(torch.from_numpy(pixels[block]).movedim(-1, 1), labels)
