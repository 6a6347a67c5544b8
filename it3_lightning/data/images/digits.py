"""Scikit-learn's 1,797 handwritten digits of 8 by 8 pixels: data that needs no download."""

from typing import Any

import torch

from it3_lightning.data.images.image_set import ImageSet
from it3_lightning.data.images.shifted import ShiftedImages
from it3_lightning.data.splits import held_out
from it3_lightning.utils.messages import not_installed

_TEST = 597


class DigitsDataModule(ShiftedImages):
    """Scikit-learn's digits, clean and shifted: 1,000 to train on, 200 to validate, 597 to test.

    The images are ``(B, 1, 8, 8)``, their 17 grey levels divided by 16. The seed splits them.

    Args:
        val_size: Samples taken from the 1,200 that are not for testing.
        kwargs: Settings of :class:`~it3_lightning.data.ShiftedImages`.

    Raises:
        ImportError: Scikit-learn is not installed (when the data is loaded).
        ValueError: A setting is out of its range.

    Example:
        >>> data = DigitsDataModule(shifts=["fog"], severity=5)
        >>> clean, fog = data.test_dataloader()
        >>> [round(next(iter(batches))[0].mean().item(), 3) for batches in (clean, fog)]
        [0.308, 0.517]
    """

    def __init__(self, *, val_size: int = 200, **kwargs: Any) -> None:
        super().__init__(val_size=val_size, **kwargs)

    @property
    def num_classes(self) -> int:
        """Ten digits."""
        return 10

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return 1,200 training images and 597 test images, chosen by the seed."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            message = not_installed("scikit-learn", "which holds the digits", "data", error)
            raise ImportError(message) from error
        bunch = load_digits()
        images = torch.from_numpy(bunch.images).float()[:, None] / 16
        digits = ImageSet(images, torch.from_numpy(bunch.target).long())
        test, train = held_out(digits, _TEST, self.seed, "test digits")
        return train, test
