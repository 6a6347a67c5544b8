"""Read the files of CIFAR-10 and of CIFAR-10-C, and refuse damaged ones."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import CIFAR10

from it3_lightning.data.image_set import ImageSet
from it3_lightning.data.settings import SEVERITIES

TRAIN_FILES: tuple[str, ...] = tuple(name for name, _ in CIFAR10.train_list)
TEST_FILES: tuple[str, ...] = tuple(name for name, _ in CIFAR10.test_list)
CLASSES = 10

_PIXELS = 3 * 32 * 32
_SAFE = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


def read_batch(path: Path) -> ImageSet:
    """Read one of the six pickled batches.

    Only arrays, lists and text are unpickled: a file from elsewhere cannot run code.

    Args:
        path: A dictionary with ``data``, uint8 ``(N, 3072)``, red then green then blue, each row
            by row, and ``labels``, a list of ``N`` integers from 0 to 9.

    Returns:
        ``N`` images ``(3, 32, 32)``, uint8.

    Raises:
        ValueError: The file is empty, cut off, damaged or of another kind.

    Source: A. Krizhevsky, the page of the CIFAR-10 dataset, "python version".
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
        pixels, labels = np.asarray(content["data"]), np.asarray(content["labels"])
    except (EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected {path} to be a pickled batch of CIFAR-10, got {path.stat().st_size} bytes "
            f"that are none ({type(error).__name__}: {error}). Delete it and fetch it again."
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise ValueError(
            f"Expected data (N, {_PIXELS}) of uint8 in {path}, got {pixels.shape} of "
            f"{pixels.dtype}. Put the file of CIFAR-10 in its place."
        )
    check_classes(path, labels, len(pixels))
    images = torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32)
    return ImageSet(images, torch.from_numpy(labels.astype(np.int64)))


def joined(parts: list[ImageSet]) -> ImageSet:
    """Return all samples of several sets, in order."""
    return ImageSet(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def check_classes(path: Path, labels: NDArray[Any], count: int) -> None:
    """Refuse labels that are not ``count`` integers from 0 to 9.

    >>> check_classes(Path("labels.npy"), np.array([3, 8]), 2)
    """
    integers = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not integers or len(labels) != count or not count:
        raise ValueError(
            f"Expected one integer label for each of {count} images (at least one) in {path}, got "
            f"{labels.shape} of {labels.dtype}. Put files there that belong together."
        )
    if labels.min() < 0 or labels.max() >= CLASSES:
        raise ValueError(
            f"Expected labels from 0 to {CLASSES - 1} in {path}, got {labels.min()} to "
            f"{labels.max()}. Put the file of CIFAR-10 in its place."
        )


def read_corrupted(folder: Path, name: str, severity: int, labels: Tensor) -> ImageSet:
    """Read one severity of one corruption of CIFAR-10-C; the file is mapped, not loaded.

    Args:
        folder: Holds ``{name}.npy``, uint8 ``(5 N, 32, 32, 3)``: ``N`` test images at severity 1,
            the same at severity 2, and so on, and ``labels.npy``, integers ``(5 N,)``.
        name: Of the corruption.
        severity: 1 to 5.
        labels: ``(N,)`` of the clean test images.

    Returns:
        ``N`` images ``(3, 32, 32)``, uint8.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is cut off or of another shape, or the labels are not those of the
            clean test images.

    Source: D. Hendrycks and T. Dietterich (ICLR 2019), ``make_cifar_c.py``.
    """
    count = len(labels)
    block = slice(count * (severity - 1), count * severity)
    there = _mapped(folder / "labels.npy")
    check_classes(folder / "labels.npy", there, count * len(SEVERITIES))
    wrong = int((torch.from_numpy(there[block].astype(np.int64)) != labels).sum())
    if wrong:
        raise ValueError(
            f"Expected {folder / 'labels.npy'} to repeat the labels of the {count} test images of "
            f"CIFAR-10 for each severity, got {wrong} others at severity {severity}. Put files "
            "there that belong together."
        )
    pixels = _mapped(folder / f"{name}.npy")
    shape = (count * len(SEVERITIES), 32, 32, 3)
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise ValueError(
            f"Expected {folder / f'{name}.npy'} to hold {shape} of uint8, five severities of "
            f"{count} images, got {pixels.shape} of {pixels.dtype}. Put the file of CIFAR-10-C in "
            "its place."
        )
    return ImageSet(torch.from_numpy(pixels[block]).movedim(-1, 1), labels)


def _mapped(path: Path) -> NDArray[Any]:
    """Map an ``.npy`` file into memory, copying a page only where somebody writes to it."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="c")
    except FileNotFoundError:
        raise
    except (EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"Expected {path} to be a whole .npy file, got {path.stat().st_size} bytes that are "
            f"none ({error}). Delete it and fetch it again."
        ) from error
    return array


class _Unpickler(pickle.Unpickler):
    """Builds arrays of numbers, and nothing else that a pickle may name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")
        return super().find_class(module, name)
