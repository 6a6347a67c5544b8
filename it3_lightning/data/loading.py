"""DataLoaders that take whole batches and draw nothing from the global random state."""

from typing import Any, TypeVar

from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from it3_lightning.data.sampling import seeded, subset
from it3_lightning.data.views import DrawSampler, Views

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
    sampler: Sampler[int] | None = None,
    num_workers: int = 0,
) -> DataLoader[T]:
    """Return a DataLoader of a set that hands over whole batches (``__getitems__``).

    Its samplers are the usual ones, so that a Trainer can distribute it; random views come with
    draws, from a sampler that a Trainer wraps, as it does one that is given. Without a generator
    of its own, each pass over it would draw from the global random state.
    """
    if isinstance(source, Views):
        sampler = DrawSampler(len(source), generator)
    return DataLoader(
        source,
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=whole_batch,
        generator=generator,
    )


def sampled(source: DataLoader[T], size: int, *, batch_size: int, seed: int) -> DataLoader[T]:
    """Return a loader of some samples of another, in the order of its dataset.

    Args:
        source: a loader whose dataset has a length.
        size: how many samples at most; of datasets of equal lengths the same ones.
        batch_size: of the new loader.
        seed: chooses them.

    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> source = DataLoader(TensorDataset(torch.arange(6)), batch_size=6)
    >>> [batch[0].tolist() for batch in sampled(source, 3, batch_size=2, seed=0)]
    [[1, 2], [5]]
    """
    count = len(source.dataset)  # type: ignore[arg-type]
    chosen, _ = subset(count, min(size, count), seed, "sampled")
    return DataLoader(
        Subset(source.dataset, chosen.tolist()),
        batch_size=batch_size,
        num_workers=source.num_workers,
        collate_fn=source.collate_fn,
        generator=seeded(seed, "loader"),
    )
