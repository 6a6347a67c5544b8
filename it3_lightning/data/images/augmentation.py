"""Training images cropped and mirrored at random, each view as its draw says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from it3_lightning.data.contract import Batch
from it3_lightning.data.images.base import Images
from it3_lightning.data.views import Views


class Augmented(Views):
    """Images, each changed at random.

    Args:
        source: The images.
        augment: Changes images ``(B, C, H, W)`` according to draws ``(B,)``, int64.
    """

    def __init__(self, source: Images, augment: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(source)
        self.images = source
        self.augment = augment

    def views(self, rows: list[int], draws: list[int]) -> Batch:
        """Return changed images of these samples, and their labels."""
        images, labels = self.images.__getitems__(rows)
        return self.augment(images, torch.tensor(draws)), labels


def crop_and_flip(images: Tensor, draws: Tensor, *, padding: int = 4) -> Tensor:
    """Surround images with zeros, cut their size out at a random place, mirror half of them.

    Args:
        images: ``(B, C, H, W)``.
        draws: ``(B,)``, int64: each chooses one of ``2 * (2 * padding + 1)**2`` views.
        padding: Width of the surrounding zeros, in pixels.

    Returns:
        ``(B, C, H, W)``.

    Source: the usual training on CIFAR, He et al., "Deep Residual Learning" (2016), section 4.2.

    Example:
        >>> row = torch.arange(1.0, 5.0).view(1, 1, 1, 4)
        >>> crop_and_flip(row, torch.tensor([1]), padding=0)  # an odd draw mirrors
        tensor([[[[4., 3., 2., 1.]]]])
    """
    height, width = images.shape[-2:]
    places = 2 * padding + 1
    mirrored, top, left = draws % 2 == 1, draws // 2 % places, draws // 2 // places % places
    across = torch.arange(width).expand(len(draws), width)
    across = torch.where(mirrored[:, None], across.flip(1), across) + left[:, None]
    down = torch.arange(height) + top[:, None]
    padded = pad(images, (padding, padding, padding, padding)).movedim(1, -1)
    samples = torch.arange(len(draws))[:, None, None]
    chosen = padded[samples, down[:, :, None], across[:, None, :]]  # (B, H, W, C)
    return chosen.movedim(-1, 1).contiguous()
