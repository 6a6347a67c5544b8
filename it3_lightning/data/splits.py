"""Training, validation and test images of a seed, and which test images were chosen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from it3_lightning.data.images import Images
from it3_lightning.data.sampling import subset
from it3_lightning.data.settings import Split


@dataclass(frozen=True)
class Splits:
    """Three sets of images.

    Args:
        train: To train on.
        validation: Taken from the training images.
        test: To test on.
        tested: Which of all test images these are, ``(M,)`` ascending; None for all.
    """

    train: Images
    validation: Images
    test: Images
    tested: Tensor | None = None

    @classmethod
    def of(
        cls,
        train: Images,
        test: Images,
        *,
        val_size: int,
        train_size: int | None,
        test_size: int | None,
        seed: int,
    ) -> Splits:
        """Split the training images in two, and keep seeded subsets where sizes are given.

        Raises:
            ValueError: There are too few images.

        >>> import torch
        >>> from it3_lightning.data.image_set import ImageSet
        >>> images = ImageSet(torch.zeros(8, 1, 2, 2), torch.arange(8))
        >>> splits = Splits.of(images, images, val_size=3, train_size=4, test_size=2, seed=0)
        >>> len(splits.train), len(splits.validation), len(splits.test)
        (4, 3, 2)
        """
        validation, others = subset(len(train), val_size, seed, "val_size")
        size = len(others) if train_size is None else train_size
        kept, _ = subset(len(others), size, seed, "train_size")
        tested = None if test_size is None else subset(len(test), test_size, seed, "test_size")[0]
        return cls(
            train=train.select(others[kept]),
            validation=train.select(validation),
            test=test if tested is None else test.select(tested),
            tested=tested,
        )

    def held_out(self, split: Split) -> Images:
        """Return the images that a data module evaluates on."""
        return self.test if split == "test" else self.validation

    def chosen(self, tested: Images) -> Images:
        """Return those of all test images, under whatever shift, that are tested on."""
        return tested if self.tested is None else tested.select(self.tested)
