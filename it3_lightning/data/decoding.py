"""Decode image files into 8-bit tensors of one size; a damaged file is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv


class Decode(Protocol):
    """Reads a file."""

    def __call__(self, path: Path) -> Tensor:
        """Return the image, uint8 ``(3, H, W)``; ``H`` and ``W`` are the same for all files."""


def read_rgb(path: Path) -> Image.Image:
    """Read an image file whole, as RGB whatever its mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is empty, cut off, damaged, or no image.
    """
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"Expected {path} to be a whole image, got {path.stat().st_size} bytes that do not "
            f"decode ({error}). Delete it and fetch it again."
        ) from error


@dataclass(frozen=True)
class Resized:
    """Brings the whole image to ``size`` by ``size`` pixels, antialiased, whatever its shape."""

    size: int

    def __call__(self, path: Path) -> Tensor:
        """Return the image, uint8 ``(3, size, size)``."""
        pixels: Tensor = tv.pil_to_tensor(tv.resize(read_rgb(path), [self.size, self.size]))
        return pixels


@dataclass(frozen=True)
class CenterCropped:
    """Brings the shorter side to ``resize`` pixels and cuts ``size`` by ``size`` from the middle.

    With 256 and 224 this is the usual evaluation on ImageNet.
    """

    resize: int
    size: int

    def __call__(self, path: Path) -> Tensor:
        """Return the image, uint8 ``(3, size, size)``."""
        image = tv.center_crop(tv.resize(read_rgb(path), [self.resize]), [self.size])
        pixels: Tensor = tv.pil_to_tensor(image)
        return pixels


class InMemory:
    """Decodes some files once and keeps the 8-bit images; what reads them then reads no file.

    Args:
        decode: Reads a file.
        paths: Files to keep: ``len(paths) * 3 * H * W`` bytes.
    """

    def __init__(self, decode: Decode, paths: Sequence[Path]) -> None:
        self._rows = {path: row for row, path in enumerate(paths)}
        self._images = torch.empty(0, dtype=torch.uint8)
        for path, row in self._rows.items():
            image = decode(path)
            if row == 0:  # the first tells the size
                self._images = image.new_empty((len(paths), *image.shape))
            self._images[row] = image

    def __call__(self, path: Path) -> Tensor:
        """Return the image, uint8 ``(3, H, W)``."""
        return self._images[self._rows[path]]
