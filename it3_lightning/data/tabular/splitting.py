"""Which rows train, validate and test, and which of them make a stream of unequal frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from it3_lightning.data.sampling import subset, unequal_stream
from it3_lightning.data.tabular.table import Table

_TENTHS = torch.arange(1, 10, dtype=torch.float64) / 10


def split(
    train: Table,
    test: Table | None,
    *,
    seed: int,
    test_share: float,
    val_size: int | None,
    train_size: int | None,
    test_size: int | None,
) -> dict[str, Table]:
    """Return the tables ``"train"``, ``"validation"`` and ``"test"``, which share no row.

    Args:
        train: rows to train and validate on.
        test: rows to test on; ``None``: a share of ``train``.
        seed: the same chooses the same.
        test_share: that share.
        val_size: rows to validate on; ``None`` for a tenth of those that are not for testing.
        train_size: rows to train on; ``None`` for all that are left.
        test_size: rows to test on; ``None`` for all.

    Raises:
        ValueError: there are fewer rows than a size asks for.
    """
    if test is None:
        held_out, train = _part(train, max(1, round(test_share * len(train))), seed, "test rows")
        test = held_out
    size = max(1, len(train) // 10) if val_size is None else val_size
    validation, rest = _part(train, size, seed, "val_size")
    if train_size is not None:
        rest, _ = _part(rest, train_size, seed, "train_size")
    if test_size is not None:
        test, _ = _part(test, test_size, seed, "test_size")
    return {"train": rest, "validation": validation, "test": test}


def unequal_rows(target: Tensor, seed: int) -> Tensor:
    """Choose rows so that a few classes, or a few ranges of values, are ten times as frequent.

    These are three of six or more classes, else half of them, chosen and shuffled as by
    :func:`~it3_lightning.data.unequal_stream`. Of values, the tenths between their deciles count as
    classes: the targets shift, as they do where houses of some price are sold more often.

    Args:
        target: ``(N,)`` classes or ``(N, 1)`` floating values.
        seed: picks the frequent ones and the order.

    Returns:
        Indices ``(M,)`` into ``target``, without repetition.

    Raises:
        ValueError: there are fewer than two classes or different tenths.

    Example:
        >>> values = torch.arange(200.0)[:, None]
        >>> tenths = values[unequal_rows(values, seed=0), 0].long() // 20
        >>> tenths.bincount().sort(descending=True).values
        tensor([20, 20, 20,  2,  2,  2,  2,  2,  2,  2])
    """
    labels = target
    if target.is_floating_point():
        values = target.flatten().double()
        labels = torch.bucketize(values, values.quantile(_TENTHS), right=True)
    frequent = min(3, len(set(labels.tolist())) // 2)
    return unequal_stream(labels, seed, frequent=max(1, frequent))


def _part(table: Table, size: int, seed: int, purpose: str) -> tuple[Table, Table]:
    """Return ``size`` seeded rows of a table, and the others."""
    chosen, others = subset(len(table), size, seed, purpose)
    return table.select(chosen), table.select(others)
