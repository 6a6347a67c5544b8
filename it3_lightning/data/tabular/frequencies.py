"""Which rows of a table make a stream of unequal frequencies."""

from __future__ import annotations

import torch
from torch import Tensor

from it3_lightning.data.sampling import unequal_stream

_TENTHS = torch.arange(1, 10, dtype=torch.float64) / 10


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
