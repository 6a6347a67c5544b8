"""Square tiles of large images and their masks, read from the files as they are asked for."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from it3_lightning.data.images import Batch, as_float
from it3_lightning.data.masked_set import MaskedSet

FILES_AT_ONCE = 4  # decoded and kept: four of 4096 x 4096 pixels are 268 MB

# What Pillow raises on files that are cut off or no images, by format.
_UNREADABLE = (OSError, SyntaxError, EOFError, struct.error)


@dataclass(frozen=True)
class Pair:
    """An image file and the file of its mask."""

    image: Path
    mask: Path


class Tiles(MaskedSet):
    """All whole tiles of some images, row by row; what is left at the right and below is not used.

    Only the headers of the files are read at first. The last few decoded files are kept.

    Args:
        pairs: files of images and masks of the same size. Masks hold 0 and 255, or 0 and 1.
        tile: height and width of a tile, in pixels.

    Raises:
        ValueError: An image and its mask have different sizes or are smaller than a tile; when a
            tile is asked for, a file that cannot be read whole, or a mask with other values.
    """

    def __init__(self, pairs: Sequence[Pair], tile: int) -> None:
        self.pairs = tuple(pairs)
        self.tile = tile
        places = [_grid(number, pair, tile) for number, pair in enumerate(self.pairs)]
        self._places = torch.cat(places) if places else torch.zeros(0, 3, dtype=torch.int64)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        crops = [self._crop(*self._places[index].tolist()) for index in indices]
        images, masks = (torch.stack(parts) for parts in zip(*crops, strict=True))
        return as_float(images), masks.float()

    @property
    def files(self) -> Tensor:
        """Number of the file each tile lies in."""
        return self._places[:, 0]

    def select(self, indices: Tensor) -> Tiles:
        """Return the tiles at ``indices``, in their order."""
        chosen = Tiles((), self.tile)
        chosen.pairs, chosen._places = self.pairs, self._places[indices]
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        """Leave the decoded files behind: a worker process reads its own."""
        return {**vars(self), "_kept": {}}

    def _crop(self, number: int, top: int, left: int) -> tuple[Tensor, Tensor]:
        rows, columns = slice(top, top + self.tile), slice(left, left + self.tile)
        image, mask = self._decoded(number)
        return image[:, rows, columns], mask[:, rows, columns]

    def _decoded(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a whole image and its mask; the file used longest ago makes room."""
        decoded = self._kept.pop(number, None)
        if decoded is None:
            decoded = _image(self.pairs[number].image), _mask(self.pairs[number].mask)
            while len(self._kept) >= FILES_AT_ONCE:
                del self._kept[next(iter(self._kept))]
        self._kept[number] = decoded
        return decoded


def _grid(number: int, pair: Pair, tile: int) -> Tensor:
    """Return the places of a file's tiles, int64 ``(N, 3)``: its number, top, left."""
    (width, height), other = (_size(path) for path in (pair.image, pair.mask))
    if (width, height) != other:
        raise ValueError(
            f"Expected an image and its mask to have the same size, got {width} x {height} in "
            f"{pair.image} and {other[0]} x {other[1]} in {pair.mask}. Pair the files of one scene."
        )
    if min(width, height) < tile:
        raise ValueError(
            f"Expected images of at least tile={tile} pixels a side, got {width} x {height} in "
            f"{pair.image}. Lower tile."
        )
    starts = [torch.arange(0, side - tile + 1, tile) for side in (height, width)]
    corners = torch.cartesian_prod(*starts)
    return torch.cat([torch.full((len(corners), 1), number), corners], dim=1)


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _read(path: Path, mode: str) -> Tensor:
    """Return all pixels of a file, uint8 ``(C, H, W)``."""
    try:
        with Image.open(path) as image:
            pixels: Tensor = pil_to_tensor(image.convert(mode))
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    return pixels


def _image(path: Path) -> Tensor:
    return _read(path, "RGB")


def _mask(path: Path) -> Tensor:
    """Return a mask, bool ``(1, H, W)``."""
    pixels = _read(path, "L")
    found = (
        pixels.flatten().bincount().nonzero().flatten().tolist()
    )  # sorting takes 8 times as long
    if not (set(found) <= {0, 255} or set(found) <= {0, 1}):
        raise ValueError(
            f"Expected a mask of 0 and 255, or of 0 and 1, in {path}, got the values "
            f"{', '.join(map(str, found[:8]))}{', ...' * (len(found) > 8)}. Save it without "
            "colours, smoothing or lossy compression; is it perhaps the image?"
        )
    return pixels > 0


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"Expected a whole image in {path}, got a file that cannot be read: {error}. Copy or "
        "download it again."
    )
