"""Repository of labelled images, in memory or on disk, and the base of their data modules."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from it3_lightning.data.base import ShiftedData, reading
from it3_lightning.data.contents import digest
from it3_lightning.data.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, Corruption
from it3_lightning.data.sampling import Batch, Samples, Views, chosen, seeded
from it3_lightning.data.shifts import SHIFTS, TUNING_SHIFTS, Severity, Shift
from it3_lightning.utils.messages import undefined, unknown

Change = Shift | Corruption
"""A kind of shift at one severity, a pure function of images and a generator."""
Decode = Callable[[Path], Tensor]
"""Reads a file: uint8 ``(3, H, W)``, where ``H`` and ``W`` are the same for all files."""
_CHUNK = 1000  # images shifted at once: part of what a seed means, so it is no option


class Images(Samples):
    """Images, float32 ``(B, C, H, W)`` in [0, 1] in a batch, and a class or values of each."""

    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def select(self, indices: Tensor) -> Images:
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""

    @abstractmethod
    def shifted(self, change: Change, seed: int) -> Images:
        """Return the same samples under a shift; the seed fixes every draw."""


@dataclass(eq=False)
class ImageSet(Images):
    """Images and their labels as two tensors.

    A sample is ``(image, label)``: float32 ``(C, H, W)`` in [0, 1] and an int64 scalar (or float32
    values ``(K,)``). 8-bit images stay 8-bit, in memory or in the mapped file they are a view of,
    and are divided by 255 as they are read.

    Args:
        images: ``(N, C, H, W)``, uint8, or floating point in [0, 1].
        labels: ``(N,)``, int64, or ``(N, K)``, float32.

    Example:
        >>> images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
        >>> batch = ImageSet(images, torch.arange(3)).__getitems__([1, 2])
        >>> batch[0].flatten()
        tensor([0.2000, 1.0000])
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        check_pixels(self.images)
        check_labels(self.labels, len(self.images))

    def __getitems__(self, indices: list[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return as_float(self.images[chosen]), self.labels[chosen]

    def select(self, indices: Tensor) -> ImageSet:
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""
        return ImageSet(self.images[indices], self.labels[indices])

    def shifted(self, change: Change, seed: int) -> ImageSet:
        """Apply a shift to all images, in fixed chunks; 8-bit images are rounded to 8 bits."""
        generator = seeded(seed, change.name, change.severity)
        images = torch.empty_like(self.images)
        for start in range(0, len(images), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            values = change(as_float(self.images[chunk]), generator)
            images[chunk] = (values * 255).round() if images.dtype == torch.uint8 else values
        return ImageSet(images, self.labels)


class ImageFiles(Images):
    """Image files and their labels, decoded and shifted only when they are read.

    What a shift draws for an image depends on the seed, the shift and the file's name alone.

    Args:
        folder: Where the files are.
        names: Their paths in it, ``N`` of them.
        labels: ``(N,)`` int64, or ``(N, K)`` float32.
        decode: Reads a file, as uint8 ``(3, H, W)``.
        change: A shift to apply to each image; None for none.
        seed: Of the shift.

    Raises:
        ValueError: The labels do not fit; when a file is read, it is damaged.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str] | NDArray[np.bytes_],
        labels: Tensor,
        decode: Decode,
        *,
        change: Change | None = None,
        seed: int = 0,
    ) -> None:
        check_labels(labels, len(names))
        self.folder, self.labels, self.decode = folder, labels, decode
        self.change, self.seed = change, seed
        # One array: a list of a million strings would be copied into every worker as it is read.
        self._names: NDArray[np.bytes_] = (
            names if isinstance(names, np.ndarray) else np.array([os.fsencode(n) for n in names])
        )

    def __getitems__(self, indices: list[int]) -> Batch:
        images = torch.stack([self._image(index) for index in indices])
        return images, self.labels[torch.as_tensor(indices)]

    def _image(self, index: int) -> Tensor:
        image = as_float(self.decode(self.path(index)))
        if self.change is None:
            return image
        kind = self.change.name, self.change.severity, os.fsdecode(self._names[index])
        return self.change(image[None], seeded(self.seed, *kind))[0]

    @property
    def names(self) -> list[str]:
        """Paths of the files in the folder."""
        return [os.fsdecode(name) for name in self._names]

    @property
    def paths(self) -> list[Path]:
        """The files themselves, in the order of the samples."""
        return [self.folder / name for name in self.names]

    def path(self, index: int) -> Path:
        """Return the file of a sample."""
        return self.folder / os.fsdecode(self._names[index])

    def select(self, indices: Tensor) -> ImageFiles:
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""
        return self._like(names=self._names[indices.numpy()], labels=self.labels[indices])

    def shifted(self, change: Change, seed: int) -> ImageFiles:
        """Return the same files, to be shifted as they are read."""
        return self._like(change=change, seed=seed)

    def elsewhere(self, folder: Path, decode: Decode) -> ImageFiles:
        """Return files of the same names and labels in another folder."""
        return self._like(folder=folder, decode=decode)

    def _like(self, **changed: Any) -> ImageFiles:
        kept = {name.removeprefix("_"): value for name, value in vars(self).items()}
        return ImageFiles(**{**kept, **changed})


def read_image(path: Path, mode: str) -> Image.Image:
    """Read an image file whole, in a mode of 8 bits a channel; grey and deeper ones are left so."""
    with reading(path, "a whole image"), Image.open(path) as file:
        if file.mode != "L" and file.mode[0] not in "IF":  # which Pillow would cut to 8 bits
            return file.convert(mode)
        file.load()
        return file


def read_size(path: Path) -> tuple[int, int]:
    """Read width and height of an image file, from its header alone."""
    with reading(path, "a whole image"), Image.open(path) as file:
        return file.size


def read_rgb(path: Path) -> Image.Image:
    """Read an image file whole, as RGB of 8 bits a channel.

    16 bits, and floats in [0, 1], are scaled by their full range; Pillow opens 16 bits as 32 in
    some formats, which have no more.

    Raises:
        ValueError: The file is damaged, or the full range of its values is not known.
    """
    image = read_image(path, "RGB")
    if image.mode in ("RGB", "L"):
        return image.convert("RGB")
    values, full = np.asarray(image), 1 if image.mode == "F" else 65535
    known = image.mode != "I" or image.format in ("PNG", "PPM")
    if not (known and values.min() >= 0 and values.max() <= full):
        raise ValueError(
            f"Expected {path} to hold integers of 8 or 16 bits, or floats in [0, 1], got "
            f"{values.dtype} from {values.min():.6g} to {values.max():.6g}, of a range that is not "
            "known. Save it with 8 or 16 bits."
        )
    scaled = (values * (255 / full)).round().astype(np.uint8)
    return Image.fromarray(scaled).convert("RGB")


def check_pixels(images: Tensor) -> None:
    """Refuse what are no images ``(N, C, H, W)``, uint8 or floating point in [0, 1]."""
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            "Expected images (N, C, H, W) of dtype uint8 or floating point, got "
            f"{tuple(images.shape)} of {images.dtype}. Add an axis for the channels with "
            "images[:, None], or convert with images.float()."
        )
    if images.is_floating_point() and images.numel():
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"Expected images in [0, 1], got {low:.4g} to {high:.4g}. "
                "Divide by the largest value; normalise inside the model."
            )


def check_labels(labels: Tensor, count: int) -> None:
    """Refuse labels that are neither a class nor values for each of ``count`` images."""
    classes = labels.ndim == 1 and labels.dtype == torch.int64
    values = labels.ndim == 2 and labels.dtype == torch.float32
    if not (classes or values) or len(labels) != count:
        raise ValueError(
            f"Expected one int64 label for each of {count} images, or float32 values (N, K), got "
            f"{tuple(labels.shape)} of {labels.dtype}. Pass class numbers: labels.long(), or "
            "values: values.float()[:, None]."
        )


def as_float(images: Tensor) -> Tensor:
    """Return images as contiguous float32 in [0, 1], dividing 8-bit values by 255."""
    values = images.contiguous().float()
    return values / 255 if images.dtype == torch.uint8 else values


@dataclass(eq=False)
class Augmented(Views):
    """Images, each changed at random."""

    augment: Callable[[Tensor, Tensor], Tensor]

    def views(self, rows: list[int], draws: list[int]) -> Batch:
        """Return changed images of these samples, and their labels."""
        images, labels = self.source.__getitems__(rows)
        return self.augment(images, torch.tensor(draws)), labels


def crop_and_flip(images: Tensor, draws: Tensor, *, padding: int = 4) -> Tensor:
    """Surround images with zeros, cut their size out at a random place, mirror half of them.

    Source: the usual training on CIFAR, He et al., "Deep Residual Learning" (2016), section 4.2.

    Example:
        >>> row = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
        >>> crop_and_flip(row, torch.tensor([1]), padding=0)  # an odd draw mirrors
        tensor([[[[4., 3., 2., 1.]]]])
    """
    height, width = images.shape[-2:]
    places = 2 * padding + 1
    mirrored, top, left = draws % 2 == 1, draws // 2 % places, draws // 2 // places % places
    across = torch.arange(width).expand(len(draws), width)
    across = torch.where(mirrored[:, None], across.flip(1), across) + left[:, None]
    down = torch.arange(height) + top[:, None]
    padded = pad(images, (padding, padding, padding, padding)).movedim(1, -1)
    samples = torch.arange(len(draws))[:, None, None]
    chosen = padded[samples, down[:, :, None], across[:, None, :]]  # (B, H, W, C)
    return chosen.movedim(-1, 1).contiguous()


@dataclass(eq=False)
class ShiftedImages(ShiftedData):
    """Images for training, and the same held-out images clean and under shifts for testing.

    A subclass says in :meth:`load` where its images come from, and in ``sample_settings`` what that
    depends on; it may override ``training``, ``change`` and ``published``. Each batch is
    ``(images, labels)``: float32 ``(B, C, H, W)`` in [0, 1] and int64 ``(B,)``. Images in memory
    are shifted once and kept in their own dtype (8 bits round a shifted value by at most 1/510),
    images on disk are shifted as they are read. ``stream="unequal"`` makes three classes ten times
    as frequent.

    The shifts are ``SHIFTS``, and ``TUNING_SHIFTS`` for choosing settings; where a subclass sets
    ``corruptions`` to another of its ``SOURCES`` than ``"own"``, they are ``CORRUPTIONS`` and
    ``EXTRA_CORRUPTIONS``.

    Args:
        val_size: Samples taken from the training images for validation.
    """

    SHIFTS = SHIFTS
    TUNING_SHIFTS = TUNING_SHIFTS
    SOURCES: ClassVar[tuple[str, ...]] = ("own",)
    PUBLISHED: ClassVar[str] = ""
    """Folder of published corruptions in the root."""
    needed_sizes = ("val_size",)
    root: Any = field(default="", init=False)
    corruptions: Any = field(default="own", init=False)
    corrupted: Any = field(default=None, init=False)

    _: KW_ONLY
    severity: Severity = 3
    val_size: int = 5000

    def __post_init__(self) -> None:
        if self.corruptions == "auto":
            there = self.corrupted is not None or self.corrupted_folder.is_dir()
            self.corruptions = "files" if there else self.SOURCES[1]
        super().__post_init__()

    @property
    def corrupted_folder(self) -> Path:
        """Folder of published corruptions, in the root if no setting says where."""
        return Path(self.corrupted or Path(self.root, self.PUBLISHED))

    # Hooks of a subclass

    def load(self) -> tuple[Images, Images]:
        """Return all training images and all test images; a subclass implements this."""
        raise undefined(self, "load(self) -> tuple[Images, Images]", "Return training and test.")

    def published(self, name: str, severity: int) -> Images | None:
        """Return all test images under a shift where they are not made but lie in files."""
        return None

    def change(self, name: str, severity: int) -> Change:
        """Return the function behind a name; that of a published corruption is never called."""
        return (Shift if self.corruptions == "own" else Corruption)(name, severity)

    # What the base asks for

    @property
    def reporting_shifts(self) -> tuple[str, ...]:
        """Names of the shifts that results are reported on."""
        return self.SHIFTS if self.corruptions == "own" else CORRUPTIONS

    @property
    def tuning_shifts(self) -> tuple[str, ...]:
        """Names of other shifts, only for choosing settings."""
        return self.TUNING_SHIFTS if self.corruptions == "own" else EXTRA_CORRUPTIONS

    @property
    def num_classes(self) -> int:
        """Number of classes: one more than the largest label to train on; values are refused."""
        self.setup("fit")
        labels = self._splits["train"].labels
        if labels.is_floating_point():
            raise ValueError(
                f"Expected classes, got values {tuple(labels.shape)}: {type(self).__name__} is "
                "for regression. Give the network one output for each value."
            )
        return 1 + int(labels.max())

    def check(self) -> None:
        """Refuse settings out of their range, and files of test images for validation."""
        if self.corruptions not in self.SOURCES:
            raise ValueError(unknown("source of corruptions", self.corruptions, self.SOURCES))
        if self.corruptions == "files" and self.evaluate_on == "validation":
            others = " or ".join(repr(source) for source in self.SOURCES if source != "files")
            raise ValueError(
                'Expected evaluate_on="test" with corruptions="files", got "validation": the '
                f"published files hold test images alone. Choose settings by corruptions={others}."
            )
        super().check()

    def split(self) -> dict[str, Images]:
        """Return the images to train, validate and test on, all of one shape."""
        train, test = self.load()
        if isinstance(train, ImageSet) and isinstance(test, ImageSet):
            shapes = [tuple(images.images.shape[1:]) for images in (train, test)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"Expected test images of {self.root or type(self).__name__} to have the shape "
                    f"of those to train on, {shapes[0]}, got {shapes[1]}. Take them from one set."
                )
        return self.parted(train, test)

    def shifted(self, name: str) -> Images:
        """Return the held-out images under a shift, from files where they lie in some."""
        kind, severity = self.wanted()[name]
        there = self.published(kind, severity)
        if there is not None:
            return chosen(there, self.test_size, self.seed, "test_size")
        held_out: Images = self._splits[self.evaluate_on]
        return held_out.shifted(self.change(kind, severity), self.seed)

    def groups(self, samples: Images) -> Tensor:
        """Return the labels."""
        return samples.labels

    def content(self) -> Mapping[str, Any]:
        """Return what tells the samples from others; of published corruptions their files too."""
        found = super().content()
        if self.corruptions != "files":
            return found
        return {**found, "corrupted": digest(sorted(self.corrupted_folder.iterdir()))}
