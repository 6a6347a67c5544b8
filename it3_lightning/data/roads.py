"""Decorators of images with masks (shifted, turned), and the base of their data modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from it3_lightning.data.base import Batch, ShiftedData, check_equal
from it3_lightning.data.images import as_float
from it3_lightning.data.sampling import chosen, seeded
from it3_lightning.data.shifts import Severity, Shift
from it3_lightning.utils.messages import undefined

ROAD_SHIFTS = ("contrast", "blur", "gaussian_noise")
"""The shifts that results on roads are reported on."""
ROAD_TUNING_SHIFTS = ("gamma", "motion_blur", "speckle_noise")
"""Other shifts, only for choosing settings: no result is reported on them."""
_GEOMETRIC = ("rotation", "shear")  # they move the pixels, and the masks would stay
_PIXEL = 2.0  # of a tile, for one of a 28-pixel image: severity 3 blurs by 2.5 pixels
TURNS = 8  # orientations of a square: four rotations, each also mirrored
FILES_AT_ONCE = 4  # decoded and kept: four of 4096 x 4096 pixels are 268 MB


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


class TileOrder(Sampler[int]):
    """Goes through all tiles once: through the files in random order, a few of them at a time.

    The tiles of these few are mixed, so each file is read once in an epoch and no more of them are
    kept than that.
    """

    def __init__(
        self, files: Tensor, *, generator: Generator, at_once: int, turns: int = 1
    ) -> None:
        self._files = torch.unique(files, return_inverse=True)[1]
        self._generator = generator
        self._at_once = at_once
        self._turns = turns

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[int]:
        count = int(self._files.max()) + 1 if len(self) else 0
        place = torch.randperm(count, generator=self._generator)
        group = place[self._files] // self._at_once
        mixed = torch.randperm(len(self), generator=self._generator)
        order = mixed[group[mixed].argsort(stable=True)]
        turns = torch.randint(self._turns, order.shape, generator=self._generator)
        yield from (order * self._turns + turns).tolist()


class ShiftedMasks(ShiftedData):
    """Images with masks for training, and held-out ones clean and under shifts for testing.

    A subclass says in :meth:`load` where they come from. Each batch is ``(images, masks)``: float32
    ``(B, 3, T, T)`` in [0, 1] and float32 ``(B, 1, T, T)`` of 0 and 1. Shifts are those that move
    no pixels, ``ROAD_SHIFTS`` and ``ROAD_TUNING_SHIFTS`` among them; the lengths of their blurs are
    pixels, whatever ``T`` is. They change the images alone and are computed as images are asked
    for; the seed, the shift and the position of a sample fix them. There are no classes, so
    ``stream`` must be ``"equal"``.

    Args:
        batch_size: Samples in a training batch.
        eval_batch_size: Samples in a validation, test or prediction batch.
        severity: 1 (weak) to 5 (strong), or ``"all"``: each in turn, a loader for each, whose test
            names end in ``/1`` to ``/5``.
        augment: Whether training shows each image in one of its eight orientations, at random.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedData`.
    """

    SHIFTS = ROAD_SHIFTS
    TUNING_SHIFTS = ROAD_TUNING_SHIFTS

    def __init__(
        self,
        *,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        severity: Severity = 3,
        augment: bool = True,
        **kwargs: Any,
    ) -> None:
        self.severity = severity
        self.augment = augment
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)

    def load(self) -> dict[str, MaskedSet]:
        """Return all samples: ``"train"``, ``"validation"`` and ``"test"``."""
        raise undefined(
            self,
            "load(self) -> dict[str, MaskedSet]",
            'Return the samples by "train", "validation" and "test", e.g. as MaskedImages.',
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training images, in an order that is new in every epoch."""
        self.setup("fit")
        train = self._splits["train"]
        order = TileOrder(
            train.files,
            generator=seeded(self.seed, "order", self._epoch),
            at_once=FILES_AT_ONCE,
            turns=TURNS if self.augment else 1,
        )
        source = Turned(train) if self.augment else train
        return self._loader(source, self.batch_size, sampler=order)

    def check(self) -> None:
        """Refuse settings out of their range, before any data is read."""
        super().check()
        check_equal(self.stream, "masks have no classes that could be more frequent")

    def change(self, name: str, severity: int) -> Shift:
        """Return the shift of a name; refuse one that moves pixels."""
        if name in _GEOMETRIC:
            raise ValueError(
                f"Expected shifts that leave every pixel in its place, got {name}: the masks would "
                f"no longer fit. Leave {name} out."
            )
        return Shift(name, severity, _PIXEL)

    def split(self) -> dict[str, MaskedSet]:
        """Return as many samples of each part as the sizes say."""
        parts = self.load()
        sizes = {
            "train": ("train_size", self.train_size),
            "validation": ("val_size", self.val_size),
            "test": ("test_size", self.test_size),
        }
        return {
            part: chosen(parts[part], size, self.seed, purpose)
            for part, (purpose, size) in sizes.items()
        }

    def shifted(self, name: str) -> MaskedSet:
        """Return the held-out images under a shift, to be computed as they are asked for."""
        return Shifted(
            self._splits[self.evaluate_on], self.change(*self._wanted()[name]), self.seed
        )
