"""A LightningDataModule that tests on clean images and on every shift of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from it3_lightning.data.graded import GradedData
from it3_lightning.data.images import shifts
from it3_lightning.data.images.base import Change, Images
from it3_lightning.data.sampling import unequal_stream
from it3_lightning.data.splits import chosen
from it3_lightning.utils.messages import undefined


class ShiftedImages(GradedData[Images]):
    """Images for training, and the same held-out images clean and under shifts for testing.

    A subclass says in :meth:`load` where its images come from; what else it may say are the other
    hooks: ``source``, ``training``, ``change`` and ``published``. Each batch is ``(images,
    labels)``: float32 ``(B, C, H, W)`` in [0, 1] and int64 ``(B,)``.

    Shifted images in memory are computed once and kept as the source's own dtype: 8-bit images
    stay 8-bit, which rounds a shifted value by at most 1/510. Images on disk are shifted as they
    are read. The shifts are ``SHIFTS``, and ``TUNING_SHIFTS`` for choosing settings;
    ``stream="unequal"`` makes three classes ten times as frequent.

    Args:
        val_size: Samples taken from the training images for validation.
        kwargs: Settings of :class:`~it3_lightning.data.graded.GradedData`.

    Raises:
        ValueError: A setting is out of its range, or the data has too few samples for it.
    """

    SHIFTS = shifts.SHIFTS
    TUNING_SHIFTS = shifts.TUNING_SHIFTS
    needed_sizes = ("val_size",)

    def __init__(self, *, val_size: int = 5000, **kwargs: Any) -> None:
        super().__init__(val_size=val_size, **kwargs)

    # Hooks of a subclass

    def load(self) -> tuple[Images, Images]:
        """Return all training images and all test images; a subclass implements this."""
        raise undefined(
            self,
            "load(self) -> tuple[Images, Images]",
            "Return the training images and the test images, e.g. as ImageSet.",
        )

    def change(self, name: str, severity: int) -> Change:
        """Return the function behind a shift's name.

        Raises:
            ValueError: The name or the severity is unknown.
        """
        return shifts.Shift(name, severity)

    def published(self, name: str, severity: int) -> Images | None:
        """Return all test images under a shift where they are not made but lie in files."""
        return None

    # What the base asks for

    @property
    def num_classes(self) -> int:
        """Number of classes: one more than the largest label to train on.

        Raises:
            ValueError: The labels are values, not classes.
        """
        self.setup("fit")
        labels = self._splits["train"].labels
        if labels.is_floating_point():
            raise ValueError(
                f"Expected classes, got values {tuple(labels.shape)}: {type(self).__name__} is "
                "for regression. Give the network one output for each value."
            )
        return 1 + int(labels.max())

    def split(self) -> dict[str, Images]:
        """Return the images to train, validate and test on."""
        return self.parted(*self.load())

    def shifted(self, name: str) -> Images:
        """Return the held-out images under a shift, from files where they lie in some."""
        kind, severity = self._wanted()[name]
        there = self.published(kind, severity)
        if there is not None:
            return chosen(there, self.test_size, self.seed, "test_size")
        return self._splits[self.evaluate_on].shifted(self.change(kind, severity), self.seed)

    def frequent(self, samples: Images) -> Tensor:
        """Return an order of images in which three classes are ten times as frequent."""
        return unequal_stream(samples.labels, self.seed)
