"""Random views of samples that depend on the seed alone, whatever worker makes them.

The sampler draws a number for each sample of each epoch, in the main process, and hands it to the
workers inside the sample's index; every choice in the sample's view is a function of that number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sized

import torch
from torch import Generator
from torch.utils.data import Dataset, Sampler

from it3_lightning.data.contract import Batch

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
    """Random views of samples, each as its draw says; a plain index stands for draw 0.

    Args:
        source: The samples.
    """

    def __init__(self, source: Sized) -> None:
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
