"""The samples whose distances are compared: training, validation, clean, and every severity."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from torch.utils.data import DataLoader

from it3_lightning.data import ShiftedData
from it3_lightning.data.sampling import sampled
from it3_lightning.data.shifts import SEVERITIES

Loader = DataLoader[Any]


def splits(data: ShiftedData, size: int) -> Generator[tuple[str, Loader]]:
    """Yield name and loader of some samples of every split; one severity at a time is in memory.

    The names are ``"train"``, ``"validation"``, ``"clean"``, then those of the shifts, with their
    severity where they have one: ``"fog/1"`` to ``"fog/5"``. Classes are as frequent as they are,
    batches those of tests. All shifts of a severity share its samples in equal parts, whole
    batches at that, and at least one of each.

    Args:
        data: as it is to be left; close the iterator if it is not used up.
        size: samples of a split, of a severity, and of any other shift: at most this many, but for
            the last sentence above.
    """
    before = data.severity, data.stream
    data.stream = "equal"
    try:
        clean = data.test_dataloader()[0]
        batch_size = clean.batch_size or 1

        def some(loader: Loader, most: int = size) -> Loader:
            return sampled(loader, most, batch_size=batch_size, seed=data.seed)

        yield "train", some(data.plain_train_dataloader())
        yield "validation", some(data.val_dataloader())
        yield "clean", some(clean)
        batches = size // batch_size // max(len(data.shifts), 1)
        for name, loader in _shifted(data):
            graded = "/" in name
            yield name, some(loader, max(batches, 1) * batch_size if graded else size)
    finally:
        data.severity, data.stream = before


def _shifted(data: ShiftedData) -> Iterator[tuple[str, Loader]]:
    """Yield the loaders of every shift at every severity, and once those that have none."""
    if data.severity is None:
        yield from list(zip(data.test_names, data.test_dataloader(), strict=True))[1:]
        return
    for severity in SEVERITIES:
        data.severity = severity
        loaders = dict(zip(data.test_names, data.test_dataloader(), strict=True))
        yield from ((f"{name}/{severity}", loaders[name]) for name in data.shifts)
    yield from ((name, loaders[name]) for name in data.test_names[1:] if name not in data.shifts)
