"""Priors laid over features: vectors are repeated at every position, maps are resized."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def placed(embedding: Tensor, features: Tensor, axes: tuple[int, int]) -> Tensor:
    """Shape an embedding so that it broadcasts over features.

    Args:
        embedding: ``(B, C)``, or a map ``(B, C, ...)``: resized where the features have as many
            positions' dimensions, averaged over its positions otherwise.
        features: of any shape.
        axes: the features' dimensions of the batch and of the channels.

    >>> import torch
    >>> placed(torch.zeros(2, 8), torch.zeros(2, 5, 8), (0, 2)).shape
    torch.Size([2, 1, 8])
    """
    others = [axis for axis in range(features.ndim) if axis not in axes]
    if embedding.ndim > 2 and embedding.ndim == features.ndim:
        full = resized(embedding, [features.shape[axis] for axis in others])
    else:
        pooled = embedding.flatten(2).mean(2) if embedding.ndim > 2 else embedding
        full = pooled.reshape(*pooled.shape, *[1] * len(others))
    return full.movedim(tuple(range(features.ndim)), (*axes, *others))


def resized(maps: Tensor, size: list[int]) -> Tensor:
    """Bring maps ``(B, C, ...)`` to other positions: averaged to fewer, interpolated to more.

    Interpolation alone would skip most positions of a much larger map, and thin lines with them.

    >>> import torch
    >>> resized(torch.tensor([[[0.0, 1.0]]]), [4])
    tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    >>> resized(torch.tensor([[[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]]), [2])
    tensor([[[0.3333, 0.0000]]])
    """
    fewer = [min(pair) for pair in zip(maps.shape[2:], size, strict=True)]
    if list(maps.shape[2:]) != fewer:
        maps = F.interpolate(maps, size=fewer, mode="area")
    if fewer == size:
        return maps
    return F.interpolate(maps, size=size, mode=_INTERPOLATION[len(size)])
