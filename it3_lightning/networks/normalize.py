"""Normalisation of images inside a network, which takes them in [0, 1] as the data gives them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Subtracts a mean and divides by a standard deviation, channel by channel.

    Both belong to the code, not to the weights: no checkpoint holds them.

    Args:
        mean: of each channel, in [0, 1].
        std: of each channel, positive.

    Shapes:
        ``(B, C, H, W) -> (B, C, H, W)``.

    Raises:
        ValueError: they have different lengths, or a deviation is not positive.

    >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
    2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                f"Expected a mean and a positive standard deviation for each channel, got {mean} "
                f"and {std}. Write e.g. mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]."
            )
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images."""
        return (images - self.mean) / self.std
