"""Random crops of image files, the usual training on ImageNet, by each sample's draw alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms import (
    Compose,
    PILToTensor,
    RandomHorizontalFlip,
    RandomResizedCrop,
)

from it3_lightning.data.augmentation import Views
from it3_lightning.data.decoding import read_rgb
from it3_lightning.data.image_files import ImageFiles
from it3_lightning.data.images import Batch, as_float


class RandomCrops(Views):
    """Cuts 8 to 100 % of each file's image out at random, resizes it, mirrors half of them.

    Args:
        source: The files; how they decode for testing does not count here.
        size: Height and width of the result, in pixels.

    Source: C. Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015), as torchvision's
    ``RandomResizedCrop`` has it.
    """

    def __init__(self, source: ImageFiles, size: int) -> None:
        super().__init__(source)
        self._files = source
        self._view = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), PILToTensor()])

    def views(self, rows: list[int], draws: list[int]) -> Batch:
        """Return a crop of each of these samples, and their labels."""
        images = torch.stack([self._one(row, draw) for row, draw in zip(rows, draws, strict=True)])
        return as_float(images), self._files.labels[torch.tensor(rows)]

    def _one(self, row: int, draw: int) -> Tensor:
        image = read_rgb(self._files.path(row))
        with _seeded_globally(draw):
            view: Tensor = self._view(image)
        return view


@contextmanager
def _seeded_globally(seed: int) -> Iterator[None]:
    """Seed torch's global random state on the CPU within, and put it back."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
