"""DataLoaders of image sets: whole batches, and no draw from the global random state."""

from typing import Any

from torch import Generator
from torch.utils.data import DataLoader, Dataset

from it3_lightning.data.augmentation import Augmented, DrawSampler
from it3_lightning.data.images import Batch


def whole_batch(batch: Any) -> Any:
    """Pass a batch on as it is: ``__getitems__`` of a set has collated it already."""
    return batch


def loader(
    source: Dataset[Batch],
    batch_size: int,
    *,
    generator: Generator,
    shuffle: bool = False,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """Return a DataLoader with the usual samplers, so that a Trainer can distribute it.

    Without a generator of its own, each pass over it would draw from the global random state.
    Augmented images come with draws, from a sampler that a Trainer wraps to distribute it.
    """
    draws = isinstance(source, Augmented)
    return DataLoader(
        source,
        batch_size=batch_size,
        shuffle=shuffle and not draws,
        sampler=DrawSampler(len(source), generator) if isinstance(source, Augmented) else None,
        num_workers=num_workers,
        collate_fn=whole_batch,
        generator=generator,
    )
