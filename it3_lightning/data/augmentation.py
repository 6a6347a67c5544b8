"""Random views of training images that depend on the seed alone, whatever worker makes them.

The sampler draws a number for each sample of each epoch, in the main process, and hands it to the
workers inside the sample's index; every choice in the sample's view is a function of that number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, Sampler

from it3_lightning.data.images import Batch, Images

_DRAWS = 2**31


class DrawSampler(Sampler[int]):
    """Shuffles the samples anew in each pass, each as ``index + count * draw``.

    Args:
        count: Number of samples.
        generator: Gives the order and a draw from 0 to ``2**31 - 1`` for each sample.
    """

    def __init__(self, count: int, generator: Generator) -> None:
        self.count = count
        self.generator = generator

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=self.generator)
        draws = torch.randint(_DRAWS, (self.count,), generator=self.generator)
        yield from (order + self.count * draws).tolist()


class Views(Dataset[Batch], ABC):
    """Random views of images, each as its draw says; a plain index stands for draw 0.

    Args:
        source: The images.
    """

    def __init__(self, source: Images) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, code: int) -> Batch:
        images, labels = self.__getitems__([code])
        return images[0], labels[0]

    def __getitems__(self, codes: list[int]) -> Batch:
        """Return a whole batch ``(B, C, H, W)`` and its labels."""
        pairs = [divmod(code, len(self)) for code in codes]
        return self.views([row for _, row in pairs], [draw for draw, _ in pairs])

    @abstractmethod
    def views(self, rows: list[int], draws: list[int]) -> Batch:
        """Return a view of each of these samples, and their labels."""


class Augmented(Views):
    """Images, each changed at random.

    Args:
        source: The images.
        augment: Changes images ``(B, C, H, W)`` according to draws ``(B,)``, int64.
    """

    def __init__(self, source: Images, augment: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(source)
        self.augment = augment

    def views(self, rows: list[int], draws: list[int]) -> Batch:
        """Return changed images of these samples, and their labels."""
        images, labels = self.source.__getitems__(rows)
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
