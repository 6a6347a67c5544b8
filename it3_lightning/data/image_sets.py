"""Readers of small images: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-10-C.

Torchvision downloads what is missing; files that are there are read as they are, and damaged ones
are refused by name.
"""

from __future__ import annotations

import gzip
import math
import pickle
import struct
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

from it3_lightning.data.base import reading
from it3_lightning.data.images import Augmented, Images, ImageSet, ShiftedImages, crop_and_flip
from it3_lightning.data.sampling import Batch, held_out
from it3_lightning.data.shifts import SEVERITIES
from it3_lightning.utils.messages import not_installed

_TEST_DIGITS = 597
_CLASSES = 10
_MAGIC = {3: 2051, 1: 2049}  # number of axes -> first four bytes, for unsigned bytes
_RATIO = 1032  # of gzip, at most
_PIXELS = 3 * 32 * 32
_ARRAYS = [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
_SAFE = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), *_ARRAYS}
_IDX = tuple(f"{p}-{k}-ubyte" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1"))
_BATCHES = tuple(name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list))


def _published(dataset: Any, root: str | Path, *, download: bool | None = None) -> list[Path]:
    """Return the files of a dataset of torchvision, in the root or where it puts them.

    Where some are missing, torchvision downloads them if that is allowed.
    """
    folder, names = f"{dataset.__name__}/raw", _IDX
    if dataset is CIFAR10:
        folder, names = CIFAR10.base_folder, _BATCHES
    folders = Path(root), Path(root, folder)
    found, why = _found(folders, names), "prepare_data() has not been called"
    if not found and download is not None:
        why = "download=False"
        if download:
            try:
                dataset(Path(root), train=True, download=True)
            except (OSError, RuntimeError) as error:
                why = f"the download failed: {error}"
            found = _found(folders, names)
    if not found:
        raise FileNotFoundError(
            f"Expected the {len(names)} files {', '.join(names)} in {folders[0].resolve()} or in "
            f"{folders[1].resolve()}, got not all of them in either ({why}). Unpack them there "
            "(IDX files may be .gz), or set root to the folder that holds them."
        )
    return found


def _found(folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """Return all files from the first folder that has them: plain before packed ones."""
    for folder in folders:
        found: list[Path] = []
        for name in names:
            called = name, name.replace("-idx", ".idx")
            forms = [folder / f"{form}{end}" for end in ("", ".gz") for form in called]
            found += [form for form in forms if form.is_file()][:1]
        if len(found) == len(names):
            return found
    return []


@dataclass(eq=False)
class DigitsDataModule(ShiftedImages):
    """Scikit-learn's digits, clean and shifted: 1,000 to train on, 200 to validate, 597 to test.

    The images are ``(B, 1, 8, 8)``, 17 grey levels divided by 16. The seed splits them.

    Args:
        val_size: Samples taken from the 1,200 that are not for testing.

    Raises:
        ImportError: Scikit-learn is not installed (when the data is loaded).
        ValueError: A setting is out of its range.

    Example:
        >>> data = DigitsDataModule(shifts=["fog"], severity=5)
        >>> clean, fog = data.test_dataloader()
        >>> [round(next(iter(batches))[0].mean().item(), 3) for batches in (clean, fog)]
        [0.308, 0.517]
    """

    num_classes = _CLASSES

    _: KW_ONLY
    val_size: int = 200

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


@dataclass(eq=False)
class MNISTDataModule(ShiftedImages):
    """MNIST: 60,000 training and 10,000 test images ``(B, 1, 28, 28)`` of ten digits.

    IDX files in ``root``, or in ``root/MNIST/raw`` where torchvision downloads what is missing, are
    used as they are, plain or gzipped.

    Args:
        root: Folder of the data.
        download: Whether missing files may be downloaded.

    Raises:
        FileNotFoundError: Files are missing and were not, or could not be, downloaded.
        ValueError: A file is damaged, or a setting is out of its range.
    """

    sample_settings = ("root",)
    num_classes = _CLASSES

    root: str | Path = "data"
    _: KW_ONLY
    download: bool = True

    def prepare_data(self) -> None:
        """Look for the files, and download them where that is needed and allowed."""
        self.check()
        _published(MNIST, self.root, download=self.download)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training and all test images; nothing is downloaded here."""
        return _read_idx_files(_published(MNIST, self.root))


@dataclass(eq=False)
class FashionMNISTDataModule(ShiftedImages):
    """Fashion-MNIST: 60,000 training and 10,000 test images ``(B, 1, 28, 28)`` of ten garments.

    Files and errors are as in :class:`MNISTDataModule`, with torchvision's folder
    ``root/FashionMNIST/raw``. ``/usr/share/datasets/fashion-mnist``, where Debian's package
    ``dataset-fashion-mnist`` puts the files, serves as ``root``.

    Args:
        root: Folder of the data.
        download: Whether missing files may be downloaded.
    """

    sample_settings = ("root",)
    num_classes = _CLASSES

    root: str | Path = "data"
    _: KW_ONLY
    download: bool = True

    def prepare_data(self) -> None:
        """Look for the files, and download them where that is needed and allowed."""
        self.check()
        _published(FashionMNIST, self.root, download=self.download)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training and all test images; nothing is downloaded here."""
        return _read_idx_files(_published(FashionMNIST, self.root))


@dataclass(eq=False)
class CIFAR10DataModule(ShiftedImages):
    """CIFAR-10: 50,000 training and 10,000 test images ``(B, 3, 32, 32)`` of ten classes.

    The six pickled batches of the "python version" are used as they are in ``root``, or in
    ``root/cifar-10-batches-py`` where torchvision downloads what is missing.

    The test images are shifted by the published files of CIFAR-10-C, fifteen corruptions
    (``CORRUPTIONS``) and four for choosing settings (``EXTRA_CORRUPTIONS``), or by the library's
    own shifts. The published files hold test images alone: to choose settings without these, set
    ``evaluate_on="validation"`` and ``corruptions="own"``.

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

    Raises:
        FileNotFoundError: Files are missing and were not, or could not be, downloaded.
        ValueError: A file is damaged, or a setting is out of its range.
    """

    SOURCES = ("files", "own")
    PUBLISHED = "CIFAR-10-C"
    sample_settings = ("root", "corruptions", "corrupted")
    num_classes = _CLASSES

    root: str | Path = "data"
    _: KW_ONLY
    corruptions: Literal["auto", "files", "own"] = "auto"
    corrupted: str | Path | None = None
    download: bool = True
    augment: bool = True

    def prepare_data(self) -> None:
        """Look for the files, and download those of CIFAR-10 where that is needed and allowed."""
        self.check()
        self._look_for_corrupted()
        _published(CIFAR10, self.root, download=self.download)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return all training and all test images; nothing is downloaded here."""
        files = _published(CIFAR10, self.root)
        self._look_for_corrupted()
        *batches, test = map(_read_batch, files)
        self._test_labels = test.labels
        images, labels = ([getattr(b, name) for b in batches] for name in ("images", "labels"))
        return ImageSet(torch.cat(images), torch.cat(labels)), test

    def training(self, images: Images) -> Dataset[Batch]:
        """Return images that are cropped and mirrored at random, where that is asked for."""
        return Augmented(images, partial(crop_and_flip, padding=4)) if self.augment else images

    def published(self, name: str, severity: int) -> ImageSet | None:
        """Return all test images under a corruption of CIFAR-10-C, where these are asked for."""
        if self.corruptions != "files":
            return None
        return _read_corrupted(self.corrupted_folder, name, severity, self._test_labels)

    def _look_for_corrupted(self) -> None:
        """Refuse before any training that files of CIFAR-10-C are missing, if these are wanted."""
        folder, names = self.corrupted_folder, [f"{name}.npy" for name in (*self.shifts, "labels")]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing and self.corruptions == "files":
            raise FileNotFoundError(
                f"Expected {', '.join(names)} of CIFAR-10-C in {folder.resolve()}, got no "
                f"{', '.join(missing)}. Unpack CIFAR-10-C.tar there, set corrupted to the folder "
                'that holds them, or take the library\'s own shifts with corruptions="own".'
            )


def _read_idx_files(files: list[Path]) -> tuple[ImageSet, ImageSet]:
    """Read images and labels to train on, and those to test on, which must be of ten classes.

    Source: the file format at the end of Y. LeCun's page of the MNIST database.
    """
    sets = []
    for images, labels in (files[:2], files[2:]):
        pixels, classes = _read_idx(images, 3), _read_idx(labels, 1)
        _check_classes(labels, classes.numpy(), len(pixels), f"images of {images}")
        sets.append(ImageSet(pixels[:, None], classes.long()))
    shapes = [tuple(found.images.shape[2:]) for found in sets]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Expected images of one size, got {shapes[0]} in {files[0]} and {shapes[1]} in "
            f"{files[2]}. Put files there that belong together."
        )
    return sets[0], sets[1]


def _read_idx(path: Path, axes: int) -> Tensor:
    """Read one file of unsigned bytes, plain or gzipped: no more than its header announces.

    Its size bounds what is unpacked, and one byte more than announced is asked for.
    """
    packed, start = path.suffix == ".gz", 4 * (1 + axes)
    what = "a whole gzip file" if packed else "a whole IDX file"
    with reading(path, what), (gzip.open if packed else open)(path, "rb") as file:
        head = file.read(start)
        magic, *shape = struct.unpack(f">{1 + axes}I", head.ljust(start, b"\0"))
        size, most = math.prod(shape), path.stat().st_size * (_RATIO if packed else 1)
        body = file.read(size + 1) if magic == _MAGIC[axes] and 0 < size <= most else b""
    if len(head) < start or magic != _MAGIC[axes]:
        raise ValueError(
            f"Expected {path} to begin with {_MAGIC[axes]} (unsigned bytes, {axes} axes) and sizes "
            f"in {start} bytes, got {head.hex() or 'none'}. It is empty, cut off or another kind "
            "of file: delete it and fetch it again."
        )
    if len(body) != size or not size:
        got = f"at least {start + len(body)}" if body else f"at most {most}"
        raise ValueError(
            f"Expected {path} to hold {start + size} bytes for its shape {tuple(shape)}, at least "
            f"one of them a value, got {got}. It is damaged: delete it and fetch it again."
        )
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(*shape)


class _Unpickler(pickle.Unpickler):
    """Builds arrays of numbers, and nothing else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")
        return super().find_class(module, name)


def _read_batch(path: Path) -> ImageSet:
    """Read a pickled batch; only arrays, lists and text are unpickled: no file can run code.

    Source: A. Krizhevsky, the page of the CIFAR-10 dataset, "python version".
    """
    with reading(path, "a pickled batch of CIFAR-10"), path.open("rb") as file:
        content = _Unpickler(file, encoding="latin1").load()
        pixels, labels = np.asarray(content["data"]), np.asarray(content["labels"])
        if file.read(1):
            raise ValueError("more follows")
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise ValueError(
            f"Expected data (N, {_PIXELS}) of uint8 in {path}, got {pixels.shape} of "
            f"{pixels.dtype}. Put the file of CIFAR-10 in its place."
        )
    _check_classes(path, labels, len(pixels))
    images = torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32)
    return ImageSet(images, torch.from_numpy(labels.astype(np.int64)))


def _check_classes(path: Path, labels: NDArray[Any], count: int, of: str = "images") -> None:
    """Refuse labels that are not ``count`` integers from 0 to 9."""
    integers = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not integers or len(labels) != count or not count:
        raise ValueError(
            f"Expected one integer label for each of {count} {of} (at least one) in {path}, got "
            f"{labels.shape} of {labels.dtype}. Put files there that belong together."
        )
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise ValueError(
            f"Expected labels from 0 to {_CLASSES - 1} in {path}, got {labels.min()} to "
            f"{labels.max()}. Put the file of this data in its place."
        )


def _read_corrupted(folder: Path, name: str, severity: int, labels: Tensor) -> ImageSet:
    """Read one severity of one corruption of CIFAR-10-C; the file is mapped, not loaded.

    Source: D. Hendrycks and T. Dietterich (ICLR 2019), ``make_cifar_c.py``.
    """
    count, file = len(labels), folder / "labels.npy"
    block, there = slice(count * (severity - 1), count * severity), _mapped(file)
    _check_classes(file, there, count * len(SEVERITIES))
    wrong = int((torch.from_numpy(there[block].astype(np.int64)) != labels).sum())
    if wrong:
        raise ValueError(
            f"Expected {file} to repeat the labels of the {count} test images of CIFAR-10, got "
            f"{wrong} others at severity {severity}. Put files there that belong together."
        )
    file, shape = folder / f"{name}.npy", (count * len(SEVERITIES), 32, 32, 3)
    pixels = _mapped(file)
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(
            f"Expected {file} to hold {shape} of uint8, five severities of {count} images, got "
            f"{pixels.shape} of {pixels.dtype}. Put the file of CIFAR-10-C in its place."
        )
    return ImageSet(torch.from_numpy(pixels[block]).movedim(-1, 1), labels)


def _mapped(path: Path) -> NDArray[Any]:
    """Map an ``.npy`` file into memory, copying a page only where somebody writes to it."""
    with reading(path, "a whole .npy file"):
        array: np.memmap[Any, Any] = np.load(path, mmap_mode="c")
        if array.offset + array.nbytes != path.stat().st_size:
            raise ValueError(f"its header says {array.offset + array.nbytes} bytes")
    return array
