"""A LightningDataModule for segmentation that tests on clean images and on every shift of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from it3_lightning.data.checks import check_equal
from it3_lightning.data.graded import GradedData
from it3_lightning.data.images.shifts import Shift
from it3_lightning.data.roads.masked_set import TURNS, MaskedSet, Shifted, Turned
from it3_lightning.data.roads.tile_order import TileOrder
from it3_lightning.data.roads.tiles import FILES_AT_ONCE
from it3_lightning.data.sampling import seeded
from it3_lightning.data.splits import chosen
from it3_lightning.utils.messages import undefined

ROAD_SHIFTS = ("contrast", "blur", "gaussian_noise")
"""The shifts that results on roads are reported on."""

ROAD_TUNING_SHIFTS = ("gamma", "motion_blur", "speckle_noise")
"""Other shifts, only for choosing settings: no result is reported on them."""

_GEOMETRIC = ("rotation", "shear")  # they move the pixels, and the masks would stay
_PIXEL = 2.0  # of a tile, for one of a 28-pixel image: severity 3 blurs by 2.5 pixels


class ShiftedMasks(GradedData[MaskedSet]):
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
        augment: Whether training shows each image in one of its eight orientations, at random.
        kwargs: Settings of :class:`~it3_lightning.data.graded.GradedData`.

    Raises:
        ValueError: A setting is out of its range, or the data has too few samples for it.
    """

    SHIFTS = ROAD_SHIFTS
    TUNING_SHIFTS = ROAD_TUNING_SHIFTS

    def __init__(
        self,
        *,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        augment: bool = True,
        **kwargs: Any,
    ) -> None:
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

    def frequent(self, samples: MaskedSet) -> Tensor:
        """Refuse: there are no classes."""
        raise NotImplementedError("Masks have no classes that could be more frequent.")
