"""Drawn aerial scenes as a data module: roads that need no download."""

from __future__ import annotations

from typing import Any

import torch

from it3_lightning.data.masked_set import MaskedImages, MaskedSet
from it3_lightning.data.sampling import seeded
from it3_lightning.data.scenes import RoadScenes
from it3_lightning.data.settings import check_integer
from it3_lightning.data.shifted_masks import ShiftedMasks

_CHUNK = 16  # scenes drawn at once: part of what a seed means, so it is no option


class RoadScenesDataModule(ShiftedMasks):
    """Scenes drawn by :class:`~it3_lightning.data.RoadScenes`, clean and shifted, kept in memory.

    A stand-in for photographs where there are none; results on it say nothing about them. Scenes
    of another part or seed are others; a smaller size has the first ones of a larger.

    Args:
        size: Height and width of a scene, in pixels.
        train_size: Scenes to train on.
        val_size: Scenes to validate on.
        test_size: Scenes to test on.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedMasks`.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> data = RoadScenesDataModule(size=32, test_size=4, train_size=1, val_size=1)
        >>> images, masks = next(iter(data.test_dataloader()[0]))
        >>> images.shape, round(masks.mean().item(), 2)
        (torch.Size([4, 3, 32, 32]), 0.22)
    """

    def __init__(
        self,
        *,
        size: int = 64,
        train_size: int = 512,
        val_size: int = 96,
        test_size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_size=train_size, val_size=val_size, test_size=test_size, **kwargs)
        self.size = size
        self.check()

    def source(self) -> tuple[object, ...]:
        """Return the size of a scene."""
        return (self.size,)

    def load(self) -> dict[str, MaskedSet]:
        """Draw all scenes."""
        sizes = {"train": self.train_size, "validation": self.val_size, "test": self.test_size}
        return {part: self._scenes(part, size or 0) for part, size in sizes.items()}

    def check(self) -> None:
        """Refuse settings out of their range."""
        super().check()
        check_integer("size", self.size, 16)
        for name in ("train_size", "val_size", "test_size"):
            check_integer(name, getattr(self, name), 1)

    def _scenes(self, part: str, count: int) -> MaskedSet:
        draw = RoadScenes(self.size)
        chunks = [
            draw(_CHUNK, seeded(self.seed, "road scenes", part, start))
            for start in range(0, count, _CHUNK)
        ]
        images, masks = (torch.cat(parts)[:count] for parts in zip(*chunks, strict=True))
        return MaskedImages(images, masks)
