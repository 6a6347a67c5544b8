"""Seeded parts of a set of samples: to train on, to validate on, to test on."""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

from torch import Tensor

from it3_lightning.data.sampling import subset


class Selectable(Protocol):
    """Samples of which some can be taken."""

    def __len__(self) -> int: ...

    def select(self, indices: Tensor, /) -> Self:
        """Return the samples at ``indices`` ``(M,)``, in their order."""


S = TypeVar("S", bound=Selectable)


def chosen(samples: S, size: int | None, seed: int, purpose: str) -> S:
    """Return ``size`` of the samples, chosen by seed and purpose; None for all.

    Raises:
        ValueError: There are fewer.
    """
    if size is None:
        return samples
    return samples.select(subset(len(samples), size, seed, purpose)[0])


def held_out(samples: S, size: int, seed: int, purpose: str) -> tuple[S, S]:
    """Return ``size`` of the samples, chosen by seed and purpose, and the others.

    Raises:
        ValueError: There are fewer.
    """
    indices, others = subset(len(samples), size, seed, purpose)
    return samples.select(indices), samples.select(others)


def split(
    train: S,
    test: S,
    *,
    val_size: int | None,
    train_size: int | None,
    test_size: int | None,
    seed: int,
) -> dict[str, S]:
    """Part validation samples from those to train on, and choose as many as the sizes say.

    Args:
        train: Samples to train and validate on.
        test: Samples to test on.
        val_size: Samples to validate on; None for a tenth.
        train_size: Samples to train on; None for all that are left.
        test_size: Samples to test on; None for all.
        seed: Of every choice.

    Returns:
        ``"train"``, ``"validation"`` and ``"test"``.

    Raises:
        ValueError: There are too few samples.

    Example:
        >>> import torch
        >>> from it3_lightning.data import ImageSet
        >>> images = ImageSet(torch.zeros(8, 1, 2, 2), torch.arange(8))
        >>> parts = split(images, images, val_size=3, train_size=4, test_size=None, seed=0)
        >>> {name: part.labels.tolist() for name, part in parts.items()}
        {'train': [0, 3, 5, 6], 'validation': [2, 4, 7], 'test': [0, 1, 2, 3, 4, 5, 6, 7]}
    """
    size = max(1, len(train) // 10) if val_size is None else val_size
    validation, kept = subset(len(train), size, seed, "val_size")
    if not len(kept):
        raise ValueError(
            f"Expected val_size to leave samples to train on, got {size} of {len(train)}. Lower "
            "val_size, or give more data."
        )
    if train_size is not None:
        kept = kept[subset(len(kept), train_size, seed, "train_size")[0]]
    return {
        "train": train.select(kept),
        "validation": train.select(validation),
        "test": chosen(test, test_size, seed, "test_size"),
    }
