"""The order of training on tiles of files: random, yet with few files in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor
from torch.utils.data import Sampler


class TileOrder(Sampler[int]):
    """Goes through all tiles once: through the files in random order, a few of them at a time.

    The tiles of these few are mixed, so each file is read once in an epoch and no more of them are
    kept than that.

    Args:
        files: number of the file each tile lies in, int64 ``(N,)``.
        generator: of all draws; each epoch goes on drawing from it.
        at_once: files whose tiles are mixed.
        turns: orientations of each tile; one of them is chosen at random.

    Example:
        >>> order = TileOrder(torch.tensor([0, 0, 1, 1]), generator=torch.Generator(), at_once=1)
        >>> list(order), list(order)
        ([0, 1, 3, 2], [3, 2, 1, 0])
    """

    def __init__(
        self, files: Tensor, *, generator: Generator, at_once: int, turns: int = 1
    ) -> None:
        self._files = torch.unique(files, return_inverse=True)[1]
        self._generator = generator
        self._at_once = at_once
        self._turns = turns

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[int]:
        count = int(self._files.max()) + 1 if len(self) else 0
        place = torch.randperm(count, generator=self._generator)
        group = place[self._files] // self._at_once
        mixed = torch.randperm(len(self), generator=self._generator)
        order = mixed[group[mixed].argsort(stable=True)]
        turns = torch.randint(self._turns, order.shape, generator=self._generator)
        yield from (order * self._turns + turns).tolist()
