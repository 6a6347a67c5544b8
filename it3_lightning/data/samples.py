"""Samples with a value to predict: inside the range of training, and outside it by level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Samples:
    """Inputs ``(N, ...)`` and values to predict ``(N, 1)``.

    >>> samples = Samples(torch.zeros(3, 2), torch.arange(3.0)[:, None])
    >>> samples.select(torch.tensor([2])).targets
    tensor([[2.]])
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, indices: Tensor) -> Samples:
        """Return the samples at ``indices`` ``(M,)``, in their order."""
        return Samples(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True)
class Pool:
    """All samples.

    Args:
        inside: those inside the range of training.
        levels: those outside it, by the name of their level.
    """

    inside: Samples
    levels: Mapping[str, Samples]

    @classmethod
    def of(cls, samples: Samples, levels: Mapping[str, Tensor]) -> Pool:
        """Return samples by where they lie.

        Args:
            samples: all of them.
            levels: indices of those outside, by the name of their level.
        """
        inside = torch.ones(len(samples), dtype=torch.bool)
        inside[torch.cat(list(levels.values()))] = False
        outside = {name: samples.select(indices) for name, indices in levels.items()}
        return cls(samples.select(inside.nonzero()[:, 0]), outside)


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Samples as float32 rows, handed to a DataLoader a whole batch at a time.

    Args:
        samples: inputs of any shape ``(N, ...)``, flattened to ``(N, K)``.

    >>> Rows(Samples(torch.ones(3, 2, 2), torch.zeros(3, 1))).__getitems__([0, 2])[0].shape
    torch.Size([2, 4])
    """

    def __init__(self, samples: Samples) -> None:
        self.inputs = samples.inputs.flatten(1).float()
        self.targets = samples.targets.float()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index].clone(), self.targets[index].clone()

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch ``(B, K)``, ``(B, 1)``; DataLoader calls this if it is there."""
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.targets[chosen]


def deciles(values: Tensor) -> Tensor:
    """Return which tenth of the values each of them belongs to, ``(N,)``, 0 to 9.

    >>> deciles(torch.tensor([5.0, 1.0, 3.0, 4.0, 2.0]))
    tensor([8, 0, 4, 6, 2])
    """
    ranks = values.argsort(stable=True).argsort()
    return 10 * ranks // len(values)
