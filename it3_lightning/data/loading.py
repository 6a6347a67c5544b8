"""DataLoaders that take whole batches and draw nothing from the global random state."""

from typing import Any, TypeVar

from torch import Generator
from torch.utils.data import DataLoader, Dataset

from it3_lightning.data.augmentation import DrawSampler, Views

T = TypeVar("T")


def whole_batch(batch: Any) -> Any:
    """Pass a batch on as it is: ``__getitems__`` of a set has collated it already."""
    return batch


def loader(
    source: Dataset[T],
    batch_size: int,
    *,
    generator: Generator,
    shuffle: bool = False,
    num_workers: int = 0,
) -> DataLoader[T]:
    """Return a DataLoader of a set that hands over whole batches (``__getitems__``).

    Its samplers are the usual ones, so that a Trainer can distribute it; random views come with
    draws, from a sampler that a Trainer wraps. Without a generator of its own, each pass over it
    would draw from the global random state.
    """
    sampler = DrawSampler(len(source), generator) if isinstance(source, Views) else None
    return DataLoader(
        source,
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=whole_batch,
        generator=generator,
    )
