"""Readers of small grey images: scikit-learn's digits, MNIST and Fashion-MNIST.

Torchvision downloads what is missing; files that are there are read as they are, and damaged ones
are refused by name.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST

from it3_lightning.data.files import read_bytes
from it3_lightning.data.images import ImageSet, ShiftedImages
from it3_lightning.data.sampling import held_out
from it3_lightning.utils.messages import not_installed

_TEST_DIGITS = 597
_CLASSES = 10
_MAGIC = {3: 2051, 1: 2049}  # number of axes -> first four bytes, for unsigned bytes
_IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


class DigitsDataModule(ShiftedImages):
    """Scikit-learn's digits, clean and shifted: 1,000 to train on, 200 to validate, 597 to test.

    The images are ``(B, 1, 8, 8)``, their 17 grey levels divided by 16. The seed splits them.

    Args:
        val_size: Samples taken from the 1,200 that are not for testing.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`.

    Raises:
        ImportError: Scikit-learn is not installed (when the data is loaded).
        ValueError: A setting is out of its range.

    Example:
        >>> data = DigitsDataModule(shifts=["fog"], severity=5)
        >>> clean, fog = data.test_dataloader()
        >>> [round(next(iter(batches))[0].mean().item(), 3) for batches in (clean, fog)]
        [0.308, 0.517]
    """

    def __init__(self, *, val_size: int = 200, **kwargs: Any) -> None:
        super().__init__(val_size=val_size, **kwargs)

    @property
    def num_classes(self) -> int:
        """Ten digits."""
        return 10

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return 1,200 training images and 597 test images, chosen by the seed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            message = not_installed("scikit-learn", "which holds the digits", "data", error)
            raise ImportError(message) from error
        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None] / 16
        digits = ImageSet(images, torch.from_numpy(bunch.target).long())
        test, train = held_out(digits, _TEST_DIGITS, self.seed, "test digits")
        return train, test


class MNISTDataModule(ShiftedImages):
    """MNIST: 60,000 training and 10,000 test images ``(B, 1, 28, 28)`` of ten digits.

    IDX files in ``root``, or in ``root/MNIST/raw`` where torchvision puts them, are used as they
    are, plain or gzipped. Where there are none, torchvision downloads them into ``root``.

    Args:
        root: Folder of the data.
        download: Whether missing files may be downloaded.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`.

    Raises:
        FileNotFoundError: Files are missing and were not, or could not be, downloaded.
        ValueError: A file is damaged, or a setting is out of its range.
    """

    sample_settings = ("root",)
    num_classes = _CLASSES

    def __init__(self, root: str | Path = "data", *, download: bool = True, **kwargs: Any) -> None:
        self.root = root
        self.download = download
        super().__init__(**kwargs)

    def prepare_data(self) -> None:
        """Make sure that the four files are there: look first, then download if that is allowed."""
        self.check()
        _prepare_idx(MNIST, Path(self.root), allowed=self.download)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training and all test images; nothing is downloaded here."""
        return _read_idx_set(MNIST, Path(self.root))


class FashionMNISTDataModule(ShiftedImages):
    """Fashion-MNIST: 60,000 training and 10,000 test images ``(B, 1, 28, 28)`` of ten garments.

    Files are looked for as in :class:`MNISTDataModule`, with ``root/FashionMNIST/raw`` for
    torchvision's folder. On Debian, the package ``dataset-fashion-mnist`` puts them in
    ``/usr/share/datasets/fashion-mnist``, which serves as ``root``.

    Args:
        root: Folder of the data.
        download: Whether missing files may be downloaded.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`.

    Raises:
        FileNotFoundError: Files are missing and were not, or could not be, downloaded.
        ValueError: A file is damaged, or a setting is out of its range.
    """

    sample_settings = ("root",)
    num_classes = _CLASSES

    def __init__(self, root: str | Path = "data", *, download: bool = True, **kwargs: Any) -> None:
        self.root = root
        self.download = download
        super().__init__(**kwargs)

    def prepare_data(self) -> None:
        """Make sure that the four files are there: look first, then download if that is allowed."""
        self.check()
        _prepare_idx(FashionMNIST, Path(self.root), allowed=self.download)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training and all test images; nothing is downloaded here."""
        return _read_idx_set(FashionMNIST, Path(self.root))


def download_files(
    dataset: Callable[..., Any],
    root: Path,
    *,
    allowed: bool,
    missing: Callable[[str], FileNotFoundError],
) -> None:
    """Have a dataset of torchvision download its files; say which are missing where it cannot."""
    if not allowed:
        raise missing("download=False")
    try:
        dataset(root, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise missing(f"the download failed: {error}") from error


def _prepare_idx(kind: type[MNIST], root: Path, *, allowed: bool) -> None:
    """Look for the four files, and download them if that is allowed."""
    if _idx_files(kind, root) is None:
        download_files(kind, root, allowed=allowed, missing=partial(_missing_idx, kind, root))


def _read_idx_set(kind: type[MNIST], root: Path) -> tuple[ImageSet, ImageSet]:
    """Return all training and all test images of the four files."""
    files = _idx_files(kind, root)
    if files is None:
        raise _missing_idx(kind, root, "prepare_data() has not been called")
    return _read_pair(*files[:2]), _read_pair(*files[2:])


def _idx_files(kind: type[MNIST], root: Path) -> list[Path] | None:
    """Return images and labels to train on, then those to test on, from the first folder."""
    for folder in (root, root / kind.__name__ / "raw"):
        found = [_first_form(folder, name) for name in _IDX_FILES]
        files = [file for file in found if file is not None]
        if len(files) == len(_IDX_FILES):
            return files
    return None


def _first_form(folder: Path, name: str) -> Path | None:
    """Return a file by one of its names: plain before packed, ``-idx`` before ``.idx``."""
    names = [name.replace("-idx", f"{mark}idx") + end for end in ("", ".gz") for mark in "-."]
    return next((folder / form for form in names if (folder / form).is_file()), None)


def _missing_idx(kind: type[MNIST], root: Path, why: str) -> FileNotFoundError:
    """Build the error that says which files to place where."""
    return FileNotFoundError(
        f"Expected the four files {', '.join(_IDX_FILES)} (plain, or with .gz) in "
        f"{root.resolve()} or in {(root / kind.__name__ / 'raw').resolve()}, got not all of them "
        f"in either ({why}). Place them there, or set root to the folder that holds them."
    )


def _read_pair(images: Path, labels: Path) -> ImageSet:
    """Read a file of images and the file of their labels, which must be classes of this data.

    Source: the file format at the end of Y. LeCun's page of the MNIST database.
    """
    pixels, classes = _read_idx(images, 3), _read_idx(labels, 1).long()
    if len(pixels) != len(classes):
        raise ValueError(
            f"Expected a label for each of the {len(pixels)} images of {images}, got "
            f"{len(classes)} in {labels}. Put files there that belong together."
        )
    if classes.max() >= _CLASSES:
        raise ValueError(
            f"Expected labels from 0 to {_CLASSES - 1} in {labels}, got {classes.max()}. Put the "
            "label file of this data in its place."
        )
    return ImageSet(pixels[:, None], classes)


def _read_idx(path: Path, axes: int) -> Tensor:
    """Read one file of unsigned bytes, plain or gzipped, after comparing header and size."""
    data = read_bytes(path)
    start = 4 * (1 + axes)
    if len(data) < start:
        raise ValueError(
            f"Expected {path} to hold at least {start} bytes, got {len(data)}. "
            "It is empty or cut off: delete it and fetch it again."
        )
    magic, *shape = struct.unpack(f">{1 + axes}I", data[:start])
    if magic != _MAGIC[axes]:
        raise ValueError(
            f"Expected {path} to begin with {_MAGIC[axes]} (unsigned bytes, {axes} axes), got "
            f"{magic}. It is another kind of file: put the right one in its place."
        )
    if len(data) != start + math.prod(shape) or not math.prod(shape):
        raise ValueError(
            f"Expected {path} to hold {start + math.prod(shape)} bytes for its shape "
            f"{tuple(shape)}, at least one of them a value, got {len(data)}. "
            "It is cut off or damaged: delete it and fetch it again."
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(*shape)
