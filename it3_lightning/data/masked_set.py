"""Images with masks, in memory or read when asked for, handed out a whole batch at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from it3_lightning.data.images import Batch, as_float
from it3_lightning.data.sampling import seeded
from it3_lightning.data.shifts import Shift

TURNS = 8  # orientations of a square: four rotations, each also mirrored


class MaskedSet(Dataset[Batch], ABC):
    """Images and the masks of them.

    A sample is ``(image, mask)``: float32 ``(C, H, W)`` in [0, 1], and float32 ``(1, H, W)`` of 0
    and 1. A DataLoader asks for whole batches, so it needs ``collate_fn=whole_batch``.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a whole batch, ``(B, C, H, W)`` and ``(B, 1, H, W)``."""

    def __getitem__(self, index: int) -> Batch:
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

    @property
    def files(self) -> Tensor:
        """Number of the file each sample lies in, int64 ``(N,)``: one file is read as a whole."""
        return torch.zeros(len(self), dtype=torch.int64)

    @abstractmethod
    def select(self, indices: Tensor) -> MaskedSet:
        """Return a new set of the samples at ``indices`` ``(M,)``, in their order."""


class MaskedImages(MaskedSet):
    """Images and masks as two tensors; 8-bit images are divided by 255 as they are read.

    Args:
        images: ``(N, C, H, W)``, uint8, or floating point in [0, 1].
        masks: ``(N, 1, H, W)``, bool.

    Raises:
        ValueError: A shape or dtype is another.

    Example:
        >>> images = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
        >>> image, mask = MaskedImages(images, torch.ones(2, 1, 4, 4, dtype=torch.bool))[1]
        >>> image[0, 0, 0], mask.sum()
        (tensor(0.2000), tensor(16.))
    """

    def __init__(self, images: Tensor, masks: Tensor) -> None:
        if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                "Expected images (N, C, H, W) of dtype uint8 or floating point, got "
                f"{tuple(images.shape)} of {images.dtype}. Convert with images.float() / 255."
            )
        if masks.shape != (len(images), 1, *images.shape[2:]) or masks.dtype != torch.bool:
            raise ValueError(
                f"Expected one bool mask (1, {images.shape[2]}, {images.shape[3]}) for each of "
                f"{len(images)} images, got {tuple(masks.shape)} of {masks.dtype}. "
                "Convert with masks > 0."
            )
        self.images = images
        self.masks = masks

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        return as_float(self.images[chosen]), self.masks[chosen].float()

    def select(self, indices: Tensor) -> MaskedImages:
        """Return a new set of the samples at ``indices``."""
        return MaskedImages(self.images[indices], self.masks[indices])


class Shifted(MaskedSet):
    """The same samples under a shift, which is computed anew each time one is asked for.

    The seed, the shift and the position of a sample in the source fix every draw, so a sample is
    bitwise the same in any batch and in any process. Masks stay as they are.

    Args:
        source: the clean samples.
        shift: of the images; one that moves pixels would not fit the masks.
        seed: of all draws.
    """

    def __init__(self, source: MaskedSet, shift: Shift, seed: int) -> None:
        self.source, self.shift, self.seed = source, shift, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images, masks = self.source.__getitems__(indices)
        return torch.cat([self._one(*pair) for pair in zip(images, indices, strict=True)]), masks

    @property
    def files(self) -> Tensor:
        """Those of the source."""
        return self.source.files

    def select(self, indices: Tensor) -> MaskedSet:
        """Shift the selected samples; their positions are new ones, so other numbers are drawn."""
        return Shifted(self.source.select(indices), self.shift, self.seed)

    def _one(self, image: Tensor, index: int) -> Tensor:
        generator = seeded(self.seed, self.shift.name, self.shift.severity, index)
        return self.shift(image[None], generator)


class Turned(MaskedSet):
    """Square samples in all eight orientations: ``index // 8`` says which sample, the rest how.

    An aerial image has no up. Which orientation comes is the sampler's to choose, so nothing is
    drawn here.

    Args:
        source: samples whose images are square.
    """

    def __init__(self, source: MaskedSet) -> None:
        self.source = source

    def __len__(self) -> int:
        return TURNS * len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images, masks = self.source.__getitems__([index // TURNS for index in indices])
        hows = [index % TURNS for index in indices]
        turned = [
            torch.stack([_turned(value, how) for value, how in zip(values, hows, strict=True)])
            for values in (images, masks)
        ]
        return turned[0], turned[1]

    @property
    def files(self) -> Tensor:
        """Those of the source, each eight times."""
        return self.source.files.repeat_interleave(TURNS)

    def select(self, indices: Tensor) -> MaskedSet:
        """Return the samples at ``indices`` of the source, in all orientations."""
        return Turned(self.source.select(indices))


def _turned(image: Tensor, how: int) -> Tensor:
    """Rotate ``(C, S, S)`` by ``how % 4`` quarters, and mirror it from 4 on."""
    rotated = image.rot90(how % 4, (1, 2))
    return rotated.flip(2) if how >= 4 else rotated
