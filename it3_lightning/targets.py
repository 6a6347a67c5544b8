"""The training targets, read once before training without a trace in the training data's order."""

from __future__ import annotations

from collections.abc import Callable, Sized
from itertools import islice
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

_BATCHES = 200  # at most, spread evenly over the data


def training_targets(trainer: Trainer, target: Callable[[Any], Tensor]) -> list[Tensor]:
    """Return the targets of up to 200 training batches, spread evenly over the data.

    The batches are read anew, in order: no random state, sampler or worker of the training loaders
    is touched, and every process sees the same. An iterable of one's own is iterated as it is.

    Args:
        trainer: about to train.
        target: returns the target of a batch.
    """
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")  # as a Trainer does
    loaders.flattened = [_reader(loader) for loader in loaders.flattened]
    with isolate_rng():
        return [target(batch) for batch, _, _ in islice(iter(loaders), _BATCHES)]


def _reader(loader: Any) -> Any:
    """Return a loader of the same batches, in order, that shares no state with the given one."""
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        return loader
    dataset, size = loader.dataset, None
    if loader.batch_sampler is not None:
        size = getattr(loader.batch_sampler, "batch_size", 64)
        if not isinstance(dataset, IterableDataset):
            count = len(cast(Sized, dataset))
            dataset = Subset(dataset, range(0, count, -(-count // (_BATCHES * size)) or 1))
    return DataLoader(dataset, batch_size=size, collate_fn=loader.collate_fn)
