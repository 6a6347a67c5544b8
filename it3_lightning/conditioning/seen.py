"""The prior as a network sees it: with its presence flag, and neutral where there is none."""

from __future__ import annotations

import torch
from torch import Tensor

from it3_lightning.priors import Prior


def seen(
    source: Prior, prior: Tensor | None, present: Tensor | None, batch_size: int, like: Tensor
) -> Tensor:
    """Return the given prior where it is present, the neutral one elsewhere.

    Args:
        source: knows the presence flag and the neutral prior.
        prior: ``(B, C, ...)`` in label space, or ``None``.
        present: ``(B,)`` booleans, or ``None`` for all.
        batch_size: of the neutral prior, where none is given.
        like: device and, where it is floating, data type of the result.

    >>> from it3_lightning.priors import ValuePrior
    >>> seen(ValuePrior(), torch.ones(2, 1), torch.tensor([True, False]), 2, torch.zeros(1))
    tensor([[1., 1.],
            [0., 0.]])
    """
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    if prior is None:
        return source.neutral_input(batch_size, like.new_empty(0, dtype=dtype))
    given = source.as_input(prior.to(like.device, dtype))
    if present is None:
        return given
    neutral = source.neutral_input(given.shape[0], given)
    neutral = neutral.reshape(*neutral.shape[:2], *[1] * (given.ndim - 2))
    return torch.where(present.reshape(-1, *[1] * (given.ndim - 1)), given, neutral)
